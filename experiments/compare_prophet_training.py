"""Does training with a prophet change the target's own loss?

    python -m experiments.compare_prophet_training --output runs/prophet_effect

Trains the same target from the same weights on the same batches three ways: alone, with a prophet whose gradient
stops at the target's hidden states, and with one whose gradient goes through; several seeds of each. Draws the
validation loss of the target and prints the paired differences. Finished runs are kept.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.table import Table

from experiments import train_prophet
from experiments.command_line import given_config
from experiments.figures import Panel, save_panels
from experiments.metrics import read_metrics
from experiments.output import print_with_paths
from experiments.report import machine, mean_and_error, mean_curve
from experiments.runtime import exit_with, require_one_process
from experiments.session import finish_each
from spec_jax import DecoderConfig
from spec_jax.losses import bits_per_byte

ALONE = "target alone"
WAYS: dict[str, dict[str, float | bool]] = {
    ALONE: {"prophet_loss_weight": 0.0},
    "prophet, detached": {"detach_target_hiddens": True},
    "prophet": {},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """What to compare.

    Attributes:
      output: folder for the runs, the numbers and the figure.
      seeds: seeds of each way.
      steps: training steps of each run.
      dim: width of the target.
      depth: blocks of the target.
      validate_every: steps between points of the figure.
    """

    output: pathlib.Path = pathlib.Path("runs/prophet_effect")
    seeds: int = 4
    steps: int = 200
    dim: int = 192
    depth: int = 4
    validate_every: int = 20

    def __post_init__(self) -> None:
        if self.seeds < 2:
            raise ValueError(f"seeds must be at least 2, got {self.seeds}: one says nothing of the spread")
        if self.dim < 64:
            raise ValueError(f"dim must be at least 64, the width of a head, got {self.dim}")


def configuration(config: CompareConfig, way: str, seed: int) -> train_prophet.TrainProphetConfig:
    """The run of one way and seed."""
    preset = train_prophet.PRESETS["cpu"][1]
    target = DecoderConfig(dim=config.dim, depth=config.depth, heads=config.dim // 64)
    changed = {
        "target": target,
        "output": config.output / f"{way.replace(', ', '_').replace(' ', '_')}_{seed}",
        "seed": seed,
        "steps": config.steps,
        "validate_every": config.validate_every,
        "validation_batches": 16,
        "checkpoint_every": config.steps,
        "sample_every": 0,
        "report": False,
    }
    return dataclasses.replace(preset, **changed | WAYS[way])


def curves_of(config: CompareConfig, console: Console) -> dict[str, list[list[tuple[float, float]]]]:
    """The curves of all seeds, by way, after training what is not trained yet."""
    runs = {way: [configuration(config, way, seed) for seed in range(config.seeds)] for way in WAYS}
    every = [(run, train_prophet.task(run)) for seeds in runs.values() for run in seeds]
    for _ in finish_each(every, console):
        pass
    return {way: [curve(run) for run in seeds] for way, seeds in runs.items()}


def curve(run: train_prophet.TrainProphetConfig) -> list[tuple[float, float]]:
    """(step, bits per byte of the target on validation text) of a finished run."""
    name = "validation/target_loss"
    return [(r["step"], bits_per_byte(r[name])) for r in read_metrics(run.output) if name in r]


def main(arguments: Sequence[str] | None = None) -> int:
    """Reads the command line, trains, compares."""
    config = given_config("compare_prophet_training", CompareConfig, arguments, __doc__)
    require_one_process()
    console = Console()
    curves = curves_of(config, console)
    # Where runs are of an earlier start with another `validate_every`, these are the points that all have.
    shared = set.intersection(*({step for step, _ in run} for runs in curves.values() for run in runs))
    curves = {way: [[point for point in run if point[0] in shared] for run in runs] for way, runs in curves.items()}
    last = {way: np.array([points[-1][1] for points in runs]) for way, runs in curves.items()}
    table = Table(
        title=f"target's validation loss after {config.steps} steps, {config.seeds} seeds",
        caption="±: standard error of the mean. A detached prophet leaves the target as it is: their curves coincide.",
    )
    for column in ("", "bits per byte", "difference from alone, same seed", "of which seeds better"):
        table.add_column(column)
    for way, bits in last.items():
        difference = bits - last[ALONE]
        cells = ("", "") if way == ALONE else (mean_and_error(difference, "+.4f"), f"{(difference < 0).sum()}")
        table.add_row(way, mean_and_error(bits, ".4f"), *cells)
    console.print(table)
    mean = {way: mean_curve(runs) for way, runs in curves.items()}
    single = {
        way: [(step, bits - alone) for (step, bits), (_, alone) in zip(mean[way], mean[ALONE], strict=True)]
        for way in WAYS
    }
    save_panels(
        config.output / "prophet_effect.png",
        [
            [
                Panel("validation loss, mean of seeds", "training step", "bits per byte", mean),
                Panel("difference from the target alone", "training step", "bits per byte", single, level=0.0),
            ]
        ],
    )
    content = {"machine": machine(), "curves": curves}
    (config.output / "prophet_effect.json").write_text(json.dumps(content, indent=2) + "\n")
    print_with_paths(console, f"prophet_effect.json and prophet_effect.png are in {config.output}")
    return 0


if __name__ == "__main__":
    exit_with(main)
