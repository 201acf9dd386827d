"""What a prophet does to its target: runs of several seeds, a table and panels."""

import json
from typing import Any

import numpy as np
import pytest

from experiments import (
    compare_prophet_training,
    train_prophet,
)
from tests.experiments.strategies import prophet_config


@pytest.mark.slow
def test_prophets_effect_is_compared(tmp_path, monkeypatch: pytest.MonkeyPatch):
    """A detached prophet leaves its target as it is; the other one does not.

    Up to the rounding of sums, which two compiled programs may take in two orders: 6e-8 of the loss was seen.
    test_prophet.py shows that no gradient reaches the target.
    """
    monkeypatch.setitem(train_prophet.PRESETS, "cpu", ("tiny", prophet_config(tmp_path)))
    output = tmp_path / "effect"
    arguments = ["--output", str(output), "--seeds", "2", "--steps", "4", "--dim", "64", "--depth", "1"]
    assert compare_prophet_training.main([*arguments, "--validate-every", "2"]) == 0
    curves = json.loads((output / "prophet_effect.json").read_text())["curves"]
    assert {len(runs) for runs in curves.values()} == {2}
    assert [step for step, _ in curves["prophet"][0]] == [2, 4]
    np.testing.assert_allclose(curves["prophet, detached"], curves["target alone"], rtol=1e-6)
    assert np.abs(np.subtract(curves["prophet"], curves["target alone"])[:, -1, 1]).min() > 1e-2
    assert (output / "prophet_effect.png").exists()
    # Another seed, with points at more steps than the runs that are there.
    assert compare_prophet_training.main([*arguments, "--seeds", "3", "--validate-every", "1"]) == 0
    more = json.loads((output / "prophet_effect.json").read_text())["curves"]
    assert {way: runs[:2] for way, runs in more.items()} == curves
    assert [[step for step, _ in run] for run in more["prophet"]] == [[2, 4]] * 3


def test_the_prophets_effect_by_hand(tmp_path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """The last validation of each run, and its difference from the target alone: mean, standard error, runs better."""
    bits = {"target alone": (3.0, 3.5), "prophet, detached": (3.0, 3.5), "prophet": (2.9, 3.2)}
    curves = {way: [[(2, last + 1 + run), (4, last)] for run, last in enumerate(runs)] for way, runs in bits.items()}
    drawn = []
    monkeypatch.setattr(compare_prophet_training, "curves_of", lambda *_: curves)
    monkeypatch.setattr(compare_prophet_training, "save_panels", lambda _, grid: drawn.extend(grid[0]))
    monkeypatch.setenv("COLUMNS", "200")
    assert compare_prophet_training.main(["--seeds", "2", "--output", str(tmp_path)]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("│ prophet  "))
    cells = [cell.strip() for cell in line.split("│")[1:-1]]
    assert cells == ["prophet", "3.0500 ± 0.1500", "-0.2000 ± 0.1000", "2"]
    mean, difference = drawn
    np.testing.assert_allclose(mean.lines["prophet"], [(2, 4.55), (4, 3.05)])
    np.testing.assert_allclose(difference.lines["prophet"], [(2, -0.2), (4, -0.2)], atol=1e-9)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: compare_prophet_training.CompareConfig(seeds=1), "seeds must be at least 2, got 1"),
        (lambda: compare_prophet_training.CompareConfig(dim=48), "dim must be at least 64, .* got 48"),
    ],
)
def test_bad_input(make: Any, message: str):
    with pytest.raises(ValueError, match=message):
        make()
