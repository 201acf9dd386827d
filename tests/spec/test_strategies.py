"""Every strategy: equality with plain decoding, rows, statistics, streams, edges, traces, bad input."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spec_jax import (
    Drafter,
    EarlyExit,
    LayerSkip,
    NGram,
    Prophet,
    Sampling,
    SmallModel,
    base_decoding,
    loop,
    speculative_decoding,
    stream,
)
from spec_jax import decoding as decoding_module
from spec_jax.drafters.base import Sequence
from spec_jax.losses import (
    distillation_loss,
    early_exit_logits,
    next_token_loss,
    prophet_distillation_loss,
    prophet_losses,
)
from tests.spec.strategies import NAMES, drafting_what_is_there, random_pair, strategy
from tests.spec.test_early_exit import TOKENS
from tests.spec.test_equality import SAMPLINGS
from tests.spec.toys import random_toy
from tests.spec.transformers import CONFIG, Comparison, compare, ragged_prompts, transformer

BATCH, NEW_TOKENS, EOS = 64, 32, 5
PROMPTS, LENGTHS = ragged_prompts(0, BATCH, 12)


def decode(name: str, gamma: int, **changed: Any):
    subject = strategy(name, CONFIG, gamma)
    arguments = {"max_new_tokens": NEW_TOKENS, "key": jax.random.key(0), "prompt_length": LENGTHS, "pad_id": 23}
    arguments |= changed
    prompt = arguments.pop("prompt", PROMPTS)
    return speculative_decoding(subject.target, subject.drafter, prompt, **arguments)


def compared(name: str, rule: str, gamma: int, sampling: Sampling, eos_id: int | None) -> Comparison:
    target = strategy(name, CONFIG, gamma).target
    arguments: dict[str, Any] = {"sampling": sampling, "eos_id": eos_id, "key": jax.random.key(gamma)}
    plain = base_decoding(target, PROMPTS, max_new_tokens=NEW_TOKENS, prompt_length=LENGTHS, pad_id=23, **arguments)
    result = decode(name, gamma, verification=rule, **arguments)
    return compare(target, PROMPTS, LENGTHS, sampling, arguments["key"], result, plain)


@pytest.mark.slow
@pytest.mark.parametrize("gamma", [1, 5])
@pytest.mark.parametrize("name", NAMES)
def test_coupled_equals_plain(name: str, gamma: int, record_property):
    """Nine decodings of 64 ragged rows for each gamma: 1,152 rows a strategy."""
    cells = [(sampling, eos_id) for sampling in SAMPLINGS.values() for eos_id in (None, EOS, 7)]
    total = sum((compared(name, "coupled", gamma, *cell) for cell in cells), Comparison())
    record_property("comparison", str(total))
    assert total.rows == len(cells) * BATCH
    assert total.diverged == 0


@pytest.mark.parametrize("name", NAMES)
def test_drafts_are_kept_now_and_then(name: str):
    """So that all the above covers rounds that keep none, some and all of a draft."""
    result = decode(name, 5)
    rate = float(result.acceptance_rate)
    assert (0.02 if name == "n-gram" else 0.2) < rate < 0.97
    assert int(result.stats.accepted_bj[:, 1].sum()) > 10


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["rejection", "block"])
@pytest.mark.parametrize("name", NAMES)
def test_greedy_equals_plain(name: str, rule: str, record_property):
    cells = [(SAMPLINGS["greedy"], eos_id) for eos_id in (None, EOS)]
    total = sum((compared(name, rule, 5, *cell) for cell in cells), Comparison())
    record_property("comparison", str(total))
    assert total.diverged == 0


@pytest.mark.parametrize("name", NAMES)
def test_a_row_does_not_depend_on_the_others(name: str):
    """Reordered, and alone: the same tokens under the rule whose noise is the round's."""
    whole = decode(name, 3)
    order = np.random.default_rng(0).permutation(BATCH)
    reordered = decode(name, 3, prompt=PROMPTS[order], prompt_length=LENGTHS[order], row_ids=order)
    np.testing.assert_array_equal(reordered.tokens, np.asarray(whole.tokens)[order])
    for row in (0, 7, BATCH - 1):
        one = slice(row, row + 1)
        alone = decode(name, 3, prompt=PROMPTS[one], prompt_length=LENGTHS[one], row_ids=[row])
        np.testing.assert_array_equal(alone.tokens[0], whole.tokens[row])


