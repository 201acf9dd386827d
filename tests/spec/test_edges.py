"""Edge cases that must simply work, on toys whose output is known beforehand."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from spec_jax import (
    DecoderConfig,
    DecodeResult,
    NGram,
    Sampling,
    SmallModel,
    base_decoding,
    decoding,
    loop,
    speculative_decoding,
)
from spec_jax.checks import checked_size
from spec_jax.drafters.base import Drafter, Proposal, token_by_token
from tests.spec.toys import Toy, avoiding_toy, deterministic_toy, random_toy
from tests.spec.transformers import ragged_prompts

CYCLE = deterministic_toy([1, 2, 3, 0])
TARGET, DRAFT = random_toy(4, 4, zeros=0.1), random_toy(5, 4, zeros=0.1)
RULES = ["rejection", "block", "coupled"]
KEY = jax.random.key(1)


def decode(rule: str, target: Toy, draft: Toy, prompt, *, gamma: int = 3, new: int = 10, **others) -> DecodeResult:
    return speculative_decoding(
        target,
        SmallModel(draft, gamma=gamma),
        prompt,
        max_new_tokens=new,
        key=KEY,
        pad_id=-1,
        verification=rule,
        **others,
    )


def tokens_of_many(rule: str, target: Toy, draft: Toy) -> np.ndarray:
    """(24,000,) tokens, drawn with 4,000 keys."""
    drawn = jax.vmap(
        lambda key: speculative_decoding(
            target, SmallModel(draft, gamma=3), [[1]], max_new_tokens=6, key=key, verification=rule
        ).tokens[:, :6]
    )(jax.random.split(KEY, 4000))
    return np.asarray(drawn).ravel()


@pytest.mark.parametrize("rule", RULES)
def test_a_draft_that_knows_nothing_of_a_token(rule: str, monkeypatch: pytest.MonkeyPatch):
    """All its logits after token 2 are −inf, as a table of counts has them: the target's law stays what it is."""
    law = np.array([0.0, 0.2, 0.3, 0.5])
    target = Toy(jnp.broadcast_to(jnp.log(law), (2, 5, 4, 4)))
    draft = Toy(jnp.zeros((2, 5, 4, 4)).at[:, :, 2].set(-jnp.inf))

    def deviation() -> float:
        counts = np.bincount(tokens_of_many(rule, target, draft), minlength=4)
        assert counts.sum() == 24_000
        if counts[0]:
            return np.inf
        expected = 24_000 * law[1:]
        return float(((counts[1:] - expected) ** 2 / expected).sum())

    # χ² of two degrees of freedom is above 18.4 once in 10,000.
    assert deviation() < 18.4
    if rule != "coupled":
        with monkeypatch.context() as without:
            without.setattr(loop, "_usable", lambda draft, done_b: draft)
            jax.clear_caches()
            assert deviation() > 18.4
        jax.clear_caches()


def no_distribution(logit: float) -> Toy:
    """One token of its vocabulary has such a logit; of −inf, all."""
    logits_v = np.full(4, logit) if logit == -np.inf else np.array([0.0, 0.0, logit, 0.0])
    return Toy(jnp.broadcast_to(jnp.asarray(logits_v, jnp.float32), (2, 5, 4, 4)))


@pytest.mark.parametrize("sampling", [Sampling(temperature=0.0), Sampling()], ids=["greedy", "temperature 1"])
@pytest.mark.parametrize("logit", [-np.inf, np.inf, np.nan])
def test_models_that_are_no_distribution(logit: float, sampling: Sampling):
    """As a draft it drafts nothing; as a target it is decoded as without a draft."""
    broken = no_distribution(logit)
    plain = base_decoding(broken, [[1], [2]], max_new_tokens=10, key=KEY, pad_id=-1, sampling=sampling)
    for rule in RULES:
        result = decode(rule, TARGET, broken, [[1], [2]], sampling=sampling)
        assert result.drafted.tolist() == result.accepted.tolist() == [0, 0]
        assert result.lengths.tolist() == result.rounds.tolist() == [10, 10]
        result = decode(rule, broken, TARGET, [[1], [2]], sampling=sampling)
        assert result.tokens.tolist() == plain.tokens.tolist()


@pytest.mark.parametrize("rule", RULES)
def test_gamma_zero_drafts_nothing(rule: str):
    """One token a round, whatever the rule; coupled is then plain decoding."""
    prompts, lengths = ragged_prompts(3, 8, 6, 4)
    result = decode(rule, TARGET, DRAFT, prompts, gamma=0, prompt_length=lengths)
    assert result.rounds.tolist() == result.lengths.tolist() == [10] * 8
    assert result.drafted.tolist() == result.accepted.tolist() == [0] * 8
    assert result.stats.drafted_bj.shape == (8, 0)
    assert float(result.block_efficiency) == 1
    if rule == "coupled":
        plain = base_decoding(TARGET, prompts, max_new_tokens=10, key=KEY, pad_id=-1, prompt_length=lengths)
        np.testing.assert_array_equal(result.tokens, plain.tokens)


