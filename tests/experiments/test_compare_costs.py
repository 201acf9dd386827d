"""What a round costs, by drafter: the models that are asked for, a table, JSON."""

import json
import pathlib
from typing import Any

import pytest

from experiments import (
    compare_costs,
)


def test_costs_are_compared(tmp_path):
    output = tmp_path / "costs.json"
    arguments = ["--dim", "32", "--depth", "2", "--gammas", "1", "2", "--repeats", "1", "--max-new-tokens", "8"]
    assert compare_costs.main([*arguments, "--output", str(output)]) == 0
    rows = json.loads(output.read_text())["rows"]
    assert [(row["strategy"], row["gamma"]) for row in rows] == [
        (name, gamma) for gamma in (1, 2) for name in ("small draft", "early exit", "prophet", "n-gram")
    ]
    assert all(row["draft_cost"] > 0 and row["scoring_cost"] > 0 for row in rows)


def test_costs_are_of_the_models_asked_for(
    tmp_path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """And a round's cost is its draft's, token for token, and its scoring."""
    told = []

    def spy(target: Any, drafters: Any, prompt: Any, *, repeats: int, **_: Any) -> dict[str, tuple[float, float]]:
        told.append((target, drafters, repeats))
        return dict.fromkeys(drafters, (0.25, 1.5))

    monkeypatch.setattr(compare_costs, "measure_costs", spy)
    arguments = ["--dim", "64", "--depth", "4", "--draft-depth", "2", "--gammas", "3", "--repeats", "7"]
    assert compare_costs.main([*arguments, "--output", str(tmp_path / "costs.json")]) == 0
    ((target, drafters, repeats),) = told
    assert (target.config.depth, target.config.early_exit_layer, repeats) == (4, 2, 7)
    assert drafters["small draft"].draft.config.depth == 2
    assert "2.25 (0.25, 1.50)" in capsys.readouterr().out


def test_a_file_may_not_be_a_new_folder(tmp_path):
    with pytest.raises(ValueError, match="output must be a file, got the folder"):
        compare_costs.main(["--output", str(tmp_path / "new" / "..")])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: compare_costs.CostConfig(gammas=(2, 2)), "gammas must be different ones, got 2 2"),
        (lambda: compare_costs.CostConfig(draft_depth=6), "draft_depth must be in .1, depth = 6., got 6"),
        (
            lambda: compare_costs.main(["--output", str(pathlib.Path(__file__).parent)]),
            "output must be a file, got the folder",
        ),
    ],
)
def test_bad_input(make: Any, message: str):
    with pytest.raises(ValueError, match=message):
        make()
