import dataclasses
import io
import json
import os
import shutil
import signal
import sys
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.core import Tracer
from rich.console import Console

from experiments import train_draft, training
from experiments.checkpoints import open_run
from experiments.data import batch_at, load_text
from experiments.decoding_run import prompt
from experiments.metrics import read_metrics
from experiments.output import prepare_output
from experiments.runtime import exit_with
from experiments.session import finish, run
from experiments.train_state import TrainState, shard_rows
from experiments.training import NonFiniteLossError, state_parts
from tests.experiments.runs import leaves, steps_kept, tiny_config, train


def checkpoint(config, step):
    template = TrainState.create(train_draft.make_models(config), config.optimizer())
    with open_run(config.output) as checkpoints:
        return leaves(checkpoints.restore(step, state_parts(template)))


def test_a_run_leaves_checkpoints_and_metrics(tmp_path):
    """In a folder whose name could be markup, too."""
    config = tiny_config(tmp_path, keep_checkpoints=2, validate_every=5, output=tmp_path / "[" / "x]")
    code, printed = train(config)
    assert code == 0
    assert f"output in {config.output}\n" in printed
    assert steps_kept(config) == [8, 12]
    records = read_metrics(config.output)
    assert [r["step"] for r in records if "train/loss" in r] == [2, 4, 6, 8, 10, 12]
    validation = [r for r in records if "validation/target_loss" in r]
    assert [r["step"] for r in validation] == [5, 10, 12]
    assert validation[-1]["validation/target_bits_per_byte"] < validation[0]["validation/target_bits_per_byte"]
    assert validation[0]["validation/draft_bits_per_byte"] == pytest.approx(
        validation[0]["validation/draft_loss"] / np.log(2)
    )
    assert all(r["tokens_per_second"] > 0 for r in records if "tokens_per_second" in r)
    assert list((config.output / "tensorboard").iterdir())
    assert "step 12 of 12" in printed
    assert json.dumps(records)


def test_resuming_continues_bit_for_bit(tmp_path):
    whole = tiny_config(tmp_path)
    train(whole)
    parts = tiny_config(tmp_path, output=tmp_path / "parts")
    stop_soon_after(parts, 5)
    assert 5 <= steps_kept(parts)[-1] < 12
    code, _ = train(dataclasses.replace(parts, resume=True))
    assert code == 0
    for a, b in zip(checkpoint(whole, 12), checkpoint(parts, 12), strict=True):
        np.testing.assert_array_equal(a, b)
    assert training_losses(parts) == training_losses(whole)


def test_resuming_between_two_records_loses_no_step_of_a_mean(tmp_path):
    """Step 5 and step 6 are one record, and the checkpoint lies between them."""
    config = tiny_config(tmp_path, checkpoint_every=5)
    train(config)
    assert steps_kept(config) == [5, 10, 12]
    whole = training_losses(config)
    for step in (10, 12):
        shutil.rmtree(config.output / "checkpoints" / str(step))
    code, _ = train(dataclasses.replace(config, resume=True))
    assert code == 0
    assert steps_kept(config) == [5, 10, 12]
    assert training_losses(config) == whole


def training_losses(config):
    return [(r["step"], r["train/loss"]) for r in read_metrics(config.output) if "train/loss" in r]


def stop_soon_after(config, steps):
    """Ends a run by SIGTERM when so many steps are done."""

    def on_sample(models, text, done, console):
        if done == steps:
            os.kill(os.getpid(), signal.SIGTERM)

    stopping = dataclasses.replace(train_draft.task(config), on_sample=on_sample)
    code, printed = train(dataclasses.replace(config, sample_every=steps), stopping)
    assert code == 128 + signal.SIGTERM
    assert f"Stopped after step {steps_kept(config)[-1]}; go on with --resume." in printed


def test_the_loss_is_traced_twice_only(tmp_path):
    """Once with its gradient and once without, whatever the number of steps, validations and checkpoints."""
    config = tiny_config(tmp_path)
    # The scan over microbatches evaluates shapes first, which is a trace as well.
    counted: Any = chex.assert_max_traces(train_draft.make_loss_fn(config), n=3)
    code, _ = train(config, dataclasses.replace(train_draft.task(config), loss_fn=counted))
    assert code == 0


@pytest.mark.parametrize("validate_every", [1, 4])
def test_nan_stops_and_keeps_the_last_good_checkpoint(tmp_path, validate_every: int):
    """By the loss on validation text, be it measured to be shown or before a checkpoint."""
    changes = {"schedule": "cosine", "warmup_steps": 0, "checkpoint_every": 1, "validate_every": validate_every}
    config = tiny_config(tmp_path, learning_rate=1e30, **changes)
    with pytest.raises(
        NonFiniteLossError, match=r"after step 1 is (nan|inf), training stopped; there is no checkpoint"
    ):
        train(config)
    assert not list((config.output / "checkpoints").iterdir())
    assert "NaN" not in (config.output / "metrics.jsonl").read_text()
    with pytest.raises(ValueError, match=r"which holds checkpoints, .*: add --overwrite to delete it, or choose"):
        train(config)