def test_no_new_tokens():
    result = decode("rejection", TARGET, DRAFT, [[1, 2], [3, 0]], new=0)
    assert result.tokens.shape == (2, 0)
    assert result.lengths.tolist() == result.rounds.tolist() == result.drafted.tolist() == [0, 0]
    assert base_decoding(TARGET, np.ones((1, 2), int), max_new_tokens=0, key=KEY).tokens.shape == (1, 0)


def test_small_integers_of_numpy_count_as_others_do():
    """As an int8, 100 rounded up to a multiple of 64 would be -128."""
    lengths: tuple[Any, ...] = (100, np.int8(100), np.uint8(100))
    results = [base_decoding(CYCLE, [[0]], max_new_tokens=length, key=KEY) for length in lengths]
    gammas: tuple[Any, ...] = (np.int8(5), np.uint8(5), np.int8(100))
    results += [
        speculative_decoding(CYCLE, drafter, [[0]], max_new_tokens=100, key=KEY)
        for gamma in gammas
        for drafter in (SmallModel(CYCLE, gamma=gamma), NGram(gamma=gamma))
    ]
    assert DecoderConfig(dim=np.int8(64), ff_mult=np.int8(4)) == DecoderConfig(dim=64)  # pyright: ignore[reportArgumentType]
    for result in results:
        np.testing.assert_array_equal(result.tokens, [[1, 2, 3, 0] * 25])


@pytest.mark.parametrize("rule", RULES)
def test_one_new_token(rule: str):
    """One round; of the draft only the one token counts that the output could take."""
    result = decode(rule, CYCLE, CYCLE, np.arange(8)[:, None] % 4, new=1)
    assert result.tokens.tolist() == [[1], [2], [3], [0]] * 2
    assert result.rounds.tolist() == result.drafted.tolist() == result.accepted.tolist() == [1] * 8


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("batch", [1, 64])
def test_prompts_of_one_token(rule: str, batch: int):
    prompt = np.arange(batch)[:, None] % 4
    expected = (prompt + np.arange(1, 11)) % 4
    for draft in (CYCLE, DRAFT):
        result = decode(rule, CYCLE, draft, prompt)
        np.testing.assert_array_equal(result.tokens, expected)
        assert result.lengths.tolist() == [10] * batch
        # What lies behind a prompt of one token is never read, whatever it is.
        padded = np.concatenate((prompt, np.full((batch, 3), 2)), axis=1)
        longer = decode(rule, CYCLE, draft, padded, prompt_length=np.ones(batch, int))
        np.testing.assert_array_equal(longer.tokens, expected)


@pytest.mark.parametrize("rule", RULES)
def test_padding_of_the_prompt_is_not_read(rule: str):
    prompts, lengths = ragged_prompts(3, 8, 6, 4)
    padding = np.arange(6) >= lengths[:, None]
    results = [
        decode(rule, TARGET, DRAFT, np.where(padding, fill, prompts), prompt_length=lengths)
        for fill in (0, 3, -7, 1_000_000)
    ]
    for result in results[1:]:
        np.testing.assert_array_equal(result.tokens, results[0].tokens)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("prompt", "eos_id", "output"),
    [
        (1, 2, [2]),  # the first token
        (3, 1, [0, 1]),  # inside the first drafted run
        (3, 2, [0, 1, 2]),  # its last token
        (3, 3, [0, 1, 2, 3]),  # the bonus behind it
        (0, 0, [1, 2, 3, 0]),  # the bonus; the same token in the prompt ends nothing
    ],
)
def test_end_token(rule: str, prompt: int, eos_id: int, output: list[int]):
    """The end token is the last one of the output, padded behind; identical draft, gamma 3."""
    result = decode(rule, CYCLE, CYCLE, [[prompt]], eos_id=eos_id)
    assert result.tokens.tolist() == [output + [-1] * (10 - len(output))]
    assert result.lengths.tolist() == [len(output)]
    assert result.rounds.tolist() == [1]
    assert result.accepted.tolist() == result.drafted.tolist() == [min(len(output), 3)]


@pytest.mark.parametrize("rule", RULES)
def test_end_token_in_the_last_place_and_never(rule: str):
    """At the 10th of 10 places the end token changes nothing; a token that never comes neither."""
    assert decode(rule, CYCLE, CYCLE, [[0]], eos_id=2).lengths.tolist() == [2]
    never = deterministic_toy([1, 2, 0, 3])
    expected = [[1, 2, 0, 1, 2, 0, 1, 2, 0, 1]]
    for eos_id in (None, 3):
        result = decode(rule, never, never, [[0]], eos_id=eos_id)
        assert result.tokens.tolist() == expected
        assert result.lengths.tolist() == [10]
    last = deterministic_toy([*range(1, 11), 0])
    assert decode(rule, last, last, [[0]], eos_id=10).tokens.tolist() == [list(range(1, 11))]


