"""The law of whole sequences of a decoder with experts is its own, by exact enumeration, as in tests/spec/test_law.

The law is enumerated from one uncached forward, which drops nothing. Sequences are drawn 2,000 rows at a time, so that
every token is routed beside thousands of others. Level: 3 cells at 0.001, each as a whole and for its worst row; with
right code some cell fails in about one of two hundred choices of keys, and the keys are fixed.
"""

from __future__ import annotations

import functools
import zlib
from typing import Any

import jax
import numpy as np
import pytest

from experiments.expert_decoder import ExpertsConfig
from spec_jax import Decoder, DecoderConfig, DecodeResult, Sampling, SmallModel
from tests.experiments.experts import dense_draft, sparse_decoder
from tests.spec.law_cells import (
    FILTERS,
    GAMMA,
    PROMPTS,
    SEQUENCES,
    VOCAB,
    Cell,
    decode_prompts,
    law_behind,
    logits_after_prompts,
    tally,
)
from tests.spec.reference import Filters, Fit, fit

OPTIMISED = True

CONFIG = DecoderConfig(vocab_size=VOCAB, dim=8, depth=3, heads=1, dim_head=4, ff_mult=1)
EXPERTS = ExpertsConfig(num_experts=3, hidden=6)
ROWS = 125 * len(PROMPTS)


@functools.cache
def target(**changes: Any) -> Decoder:
    return sparse_decoder(CONFIG, EXPERTS, head_scale=1.5, **changes)


def drawn(model: Decoder, rule: str, filters: Filters, eos_id: int | None, sequences: int = SEQUENCES) -> Cell:
    """So many sequences, 2,000 rows under each key, every prompt 125 times."""
    drafter = SmallModel(dense_draft(CONFIG, EXPERTS, head_scale=1.5), gamma=GAMMA)
    keys = jax.random.split(jax.random.key(zlib.crc32(f"{rule} {filters}".encode())), sequences // ROWS)
    sampling = Sampling(temperature=filters.temperature, top_p=filters.top_p).checked()
    result = decode(model, drafter, keys, rule, sampling, -1 if eos_id is None else eos_id)
    return tally(jax.tree.map(lambda x: x.reshape(-1, len(PROMPTS), *x.shape[2:]), result))


@functools.partial(jax.jit, static_argnames="rule")
def decode(
    model: Decoder, drafter: SmallModel, keys: jax.Array, rule: str, sampling: Sampling, eos_id: int
) -> DecodeResult:
    """The results of the keys, one after the other."""
    return jax.lax.map(lambda key: decode_prompts(model, drafter, key, rule, sampling, eos_id, batch=ROWS), keys)


@functools.cache
def logits() -> dict[tuple[int, ...], np.ndarray]:
    return logits_after_prompts(target())


def fits(cell: Cell, filters: Filters, eos_id: int | None) -> list[Fit]:
    """Each prompt's sequences against the law of that prompt."""
    return [
        fit(counts_o, law_behind(logits().__getitem__, row, filters, eos_id))
        for row, counts_o in enumerate(cell.counts_bo)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "filter_name", "eos_id"),
    [("rejection", "temperature", 1), ("block", "top_p", None), ("coupled", "temperature", 1)],
)
def test_whole_sequence_has_the_targets_law(rule: str, filter_name: str, eos_id: int | None, record_property):
    filters = FILTERS[filter_name]
    cell = drawn(target(), rule, filters, eos_id)
    assert cell.counts_bo.sum() == SEQUENCES
    rows = fits(cell, filters, eos_id)
    whole, worst_row = sum(rows, Fit(0.0, 0)).p_value, min(row.p_value for row in rows) * len(rows)
    record_property("p_values", f"{whole} {worst_row}")
    record_property("accepted", f"{cell.accepted_per_round} {cell.standard_error}")
    assert whole > 0.001
    assert worst_row > 0.001
    assert 0.02 < cell.accepted_per_round < 1.98, "a draft that is always or never right tests little"


@pytest.mark.slow
@pytest.mark.parametrize("group_size", ["batch", "sequence"])
def test_routing_with_a_capacity_has_another_law(group_size: str, record_property):
    """The same weights, routed with a capacity over what is read at once: a tenth of the sequences shows it."""
    broken = target(dispatch_eval="index", capacity_factor_eval=1.0, min_capacity=1, group_size=group_size)
    filters = FILTERS["temperature"]
    cell = drawn(broken, "rejection", filters, 1, SEQUENCES // 10)
    p_value = sum(fits(cell, filters, 1), Fit(0.0, 0)).p_value
    record_property("p_value", p_value)
    assert p_value < 1e-6


@pytest.mark.slow
def test_another_temperature_has_another_law():
    cell = drawn(target(), "rejection", Filters(temperature=0.75), 1)
    assert sum(fits(cell, FILTERS["temperature"], 1), Fit(0.0, 0)).p_value < 1e-6
