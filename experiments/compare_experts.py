"""What mixtures of experts gain over dense layers, and what each part of them is worth: one table, one figure.

    python -m experiments.compare_experts --output runs/experts

Trains the sparse decoder of `train_moe cpu`, a dense one of equal training FLOPs, a dense one of equal size, and the
sparse one with one thing changed at a time: z-loss, threshold, capacity, extra feed-forward. All see the same text in
the same batches, and are validated as they decode, with nothing dropped. `--seeds 3` trains each three times, and gives
differences from the sparse one of the same seed with their standard error. What is trained is kept: a second start goes
on where the first one ended.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from experiments import train_moe
from experiments.checks import at_least, different
from experiments.command_line import given_config
from experiments.data import load_text
from experiments.expert_decoder import forward, sum_of
from experiments.figures import Panel, save_panels
from experiments.flops import counted_flops
from experiments.metrics import read_metrics
from experiments.output import make_folder, print_with_paths
from experiments.report import machine, mean_and_error, mean_curve, narrow_table
from experiments.runtime import exit_with, require_one_process, use_compilation_cache
from experiments.session import finish_each
from experiments.train_moe import PRESETS, VARIANTS, TrainMoEConfig
from experiments.train_state import num_parameters
from spec_jax.losses import bits_per_byte, next_token_loss

SPARSE = "sparse"
MAIN = (SPARSE, "equal-flops", "equal-parameters")
WIDER = "capacity-2"
LABELS = {SPARSE: "sparse", "equal-flops": "dense, equal FLOPs", "equal-parameters": "dense, equal size"}
RANKS = {"rank1": "1st", "rank2": "2nd"}
Curve = list[tuple[float, float]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """What to compare.

    Attributes:
      output: folder for the runs, the table and the figure.
      variants: of `sparse` and the names of `train_moe.VARIANTS`.
      steps: training steps of each; None is the preset's.
      batch_size: rows of a batch; None is the preset's. Devices share them evenly.
      seeds: runs of each, with other weights and batches.
      data: the text.
    """

    output: pathlib.Path = pathlib.Path("runs/experts")
    variants: tuple[str, ...] = (SPARSE, *VARIANTS)
    steps: int | None = None
    batch_size: int | None = None
    seeds: int = 1
    data: str = "stdlib"

    def __post_init__(self) -> None:
        known = (SPARSE, *VARIANTS)
        if not self.variants:
            raise ValueError("variants must have at least one name, got ()")
        different(self, "variants")
        if unknown := [name for name in self.variants if name not in known]:
            raise ValueError(f"variants must be of {', '.join(known)}, got {unknown[0]!r}")
        at_least(1, self, "steps", "batch_size", "seeds")

    def run(self, variant: str, seed: int) -> TrainMoEConfig:
        """Configuration of one run."""
        preset = PRESETS["cpu" if variant == SPARSE else f"cpu-{variant}"][1]
        return dataclasses.replace(
            preset,
            data=self.data,
            output=self.output / f"{variant}_{seed}",
            seed=seed,
            steps=preset.steps if self.steps is None else self.steps,
            batch_size=preset.batch_size if self.batch_size is None else self.batch_size,
            sample_every=0,
            report=False,
        )


@dataclasses.dataclass(frozen=True)
class Result:
    """What came of one run. Curves are (step, value).

    Attributes:
      variant: its name.
      seed: of its weights and batches.
      parameters: of the target.
      flops_per_token: of a training step of the target.
      tokens_per_step: tokens predicted in a step.
      bits: bits per byte on validation text.
      dropped: share of the assignments of each rank that capacity refused, mean over the layers.
      load: share of the assignments asked of each expert, by layer and expert.
    """

    variant: str
    seed: int
    parameters: int
    flops_per_token: float
    tokens_per_step: int
    bits: Curve
    dropped: dict[str, Curve]
    load: dict[str, dict[str, Curve]]

    def late(self, curve: Curve) -> float:
        """Mean over the last quarter of the run."""
        return float(np.mean([value for step, value in curve if step > 0.75 * curve[-1][0]]))

    @property
    def imbalance(self) -> float | None:
        """Load of the fullest expert over the mean load, late in the run, in the worst layer."""
        if not self.load:
            return None
        return max(max(map(self.late, experts.values())) * len(experts) for experts in self.load.values())


def training_flops(config: TrainMoEConfig) -> float:
    """Floating-point operations per token of the target's loss and gradient, as XLA counts them in the program.

    The slots of the experts count whether filled or not. The draft and the optimiser are left out.
    """

    def loss(target: Any, tokens_bt: jax.Array) -> jax.Array:
        logits, outputs = forward(target, tokens_bt[:, :-1], train=True, key=jax.random.key(0))
        aux = sum_of(out.total_aux_loss for out in outputs.values())
        return next_token_loss(logits, tokens_bt[:, 1:]) + aux

    target = jax.eval_shape(lambda: train_moe.make_models(config))["target"]
    tokens = jax.ShapeDtypeStruct((config.batch_size, config.sequence_length + 1), jnp.int32)
    return counted_flops(jax.grad(loss), target, tokens) / (config.batch_size * config.sequence_length)


def result_of(variant: str, config: TrainMoEConfig) -> Result:
    """Reads a finished run's metrics."""
    records = read_metrics(config.output)

    def curve(*names: str) -> Curve:
        """The mean of these metrics."""
        found = [(r["step"], float(np.mean([r[name] for name in names]))) for r in records if names[0] in r]
        return [(float(step), value) for step, value in found]

    names = sorted({name for record in records for name in record if name.startswith("train/")})
    ranks = sorted({name.split("/")[-1] for name in names if name.startswith("train/dropped/")})
    load: dict[str, dict[str, Curve]] = {}
    for name in names:
        if name.startswith("train/load/"):
            _, _, layer, expert = name.split("/")
            load.setdefault(layer, {})[expert] = curve(name)
    models = jax.eval_shape(lambda: train_moe.make_models(config))
    return Result(
        variant=variant,
        seed=config.seed,
        parameters=num_parameters(models["target"]),
        flops_per_token=training_flops(config),
        tokens_per_step=config.tokens_per_step,
        bits=[(step, bits_per_byte(loss)) for step, loss in curve("validation/target_loss")],
        dropped={
            rank: curve(*(n for n in names if n.startswith("train/dropped/") and n.endswith(rank))) for rank in ranks
        },
        load=load,
    )


