"""Kills training runs with SIGKILL at random moments, resumes them, and compares what they end with.

    python -m experiments.check_resume --runs 20

One run of a tiny pair goes through undisturbed. Every other one is killed several times, anywhere between its first
steps and its end (writing a checkpoint included, which such a run does most of the time), and resumed until it is
done. All parameters and optimiser states must be equal to the undisturbed run's, bit for bit.
"""

from __future__ import annotations

import dataclasses
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

import jax
import numpy as np
from rich.console import Console

from experiments import train_draft
from experiments.checkpoints import open_run
from experiments.checks import at_least
from experiments.command_line import given_config
from experiments.metrics import FILE as METRICS
from experiments.metrics import read_metrics
from experiments.output import make_folder
from experiments.runtime import exit_with
from experiments.train_state import TrainState
from experiments.training import state_parts
from spec_jax import DecoderConfig

CHECKPOINT_EVERY = 5
DIFFERENT = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckConfig:
    """How much to check.

    Attributes:
      runs: disturbed runs.
      kills: times each is killed.
      steps: training steps of each.
      seed: of the moments.
      folder: where the runs go, empty if it is there; by default a temporary folder.
    """

    runs: int = 20
    kills: int = 3
    steps: int = 300
    seed: int = 0
    folder: pathlib.Path | None = None

    def __post_init__(self) -> None:
        at_least(1, self, "runs", "kills", "steps")


def tiny_config(output: pathlib.Path, steps: int) -> train_draft.TrainDraftConfig:
    """A run whose steps take milliseconds and which writes checkpoints most of the time."""
    return train_draft.TrainDraftConfig(
        output=output,
        target=DecoderConfig(dim=32, depth=2, heads=2, dim_head=16),
        draft=DecoderConfig(dim=16, depth=1, heads=1, dim_head=16),
        steps=steps,
        batch_size=8,
        accumulation=2,
        sequence_length=32,
        learning_rate=3e-3,
        schedule="cosine",
        warmup_steps=10,
        log_every=CHECKPOINT_EVERY,
        validate_every=50,
        validation_batches=2,
        sample_every=0,
        checkpoint_every=CHECKPOINT_EVERY,
        report=False,
    )


def command(config: train_draft.TrainDraftConfig) -> list[str]:
    """The command line of a run like that."""
    pair = [
        item
        for name in ("target", "draft")
        for field in ("dim", "depth", "heads", "dim_head")
        for item in (f"--{name}.{field.replace('_', '-')}", str(getattr(getattr(config, name), field)))
    ]
    fields = (
        "output steps batch_size accumulation sequence_length learning_rate schedule warmup_steps adam_b2 log_every "
        "validate_every validation_batches sample_every checkpoint_every"
    )
    plain = [item for f in fields.split() for item in (f"--{f.replace('_', '-')}", str(getattr(config, f)))]
    return [sys.executable, "-m", "experiments.train_draft", "cpu", *plain, *pair, "--no-report"]


def final_leaves(config: train_draft.TrainDraftConfig) -> list[np.ndarray]:
    """Every array of a finished run's last checkpoint.

    Raises:
      ValueError: it has none of its last step.
    """
    shapes = jax.eval_shape(lambda: TrainState.create(train_draft.make_models(config), config.optimizer()))
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    template = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)
    with open_run(config.output) as checkpoints:
        if checkpoints.latest != config.steps:
            raise ValueError(f"{config.output} must end with step {config.steps}, got {checkpoints.latest}")
        return [np.asarray(x) for x in jax.tree.leaves(checkpoints.restore(config.steps, state_parts(template)))]


def disturbed_run(config: train_draft.TrainDraftConfig, *, kills: int, dice: random.Random) -> list[int]:
    """Runs, kills and resumes until the run is done; returns the step of the newest checkpoint after each kill."""
    found = []
    for attempt in range(kills + 1):
        begin = _newest(config.output)
        log = config.output.with_suffix(f".{attempt}.log")
        with log.open("wb") as output:
            flag = "--overwrite" if begin is None else "--resume"
            process = subprocess.Popen([*command(config), flag], stdout=output, stderr=subprocess.STDOUT)
        try:
            if attempt < kills:
                _kill_somewhere(process, config, begin or 0, dice)
            code = process.wait()
        finally:
            # It does not outlive a check that is interrupted.
            process.kill()
            process.wait()
        if code not in ((0,) if attempt == kills else (0, -signal.SIGKILL)):
            raise RuntimeError(f"the run ended with code {code}:\n{log.read_text()[-3000:]}")
        found.append(_newest(config.output) or 0)
    return found


def _kill_somewhere(
    process: subprocess.Popen[bytes], config: train_draft.TrainDraftConfig, begin: int, dice: random.Random
) -> None:
    """Waits until a random step is logged, or now and then for a moment of the start, and kills soon after."""
    old_log = _inode(config.output / METRICS)
    while_starting = dice.random() < 0.1
    deadline = time.monotonic() + (dice.uniform(0, 5) if while_starting else 600)
    step = dice.randint(begin + 1, config.steps - 1) if begin + 1 < config.steps else begin
    while process.poll() is None and time.monotonic() < deadline:
        # A resumed run replaces its log, so an old one says nothing of how far it is.
        if not while_starting and _inode(config.output / METRICS) != old_log:
            records = read_metrics(config.output)
            if records and records[-1]["step"] >= step:
                break
        time.sleep(0.002)
    time.sleep(dice.uniform(0, 0.15))
    process.kill()


def _inode(path: pathlib.Path) -> int | None:
    return path.stat().st_ino if path.exists() else None


def _newest(output: pathlib.Path) -> int | None:
    try:
        with open_run(output) as checkpoints:
            return checkpoints.latest
    except ValueError:
        return None


def check(config: CheckConfig, folder: pathlib.Path, console: Console) -> int:
    """Runs everything in a folder; returns 0 when all runs end alike, 1 otherwise."""
    dice = random.Random(config.seed)
    reference = tiny_config(folder / "undisturbed", config.steps)
    subprocess.run(command(reference), check=True, stdout=subprocess.DEVNULL)
    expected = final_leaves(reference)
    different = 0
    for index in range(config.runs):
        run = tiny_config(folder / f"run{index}", config.steps)
        steps = disturbed_run(run, kills=config.kills, dice=dice)
        same = all(np.array_equal(a, b) for a, b in zip(expected, final_leaves(run), strict=True))
        different += not same
        verdict = "equal, bit for bit" if same else "[red]DIFFERENT"
        at = ", ".join(str(step) for step in steps[:-1])
        console.print(f"run {index + 1} of {config.runs}: killed, newest checkpoints then {at}; {verdict}")
    return DIFFERENT if different else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Reads the command line and checks."""
    config = given_config("check_resume", CheckConfig, arguments, __doc__)
    console = Console(highlight=False)
    if config.folder is not None:
        if config.folder.exists() and (not config.folder.is_dir() or any(config.folder.iterdir())):
            raise ValueError(f"folder must be empty or not exist, got {config.folder}")
        make_folder(config.folder, argument="folder")
        return check(config, config.folder, console)
    with tempfile.TemporaryDirectory() as folder:
        return check(config, pathlib.Path(folder), console)


if __name__ == "__main__":
    exit_with(main)
