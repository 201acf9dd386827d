"""A tiny run, for the tests of what surrounds training."""

import dataclasses
import io
import pathlib

import jax
import numpy as np
from rich.console import Console

from experiments import check_resume, train_draft
from experiments.config import RunConfig
from experiments.session import Task, run


def tiny_text(folder: pathlib.Path) -> pathlib.Path:
    """40,000 bytes that a small model can learn something of."""
    path = folder / "text.txt"
    words = np.random.default_rng(0).choice(["alpha ", "beta ", "gamma\n", "delta, "], 8000)
    path.write_bytes("".join(words).encode()[:40_000])
    return path


def tiny_config(folder: pathlib.Path, **changes) -> train_draft.TrainDraftConfig:
    text = folder / "text.txt"
    config = dataclasses.replace(
        check_resume.tiny_config(folder / "run", 12),
        data=str(text if text.exists() else tiny_text(folder)),
        warmup_steps=0,
        validate_every=4,
        checkpoint_every=4,
        log_every=2,
    )
    return dataclasses.replace(config, **changes)


def train(config: RunConfig, task: Task | None = None) -> tuple[int, str]:
    """The exit code, and what was printed."""
    console = Console(file=io.StringIO(), width=120)
    if task is None:
        assert isinstance(config, train_draft.TrainDraftConfig)
        task = train_draft.task(config)
    code = run(config, task, console)
    assert isinstance(console.file, io.StringIO)
    return code, console.file.getvalue()


def leaves(tree) -> list[np.ndarray]:
    return [np.asarray(x) for x in jax.tree.leaves(tree)]


def steps_kept(config: RunConfig) -> list[int]:
    """Steps of which there is a checkpoint."""
    return sorted(int(path.name) for path in (config.output / "checkpoints").iterdir())
