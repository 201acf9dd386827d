"""What a training run records: means, validation, throughput, and what of it is read again."""

import collections
import contextlib
import dataclasses
import pathlib
import re
import struct
import sys
import types
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

from experiments import metrics, train_draft, training
from experiments.data import load_text, validation_batches
from experiments.generate import load_run
from experiments.metrics import Metrics, read_metrics
from experiments.output import (
    CONFIGURATION,
    make_folder,
    prepare_output,
    read_configuration,
    write_configuration,
    write_whole,
)
from experiments.train_state import num_parameters
from tests.experiments.runs import steps_kept, tiny_config, train


def test_pauses_are_not_timed(monkeypatch: pytest.MonkeyPatch):
    times = iter([0.0, 1.0, 11.0, 13.0])
    monkeypatch.setattr(training, "time", types.SimpleNamespace(perf_counter=lambda: next(times)))
    clock = training._Clock()
    with clock.paused():
        pass
    assert clock.lap() == 3


def test_throughput_is_of_the_steps_since_the_last_record(tmp_path, monkeypatch: pytest.MonkeyPatch):
    """The first step of a start compiles and is left out, of a resumed one too; what is no step is done in pauses."""
    monkeypatch.setattr(training._Clock, "lap", lambda clock: 1.0)
    config = tiny_config(tmp_path, steps=4, schedule="constant", sample_every=2)
    save, loss_fn = training.Checkpoints.save, train_draft.make_loss_fn(config)
    pauses, in_pause = [], collections.defaultdict(list)

    @contextlib.contextmanager
    def paused(clock: training._Clock) -> Iterator[None]:
        pauses.append(clock)
        yield
        pauses.pop()

    def spied(name: str, function: Any) -> Any:
        def spy(*arguments: Any) -> Any:
            in_pause[name].append(bool(pauses))
            return function(*arguments)

        return spy

    monkeypatch.setattr(training._Clock, "paused", paused)
    monkeypatch.setattr(training.Checkpoints, "save", spied("save", save))
    # Of validation, what is seen is that it is traced.
    task = dataclasses.replace(
        train_draft.task(config),
        on_sample=spied("sample", lambda *_: None),
        validation_loss_fn=spied("validate", loss_fn),
    )
    for changes in ({}, {"steps": 8, "resume": True}):
        train(dataclasses.replace(config, **changes), task)
    speeds = [r["tokens_per_second"] for r in read_metrics(config.output) if "tokens_per_second" in r]
    assert [speed / config.tokens_per_step for speed in speeds] == [1, 2, 1, 2]
    assert in_pause == {"sample": [True] * 4, "save": [True] * 2, "validate": [True]}


def test_records_are_means_over_their_steps(tmp_path):
    """The last one of what is left. Bits per byte are of the training loss, and say so, as those of validations do."""
    losses = {}
    validated = ["validation", "training", "training", "validation"]
    shown_of = {1: ["training"] * 3 + validated, 2: ["training", *validated]}
    for log_every in (1, 2):
        output = tmp_path / str(log_every)
        config = tiny_config(tmp_path, steps=5, log_every=log_every, validate_every=3, output=output)
        _, printed = train(config)
        assert re.findall(r"bits/byte \((\w+) text\)", printed) == shown_of[log_every]
        losses[log_every] = [r["train/target_loss"] for r in read_metrics(output) if "train/target_loss" in r]
    assert len(losses[1]) == 5
    means = [np.mean(losses[1][:2]), np.mean(losses[1][2:4]), losses[1][4]]
    np.testing.assert_allclose(losses[2], means, rtol=1e-6)
    shown = [float(bits) for bits in re.findall(r"([\d.]+) bits/byte", printed)]
    assert shown[0] == pytest.approx(losses[2][0] / np.log(2), abs=1e-3)


