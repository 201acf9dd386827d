import io

import jax
import numpy as np
import pytest
from flax import nnx
from rich.console import Console

import spec_jax
from experiments.samples import (
    DRAFTED_STYLE,
    TARGET_STYLE,
    ByteText,
    decoded_text,
    print_samples,
    print_stream,
    printable,
)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("def f():\n", "def f():\n"),
        ("a\tb", "a    b"),
        ("\x1b[31m", "␛[31m"),
        ("\r\x00\x7f", "␍␀␡"),
        ("\x9b2J\u202e\u2028\u200b", "�2J���"),
        ("naïve 日本 🎉", "naïve 日本 🎉"),
    ],
)
def test_nothing_steers_the_terminal(text, shown):
    assert printable(text) == shown


def test_a_character_has_the_style_of_its_last_byte():
    characters = ByteText()
    bytes_ = [*"aé".encode(), 0xFF]
    first = characters.feed(bytes_[:2], ["green", "green"])
    second = characters.feed(bytes_[2:], ["yellow", "green"])
    assert (first.plain, second.plain) == ("a", "é�")
    assert [(second.plain[span.start : span.end], span.style) for span in second.spans] == [
        ("é", "yellow"),
        ("�", "green"),
    ]
    characters.feed([0xE2], ["green"])
    assert characters.end().plain == "�"


def test_a_prompt_may_end_within_a_character():
    config = spec_jax.DecoderConfig(dim=16, depth=1, heads=1, dim_head=16)
    target = spec_jax.Decoder(config, rngs=nnx.Rngs(0))
    console, key, prompt = Console(file=io.StringIO(), width=200), jax.random.key(0), "aé".encode()[:2]
    print_stream(console, target, None, prompt, max_new_tokens=5, key=key)
    tokens = spec_jax.base_decoding(target, [list(prompt)], max_new_tokens=5, key=key).tokens[0, :5]
    text = (prompt + bytes(tokens.tolist())).decode(errors="replace")
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue() == printable(text) + "\n"


def test_tokens_that_are_no_bytes_are_shown_as_such():
    characters = ByteText()
    assert characters.feed([65, 300, 0xC3, 256, 66], ["green"] * 5).plain == "A���B"


def test_samples_are_what_decoding_gives():
    config = spec_jax.DecoderConfig(dim=16, depth=1, heads=1, dim_head=16)
    target, draft = (spec_jax.Decoder(config, rngs=nnx.Rngs(seed)) for seed in (0, 1))
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system="standard")
    key, prompt = jax.random.key(3), list(b"abc")
    options = {"max_new_tokens": 24, "sampling": spec_jax.Sampling(temperature=0.0)}
    print_samples(
        console,
        target,
        spec_jax.SmallModel(draft, gamma=3),
        prompt,
        title="step 1",
        key=key,
        verification="coupled",
        **options,
    )
    assert isinstance(console.file, io.StringIO)
    printed = console.file.getvalue()
    assert "\x1b[32m" in printed or "\x1b[1;33m" in printed
    assert (DRAFTED_STYLE, TARGET_STYLE) == ("green", "bold yellow")
    result = spec_jax.base_decoding(target, jax.numpy.array([prompt]), key=key, **options)
    expected = ByteText()
    text = expected.feed(result.tokens[0].tolist(), [""] * 24).plain + expected.end().plain
    plain = Console(file=io.StringIO(), width=80)
    print_samples(
        plain, target, spec_jax.SmallModel(draft, gamma=3), prompt, title="step 1", key=key, verification="coupled",
        **options,
    )  # fmt: skip
    assert isinstance(plain.file, io.StringIO)
    # Greedy decoding is the same with and without a draft.
    assert plain.file.getvalue().count("abc" + text) == 2


def test_drafted_and_own_tokens_have_their_colours():
    tokens = np.array([[*b"abcd"], [*b"e\0\0\0"]])
    rounds = [
        spec_jax.StreamedRound(tokens[:1], count_b=np.array([4]), accepted_b=np.array([3])),
        spec_jax.StreamedRound(tokens[1:], count_b=np.array([1]), accepted_b=np.array([0])),
    ]
    for drafting, drafted, own in ((True, DRAFTED_STYLE, TARGET_STYLE), (False, "", "")):
        texts = list(decoded_text(rounds, ByteText(), drafting=drafting))
        found = [(text.plain[span.start : span.end], span.style) for text in texts for span in text.spans]
        assert found == [part for part in (("abc", drafted), ("d", own), ("e", own)) if part[1]]
        assert "".join(text.plain for text in texts) == "abcde"


def test_samples_are_drawn_by_the_rule_asked_for():
    """The coupled rule gives the plain sample, whatever drafts; the others do not."""
    config = spec_jax.DecoderConfig(dim=16, depth=1, heads=1, dim_head=16)
    target, draft = (spec_jax.Decoder(config, rngs=nnx.Rngs(seed)) for seed in (0, 1))
    prompt, key, options = list(b"abc"), jax.random.key(3), {"max_new_tokens": 24, "sampling": spec_jax.Sampling()}
    plain = spec_jax.base_decoding(target, np.array([prompt]), key=key, **options)
    characters = ByteText()
    text = "abc" + characters.feed(plain.tokens[0].tolist(), [""] * 24).plain + characters.end().plain
    for rule in ("coupled", "rejection"):
        console = Console(file=io.StringIO(), width=80)
        drafter = spec_jax.SmallModel(draft, gamma=3)
        print_samples(console, target, drafter, prompt, title="step 1", key=key, verification=rule, **options)
        assert isinstance(console.file, io.StringIO)
        assert console.file.getvalue().count(text) == (2 if rule == "coupled" else 1)


def test_tokens_a_round_are_those_of_the_speculative_sample():
    """A draft that is the target keeps all: 24 tokens come in 6 rounds of 3 drafted ones and a bonus."""
    config = spec_jax.DecoderConfig(dim=16, depth=1, heads=1, dim_head=16)
    target = spec_jax.Decoder(config, rngs=nnx.Rngs(0))
    console, drafter = Console(file=io.StringIO(), width=80), spec_jax.SmallModel(target, gamma=3)
    options = {"max_new_tokens": 24, "key": jax.random.key(0), "sampling": spec_jax.Sampling(temperature=0.0)}
    assert print_stream(console, target, drafter, list(b"abc"), **options) == (24, 6)
    print_samples(console, target, drafter, list(b"abc"), title="step 1", verification="rejection", **options)
    assert isinstance(console.file, io.StringIO)
    assert "4.00 tokens a round" in console.file.getvalue()
