"""Which strategy when: trains on the same text and budget what needs training, and measures every strategy.

    python -m experiments.compare_strategies --output runs/strategies

Trains a small draft, an early exit and a prophet with the same steps and batches as `train_draft cpu`; n-gram lookup
and layer skipping need no training and use the small draft's target. Then decodes code and prose, at temperatures 0
and 1 and batches 1, 4 and 16. What is trained, and what is measured of each strategy at each batch size, is kept: a
second start goes on where the first one ended.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import jax
import numpy as np
from rich.console import Console

import spec_jax
from experiments import search_layer_skip, train_draft, train_early_exit, train_prophet
from experiments.checkpoints import named_leaves
from experiments.checks import at_least, different
from experiments.command_line import given_config
from experiments.data import load_text, validation_batches
from experiments.decoding_run import DecodingRunConfig
from experiments.figures import Panel, save_panels
from experiments.generate import LoadedRun, load_run
from experiments.measure import PLAIN, Measurement, measure_costs, measure_decoding
from experiments.output import make_folder, print_with_paths, write_whole
from experiments.report import machine, narrow_table
from experiments.runtime import exit_with, require_one_process, use_compilation_cache
from experiments.session import SAME_COMMAND, Task, finish_each

CELLS = "cells"
DRAFT, EXIT, PROPHET, NGRAM, SKIP = "small draft", "early exit", "prophet", "n-gram", "layer skip"
TRAINED: dict[str, tuple[Any, Callable[[Any], Task]]] = {
    DRAFT: (train_draft.PRESETS, train_draft.task),
    EXIT: (train_early_exit.PRESETS, train_early_exit.task),
    PROPHET: (train_prophet.PRESETS, train_prophet.task),
}
# Bytes whose share tells prose from code: code has more of everything else.
PROSE = np.isin(np.arange(256), np.frombuffer(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ ,", np.uint8))


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """What to compare.

    Attributes:
      output: folder for the training runs, the table and the figure.
      preset: of the training scripts.
      steps: training steps of each; None is the preset's.
      gammas: tokens drafted a round.
      batches: rows decoded at once.
      temperatures: of the text drawn.
      repeats: timed repeats of each, with prompts of their own.
      generate_length: bytes drawn a row.
    """

    output: pathlib.Path = pathlib.Path("runs/strategies")
    preset: str = "cpu"
    steps: int | None = None
    gammas: tuple[int, ...] = (1, 2, 3, 5, 8)
    batches: tuple[int, ...] = (1, 4, 16)
    temperatures: tuple[float, ...] = (0.0, 1.0)
    repeats: int = 3
    generate_length: int = 192

    def __post_init__(self) -> None:
        if self.preset not in train_draft.PRESETS:
            raise ValueError(f"preset must be one of {', '.join(train_draft.PRESETS)}, got {self.preset!r}")
        at_least(1, self, "steps", "gammas", "batches", "repeats", "generate_length")
        at_least(0, self, "temperatures")
        different(self, "gammas", "batches", "temperatures")
        if not np.isfinite(self.temperatures).all():
            raise ValueError(f"temperatures must be finite, got {self.temperatures}")


@dataclasses.dataclass(frozen=True)
class Row:
    """One measurement and where it was taken."""

    strategy: str
    text: str
    temperature: float
    measurement: Measurement

    @property
    def place(self) -> tuple[str, str, float, int]:
        """Strategy, text, temperature, batch."""
        return self.strategy, self.text, self.temperature, self.measurement.batch

    def as_json(self) -> dict[str, Any]:
        """Flat."""
        place = {"strategy": self.strategy, "text": self.text, "temperature": self.temperature}
        return place | dataclasses.asdict(self.measurement)

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Row:
        """The inverse of `as_json`."""
        fields = {field.name for field in dataclasses.fields(Measurement)}
        measurement = Measurement(**{name: value for name, value in row.items() if name in fields})
        return cls(row["strategy"], row["text"], row["temperature"], measurement)


def train_all(config: CompareConfig, console: Console) -> DecodingRunConfig:
    """Trains what is not trained yet; returns the small draft's configuration, whose sizes all share."""
    runs = {}
    for name, (presets, task) in TRAINED.items():
        preset = presets[config.preset][1]
        folder = config.output / name.replace(" ", "_")
        steps = preset.steps if config.steps is None else config.steps
        changed = dataclasses.replace(preset, output=folder, steps=steps, report=False, sample_every=0)
        runs[name] = changed, task(changed)
    for _ in finish_each(list(runs.values()), console):
        pass
    return runs[DRAFT][0]