@pytest.mark.parametrize("rule", RULES)
def test_an_end_token_drafted_beyond_the_last_place_adds_nothing(rule: str):
    """1 2 3 is drafted and right, two tokens are wanted, and 3 is the end."""
    result = decode(rule, CYCLE, CYCLE, [[0]], new=2, eos_id=3)
    assert result.tokens.tolist() == [[1, 2]]
    assert result.lengths.tolist() == result.drafted.tolist() == result.accepted.tolist() == [2]


@pytest.mark.parametrize("rule", RULES)
def test_draft_that_never_proposes_the_only_possible_token(rule: str):
    """Each round refuses its first token and the residual is the target's only token."""
    draft = avoiding_toy([1, 2, 3, 0])
    prompt = np.arange(8)[:, None] % 4
    result = decode(rule, CYCLE, draft, prompt)
    np.testing.assert_array_equal(result.tokens, (prompt + np.arange(1, 11)) % 4)
    assert result.accepted.tolist() == [0] * 8
    assert result.rounds.tolist() == result.stats.refused_b.tolist() == [10] * 8


@pytest.mark.parametrize("rule", RULES)
def test_identical_draft_is_accepted(rule: str):
    """A looked-up p / q is exactly 1: 64 rows, filters included, and no refusal."""
    prompts, lengths = ragged_prompts(4, 64, 6, 4)
    for sampling in (Sampling(), Sampling(temperature=0.6, top_p=0.9, min_p=0.05)):
        result = decode(rule, TARGET, TARGET, prompts, prompt_length=lengths, sampling=sampling)
        assert int(result.stats.refused_b.sum()) == 0
        assert result.rounds.tolist() == [3] * 64
        assert result.accepted.tolist() == result.drafted.tolist() == [3 + 3 + 2] * 64


def test_the_drafter_is_told_how_many_tokens_were_added():
    """In rows that go on, that end and that have ended. Were it told less, only drafts would suffer, never the law."""

    @struct.dataclass
    class Counting(Drafter):
        gamma: int = struct.field(pytree_node=False, default=3)

        def start(self, target, sequence, prefill, size):
            return sequence.length_b

        def propose(self, target, sequence, target_cache, state, choose):
            flat_bv = jnp.zeros((8, 4))
            draft, _ = token_by_token(flat_bv, (), lambda *_: (flat_bv, ()), choose, self.gamma)
            return Proposal(draft, target_cache, state)

        def update(self, state, scored, emitted_b):
            return state + emitted_b

    prepared = decoding._prepare(
        TARGET, Counting(), *ragged_prompts(3, 8, 6, 4), 10, KEY, Sampling(), 2, 0, "rejection", 1.0, None, None
    )
    drafter, prompt_bp, length_b, request, size = prepared
    state, counts = decoding.compiled_start(TARGET, drafter, prompt_bp, length_b, request, size=size), set()
    for _ in range(4):
        state, emission = decoding.compiled_round(TARGET, drafter, state, request)
        counts |= set(emission.count_b.tolist())
        np.testing.assert_array_equal(state.drafter_state, state.sequence.length_b)
    assert counts == {0, 1, 2, 3, 4}


def test_an_identical_draft_is_accepted_beyond_the_width_of_the_prompts():
    """Its cache has slots for the output, too."""
    target = random_toy(4, 4, zeros=0.1)
    drafter = SmallModel(target, gamma=3)
    result = speculative_decoding(target, drafter, [[1, 2]], max_new_tokens=100, key=jax.random.key(1))
    assert result.rounds.tolist() == [25]


def test_a_cache_of_the_least_size_is_enough():
    """Which is less than the next multiple of 64."""
    shared: dict[str, Any] = {"prompt": [[1, 2, 3], [0, 3, 1]], "max_new_tokens": 6, "key": jax.random.key(0)}
    drafter = SmallModel(DRAFT, gamma=5)
    least = speculative_decoding(TARGET, drafter, **shared, cache_size=3 + 6 + 5 + 1)
    np.testing.assert_array_equal(least.tokens, speculative_decoding(TARGET, drafter, **shared).tokens)


def test_padding_is_0_unless_said():
    cycle = deterministic_toy([1, 2, 3, 0])
    shared: dict[str, Any] = {"max_new_tokens": 4, "key": jax.random.key(0), "eos_id": 1}
    for result in (base_decoding(cycle, [[0]], **shared), speculative_decoding(cycle, NGram(), [[0]], **shared)):
        assert result.tokens.tolist() == [[1, 0, 0, 0]]


def test_slots_are_a_multiple_of_8():
    """Prompt and output are rounded up to 64 each, and what a draft may run past the end is room for on top."""
    assert checked_size(None, width=64, max_new_tokens=3, gamma=0) == 136
    assert checked_size(None, width=64, max_new_tokens=64, gamma=7) == 136
    assert checked_size(None, width=64, max_new_tokens=64, gamma=8) == 144
