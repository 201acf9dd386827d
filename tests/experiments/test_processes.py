import dataclasses
import os
import socket
import subprocess

import numpy as np
import pytest

from experiments import check_resume
from experiments.metrics import read_metrics
from tests.experiments.runs import tiny_config


def free_port():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def command(config, *more):
    return [*check_resume.command(config), "--data", config.data, *more]


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    """Two hosts of one device each, joined by `jax.distributed`, against one host of two devices."""
    alone = tiny_config(tmp_path, output=tmp_path / "alone")
    two_devices = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    subprocess.run(command(alone), check=True, env=two_devices, stdout=subprocess.DEVNULL, timeout=300)

    together = dataclasses.replace(alone, output=tmp_path / "together")
    one_device = {**os.environ, "XLA_FLAGS": ""}
    port = free_port()
    processes = [
        subprocess.Popen(
            command(
                together, "--distributed", "--coordinator", f"localhost:{port}", "--processes", "2",
                "--process-index", str(index),
            ),
            env=one_device,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    assert "step 12 of 12" in outputs[0]
    assert "step 12 of 12" not in outputs[1]
    losses = [[r["train/loss"] for r in read_metrics(c.output) if "train/loss" in r] for c in (alone, together)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    one, two = (check_resume.final_leaves(config) for config in (alone, together))
    for a, b in zip(one, two, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
