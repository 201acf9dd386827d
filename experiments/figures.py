"""Pictures of a run, as PNG files."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

Points = Sequence[tuple[float, float]]


def save_loss_curves(path: pathlib.Path, training: Mapping[str, Points], validation: Mapping[str, Points]) -> None:
    """Loss against steps.

    Args:
      path: of the PNG.
      training: (step, bits per byte) of each model, drawn thin.
      validation: the same on validation text, drawn thick.
    """
    figure, axes = _new("training step", "bits per byte", "Loss on text")
    for index, (name, points) in enumerate(training.items()):
        axes.plot(*_columns(points), color=f"C{index}", alpha=0.4, linewidth=1, label=f"{name}, training")
    for index, (name, points) in enumerate(validation.items()):
        steps, bits = _columns(points)
        axes.plot(steps, bits, color=f"C{index}", linewidth=2, marker="o", markersize=4, label=f"{name}, validation")
        if points:
            axes.annotate(
                f"{bits[-1]:.2f}", (steps[-1], bits[-1]), xytext=(6, 0), textcoords="offset points", va="center"
            )
    _legend(axes)
    figure.savefig(path)


def save_acceptance(path: pathlib.Path, by_position: Mapping[str, Sequence[float]]) -> None:
    """Chance that the token at each draft position is kept, one line for each of the named runs."""
    figure, axes = _new("position in the draft", "fraction of drafted tokens kept", "Acceptance by position")
    for index, (name, fractions) in enumerate(by_position.items()):
        positions = range(1, len(fractions) + 1)
        axes.plot(positions, fractions, color=_shade(index, len(by_position)), marker="o", markersize=4, label=name)
    axes.set_ylim(0, 1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
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
            axes.plot(*_columns(predicted[name]), color=f"C{index}", linestyle="--", label=f"{name}, formula")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(axes, loc="lower right")
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
