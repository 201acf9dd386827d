"""Runs of two processes, joined by `jax.distributed`, most started without the launcher, which would end the second."""

import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from experiments import check_resume
from experiments.checkpoints import has_checkpoint
from experiments.launch import LAUNCHER, LaunchConfig, environments
from experiments.metrics import read_metrics
from experiments.training import MOST_STEPS_UNASKED
from tests.experiments.runs import tiny_config

STEPS = 24
# Of what starts, compiles and trains on a machine that others use too; nothing hangs longer than that.
PATIENCE_SECONDS = 900
SECONDS_TO_STOP = 60


def start(config, folder, *more, processes=2, devices=4, joining=2):
    """The processes of a run, or the first of them, and how many devices they have in total."""
    size = LaunchConfig(processes=processes, devices_per_process=devices // processes)
    started = []
    for environment in environments(size, os.environ)[:joining]:
        with (folder / f"{len(started)}.log").open("wb") as log:
            command = [*check_resume.command(config), "--data", config.data, *more]
            started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    return started


def finish(processes, folder):
    """Exit codes and logs of processes that end by themselves; what does not is killed."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    try:
        for process in processes:
            process.wait(max(0, deadline - time.monotonic()))
    finally:
        kill(processes)
    return [process.returncode for process in processes], logs(processes, folder)


def kill(processes):
    for process in processes:
        process.kill()
        process.wait()


def logs(processes, folder):
    return [(folder / f"{index}.log").read_text() for index in range(len(processes))]


def wait_until(reached, processes, folder):
    """Returns when `reached()`, at which all processes must be running still."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    try:
        while not reached():
            assert time.monotonic() < deadline, logs(processes, folder)
            assert {process.poll() for process in processes} == {None}, logs(processes, folder)
            time.sleep(0.005)
    except BaseException:
        kill(processes)
        raise


def end_of_survivor(survivor, processes, folder):
    """The log of a process that must end by itself, in time and with an error; the others are killed then."""
    try:
        code = processes[survivor].wait(SECONDS_TO_STOP)
    finally:
        kill(processes)
    log = logs(processes, folder)[survivor]
    assert code in (1, -signal.SIGABRT), log
    assert "error" in log.lower()
    return log


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """Two processes of two devices, undisturbed."""
    folder = tmp_path_factory.mktemp("together")
    config = tiny_config(folder, steps=STEPS, checkpoint_every=STEPS // 6, log_every=2, validate_every=STEPS)
    codes, outputs = finish(start(config, folder), folder)
    assert codes == [0, 0], outputs
    assert f"step {STEPS} of {STEPS}" in outputs[0]
    assert f"step {STEPS} of {STEPS}" not in outputs[1]
    return config


@pytest.mark.slow
def test_two_processes_train_as_one(together, tmp_path):
    alone = tiny_config(tmp_path, steps=STEPS, checkpoint_every=STEPS, log_every=2, validate_every=STEPS)
    codes, outputs = finish(start(alone, tmp_path, processes=1), tmp_path)
    assert codes == [0], outputs
    losses = [[r["train/loss"] for r in read_metrics(c.output) if "train/loss" in r] for c in (alone, together)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    for a, b in zip(*map(check_resume.final_leaves, (alone, together)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.slow
def test_a_coordinator_killed_in_a_checkpoint_ends_the_other_and_the_run_resumes(together, tmp_path):
    config = tiny_config(tmp_path, steps=STEPS, checkpoint_every=STEPS // 6, log_every=2, validate_every=STEPS)
    processes = start(config, tmp_path)
    folder = config.output / "checkpoints"

    def complete():
        return sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit())

    def halted_while_writing():
        # Process 0 gives a checkpoint its name. What is seen while it stands still is true when it is killed.
        if not (complete() and any(folder.glob("*tmp*"))):
            return False
        processes[0].send_signal(signal.SIGSTOP)
        if any(folder.glob("*tmp*")):
            return True
        processes[0].send_signal(signal.SIGCONT)
        return False

    wait_until(halted_while_writing, processes, tmp_path)
    processes[0].kill()
    end_of_survivor(1, processes, tmp_path)
    assert any(folder.glob("*tmp*"))
    left = complete()[-1]
    assert left < STEPS

    codes, outputs = finish(start(config, tmp_path, "--resume"), tmp_path)
    assert codes == [0, 0], outputs
    assert f"from step {left} to {STEPS}" in outputs[0]
    for expected, got in zip(*map(check_resume.final_leaves, (together, config)), strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "line"),
    [(signal.SIGKILL, "from step 0"), (signal.SIGSTOP, "step 2 of")],
    ids=["killed before the first step", "stopped in training"],
)
def test_a_process_that_dies_or_hangs_ends_the_other(number, line, tmp_path):
    """A stopped process keeps its connections: only that it says nothing shows that it is gone."""
    endless = tiny_config(tmp_path, steps=10**6, checkpoint_every=10**6, log_every=2, validate_every=10**6)
    processes = start(endless, tmp_path, devices=2)
    wait_until(lambda: line in logs(processes, tmp_path)[0], processes, tmp_path)
    processes[1].send_signal(number)
    log = end_of_survivor(0, processes, tmp_path)
    assert ("step 2 of" in log) == (number == signal.SIGSTOP)


@pytest.mark.slow
def test_a_process_that_never_joins_ends_the_other(tmp_path):
    config = tiny_config(tmp_path)
    processes = start(config, tmp_path, "--join-timeout", "3", joining=1)
    log = end_of_survivor(0, processes, tmp_path)
    assert re.search(r"waiting for all processes to join at localhost:\d+: 3 seconds at most \(join_timeout\)\n", log)
    assert not config.output.exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 10**6, "log_every": 2, "validate_every": 10**6},
        {"steps": 10**6, "log_every": 10**6, "validate_every": 30},
        {"steps": MOST_STEPS_UNASKED - 1, "log_every": 1000, "validate_every": 3, "validation_batches": 300},
    ],
    ids=["in training", "of few records", "after the last step at which they ask each other"],
)
def test_a_signal_to_one_process_stops_all(changes, tmp_path):
    """They agree that the run is not done: none writes its report, and none waits for another."""
    config = tiny_config(tmp_path, checkpoint_every=10**6, **changes)
    processes = start(config, tmp_path, "--report")
    wait_until(lambda: read_metrics(config.output), processes, tmp_path)
    processes[1].send_signal(signal.SIGTERM)
    codes, outputs = finish(processes, tmp_path)
    assert codes == [128 + signal.SIGTERM] * 2, outputs
    assert "Stopped after step" in outputs[0]
    assert not (config.output / "report.json").exists()


@pytest.mark.slow
def test_processes_whose_launcher_is_killed_stop_with_a_checkpoint(tmp_path):
    """Which else would go on in a folder that the next run writes to."""
    # So many that they would not end in time, and would not run for ever.
    config = tiny_config(tmp_path, steps=20_000, checkpoint_every=10**6, log_every=2, validate_every=10**6)
    command = [sys.executable, "-m", "experiments.launch", "--", *check_resume.command(config), "--data", config.data]
    with (tmp_path / "0.log").open("wb") as log:
        processes = [subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)]
    wait_until(lambda: read_metrics(config.output), processes, tmp_path)
    processes[0].kill()
    processes[0].wait()
    deadline = time.monotonic() + SECONDS_TO_STOP
    while "Stopped after step" not in (text := logs(processes, tmp_path)[0]):
        assert time.monotonic() < deadline, text
        time.sleep(0.1)
    assert has_checkpoint(config.output)


@pytest.mark.slow
def test_a_process_whose_launcher_was_killed_before_it_joined_ends(tmp_path, monkeypatch):
    with subprocess.Popen([sys.executable, "-c", ""]) as launcher:
        pass
    monkeypatch.setenv(LAUNCHER, str(launcher.pid))
    processes = start(tiny_config(tmp_path), tmp_path, joining=1)
    codes, outputs = finish(processes, tmp_path)
    assert codes == [-signal.SIGTERM], outputs
