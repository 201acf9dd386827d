"""Pictures of a run, as PNG files."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

Points = Sequence[tuple[float, float]]
# Lines of more points than this are drawn without markers.
MANY_POINTS = 15


def save_loss_curves(path: pathlib.Path, training: Mapping[str, Points], validation: Mapping[str, Points]) -> None:
    """Loss against steps.

    Args:
      path: of the PNG.
      training: (step, bits per byte) of each model, drawn thin.
      validation: the same on validation text, drawn thick.
    """
    figure, axes = _new("training step", "bits per byte", "Loss on text")
    _whole_numbers(axes)
    for index, (name, points) in enumerate(training.items()):
        colour, label = f"C{index}", f"{name}, training"
        axes.plot(*_columns(points), color=colour, alpha=0.4, linewidth=1, marker=_marker(points), label=label)
    for index, (name, points) in enumerate(validation.items()):
        steps, bits = _columns(points)
        label = f"{name}, validation" + (f", {bits[-1]:.2f} at the end" if points else "")
        axes.plot(steps, bits, color=f"C{index}", linewidth=2, marker="o", markersize=4, label=label)
    _legend(axes)
    figure.savefig(path)


def save_acceptance(path: pathlib.Path, by_position: Mapping[str, Sequence[float]]) -> None:
    """Chance that the token at each draft position is kept, one line for each of the named runs."""
    figure, axes = _new("position in the draft", "fraction of drafted tokens kept", "Acceptance by position")
    # The first on top: long drafts would hide short ones that begin alike.
    for index, (name, fractions) in enumerate(by_position.items()):
        style = {"color": _shade(index, len(by_position)), "marker": "o", "markersize": 4, "zorder": 3 - index / 100}
        axes.plot(range(1, len(fractions) + 1), fractions, label=name, **style)
    axes.set_ylim(0, 1)
    _whole_numbers(axes)
    _legend(axes, ncols=2)
    figure.savefig(path)


def save_speedup(path: pathlib.Path, measured: Mapping[str, Points], predicted: Mapping[str, Points]) -> None:
    """Speed-up against gamma: measured as lines, the formula's predictions dashed.

    Args:
      path: of the PNG.
      measured: (gamma, speed-up) by strategy.
      predicted: the same from the formula.
    """
    figure, axes = _new("tokens drafted a round, γ", "speed-up over plain decoding", "Speed-up of speculative decoding")
    axes.axhline(1, color="0.6", linewidth=1)
    for index, (name, points) in enumerate(measured.items()):
        axes.plot(*_columns(points), color=f"C{index}", linewidth=2, marker="o", label=f"{name}, measured")
        if name in predicted:
            formula, label = predicted[name], f"{name}, formula"
            axes.plot(*_columns(formula), color=f"C{index}", linestyle="--", marker=_marker(formula), label=label)
    axes.set_ylim(bottom=0)
    _whole_numbers(axes)
    _legend(axes)
    figure.savefig(path)


@dataclasses.dataclass(frozen=True)
class Panel:
    """One of several pictures on a sheet.

    Attributes:
      title: above it.
      x: what the horizontal axis shows.
      y: what the vertical axis shows.
      lines: points by name, drawn whole; one that coincides with one before it has gaps, for both to be seen.
      formula: what a formula gives for the same names, drawn dashed.
      level: a horizontal line to compare with, or None.
      bottom: where the vertical axis starts, or None.
      own_legend: whether its names are its own: colours from the first on, and a legend inside.
    """

    title: str
    x: str
    y: str
    lines: Mapping[str, Points]
    formula: Mapping[str, Points] = dataclasses.field(default_factory=dict)
    level: float | None = None
    bottom: float | None = None
    own_legend: bool = False


def save_panels(path: pathlib.Path, grid: Sequence[Sequence[Panel]]) -> None:
    """A sheet of panels; a name has the same colour in all of them, and their legend stands below."""
    rows, columns = len(grid), max(map(len, grid))
    figure = Figure(figsize=(3.3 * columns, 2.7 * rows), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    shared_colours: dict[str, str] = {}
    shared_handles: dict[str, Any] = {}
    formula_handle: dict[str, Any] = {}
    for row, line in enumerate(grid):
        for column, panel in enumerate(line):
            colours, handles = ({}, {}) if panel.own_legend else (shared_colours, shared_handles)
            axes = figure.add_subplot(rows, columns, row * columns + column + 1)
            axes.set(xlabel=panel.x, ylabel=panel.y)
            axes.set_title(panel.title, fontsize=9)
            axes.grid(color="0.9")
            axes.spines[["top", "right"]].set_visible(False)
            if panel.level is not None:
                axes.axhline(panel.level, color="0.6", linewidth=1)
            drawn: list[Points] = []
            for name, points in panel.lines.items():
                colour = colours.setdefault(name, f"C{len(colours)}")
                marker = "o" if len(points) <= MANY_POINTS else ""
                (handles[name],) = axes.plot(
                    *_columns(points), color=colour, marker=marker, markersize=3, linewidth=1.5
                )
                if points in drawn:
                    handles[name].set_dashes((4, 4))
                drawn.append(points)
            for name, points in panel.formula.items():
                dashed: dict[str, Any] = {"linestyle": "--", "linewidth": 1, "marker": _marker(points)}
                axes.plot(*_columns(points), color=colours[name], **dashed)
                formula_handle["formula"] = Line2D([], [], color="0.3", **dashed)
            axes.set_ylim(bottom=panel.bottom)
            if all(float(x).is_integer() for points in panel.lines.values() for x, _ in points):
                _whole_numbers(axes, nbins=6)
            else:
                axes.xaxis.set_major_locator(MaxNLocator(nbins=4))
            if panel.own_legend:
                # Room above the lines for rows of two names.
                bottom, top = axes.get_ylim()
                axes.set_ylim(bottom, top + (0.06 + 0.1 * math.ceil(len(handles) / 2)) * (top - bottom))
                axes.legend(handles.values(), handles.keys(), loc="upper center", fontsize=7, ncols=2, frameon=False)
    if legend := shared_handles | formula_handle:
        # There is room for two names below a panel.
        ncols = min(len(legend), 2 * columns)
        figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=ncols, frameon=False)
    figure.savefig(path)


def _new(x: str, y: str, title: str) -> tuple[Figure, Axes]:
    # A Figure made by itself, not through pyplot, touches no global state and needs no closing.
    figure = Figure(figsize=(7, 4.2), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set(xlabel=x, ylabel=y, title=title)
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _whole_numbers(axes: Axes, **options: Any) -> None:
    """Along the horizontal axis, even where there is but one."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, **options))


def _marker(points: Points) -> str:
    """For a line of one point, which would not be seen; not round, as the points of lines drawn thick are."""
    return "x" if len(points) == 1 else ""


def _columns(points: Points) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _shade(index: int, count: int) -> tuple[float, float, float]:
    """From light to dark blue."""
    darkness = (index + 1) / count
    return (0.75 - 0.72 * darkness, 0.86 - 0.6 * darkness, 0.97 - 0.45 * darkness)


def _legend(axes: Axes, **options: Any) -> None:
    # Matplotlib warns of a legend with nothing in it.
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, **options)
