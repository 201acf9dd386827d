"""The benchmark of mixtures measures what it says, on layers small enough to be quick."""

import dataclasses
import json
import pathlib
from collections.abc import Callable

import numpy as np
import pytest

from experiments import benchmark_moe
from experiments.peak_memory import peak_memory


def tiny(folder: pathlib.Path, *sections: benchmark_moe.Section) -> benchmark_moe.Config:
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


def test_sections_are_measured_and_added_to_the_file(tmp_path: pathlib.Path):
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


def test_meshes_are_read_from_their_programs(tmp_path: pathlib.Path):
    report = benchmark_moe.main(dataclasses.replace(tiny(tmp_path, "dense"), mesh=("1x1", "1x2", "2x2"), shape=(1, 32)))
    assert list(report) == ["mesh"]
    alone, rows = report["mesh"]["rows"][:2], report["mesh"]["rows"][2:]
    assert [row["all_to_alls"] for row in alone] == [0, 0]
    assert [(row["mesh"], row["all_to_alls"]) for row in rows] == [("1x2", 2), ("1x2", 4), ("2x2", 2), ("2x2", 4)]
    for row in rows:
        # floor(32 · 1.25 / 4) slots for each of 4 experts, of which half stay.
        assert row["buffer_bytes"] == 4 * 10 * 8 * 4 / 2
        assert row["all_to_all_bytes"] == row["all_to_alls"] * row["buffer_bytes"]
        assert row["other_kinds"] == ["all-reduce"]
        # Of one device, which has a sequence of its own on every mesh.
        assert row["flops"] == pytest.approx(alone[row["mode"] != "forward"]["flops"], rel=0.05)


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (("2by2",), "mesh must be DATAxEXPERT, such as 2x4, got '2by2'"),
        (("0x2",), "mesh must be DATAxEXPERT, such as 2x4, got '0x2'"),
        (("4x4",), "mesh must fit the 8 devices, got 4x4"),
    ],
)
def test_meshes_refused(tmp_path: pathlib.Path, mesh: tuple[str, ...], message: str):
    with pytest.raises(ValueError, match=message):
        benchmark_moe.main(dataclasses.replace(tiny(tmp_path), mesh=mesh))


def test_exponents():
    assert benchmark_moe._exponent({"1": 3.0, "10": 30.0, "100": 300.0}) == pytest.approx(1)
    assert benchmark_moe._exponent({"1": 1.0, "2": 4.0, "4": 16.0}) == pytest.approx(2)


def touches(megabytes: int) -> Callable[[int], np.integer]:
    return lambda repeat: np.ones(megabytes * 2**20, np.uint8).sum()


def test_peak_memory_is_what_the_call_touches():
    """Memory that is freed before the call returns counts too; a call that needs none adds next to none.

    The kernel adds up a process's pages in batches per core, so what it says may be some hundred KiB off.
    """
    assert peak_memory(touches, 1) < 10 * 2**20
    assert 63 * 2**20 <= peak_memory(touches, 64) < 80 * 2**20