def test_nan_late_in_a_run(tmp_path):
    """The message names the step, and the checkpoint that is left, be it of this start or of the one before."""
    config = tiny_config(tmp_path, steps=8, schedule="constant")
    good = dataclasses.replace(config, output=tmp_path / "good")
    train(dataclasses.replace(good, steps=4))
    loss_fn = train_draft.make_loss_fn(config)
    # The second microbatch of the sixth step.
    bad_bt = batch_of(config, step=5)[1]

    def poisoned(models, tokens_bt):
        loss, report = loss_fn(models, tokens_bt)
        return jnp.where((tokens_bt == bad_bt).all(), jnp.inf, loss), report

    message = "loss of step 6 is inf, training stopped; the checkpoint of step 4 is good .*; start again with a lower"
    for start in (config, dataclasses.replace(good, resume=True)):
        with pytest.raises(NonFiniteLossError, match=message):
            train(start, dataclasses.replace(train_draft.task(config), loss_fn=poisoned))
        assert steps_kept(start) == [4]
    for a, b in zip(checkpoint(config, 4), checkpoint(good, 4), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def batch_of(config, step):
    """(A, B, T + 1) tokens of a step, drawn as one batch."""
    rows = batch_at(
        load_text(config.data).train,
        seed=config.seed,
        step=step,
        batch_size=config.accumulation * config.batch_size,
        sequence_length=config.sequence_length,
    )
    return rows.reshape(config.accumulation, config.batch_size, -1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output": "text.txt/below"}, "output must be a folder that can be written"),
        ({"output": "run"}, "output must be a folder without a run, .* add --resume"),
        ({"output": "x [1]"}, r"output must have no \[...\] in its absolute path, where Orbax writes, got /.*/x \[1\]"),
        ({"resume": True, "output": "nothing"}, "output must be the output folder of a training run"),
        (
            {"prompt_length": 9000, "report": True, "overwrite": True},
            "prompt_length must be at most .* of test text",
        ),
        (
            {"prompt_length": 9000, "sample_every": 1, "overwrite": True},
            "prompt_length must .* of validation text",
        ),
        ({"resume": True, "output": "run/checkpoints"}, "output must be the folder of the run, .*run, got that of its"),
        ({"data": ".", "overwrite": True}, "output must be outside the folder of data, .*, got .*run"),
        ({"resume": True, "seed": 5}, r"these fields differ.*\n  seed: expected 0, got 5\n"),
        ({"resume": True, "data": "other.txt"}, r"\n  text: expected 'text.txt, SHA"),
        ({"data": "short.txt", "overwrite": True}, "data must have at least sequence_length"),
        ({"data": "missing.txt", "overwrite": True}, "missing.txt"),
        ({"batch_size": 3, "overwrite": True}, "batch_size must be a multiple of the 8 devices that share it, got 3"),
    ],
)
def test_bad_input_before_any_compute(changes, message, finished):
    folder = finished
    changes = {k: folder / v if k == "output" else str(folder / v) if k == "data" else v for k, v in changes.items()}

    def no_compute(*_):
        raise AssertionError("computed before checking")

    def shapes_only():
        models = train_draft.make_models(config)
        assert all(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(models))
        return models

    config = tiny_config(folder, **changes)
    task = dataclasses.replace(train_draft.task(config), loss_fn=no_compute, make_models=shapes_only)
    before = sorted(path.name for path in (folder / "run").rglob("*"))
    with pytest.raises(ValueError, match=message):
        train(config, task)
    assert sorted(path.name for path in (folder / "run").rglob("*")) == before
    assert not (folder / "nothing").exists()