def test_validation_is_the_mean_over_its_batches(tmp_path):
    config = tiny_config(tmp_path, steps=2)
    train(config)
    record = next(r for r in read_metrics(config.output) if "validation/target_loss" in r)
    batches = validation_batches(
        load_text(config.data).validation,
        batch_size=config.batch_size,
        sequence_length=config.sequence_length,
        max_batches=config.validation_batches,
    )
    loss_fn, models = jax.jit(train_draft.make_loss_fn(config)), load_run(config.output).models
    losses = [float(loss_fn(models, tokens_bt)[1]["target_loss"]) for tokens_bt in batches]
    assert len(losses) == 2
    assert record["validation/target_loss"] == pytest.approx(np.mean(losses), rel=1e-5)


@pytest.mark.parametrize("cut_off", ['{"st', "[1]", "{}"])
def test_a_line_that_a_kill_cut_off_is_left_out(cut_off, tmp_path):
    (tmp_path / metrics.FILE).write_text(f'{{"step": 1}}\n{{"step": 2}}\n{cut_off}')
    assert read_metrics(tmp_path) == read_metrics(str(tmp_path)) == [{"step": 1}, {"step": 2}]
    with Metrics(tmp_path, first_step=1) as written:
        written.write(2, {"train/loss": 3.0})
    assert read_metrics(tmp_path) == [{"step": 1}, {"step": 2, "train/loss": 3.0}]


def test_a_kill_loses_no_record_from_before_a_checkpoint(tmp_path, monkeypatch: pytest.MonkeyPatch):
    """Of TensorBoard's file: a resumed run does not write them again."""
    config = tiny_config(tmp_path, steps=4, checkpoint_every=2)
    save, found = training.Checkpoints.save, []

    def spy(*arguments: Any) -> None:
        (events,) = (config.output / metrics.TENSORBOARD).iterdir()
        records = [(name, r["step"]) for r in read_metrics(config.output) for name in r if name != "step"]
        found.append((scalars_in(events.read_bytes()), records))
        save(*arguments)

    monkeypatch.setattr(training.Checkpoints, "save", spy)
    train(config)
    assert [len(expected) for _, expected in found] == [4, 12]
    for got, expected in found:
        assert sorted(got) == sorted(expected)


def test_tensorboard_is_told_what_a_resumed_run_repeats(tmp_path):
    """From the step after the checkpoint on, it forgets what is in earlier files."""
    for first_step in (0, 3):
        (folder := tmp_path / str(first_step)).mkdir()
        with Metrics(folder, first_step=first_step) as written:
            written.write(first_step + 1, {"train/loss": 3.0})
        (file,) = (folder / metrics.TENSORBOARD).iterdir()
        begun = [event for event in events_in(file.read_bytes()) if event.HasField("session_log")]
        assert [(event.step, event.session_log.status) for event in begun] == ([(4, 1)] if first_step else [])
        assert scalars_in(file.read_bytes()) == [("train/loss", first_step + 1)]


def events_in(content: bytes) -> Iterator[Any]:
    """Those of a TensorBoard file: records that have 12 bytes before and 4 behind them."""
    at = 0
    while at < len(content):
        (length,) = struct.unpack_from("<Q", content, at)
        yield Event.FromString(content[at + 12 : at + 12 + length])
        at += length + 16


def scalars_in(content: bytes) -> list[tuple[str, int]]:
    """Name and step of every one."""
    return [(value.tag, event.step) for event in events_in(content) for value in event.summary.value]


def test_weights_and_biases_gets_every_record(tmp_path, monkeypatch: pytest.MonkeyPatch):
    begun, logged, ended = [], [], []
    project = types.SimpleNamespace(
        log=lambda values, *, step: logged.append({"step": step, **values}),
        finish=lambda *, exit_code: ended.append(exit_code),
    )
    wandb = types.SimpleNamespace(init=lambda **arguments: begun.append(arguments) or project)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    config = tiny_config(tmp_path, steps=2, wandb="project")
    train(config)
    assert [(one["project"], one["resume"]) for one in begun] == [("project", "allow")]
    assert begun[0]["config"] == read_configuration(config.output)
    assert logged == read_metrics(config.output)
    assert len(logged) == 2
    # Resumed, it goes on in its record; begun anew, it has another.
    with pytest.raises(RuntimeError), Metrics(config.output, first_step=2, wandb="project"):
        raise RuntimeError
    train(dataclasses.replace(config, overwrite=True))
    assert ended == [0, 1, 0]
    assert begun[0]["id"] == begun[1]["id"] != begun[2]["id"]


