"""The benchmark of decoding reports what it measured, in the units it says."""

import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import pytest

from experiments import benchmark_decoding

SECONDS = {"plain": [0.4, 0.6, 0.9], "spec_jax": [0.2, 0.2, 0.3], "models only": [0.1, 0.15, 0.3], "memory": [0.5] * 3}
TOKENS = 8


def scripted(calls: Mapping[str, Callable[[int], Any]], *, repeats: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """As `measure.alternate`, with times of our own."""
    results = {name: [jax.block_until_ready(call(repeat)) for repeat in range(repeats)] for name, call in calls.items()}
    return {name: SECONDS[name] for name in calls}, results


def test_what_is_measured_is_reported(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    memory_read = benchmark_decoding.memory_read
    monkeypatch.setattr(benchmark_decoding, "alternate", scripted)
    monkeypatch.setattr(benchmark_decoding, "memory_read", lambda: memory_read(1e-4))
    config = benchmark_decoding.Config(
        dim=64,
        depth=2,
        draft_depth=1,
        prompt_length=8,
        max_new_tokens=TOKENS,
        batches=(2,),
        gamma=2,
        repeats=3,
        with_torch=False,
        output=tmp_path / "new" / "decoding.json",
    )
    report = benchmark_decoding.main(config)
    assert json.loads(config.output.read_text()) == json.loads(json.dumps(report))
    assert [row["batch"] for row in report["plain"]] == [2]
    for row in report["plain"]:
        # A batch's tokens are decoded side by side.
        assert row["milliseconds_min"] == {"spec_jax": pytest.approx(200 / TOKENS)}
        rate = memory_read(1e-4)[1] / 0.5
        assert row["memory_gigabytes_per_second"] == pytest.approx(rate / 1e9)
        needed = row["memory"]["weights_bytes"] + row["memory"]["cache_bytes"]
        assert row["floor_milliseconds"] == pytest.approx(needed / rate * 1e3)
        assert row["times_floor"] == pytest.approx(200 / TOKENS / row["floor_milliseconds"])
        assert row["memory"]["peak_bytes"] >= needed
    row = report["speculative"]
    assert row["milliseconds_min"]["plain"] == pytest.approx(400 / TOKENS)
    assert row["milliseconds_median"]["plain"] == pytest.approx(600 / TOKENS)
    # Of each repeat, not of the medians.
    assert row["times_ours_median"] == {"plain": pytest.approx(3), "spec_jax": 1}
    assert row["times_ours_of_minima"]["plain"] == pytest.approx(2)
    assert row["speedup"] == pytest.approx(3)
    assert row["speedup_over_predicted"] == pytest.approx(3 / row["predicted_speedup"])
    np.testing.assert_allclose(row["overhead_outside_models_by_repeat"], [0.5, 0.25, 0], atol=1e-12)
    assert row["overhead_outside_models"] == pytest.approx(0.25)
    assert 0 <= row["acceptance_rate"] <= 1 <= row["mean_accepted_length"] + 1 <= config.gamma + 1


def test_memory_is_read_as_many_bytes_as_are_said():
    call, read = benchmark_decoding.memory_read(2**-10)
    assert call(0) == read / 4 == 2**18


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: benchmark_decoding.Config(batches=(1, 1)), "batches must be different ones, got 1 1"),
        (lambda: benchmark_decoding.Config(batches=(1, 0)), "batches must be at least 1, got .1, 0."),
        (lambda: benchmark_decoding.Config(dtype="bfloat16", with_torch=True), "dtype must be float32 to compare with"),
    ],
)
def test_bad_input(make: Any, message: str):
    with pytest.raises(ValueError, match=message):
        make()
