import json

import numpy as np
import pytest

from experiments import benchmark_moe
from experiments.peak_memory import peak_memory


def tiny(folder, *sections):
    return benchmark_moe.Config(
        sections=sections,
        dim=8,
        num_experts=4,
        shape=(2, 8),
        lengths=(8, 16),
        growing_experts=(2, 4),
        growing_experts_shapes=((1, 16),),
        repeats=2,
        output=folder / "results" / "moe.json",
    )


def test_sections_are_measured_and_added_to_the_file(tmp_path):
    benchmark_moe.main(tiny(tmp_path, "dense", "sequence"))
    report = benchmark_moe.main(tiny(tmp_path, "experts"))
    assert json.loads((tmp_path / "results" / "moe.json").read_text()) == json.loads(json.dumps(report))
    assert list(report) == ["dense", "sequence", "experts"]
    dense = report["dense"]["rows"]
    assert [row["mode"] for row in dense] == ["forward", "forward + backward"]
    for row in dense:
        assert set(row["milliseconds_min"]) == {"dense", "index", "ragged"}
        assert row["over_base_median"]["dense"] == row["over_base_of_minima"]["dense"] == 1
        assert 0 < row["milliseconds_min"]["index"] <= row["milliseconds_median"]["index"]
    assert {(row["dispatch"], row["mode"]) for row in report["sequence"]["rows"]} == {
        (dispatch, mode) for dispatch in ("index", "ragged") for mode in benchmark_moe.MODES
    }
    assert report["experts"]["rows"][0]["base"] == "2"
    assert report["experts"]["config"]["repeats"] == 2


def test_exponents():
    assert benchmark_moe._exponent({"1": 3.0, "10": 30.0, "100": 300.0}) == pytest.approx(1)
    assert benchmark_moe._exponent({"1": 1.0, "2": 4.0, "4": 16.0}) == pytest.approx(2)


def touches(megabytes):
    return lambda repeat: np.ones(megabytes * 2**20, np.uint8).sum()


def test_peak_memory_is_what_the_call_touches():
    """Memory that is freed before the call returns counts too; a call that needs none adds next to none."""
    assert peak_memory(touches, 1) < 10 * 2**20
    assert 64 * 2**20 <= peak_memory(touches, 64) < 80 * 2**20
