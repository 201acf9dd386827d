"""Coupled and greedy decoding are token for token plain decoding, for transformers in float32 and ragged batches."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest

from spec_jax import DecodeResult, Sampling, SmallModel, base_decoding, speculative_decoding
from tests.spec.transformers import CONFIG, Comparison, compare, near, ragged_prompts, transformer

TARGET = transformer(0)
DRAFTS = {
    "weak": transformer(1),
    "strong": near(0, 0.05),
    "identical": TARGET,
    "shallow": transformer(2, dataclasses.replace(CONFIG, depth=1, dim=16)),
}
SAMPLINGS = {
    "plain": Sampling(),
    "greedy": Sampling(temperature=0.0),
    "filtered": Sampling(temperature=1.3, top_p=0.9, min_p=0.02),
}
BATCH, NEW_TOKENS, EOS = 64, 32, 5
PROMPTS, LENGTHS = ragged_prompts(0, BATCH, 12)


# A program of its own, which the tests of all samplings elsewhere do without.
TOP_K = {"top_k": Sampling(temperature=1.5, top_k=6)}


def arguments(sampling: str = "plain", eos_id: int | None = None, seed: int = 0) -> dict[str, Any]:
    return {
        "max_new_tokens": NEW_TOKENS,
        "key": jax.random.key(seed),
        "prompt_length": LENGTHS,
        "sampling": (SAMPLINGS | TOP_K)[sampling],
        "eos_id": eos_id,
        "pad_id": 23,
    }


@functools.cache
def plainly(sampling: str, eos_id: int | None, seed: int) -> DecodeResult:
    return base_decoding(TARGET, PROMPTS, **arguments(sampling, eos_id, seed))


def compared(rule: str, draft: str, gamma: int, sampling: str, eos_id: int | None, seed: int) -> Comparison:
    drafter, common = SmallModel(DRAFTS[draft], gamma=gamma), arguments(sampling, eos_id, seed)
    plain = plainly(sampling, eos_id, seed)
    result = speculative_decoding(TARGET, drafter, PROMPTS, verification=rule, **common)
    comparison = compare(TARGET, PROMPTS, LENGTHS, common["sampling"], common["key"], result, plain)
    if comparison.different == 0:
        np.testing.assert_array_equal(result.lengths, plain.lengths)
    return comparison


def check(total: Comparison, rows: int, record_property) -> None:
    record_property("comparison", str(total))
    print(total)
    assert total.rows >= rows
    assert total.diverged == 0


@pytest.mark.slow
@pytest.mark.parametrize("gamma", [0, 1, 3, 5, 8])
def test_coupled_equals_plain(gamma: int, record_property):
    """5 × 18 decodings of 64 ragged rows: 5,760 rows. (On the CPU none differs at all.)"""
    total = Comparison()
    for seed, draft in enumerate(["weak", "strong", "identical"]):
        for sampling in SAMPLINGS:
            for eos_id in (None, EOS):
                total += compared("coupled", draft, gamma, sampling, eos_id, seed)
    check(total, 18 * BATCH, record_property)


@pytest.mark.slow
def test_coupled_equals_plain_with_top_k(record_property):
    """The shallow draft is a model of other sizes."""
    total = sum((compared("coupled", "shallow", 3, "top_k", eos_id, 7) for eos_id in (None, EOS)), Comparison())
    check(total, 2 * BATCH, record_property)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["rejection", "block"])
def test_greedy_equals_plain(rule: str, record_property):
    """2 × 12 decodings of 64 ragged rows: 1,536 rows; with "coupled" above, 3,456 greedy ones."""
    total = Comparison()
    for draft in ("weak", "strong", "identical"):
        for eos_id in (None, EOS):
            for seed in (0, 1):
                total += compared(rule, draft, 5, "greedy", eos_id, seed)
    check(total, 12 * BATCH, record_property)


def test_the_comparison_notices_a_difference():
    """Another key is a divergence in nearly every row, so near ties excuse nothing by themselves."""
    arguments: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "prompt_length": LENGTHS}
    keys = jax.random.key(0), jax.random.key(1)
    left, right = (base_decoding(TARGET, PROMPTS, key=key, **arguments) for key in keys)
    comparison = compare(TARGET, PROMPTS, LENGTHS, Sampling(), keys[0], left, right)
    assert comparison.diverged >= BATCH - 2


@pytest.mark.parametrize("rule", ["rejection", "block", "coupled"])
def test_identical_draft_is_accepted(rule: str):
    """Everything, but for rounding: p / q is 1 to about 1e-6, so no refusal in 64 rows of 32 tokens."""
    result = speculative_decoding(
        TARGET,
        SmallModel(TARGET, gamma=5),
        PROMPTS,
        max_new_tokens=NEW_TOKENS,
        key=jax.random.key(3),
        prompt_length=LENGTHS,
        verification=rule,
    )
    assert int(result.stats.refused_b.sum()) == 0
    np.testing.assert_array_equal(result.stats.accepted_bj, result.stats.drafted_bj)
    # 5 rounds of 6 and one of 2: of the last draft only the two tokens that fit count.
    assert result.rounds.tolist() == [6] * BATCH
    assert result.drafted.tolist() == [27] * BATCH


def test_drafts_are_what_they_are_called():
    rates = {}
    for name in ("weak", "strong", "identical"):
        result = speculative_decoding(
            TARGET, SmallModel(DRAFTS[name], gamma=5), PROMPTS, max_new_tokens=NEW_TOKENS, key=jax.random.key(4)
        )
        rates[name] = float(result.acceptance_rate)
    assert rates["weak"] < 0.5 < 0.7 < rates["strong"] < 0.99
    assert rates["identical"] == 1
