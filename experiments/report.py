"""The end of a training run: decoding measured, a table, a JSON file and three pictures."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import platform
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from experiments import figures
from experiments.measure import PLAIN, Measurement
from experiments.metrics import read_metrics
from experiments.output import ACCEPTANCE_FIGURE, LOSS_FIGURE, REPORT, SPEEDUP_FIGURE
from spec_jax.losses import bits_per_byte

CPU_INFO = pathlib.Path("/proc/cpuinfo")


def machine() -> dict[str, Any]:
    """What the measurements ran on."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "processor": _processor(),
        "devices": jax.device_count(),
        "platform": device.platform,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
    }


def _processor() -> str:
    """Its name, as far as the system tells."""
    if CPU_INFO.exists():
        for line in CPU_INFO.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def narrow_table(title: str, **options: Any) -> Table:
    """A table of which much fits 80 columns: one space between columns, and a line below their heads only."""
    return Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), **options)


def mean_and_error(values: np.ndarray, form: str) -> str:
    """The mean of several runs and its standard error, in this format; of one run, its value."""
    mean = format(values.mean(), form)
    if len(values) == 1:
        return mean
    return f"{mean} ± {format(values.std(ddof=1) / len(values) ** 0.5, form.removeprefix('+'))}"


def mean_curve(curves: Sequence[figures.Points]) -> list[tuple[float, float]]:
    """The mean of several runs' curves, at the places that all of them have."""
    runs = [dict(curve) for curve in curves]
    shared = [x for x in runs[0] if all(x in run for run in runs)]
    return [(x, float(np.mean([run[x] for run in runs]))) for x in shared]


def print_table(console: Console, measurements: Sequence[Measurement], *, title: str) -> None:
    """Plain decoding and each strategy, the fastest one in bold."""
    best = max(measurements, key=lambda m: m.speedup)
    table = narrow_table(
        title,
        caption="accepted: how often a token is kept when all drafted before it were; "
        "c, s: time to draft one token and to score a draft, in plain steps",
    )
    table.add_column("decoding", no_wrap=True)
    for column in ("ms/token\nmedian", "ms/token\nmin", "accepted", "tokens\n/round", "c", "s", "speed-up", "formula"):
        table.add_column(column, justify="right", no_wrap=True)
    for m in measurements:
        drafted = m.acceptance_rate is not None
        table.add_row(
            m.name,
            f"{m.milliseconds_median:.2f}",
            f"{m.milliseconds_min:.2f}",
            f"{m.acceptance_rate:.1%}" if m.acceptance_rate is not None else "",
            f"{m.tokens_per_round:.2f}",
            f"{m.draft_cost:.2f}" if drafted else "",
            f"{m.scoring_cost:.2f}" if drafted else "",
            f"{m.speedup:.2f} ×" if drafted else "",
            f"{m.predicted_speedup:.2f} ×" if drafted else "",
            style="bold" if m is best and drafted else "",
        )
    console.print(table)


def write_report(
    output: pathlib.Path, measurements: Sequence[Measurement], *, label: str, configuration: dict[str, Any]
) -> None:
    """All numbers as JSON, and the figures, into the run's folder.

    Args:
      output: the folder.
      measurements: of decoding.
      label: the strategy's name in the figures.
      configuration: the run's.
    """
    content = {
        "machine": machine(),
        "configuration": configuration,
        "decoding": [dataclasses.asdict(m) for m in measurements],
    }
    (output / REPORT).write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
    save_loss_figure(output)
    drafted = [m for m in measurements if m.name != PLAIN]
    figures.save_acceptance(output / ACCEPTANCE_FIGURE, {m.name: m.acceptance_by_position for m in drafted})
    figures.save_speedup(
        output / SPEEDUP_FIGURE,
        {label: [(m.gamma, m.speedup) for m in drafted]},
        {label: [(m.gamma, m.predicted_speedup) for m in drafted]},
    )


def save_loss_figure(output: pathlib.Path) -> None:
    """Loss curves from the run's metrics."""
    records = read_metrics(output)

    def curves(part: str) -> dict[str, list[tuple[float, float]]]:
        names = {key for record in records for key in record if key.startswith(f"{part}/") and key.endswith("_loss")}
        return {
            name.removeprefix(f"{part}/").removesuffix("_loss"): [
                (record["step"], bits_per_byte(record[name])) for record in records if name in record
            ]
            for name in sorted(names, reverse=True)
        }

    figures.save_loss_curves(output / LOSS_FIGURE, curves("train"), curves("validation"))
