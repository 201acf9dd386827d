"""The law of the whole output is the target's, by exact enumeration.

Every cell draws 200,000 sequences of tabular models and compares them with the law that `reference.sequence_law`
enumerates from the target's table alone, each row with the law of its own prompt, by chi-squared.

On the level: 90 cells (72 with more than one outcome) are tested at 0.001 as a whole (the rows' independent statistics
added up) and once more for their worst row. With right code, some cell fails in about one of ten choices of keys; the
keys are fixed, so the outcome is always the same. The first choice had such a cell (block, batch 1, top_k, no end
token: p = 0.00094). It was drawn again with 20 other keys, 4,000,000 sequences: p = 0.93 for all of them, and between
0.08 and 0.99 for each. The keys were then changed once, for all cells together.
"""

from __future__ import annotations

import numpy as np
import pytest

from spec_jax.sampling import Sampling
from tests.spec.law_cells import FILTERS, SEQUENCES, draw_cell, p_values, prompt_law
from tests.spec.reference import Filters

OPTIMISED = True


@pytest.mark.slow
@pytest.mark.parametrize("eos_id", [None, 1])
@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("batch", [1, 4, 16])
@pytest.mark.parametrize("rule", ["rejection", "block", "coupled"])
def test_whole_sequence_has_the_targets_law(rule: str, batch: int, name: str, eos_id: int | None, record_property):
    cell = draw_cell(rule, batch, FILTERS[name], eos_id)
    assert cell.counts_bo.sum() == SEQUENCES
    whole, worst_row = p_values(cell, FILTERS[name], eos_id)
    record_property("p_values", f"{whole} {worst_row}")
    record_property("accepted", f"{cell.accepted_per_round} {cell.standard_error}")
    assert whole > 0.001
    assert worst_row > 0.001


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 4, 16])
def test_block_never_accepts_less_than_rejection(batch: int, record_property):
    """In every cell, up to 4 standard errors of the difference; test_verification.py compares without error."""
    deviations = []
    for filters in FILTERS.values():
        for eos_id in (None, 1):
            rejection, block = (draw_cell(rule, batch, filters, eos_id) for rule in ("rejection", "block"))
            error = np.hypot(block.standard_error, rejection.standard_error)
            gain = block.accepted_per_round - rejection.accepted_per_round
            deviations.append(gain / error if error > 0 else 0.0)
            assert gain >= -4 * error
    record_property("gain_in_errors", str(deviations))
    assert max(deviations) > 6, "no cell tells the two rules apart"


def test_laws_of_rows_differ():
    """The per-row test means something: no two of the first four prompts' laws would pass for each other."""
    laws = [prompt_law(row, Filters(), None) for row in range(4)]
    for first in range(4):
        for second in range(first):
            assert abs(laws[first] - laws[second]).sum() / 2 > 0.05


@pytest.mark.slow
def test_lenience_accepts_more_and_changes_the_law(record_property):
    filters = FILTERS["temperature"]
    exact, lenient = (draw_cell("rejection", 4, filters, None, lenience) for lenience in (1.0, 0.5))
    p_value = p_values(lenient, filters, None)[0]
    record_property("p_value", p_value)
    assert p_values(exact, filters, None)[0] > 0.001
    assert p_value < 1e-6
    assert lenient.accepted_per_round > exact.accepted_per_round + 0.1


def test_filters_of_the_cells_filter():
    """No cell's filter keeps everything: as they stand in FILTERS they change the law."""
    assert Sampling() == Sampling(temperature=1.0, top_k=None, top_p=1.0, min_p=0.0)
    for name in ("top_k", "top_p", "min_p"):
        filters = FILTERS[name]
        unfiltered = Filters(temperature=filters.temperature)
        assert abs(prompt_law(0, filters, None) - prompt_law(0, unfiltered, None)).sum() / 2 > 0.05
