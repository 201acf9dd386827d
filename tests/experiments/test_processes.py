"""Runs of two processes, joined by `jax.distributed` and started without the launcher, which would end the second."""

import os
import re
import signal
import subprocess
import time

import numpy as np
import pytest

from experiments import check_resume
from experiments.launch import LaunchConfig, environments
from experiments.metrics import read_metrics
from tests.experiments.runs import tiny_config

STEPS = 60
# Of what starts, compiles and trains on a machine that others use too; nothing hangs longer than that.
PATIENCE_SECONDS = 900
SECONDS_TO_STOP = 60


def start(config, folder, *more, processes=2):
    """The processes of a run, on four devices in total."""
    size = LaunchConfig(processes=processes, devices_per_process=4 // processes)
    started = []
    for environment in environments(size, os.environ):
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
        for process in processes:
            process.kill()
            process.wait()
    return [process.returncode for process in processes], logs(processes, folder)


def logs(processes, folder):
    return [(folder / f"{index}.log").read_text() for index in range(len(processes))]


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
def test_a_killed_process_ends_the_others_and_the_run_resumes(together, tmp_path):
    config = tiny_config(tmp_path, steps=STEPS, checkpoint_every=STEPS // 6, log_every=2, validate_every=STEPS)
    processes = start(config, tmp_path)
    try:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not any(record["step"] > STEPS // 3 for record in read_metrics(config.output)):
            assert time.monotonic() < deadline, logs(processes, tmp_path)
            assert [process.poll() for process in processes] == [None, None], logs(processes, tmp_path)
            time.sleep(0.01)
        processes[1].kill()
        code = processes[0].wait(SECONDS_TO_STOP)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert code not in (0, -signal.SIGKILL)
    assert "error" in logs(processes, tmp_path)[0].lower()

    codes, outputs = finish(start(config, tmp_path, "--resume"), tmp_path)
    assert codes == [0, 0], outputs
    begun = re.search(rf"from step (\d+) to {STEPS}", outputs[0])
    assert begun is not None
    assert STEPS // 6 <= int(begun[1]) < STEPS
    for expected, got in zip(*map(check_resume.final_leaves, (together, config)), strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all(tmp_path):
    """They agree that the run is not done: none writes its report, and none waits for another."""
    config = tiny_config(tmp_path, steps=10**6, checkpoint_every=10**6, log_every=2, validate_every=10**6, report=True)
    processes = start(config, tmp_path)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not read_metrics(config.output):
        assert time.monotonic() < deadline, logs(processes, tmp_path)
        assert [process.poll() for process in processes] == [None, None], logs(processes, tmp_path)
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGTERM)
    codes, outputs = finish(processes, tmp_path)
    assert codes == [128 + signal.SIGTERM] * 2, outputs
    assert "Stopped after step" in outputs[0]
    assert not (config.output / "report.json").exists()
