"""What a person sees while a run goes on: tokens per second of training alone, and bits per byte of the main model."""

import dataclasses
import io
import re
import time
import types
from typing import Any

import pytest
from rich.console import Console

from experiments import train_draft, training
from experiments.metrics import read_metrics
from experiments.progress import TrainingProgress
from tests.experiments.runs import tiny_config, train

PAUSE_SECONDS = 1000


def test_compiling_and_samples_do_not_slow_the_training(tmp_path, monkeypatch: pytest.MonkeyPatch):
    """The clock goes on by a thousand seconds in each sample, and none of them counts; nor does the first step.

    All steps before a sample are recorded first, for what of them ran in its pause would not be timed.
    """
    pauses, recorded = [], []
    clock = types.SimpleNamespace(perf_counter=lambda: time.perf_counter() + PAUSE_SECONDS * len(pauses))
    monkeypatch.setattr(training, "time", clock)

    def slow_sample(*_: Any) -> None:
        pauses.append(1)
        recorded.append(read_metrics(config.output)[-1]["step"])

    config = tiny_config(tmp_path, steps=4, log_every=1, sample_every=1)
    _, printed = train(config, dataclasses.replace(train_draft.task(config), on_sample=slow_sample))
    speeds = [record["tokens_per_second"] for record in read_metrics(config.output) if "tokens_per_second" in record]
    assert recorded == [1, 2, 3, 4]
    assert len(speeds) == printed.count("tokens/s") == 3
    assert min(speeds) > config.tokens_per_step / PAUSE_SECONDS


def test_bits_are_of_the_main_model_on_the_last_validation_text(tmp_path):
    config = tiny_config(tmp_path, steps=4, log_every=2, validate_every=2)
    _, printed = train(config)
    validation = [record for record in read_metrics(config.output) if "validation/target_bits_per_byte" in record]
    shown = [float(bits) for bits in re.findall(r"([\d.]+) bits/byte", printed)]
    assert shown[1] == pytest.approx(validation[0]["validation/target_bits_per_byte"], abs=1e-3)
    assert abs(shown[1] - validation[0]["validation/draft_bits_per_byte"]) > 1e-2
    assert shown[3] == pytest.approx(validation[1]["validation/target_bits_per_byte"], abs=1e-3)
    assert re.findall(r"step (\d) of 4 .*\((\w+) text\)", printed) == [
        ("2", "training"), ("2", "validation"), ("4", "training"), ("4", "validation"),
    ]  # fmt: skip


def test_a_line_of_a_log_stays_one_and_says_whose_bits_they_are():
    console = Console(file=io.StringIO(), width=40)
    with TrainingProgress(console, steps=2000, done=0, model="target") as progress:
        progress.record(1000, loss=2.5, bits=1.25, speed=12345.6)
        progress.validated(1000, 1.5)
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().splitlines() == [
        "step 1,000 of 2,000 · loss 2.500 · target 1.250 bits/byte (training text) · 12,346 tokens/s",
        "step 1,000 of 2,000 · target 1.500 bits/byte (validation text)",
    ]


def test_the_bar_of_a_terminal():
    """It begins where the run goes on; bits are those of the training text until there are validated ones."""
    progress = TrainingProgress(Console(file=io.StringIO()), steps=9, done=2, model="target")
    (task,) = progress._bar.tasks
    assert (task.total, task.completed) == (9, 2)
    progress.step(4)
    progress.record(4, loss=1.0, bits=2.0, speed=None)
    assert (task.completed, task.fields["bits"]) == (4, 2.0)
    progress.validated(4, 3.0)
    progress.record(5, loss=1.0, bits=2.5, speed=None)
    assert task.fields["bits"] == 3.0