@pytest.mark.parametrize("name", NAMES)
def test_stream_is_the_same_decoding(name: str):
    """And its rounds add up to the statistics."""
    subject, arguments = strategy(name, CONFIG, 3), {"max_new_tokens": NEW_TOKENS, "key": jax.random.key(1)}
    arguments |= {"prompt_length": LENGTHS, "eos_id": EOS}
    result = speculative_decoding(subject.target, subject.drafter, PROMPTS, **arguments)
    rows, accepted_b, rounds_b = [[] for _ in range(BATCH)], np.zeros(BATCH, int), np.zeros(BATCH, int)
    for round_ in stream(subject.target, subject.drafter, PROMPTS, **arguments):
        for row in range(BATCH):
            rows[row] += round_.row(row)[0]
        accepted_b += round_.accepted_b
        rounds_b += round_.count_b > 0
    for row, length in enumerate(np.asarray(result.lengths)):
        assert rows[row] == result.tokens[row, :length].tolist()
    np.testing.assert_array_equal(result.accepted, accepted_b)
    np.testing.assert_array_equal(result.rounds, rounds_b)
    assert (np.asarray(result.accepted) <= np.asarray(result.drafted)).all()
    np.testing.assert_array_equal(np.asarray(result.lengths) > 0, True)


@pytest.mark.parametrize("name", NAMES)
def test_edges(name: str):
    """Nothing drafted, nothing wanted, one token wanted, one row of one token, an end token that comes at once."""
    plain = base_decoding(
        strategy(name, CONFIG, 0).target, PROMPTS, max_new_tokens=8, prompt_length=LENGTHS, key=jax.random.key(0)
    )
    undrafted = decode(name, 0, max_new_tokens=8, verification="coupled")
    np.testing.assert_array_equal(undrafted.tokens, plain.tokens)
    assert undrafted.rounds.tolist() == [8] * BATCH
    assert decode(name, 3, max_new_tokens=0).tokens.shape == (BATCH, 0)
    assert decode(name, 3, max_new_tokens=1).lengths.tolist() == [1] * BATCH
    one = decode(name, 3, prompt=[[4]], prompt_length=[1])
    assert one.lengths.tolist() == [NEW_TOKENS]
    first = int(one.tokens[0, 0])
    ended = decode(name, 3, prompt=[[4]], prompt_length=[1], eos_id=first)
    assert ended.lengths.tolist() == [1]
    assert ended.tokens[0].tolist() == [first] + [23] * (NEW_TOKENS - 1)


@pytest.mark.parametrize("name", NAMES)
def test_integers_stay_int32_under_x64(name: str):
    """Promotion is strict here. Traced only."""
    decode_with = functools.partial(decode, name, 2, eos_id=3, sampling=Sampling(temperature=0.5, top_k=3, top_p=0.9))
    # Made beforehand: it is kept for other tests.
    strategy(name, CONFIG, 2)
    with jax.enable_x64(True):
        for rule in ("rejection", "block", "coupled"):
            result = jax.eval_shape(lambda key, rule=rule: decode_with(key=key, verification=rule), jax.random.key(0))
            assert {x.dtype for x in jax.tree.leaves(result)} == {np.dtype(np.int32)}


def test_losses_mix_no_dtypes_under_x64():
    """Promotion is strict here. Traced only, with gradients."""
    recycling = dataclasses.replace(CONFIG, early_exit_layer=1, early_exit_recycling=2)
    target, pair = transformer(0, recycling), random_pair(CONFIG)
    tokens_bt, mask_bt = jnp.ones((2, 13), jnp.int32), jnp.ones((2, 12), bool)

    def early_exit(target: Any) -> jax.Array:
        head_btv, exit_btv = early_exit_logits(target, tokens_bt[:, :-1], key=jax.random.key(0))
        taught = distillation_loss(exit_btv, head_btv, mask_bt=mask_bt)
        return next_token_loss(exit_btv, tokens_bt[:, 1:], mask_bt=mask_bt) + taught

    def prophet(pair: Any) -> jax.Array:
        output = pair(tokens_bt)
        main, ahead = prophet_losses(pair, output, tokens_bt)
        return main + ahead + prophet_distillation_loss(pair, output)

    with jax.enable_x64(True):
        for loss, models in ((early_exit, target), (prophet, pair)):
            bar = jax.eval_shape(jax.grad(loss), models)
            assert {x.dtype for x in jax.tree.leaves(bar)} == {np.dtype(np.float32)}


@pytest.mark.parametrize("name", NAMES)
def test_traced_once(name: str, monkeypatch: pytest.MonkeyPatch):
    chex.clear_trace_counter()
    counted = jax.jit(chex.assert_max_traces(loop.decode, n=1), static_argnames=("size", "width"))
    monkeypatch.setattr(decoding_module, "compiled_decode", counted)
    for changed in ({}, {"sampling": Sampling(temperature=0.5, top_p=0.9)}, {"eos_id": 3}, {"max_new_tokens": 50}):
        decode(name, 2, **changed)
    subject = strategy(name, CONFIG, 2)
    decode(name, 2, key=jax.random.key(9), prompt=PROMPTS[:, :7], prompt_length=np.minimum(LENGTHS, 7))
    target, drafter = jax.tree.map(lambda weight: weight * 0.9, (subject.target, subject.drafter))
    speculative_decoding(target, drafter, PROMPTS, max_new_tokens=NEW_TOKENS, key=jax.random.key(0), pad_id=23)
    chex.clear_trace_counter()


