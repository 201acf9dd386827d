"""What a person reads at the end of a run: the numbers of a table and the lines of its figures."""

import io
import itertools
import json
import pathlib
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from rich.console import Console

from experiments.figures import Panel, save_panels
from experiments.measure import PLAIN, Measurement
from experiments.report import print_table, write_report


def measurement(name: str, gamma: int, speedup: float, **changes: Any) -> Measurement:
    """No two numbers of it are alike."""
    numbers: dict[str, Any] = {
        "batch": 1,
        "milliseconds_min": 1.25,
        "milliseconds_median": 2.5,
        "acceptance_rate": 0.625,
        "acceptance_by_position": [0.75, 0.5],
        "tokens_per_round": 3.75,
        "draft_cost": 0.2,
        "scoring_cost": 1.4,
        "drafting_rate": 0.9,
        "speedup_of_minima": 7.0,
        "predicted_speedup": speedup + 0.125,
    }
    return Measurement(name=name, gamma=gamma, speedup=speedup, **numbers | changes)


MEASURED = [
    measurement(PLAIN, 0, 1.0, acceptance_rate=None, acceptance_by_position=[], tokens_per_round=1.0),
    measurement("γ = 1", 1, 1.5),
    measurement("γ = 2", 2, 2.5),
    measurement("γ = 3", 3, 0.5),
]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, Figure]:
    """The figures that are saved, by the name of their file."""
    figures: dict[str, Figure] = {}
    save = Figure.savefig

    def spy(figure: Figure, path: pathlib.Path) -> None:
        figures[path.name] = figure
        save(figure, path)

    monkeypatch.setattr(Figure, "savefig", spy)
    return figures


def lines_of(figure: Figure, axes: int = 0) -> dict[str, list[tuple[float, float]]]:
    """The points of each line that has a label."""
    lines = [line for line in figure.axes[axes].lines if not str(line.get_label()).startswith("_")]
    return {str(line.get_label()): np.asarray(line.get_xydata()).tolist() for line in lines}


def test_the_table_by_hand():
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system="standard")
    print_table(console, MEASURED, title="batch 1")
    assert isinstance(console.file, io.StringIO)
    rows = [line for line in console.file.getvalue().splitlines() if "2.50" in line]
    bold = "\x1b[1m"
    assert [bold in row for row in rows] == [False, False, True, False]
    assert rows[0].split() == ["plain", "2.50", "1.25", "1.00"]
    cells = rows[1].split()
    assert cells == ["γ", "=", "1", "2.50", "1.25", "62.5%", "3.75", "0.20", "1.40", "1.50", "×", "1.62", "×"]