def run_all(config: CompareConfig, console: Console) -> list[Result]:
    """Trains what is not trained yet, and reads all of it."""
    runs = [(variant, config.run(variant, seed)) for seed in range(config.seeds) for variant in config.variants]
    finished = finish_each([(run, train_moe.task(run)) for _, run in runs], console)
    results = []
    for (variant, run), _ in zip(runs, finished, strict=True):
        results.append(result_of(variant, run))
        # A process may map only so much memory, and each compiled program maps some.
        jax.clear_caches()
    return results


COLUMNS = ("variant", "bits per byte", "against sparse", "size", "MFLOP per byte", "dropped", "fullest expert")
CAPTION = (
    "Means over the seeds; ±: standard error. Against sparse: the difference from the sparse one of the same seed. "
    "Size: weights of the target. MFLOP: of a training step of the target, as XLA counts them. Dropped: of the first "
    "and second choices, mean over layers. Fullest expert: its load over the mean load, in the worst layer. Both over "
    "the last quarter of the run."
)


def by_variant(results: Sequence[Result]) -> dict[str, list[Result]]:
    """The runs of each variant, one for each seed."""
    runs: dict[str, list[Result]] = {}
    for result in results:
        runs.setdefault(result.variant, []).append(result)
    return runs


def table_rows(results: Sequence[Result]) -> list[tuple[str, ...]]:
    """The cells of `COLUMNS` for each variant."""
    every = by_variant(results)
    last = {variant: np.array([run.bits[-1][1] for run in runs]) for variant, runs in every.items()}
    rows = []
    for variant, runs in every.items():
        dropped = [
            f"{np.mean([run.late(run.dropped[rank]) for run in runs]):.0%}" for rank in RANKS if rank in runs[0].dropped
        ]
        imbalance = [run.imbalance for run in runs if run.imbalance is not None]
        compared = SPARSE in last and variant != SPARSE
        rows.append(
            (
                LABELS.get(variant, variant),
                mean_and_error(last[variant], ".3f"),
                mean_and_error(last[variant] - last[SPARSE], "+.3f") if compared else "",
                f"{runs[0].parameters / 1e6:.2f} M",
                f"{runs[0].flops_per_token / 1e6:.1f}",
                ", ".join(dropped),
                f"{np.mean(imbalance):.2f} ×" if imbalance else "",
            )
        )
    return rows


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """The table, for a README."""
    lines = [COLUMNS, ["---"] * len(COLUMNS), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def panels(results: Sequence[Result]) -> list[list[Panel]]:
    """Loss against steps and FLOPs of the three that are compared; load and drops of the sparse one.

    Means over the seeds, but for the load: which expert is which differs from seed to seed. Of what there is, if it is
    none of the three.
    """
    every = by_variant(results)
    main = {LABELS[name]: every[name] for name in MAIN if name in every} or every
    steps = {label: mean_curve([run.bits for run in runs]) for label, runs in main.items()}
    flops = {
        label: [(step * runs[0].tokens_per_step * runs[0].flops_per_token / 1e12, bits) for step, bits in steps[label]]
        for label, runs in main.items()
    }
    loss = "validation bits per byte"
    seeds = max(map(len, every.values()))
    all_seeds, first_seed = (f", {seeds} seeds", ", first seed") if seeds > 1 else ("", "")
    line = [
        Panel(f"Loss against steps{all_seeds}", "training step", loss, steps),
        Panel(f"Loss against computation{all_seeds}", "training TFLOP", loss, flops),
    ]
    sheet = [line]
    if SPARSE in every:
        sheet.append(
            [
                Panel(
                    f"Load of each expert, {layer.replace('layer', 'layer ')}{first_seed}",
                    "training step", "share of assignments",
                    {name.removeprefix("expert"): curve for name, curve in experts.items()},
                    level=1 / len(experts), bottom=0.0, own_legend=True,
                )
                for layer, experts in list(every[SPARSE][0].load.items())[-1:]
            ]
        )  # fmt: skip
        dropped = {
            f"{ordinal} choice, {PRESETS[preset][1].experts.capacity_factor:g}": mean_curve(
                [run.dropped[rank] for run in every[name]]
            )
            for name, preset in ((SPARSE, "cpu"), (WIDER, f"cpu-{WIDER}"))
            if name in every
            for rank, ordinal in RANKS.items()
            if rank in every[name][0].dropped
        }
        sheet[-1].append(
            Panel(
                f"Dropped, by choice and capacity{all_seeds}",
                "training step",
                "share dropped",
                dropped,
                bottom=0.0,
                own_legend=True,
            )
        )
    return sheet


def main(arguments: Sequence[str] | None = None) -> int:
    """Reads the command line, trains and writes."""
    config = given_config("compare_experts", CompareConfig, arguments, __doc__)
    require_one_process()
    console = Console()
    use_compilation_cache()
    first = config.run(config.variants[0], 0)
    # Before the folder is made: raises where the text is none to train on.
    load_text(config.data).check(first.sequence_length)
    make_folder(config.output)
    results = run_all(config, console)
    rows = table_rows(results)
    table = narrow_table("the same text and batches", caption=CAPTION)
    for column in COLUMNS:
        table.add_column(column, no_wrap=column == COLUMNS[0])
    for row in rows:
        table.add_row(*row)
    console.print(table)
    content = {
        "machine": machine(),
        "batch": [first.batch_size, first.sequence_length],
        "steps": first.steps,
        "runs": [dataclasses.asdict(result) for result in results],
    }
    (config.output / "experts.json").write_text(json.dumps(content) + "\n")
    (config.output / "experts.md").write_text(markdown(rows))
    save_panels(config.output / "experts.png", panels(results))
    print_with_paths(console, f"experts.json, experts.md and experts.png are in {config.output}")
    return 0


if __name__ == "__main__":
    exit_with(main)