PAIR = random_pair(CONFIG)
WIDE = transformer(0, dataclasses.replace(CONFIG, dim=48))
PLAIN = transformer(0)
BAD: list[tuple[Any, Drafter, str]] = [
    (PLAIN, EarlyExit(), "target must be a Decoder with early_exit_layer for EarlyExit, got a Decoder without one"),
    (random_toy(0, 4), EarlyExit(), "target must be a Decoder with early_exit_layer for EarlyExit, got Toy"),
    (random_toy(0, 4), LayerSkip((), ()), "target must be a Decoder for LayerSkip, got Toy"),
    (PLAIN, Prophet(PLAIN), "prophet must be a ModelWithProphet or its prophet, got Decoder"),
    (PLAIN, LayerSkip([2], []), "skip_attention must hold layers in [0, 2), got (2,)"),  # pyright: ignore
    (PLAIN, LayerSkip((2,), ()), "skip_attention must hold layers in [0, 2), got (2,)"),
    (PLAIN, LayerSkip((True,), ()), "skip_attention must hold layers in [0, 2), got (True,)"),
    (PLAIN, LayerSkip((), (-1,)), "skip_feed_forward must hold layers in [0, 2), got (-1,)"),
    (PLAIN, LayerSkip((0.0,), ()), "skip_attention must hold layers in [0, 2), got (0.0,)"),  # pyright: ignore
    (PLAIN, LayerSkip(([0],), ()), "skip_attention must hold layers in [0, 2), got ([0],)"),  # pyright: ignore
    (random_toy(0, 4), Prophet(PAIR), "target must be a Decoder for Prophet, got Toy"),
    (WIDE, Prophet(PAIR), "target must have the width 32 that the prophet starts from, got 48"),
    (
        transformer(0, dataclasses.replace(CONFIG, vocab_size=25)),
        Prophet(PAIR),
        "drafter must have the target's vocabulary of 25 tokens, got 24",
    ),
    (PLAIN, NGram(min_ngram=0), "min_ngram must be at least 1, got 0"),
    (PLAIN, NGram(max_ngram=1), "min_ngram must be at most max_ngram, got min_ngram 2 and max_ngram 1"),
    *((PLAIN, drafter, "gamma must be an integer >= 0, got -1") for drafter in (
        EarlyExit(gamma=-1), LayerSkip((), (), gamma=-1), Prophet(PAIR, gamma=-1), NGram(gamma=-1),
    )),
]  # fmt: skip


@pytest.mark.parametrize(("target", "drafter", "message"), BAD, ids=[message for *_, message in BAD])
def test_bad_input(target: Any, drafter: Drafter, message: str):
    for decode in (speculative_decoding, stream):
        with pytest.raises(ValueError, match=re.escape(message)):
            decode(target, drafter, [[1, 2]], max_new_tokens=4, key=jax.random.key(0))


@pytest.mark.parametrize(("attention", "feed_forward"), [((1,), ()), ((), (1,)), ((1,), (1,))])
def test_layer_skip_drafts_with_the_thinned_model(attention: tuple[int, ...], feed_forward: tuple[int, ...]):
    """Only the last layer is thinned, so that all that is read in the cache is as one thinned forward has it."""
    target, length_b = transformer(0), np.array([1, 4, 8])

    @jax.jit
    def drafted_and_thinned(length_b: jax.Array) -> tuple[jax.Array, jax.Array]:
        sequence = Sequence(TOKENS, length_b)
        choose = drafting_what_is_there(sequence)
        cache = target(TOKENS, target.init_cache(3, 16)).cache
        assert cache is not None
        drafter = LayerSkip(attention, feed_forward, gamma=3)
        proposal = drafter.propose(target, sequence, cache.with_length(length_b - 1), (), choose)
        thinned_btv = target.without(TOKENS, None, attention=attention, feed_forward=feed_forward)[0]
        return proposal.draft.log_probs_bjv, thinned_btv

    drafted_bjv, thinned_btv = map(np.asarray, drafted_and_thinned(length_b))
    at_bj = length_b[:, None] - 1 + np.arange(3)[None, :]
    np.testing.assert_allclose(drafted_bjv, thinned_btv[np.arange(3)[:, None], at_bj], atol=2e-5)


def test_defaults_are_those_of_the_readme():
    for drafter in (SmallModel(transformer(1)), EarlyExit(), LayerSkip((), ()), Prophet(PAIR)):
        assert drafter.gamma == 5
    assert NGram() == NGram(max_ngram=3, gamma=8, min_ngram=2)