def prompts_of(split: np.ndarray, kind: str, *, count: int, length: int) -> np.ndarray:
    """(count, length) pieces of text that look most like prose or most like code, spread over the split.

    Raises:
      ValueError: the split has not as many.
    """
    last = len(split) - length
    starts = np.arange(0, last + 1, max(length, last // 4096))
    share = np.array([PROSE[split[start : start + length]].mean() for start in starts])
    order = np.argsort(share if kind == "code" else -share, kind="stable")
    # The hundredth part at the far end holds tables and rulers, which are neither.
    order = order[len(order) // 100 :]
    if count > len(order):
        raise ValueError(f"repeats · batches must be at most {len(order)}, the pieces of test text, got {count}")
    chosen = starts[np.sort(order[:count])]
    return np.stack([split[start : start + length] for start in chosen]).astype(np.int32)


def measure_all(
    config: CompareConfig, shared: DecodingRunConfig, runs: Mapping[str, LoadedRun], console: Console
) -> list[Row]:
    """Every strategy, gamma, batch, temperature and kind of text."""
    text = load_text(shared.data)
    # Searched where a cell is measured that skips layers.
    searched = cache(lambda: searched_layers(runs[DRAFT].target, text.validation))
    targets = {name: run.target for name, run in runs.items()}
    targets |= {NGRAM: targets[DRAFT], SKIP: targets[DRAFT]}

    def drafter(name: str, gamma: int) -> spec_jax.Drafter:
        if name == NGRAM:
            return spec_jax.NGram(gamma=gamma)
        if name == SKIP:
            return spec_jax.LayerSkip(searched().skip_attention, searched().skip_feed_forward, gamma=gamma)
        return runs[name].strategy.drafter(runs[name].models, gamma)

    rows = []
    for batch in config.batches:
        shape = config.repeats, batch, shared.prompt_length
        texts = {
            kind: prompts_of(text.test, kind, count=shape[0] * batch, length=shape[2]).reshape(shape)
            for kind in ("code", "prose")
        }
        for name, target in targets.items():
            cell = config.output / CELLS / f"{name.replace(' ', '_')}_{batch}.json"
            measure = partial(measure_cell, config, name, target, partial(drafter, name), texts, console)
            models = runs[name].models if name in runs else target
            rows += kept_cell(cell, config, models, measure)
    return rows


def measure_cell(
    config: CompareConfig,
    name: str,
    target: Any,
    drafter: Callable[[int], spec_jax.Drafter],
    texts: Mapping[str, np.ndarray],
    console: Console,
) -> list[Row]:
    """One strategy at one batch size: every gamma, temperature and kind of text (repeats, B, P)."""
    drafters = {f"γ = {gamma}": drafter(gamma) for gamma in config.gammas}
    rows = []
    common: dict[str, Any] = {"max_new_tokens": config.generate_length}
    costs = measure_costs(target, drafters, texts["code"][0], sampling=spec_jax.Sampling(), **common)
    for kind, prompts in texts.items():
        for temperature in config.temperatures:
            sampling = spec_jax.Sampling(temperature=temperature)
            measured = measure_decoding(target, drafters, list(prompts), sampling=sampling, costs=costs, **common)
            rows += [Row(name, kind, temperature, m) for m in measured if m.name != PLAIN]
            fastest = max((row.measurement for row in rows[-len(drafters) :]), key=lambda m: m.speedup)
            console.print(
                f"{name}, batch {fastest.batch}, {kind}, temperature {temperature:g}: "
                f"{fastest.speedup:.2f} × at {fastest.name}, the formula says {fastest.predicted_speedup:.2f} ×",
                soft_wrap=True,
            )
    # A process may map only so much memory, and each compiled program maps some.
    jax.clear_caches()
    return rows


def kept_cell(path: pathlib.Path, config: CompareConfig, models: Any, measure: Callable[[], list[Row]]) -> list[Row]:
    """The rows of a cell from its file, where an earlier start measured these models so; measured now otherwise."""
    weights = {name: zlib.crc32(np.asarray(leaf).tobytes()) for name, leaf in named_leaves(models).items()}
    how = dataclasses.asdict(config) | {"output": None, "batches": None, "machine": machine(), "weights": weights}
    how = json.loads(json.dumps(how))
    try:
        kept = json.loads(path.read_text())
        if kept["how"] == how:
            return [Row.from_json(row) for row in kept["rows"]]
    except (OSError, ValueError, KeyError, TypeError):
        # There is none, or it is damaged: measured again, it is whole.
        pass
    rows = measure()
    path.parent.mkdir(exist_ok=True)
    write_whole(path, json.dumps({"how": how, "rows": [row.as_json() for row in rows]}, indent=2) + "\n")
    return rows


def ngram_extremes(config: CompareConfig, shared: DecodingRunConfig, target: Any, console: Console) -> list[Row]:
    """N-gram lookup where all repeats itself, and where it finds nothing: a drafting strategy's best and worst.

    Repetitive is 16 bytes of the test text over and over, continued greedily; noise is drawn at temperature 5, where
    hardly two bytes come twice.
    """
    split = load_text(shared.data).test
    pieces = prompts_of(split, "code", count=config.repeats, length=16)
    repeated = np.tile(pieces, (1, -(-shared.prompt_length // 16)))[:, None, : shared.prompt_length]
    noise = np.random.default_rng(0).integers(0, 256, repeated.shape).astype(np.int32)
    drafters = {f"γ = {gamma}": spec_jax.NGram(gamma=gamma) for gamma in config.gammas}
    rows = []
    for kind, prompts, temperature in (("repetitive", repeated, 0.0), ("noise", noise, 5.0)):
        sampling = spec_jax.Sampling(temperature=temperature)
        measured = measure_decoding(
            target, drafters, list(prompts), max_new_tokens=config.generate_length, sampling=sampling
        )
        for m in measured:
            if m.name != PLAIN:
                rows.append(Row(NGRAM, kind, temperature, m))
                console.print(
                    f"n-gram on {kind} text, {m.name}: {m.speedup:.2f} × (of the fastest repeats "
                    f"{m.speedup_of_minima:.2f} ×), drafting in {m.drafting_rate:.0%} of the rounds",
                    soft_wrap=True,
                )
    return rows


def searched_layers(target: Any, validation: np.ndarray) -> search_layer_skip.Found:
    """The best set of sublayers to skip."""
    batches = list(validation_batches(validation, batch_size=8, sequence_length=128, max_batches=1))
    way = search_layer_skip.search(target, batches, max_gamma=8, scoring_cost=1.8)
    return max(way, key=lambda found: found.speedup)


def print_rows(console: Console, rows: Sequence[Row]) -> None:
    """The best gamma of each strategy in each place: measured, formula, acceptance."""
    places = sorted({(row.measurement.batch, row.temperature, row.text) for row in rows})
    strategies = list(dict.fromkeys(row.strategy for row in rows))
    table = narrow_table(
        "speed-up over plain decoding at temperature T, at the best γ; below: the formula's, what was accepted",
        show_edge=False,
    )
    for column in ("batch", "T", "text", *strategies):
        table.add_column(column, no_wrap=True)
    for batch, temperature, text in places:
        cells = []
        for strategy in strategies:
            here = [row.measurement for row in rows if row.place == (strategy, text, temperature, batch)]
            best = max(here, key=lambda m: m.speedup)
            rate = f"{best.acceptance_rate:.0%}" if best.acceptance_rate is not None else ""
            cells.append(f"{best.speedup:.2f}, γ {best.gamma}\n{best.predicted_speedup:.2f}, {rate}")
        table.add_row(str(batch), f"{temperature:g}", text, *cells)
    console.print(table)


def panels(rows: Sequence[Row]) -> list[list[Panel]]:
    """One row a text and temperature: acceptance by position, then the speed-up at each batch."""
    grid = []
    for text, temperature in dict.fromkeys((row.text, row.temperature) for row in rows):
        here = [row for row in rows if (row.text, row.temperature) == (text, temperature)]
        batches = sorted({row.measurement.batch for row in here})
        strategies = list(dict.fromkeys(row.strategy for row in here))
        longest = max(row.measurement.gamma for row in here)
        title = f"{text}, temperature {temperature:g}"
        acceptance = {
            row.strategy: list(enumerate(row.measurement.acceptance_by_position, 1))
            for row in here
            if row.measurement.gamma == longest and row.measurement.batch == batches[0]
        }
        line = [Panel(title, "position in the draft", "fraction kept", acceptance, bottom=0.0)]
        for batch in batches:
            measured: dict[str, list[tuple[float, float]]] = {name: [] for name in strategies}
            predicted: dict[str, list[tuple[float, float]]] = {name: [] for name in strategies}
            for row in here:
                if (m := row.measurement).batch == batch:
                    measured[row.strategy].append((m.gamma, m.speedup))
                    predicted[row.strategy].append((m.gamma, m.predicted_speedup))
            line.append(Panel(f"{title}, batch {batch}", "γ", "speed-up", measured, predicted, level=1.0, bottom=0.0))
        grid.append(line)
    return grid


def main(arguments: Sequence[str] | None = None) -> int:
    """Reads the command line, trains, measures and writes."""
    config = given_config("compare_strategies", CompareConfig, arguments, __doc__)
    require_one_process()
    console = Console()
    use_compilation_cache()
    _, preset = train_draft.PRESETS[config.preset]
    # Before anything is trained: raises where there are too few.
    prompts_of(
        load_text(preset.data).test, "code", count=config.repeats * max(config.batches), length=preset.prompt_length
    )
    make_folder(config.output)
    shared = train_all(config, console)
    runs = {name: load_run(config.output / name.replace(" ", "_")) for name in TRAINED}
    cell = config.output / CELLS / "n-gram_extremes.json"
    target = runs[DRAFT].target
    try:
        rows = measure_all(config, shared, runs, console)
        print_rows(console, rows)
        extremes = kept_cell(cell, config, target, partial(ngram_extremes, config, shared, target, console))
    except KeyboardInterrupt:
        console.print(f"[yellow]Stopped; go on with {SAME_COMMAND}: what is measured of a strategy and batch is kept.")
        raise
    content = {"machine": machine(), "rows": [row.as_json() for row in rows + extremes]}
    (config.output / "strategies.json").write_text(json.dumps(content, indent=2) + "\n")
    save_panels(config.output / "strategies.png", panels(rows))
    print_with_paths(console, f"strategies.json and strategies.png are in {config.output}")
    return 0


if __name__ == "__main__":
    exit_with(main)