def test_models_that_cannot_be_are_refused_before_a_run_is_overwritten(finished):
    def make_models():
        raise ValueError("prophet must have no early exit")

    config = tiny_config(finished, overwrite=True)
    with pytest.raises(ValueError, match="prophet must have no early exit"):
        train(config, dataclasses.replace(train_draft.task(config), make_models=make_models))
    assert steps_kept(config) == [4]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a finished run."""
    folder = tmp_path_factory.mktemp("finished")
    train(tiny_config(folder, steps=4))
    (folder / "short.txt").write_text("too short")
    (folder / "other.txt").write_bytes((folder / "text.txt").read_bytes() + b"!")
    return folder


def test_a_folder_is_refused_by_one_process_alone(finished, monkeypatch: pytest.MonkeyPatch):
    """Checkpoints are opened by all or none: Orbax lets those that do wait for each other."""
    monkeypatch.setattr(ocp, "CheckpointManager", None)
    with pytest.raises(ValueError, match=r"output must be a folder without a run, got .*: add --resume to go on"):
        prepare_output(finished / "run", resume=False, overwrite=False)


def test_overwrite_replaces_a_run(tmp_path):
    """What is behind a link to another disk goes, and the link stays."""
    config = tiny_config(tmp_path, steps=4, schedule="constant")
    disk = tmp_path / "disk"
    disk.mkdir()
    config.output.mkdir()
    (config.output / "checkpoints").symlink_to(disk)
    train(dataclasses.replace(config, overwrite=True))
    assert (disk / "4").is_dir()
    for name in ("report.json", "loss.png", "acceptance.png", "speedup.png", "layer_skip.json"):
        (config.output / name).write_text("of the first run")
    (config.output / "notes.txt").write_text("mine")
    code, _ = train(dataclasses.replace(config, overwrite=True, steps=8))
    assert code == 0
    assert steps_kept(config) == [4, 8]
    assert (config.output / "checkpoints").is_symlink()
    assert (config.output / "notes.txt").read_text() == "mine"
    left = {"notes.txt", "checkpoints", "configuration.json", "metrics.jsonl", "tensorboard"}
    assert {path.name for path in config.output.iterdir()} == left
    # Where no schedule depends on the number of steps, a longer run is not taken for a shorter one.
    message = "steps must be at least the 8 that .*run has trained, got 4"
    with pytest.raises(ValueError, match=message):
        train(dataclasses.replace(config, resume=True))
    with pytest.raises(ValueError, match=message):
        finish(config, train_draft.task(config), Console(quiet=True))


def test_an_interrupted_report_says_how_to_have_it(tmp_path):
    config = tiny_config(tmp_path, steps=2, prompt_length=8, report=True)
    console = Console(file=io.StringIO(), width=120)

    def on_report(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(config, dataclasses.replace(train_draft.task(config), on_report=on_report), console)
    assert isinstance(console.file, io.StringIO)
    assert "Stopped before the end of the report; make it with --resume." in console.file.getvalue()
    assert steps_kept(config) == [2]


def test_the_report_is_of_the_trained_models(tmp_path):
    """And there is none where none is asked for."""
    config = tiny_config(tmp_path, steps=2, prompt_length=8)
    reported = []

    def on_report(models, text, console, configuration):
        reported.append((leaves(models), text.name, configuration))

    for report in (False, True):
        reporting = dataclasses.replace(config, report=report, overwrite=report)
        train(reporting, dataclasses.replace(train_draft.task(reporting), on_report=on_report))
    ((models, name, configuration),) = reported
    with open_run(config.output) as checkpoints:
        saved = checkpoints.restore(2, {"models": train_draft.make_models(config)})["models"]
        assert (name, configuration) == ("text.txt", checkpoints.configuration(2))
    for a, b in zip(models, leaves(saved), strict=True):
        np.testing.assert_array_equal(a, b)


def test_wandb_that_is_not_installed(finished, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = tiny_config(finished, wandb="project", overwrite=True)
    with pytest.raises(ValueError, match="wandb must be installed"):
        train(config)
    assert steps_kept(config) == [4]


def test_prompts_have_the_length_asked_for():
    split = np.arange(100, dtype=np.uint8)
    for length in (1, 2, 7):
        config = train_draft.TrainDraftConfig(prompt_length=length)
        assert [prompt(split, config, step).shape for step in (0, 1)] == [(1, length)] * 2


@pytest.mark.parametrize(("error", "code"), [(ValueError("bad"), 2), (NonFiniteLossError("nan"), 3)])
def test_exit_codes(error, code, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as caught:
        exit_with(main)
    assert caught.value.code == code
    assert f"error: {error}" in capsys.readouterr().err


def test_batches_are_those_of_the_seed_and_the_step(tmp_path, monkeypatch: pytest.MonkeyPatch):
    """Of training text, and no two microbatches are the same."""
    config = tiny_config(tmp_path, steps=2, seed=3)
    read = []

    def spy(tokens: np.ndarray, mesh: Any, *, axis: int) -> Any:
        if tokens.ndim == 3:
            read.append(tokens)
        return shard_rows(tokens, mesh, axis=axis)

    monkeypatch.setattr(training, "shard_rows", spy)
    train(config)
    np.testing.assert_array_equal(read, [batch_of(config, step) for step in (0, 1)])


def test_a_finished_run_that_is_resumed_makes_its_report(tmp_path):
    config = tiny_config(tmp_path, steps=2, prompt_length=8)
    train(config)
    reported = []
    task = dataclasses.replace(train_draft.task(config), on_report=lambda *_: reported.append(None))
    train(dataclasses.replace(config, resume=True, report=True), task)
    assert len(reported) == 1
