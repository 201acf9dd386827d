"""The law of the whole output is the target's under every strategy, by exact enumeration, as in test_law.

The targets are tiny transformers of three tokens, whose law is enumerated from one uncached forward over all rows.
Level: 18 cells at 0.001, each as a whole and for its worst row; with right code some cell fails in about one of thirty
choices of keys, and the keys are fixed.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spec_jax import DecoderConfig, DecodeResult, Sampling
from tests.spec.law_cells import (
    FILTERS,
    GAMMA,
    SEQUENCES,
    VOCAB,
    decode_prompts,
    law_behind,
    logits_after_prompts,
    tally,
)
from tests.spec.reference import Filters, Fit, fit
from tests.spec.strategies import NAMES, strategy

OPTIMISED = True

CHUNKS = 10
CONFIG = DecoderConfig(vocab_size=VOCAB, dim=8, depth=2, heads=1, dim_head=4, ff_mult=1)


@functools.cache
def program(name: str, rule: str, batch: int, top_k: int | None):
    """(keys, filters, end token) → 200,000 sequences: `batch` ragged prompts under each key."""
    subject = strategy(name, CONFIG, GAMMA)

    def one_key(key: jax.Array, sampling: Sampling, eos_id: jax.Array) -> DecodeResult:
        sampling = dataclasses.replace(sampling, top_k=top_k)
        return decode_prompts(subject.target, subject.drafter, key, rule, sampling, eos_id, batch=batch)

    def run(keys: jax.Array, sampling: Sampling, eos_id: jax.Array) -> DecodeResult:
        chunks = keys.reshape(CHUNKS, -1)
        result = jax.lax.map(lambda keys: jax.vmap(one_key, (0, None, None))(keys, sampling, eos_id), chunks)
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), result)

    return jax.jit(run)


@functools.cache
def prompt_law(name: str, row: int, filters: Filters, eos_id: int | None) -> np.ndarray:
    return law_behind(logits_of(name).__getitem__, row, filters, eos_id)


@functools.cache
def logits_of(name: str) -> dict[tuple[int, ...], np.ndarray]:
    return logits_after_prompts(strategy(name, CONFIG, GAMMA).target)


# Each strategy meets each rule, each rule with a batch size of its own and, from strategy to strategy, another filter.
# The filters are the loop's, the same for every strategy: test_law has their full cross with rules, batches and end
# tokens. Greedy has no law: it is compared token for token in test_strategies.
RULES = ("rejection", 4), ("block", 16), ("coupled", 1)
FILTERS_AND_ENDS = ("temperature", 1), ("top_p", None), ("min_p", 1)
CELLS = [
    (name, *rule, *FILTERS_AND_ENDS[(place + turn) % len(FILTERS_AND_ENDS)])
    for turn, name in enumerate(NAMES)
    for place, rule in enumerate(RULES)
]
# Top-k is a program of its own: each rule's under one strategy.
CELLS += [(name, *rule, "top_k", 1) for name, rule in zip(NAMES[1:], RULES)]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "rule", "batch", "filter_name", "eos_id"), CELLS)
def test_whole_sequence_has_the_targets_law(
    name: str, rule: str, batch: int, filter_name: str, eos_id: int | None, record_property
):
    filters = FILTERS[filter_name]
    seed = zlib.crc32(f"{name} {rule} {batch} {filters} {eos_id}".encode())
    keys = jax.random.split(jax.random.key(seed), SEQUENCES // batch)
    sampling = Sampling(temperature=filters.temperature, top_p=filters.top_p, min_p=filters.min_p).checked()
    end = jnp.int32(-1 if eos_id is None else eos_id)
    cell = tally(program(name, rule, batch, filters.top_k)(keys, sampling, end))
    assert cell.counts_bo.sum() == SEQUENCES
    rows = [fit(counts_o, prompt_law(name, row, filters, eos_id)) for row, counts_o in enumerate(cell.counts_bo)]
    whole, worst_row = sum(rows, Fit(0.0, 0)).p_value, min(row.p_value for row in rows) * len(rows)
    record_property("p_values", f"{whole} {worst_row}")
    record_property("accepted", f"{cell.accepted_per_round} {cell.standard_error}")
    assert whole > 0.001
    assert worst_row > 0.001
    assert 0.02 < cell.accepted_per_round < 1.98, "a draft that is always or never right tests little"


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_negative_control(name: str):
    """The same sequences do not pass for those of another temperature."""
    keys = jax.random.split(jax.random.key(0), SEQUENCES // 4)
    sampling = Sampling(temperature=0.75).checked()
    cell = tally(program(name, "rejection", 4, None)(keys, sampling, jnp.int32(1)))
    rows = [
        fit(counts_o, prompt_law(name, row, FILTERS["temperature"], 1)) for row, counts_o in enumerate(cell.counts_bo)
    ]
    assert sum(rows, Fit(0.0, 0)).p_value < 1e-6