def test_the_figures_of_a_run_by_hand(tmp_path: pathlib.Path, drawn: dict[str, Figure]):
    """Losses in bits, acceptance from the first position on, and the speed-ups that were measured drawn whole."""
    records = [
        {"step": 2, "train/target_loss": np.log(2), "train/draft_loss": np.log(8), "train/loss": 9.0},
        {"step": 4, "validation/target_loss": np.log(4), "validation/target_bits_per_byte": 2.0},
        {"step": 6, "train/target_loss": np.log(16), "validation/target_loss": np.log(32)},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    write_report(tmp_path, MEASURED[:3], label="small draft", configuration={})
    assert lines_of(drawn["loss.png"]) == {
        "target, training": [[2, pytest.approx(1)], [6, pytest.approx(4)]],
        "draft, training": [[2, pytest.approx(3)]],
        "target, validation, 5.00 at the end": [[4, pytest.approx(2)], [6, pytest.approx(5)]],
    }
    # A line of a single point is no line: it needs a marker to be seen.
    markers = [line.get_marker() for line in drawn["loss.png"].axes[0].lines]
    assert [marker not in ("", "None") for marker in markers] == [False, True, True]
    positions = [[1, 0.75], [2, 0.5]]
    assert lines_of(drawn["acceptance.png"]) == {"γ = 1": positions, "γ = 2": positions}
    assert drawn["acceptance.png"].axes[0].get_ylim() == (0, 1)
    assert len({line.get_color() for line in drawn["acceptance.png"].axes[0].lines}) == 2
    assert lines_of(drawn["speedup.png"]) == {
        "small draft, measured": [[1, 1.5], [2, 2.5]],
        "small draft, formula": [[1, 1.625], [2, 2.625]],
    }
    assert drawn["speedup.png"].axes[0].get_ylim()[0] == 0


def test_a_sheet_of_few_panels_and_single_points(tmp_path: pathlib.Path, drawn: dict[str, Figure]):
    """The legend is no wider than the sheet, and what is measured looks other than what the formula says."""
    names = ("small draft", "early exit", "prophet", "n-gram", "layer skip")
    points = {name: [(1.0, 1.5)] for name in names}
    save_panels(tmp_path / "sheet.png", [[Panel("left", "x", "y", points), Panel("right", "x", "y", points, points)]])
    sheet = drawn["sheet.png"]
    (legend,) = sheet.legends
    assert [text.get_text() for text in legend.get_texts()] == [*names, "formula"]
    assert legend.get_window_extent().width < sheet.bbox.width
    assert [line.get_marker() for line in sheet.axes[1].lines] == ["o"] * 5 + ["x"] * 5


@pytest.mark.parametrize(("last", "whole"), [(3.0, True), (0.62, False), (0.0012, False)])
def test_the_horizontal_axis_of_a_panel(tmp_path: pathlib.Path, drawn: dict[str, Figure], last: float, whole: bool):
    """Whole numbers of steps; of what is no whole number several ticks, apart from each other."""
    save_panels(tmp_path / "sheet.png", [[Panel("one", "x", "y", {"a": [(0.0, 2.0), (last, 1.0)]})]])
    (axes,) = drawn["sheet.png"].axes
    labels = [label for tick, label in zip(axes.get_xticks(), axes.get_xticklabels()) if 0 <= tick <= last]
    assert len(labels) >= 2
    assert all(float(tick).is_integer() for tick in axes.get_xticks()) == whole
    boxes = [label.get_window_extent() for label in labels]
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))


def test_a_line_upon_another_lets_it_be_seen(tmp_path: pathlib.Path, drawn: dict[str, Figure]):
    one, other = [(1.0, 3.0), (2.0, 4.0)], [(1.0, 5.0), (2.0, 6.0)]
    save_panels(tmp_path / "sheet.png", [[Panel("", "x", "y", {"a": one, "b": other, "c": list(one)})]])
    (axes,) = drawn["sheet.png"].axes
    assert [line.get_linestyle() for line in axes.lines] == ["-", "-", "--"]


def test_panels_by_hand(tmp_path: pathlib.Path, drawn: dict[str, Figure]):
    """Names have the same colour in all panels, dashed lines that of their name."""
    one, other = [(1.0, 3.0), (2.0, 4.0)], [(1.0, 5.0), (2.0, 6.0)]
    grid = [
        [Panel("first", "x", "y", {"a": one, "b": other}, {"b": one}, level=2.0, bottom=0.0)],
        [
            Panel("second", "x", "y", {"b": one}),
            Panel("third", "x", "y", {"c": other}, own_legend=True),
            Panel("fourth", "x", "y", {"b": 8 * one}),
        ],
    ]
    save_panels(tmp_path / "sheet.png", grid)
    first, second, third, fourth = drawn["sheet.png"].axes
    assert [axes.get_title() for axes in drawn["sheet.png"].axes] == ["first", "second", "third", "fourth"]
    places = [axes.get_subplotspec() for axes in drawn["sheet.png"].axes]
    assert [(place.rowspan.start, place.colspan.start) for place in places if place] == [(0, 0), (1, 0), (1, 1), (1, 2)]
    level, a, b, dashed = first.lines
    assert set(np.asarray(level.get_ydata()).tolist()) == {2.0}
    assert [np.asarray(line.get_xydata()).tolist() for line in (a, b, dashed)] == np.array([one, other, one]).tolist()
    assert [line.get_linestyle() for line in (a, b, dashed)] == ["-", "-", "--"]
    # Many points are a line without markers.
    assert (second.lines[0].get_marker(), fourth.lines[0].get_marker()) == ("o", "")
    assert a.get_color() != b.get_color() == dashed.get_color() == second.lines[0].get_color()
    # A panel with a legend of its own has colours from the first on.
    assert third.lines[0].get_color() == a.get_color()
    assert first.get_ylim()[0] == 0 < second.get_ylim()[0]
    assert [legend.get_text() for legend in drawn["sheet.png"].legends[0].get_texts()] == ["a", "b", "formula"]