def test_a_run_without_a_checkpoint_begins_anew(tmp_path):
    """What to do then is said where resuming is refused."""
    message = "output must be the output folder of a training run with a checkpoint, got "
    with pytest.raises(ValueError, match=message) as nothing:
        prepare_output(tmp_path, resume=True, overwrite=False)
    assert "overwrite" not in str(nothing.value)
    write_configuration(tmp_path, {"seed": 3})
    with pytest.raises(ValueError, match=f"{message}.*: that run ended before its first, begin anew with --overwrite"):
        prepare_output(tmp_path, resume=True, overwrite=False)


def test_a_folder_is_one_process_own_while_it_trains(tmp_path):
    """Neither gone on with nor overwritten by another, which is told so before anything of it is touched."""
    config = tiny_config(tmp_path, steps=2, schedule="constant", sample_every=1)
    refused = []

    def on_sample(models: Any, text: Any, done: int, console: Any) -> None:
        for changes in ({"overwrite": True}, {"resume": True}):
            with pytest.raises(ValueError, match=r"output must be a folder that no other process writes to, got .*run"):
                train(dataclasses.replace(config, **changes))
            refused.append(done)

    train(config, dataclasses.replace(train_draft.task(config), on_sample=on_sample))
    assert refused == [1, 1, 2, 2]
    train(dataclasses.replace(config, steps=3, resume=True))
    assert steps_kept(config)[-1] == 3


def test_a_configuration_that_a_kill_cut_off_is_none(tmp_path):
    write_configuration(tmp_path, {"seed": 3})
    assert read_configuration(tmp_path) == {"seed": 3}
    path = tmp_path / CONFIGURATION
    path.write_text(path.read_text()[:-3])
    assert read_configuration(tmp_path) is None


def test_tensorboard_has_the_values(tmp_path):
    with Metrics(tmp_path, first_step=0) as writer:
        writer.write(1, {"train/loss": 3.0})
    (file,) = (tmp_path / metrics.TENSORBOARD).iterdir()
    values = [(v.tag, v.simple_value) for event in events_in(file.read_bytes()) for v in event.summary.value]
    assert values == [("train/loss", 3.0)]


def test_the_first_step_of_a_run_and_of_a_resumed_one_is_not_timed(tmp_path, monkeypatch: pytest.MonkeyPatch):
    """It compiles. Besides, the clock stands still while a record is taken, of which there are two in four steps."""
    laps, lap = [], training._Clock.lap
    monkeypatch.setattr(training._Clock, "lap", lambda clock: laps.append(None) or lap(clock))
    config = tiny_config(tmp_path, steps=4, schedule="constant")
    train(config)
    assert len(laps) == 3
    train(dataclasses.replace(config, steps=8, resume=True))
    assert len(laps) == 6


def test_what_is_printed_of_a_run(tmp_path):
    config = tiny_config(tmp_path, steps=2)
    printed = " ".join(train(config)[1].split())
    sizes = ", ".join(f"{name} {num_parameters(m):,}" for name, m in sorted(train_draft.make_models(config).items()))
    assert f"parameters: {sizes}; 8 device(s); from step 0 to 2" in printed
    (loss,) = (record["train/loss"] for record in read_metrics(config.output) if "train/loss" in record)
    assert f"loss {loss:.3f} ·" in printed


def test_a_file_is_as_it_was_or_whole(tmp_path, monkeypatch: pytest.MonkeyPatch):
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    (tmp_path / "a").write_text("old")
    monkeypatch.setattr(pathlib.Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old"


def test_overwriting_a_run_takes_its_weights_and_biases_too(tmp_path):
    (tmp_path / metrics.WANDB).mkdir()
    prepare_output(tmp_path, resume=False, overwrite=True)
    assert not (tmp_path / metrics.WANDB).exists()


@pytest.mark.skipif(sys.platform != "linux", reason="of Linux only")
def test_a_folder_that_takes_no_files_is_refused():
    with pytest.raises(ValueError, match="output must be a folder that can be written, got /proc/self: "):
        make_folder(pathlib.Path("/proc/self"))
