"""Runs a command as several processes of this machine that train together, with CPU devices and gloo between them.

    python -m experiments.launch --processes 2 --devices-per-process 4 -- python -m experiments.train_draft cpu

Every script that trains a model works under it without further flags. Process 0 writes to this terminal; of the others
the last lines are shown if they fail. Signals reach all of them, except those that are ignored, as under `nohup`.
If the launcher itself is killed, they stop as at SIGTERM, with a checkpoint.
Accelerators of one machine need no launcher: one process drives them all.
"""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress

from experiments.checks import at_least
from experiments.command_line import given_config
from experiments.start import answered

# Where `runtime.start_processes` finds the other processes. JAX reads the first of these itself.
COORDINATOR = "JAX_COORDINATOR_ADDRESS"
PROCESSES = "JAX_NUM_PROCESSES"
PROCESS_INDEX = "JAX_PROCESS_ID"
# The launcher's own process. `runtime.start_processes` sees to it that none outlives it.
LAUNCHER = "SPEC_JAX_LAUNCHER"
# Exit codes of a program that has told the user why it ends.
BAD_INPUT, NOT_FINITE = 2, 3

# When one has ended with an error, the others notice it by themselves, or end like it with their last checkpoint
# written. Whatever still runs so long after is killed.
GRACE_SECONDS = 60
LINES_SHOWN = 40
DEVICE_COUNT = "--xla_force_host_platform_device_count"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """How many processes, and of what size.

    Attributes:
      processes: how many to start.
      devices_per_process: CPU devices of each.
    """

    processes: int = 2
    devices_per_process: int = 1

    def __post_init__(self) -> None:
        at_least(1, self, "processes", "devices_per_process")


def environments(config: LaunchConfig, environment: Mapping[str, str]) -> list[dict[str, str]]:
    """The environment of every process: the given one, its devices, and where it finds the others."""
    flags = [flag for flag in environment.get("XLA_FLAGS", "").split() if not flag.startswith(DEVICE_COUNT)]
    shared = {
        **environment,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": " ".join((*flags, f"{DEVICE_COUNT}={config.devices_per_process}")),
        COORDINATOR: f"localhost:{free_port()}",
        PROCESSES: str(config.processes),
    }
    return [{**shared, PROCESS_INDEX: str(index)} for index in range(config.processes)]


def launch(config: LaunchConfig, command: Sequence[str]) -> int:
    """Runs the command in every process and waits for all.

    Args:
      config: how many processes.
      command: a program and its arguments.

    Returns:
      0 if every process ended with 0, else the exit code of the first that did not: 128 + n if signal n ended it.

    Raises:
      ValueError: there is no such program.
    """
    processes: list[subprocess.Popen[bytes]] = []
    # Each with the number of processes that got it: a process may be on its way when a signal comes.
    signals: list[tuple[int, int]] = []

    def forward(number: int, _frame: object) -> None:
        signals.append((number, len(processes)))
        for process in processes:
            _signal(process, number)

    forwarded = answered(signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    previous = {number: signal.signal(number, forward) for number in forwarded}
    inherited = {**os.environ, LAUNCHER: str(os.getpid())}
    with tempfile.TemporaryDirectory() as folder:
        logs = [pathlib.Path(folder, str(index)) for index in range(config.processes)]
        try:
            for environment, log in zip(environments(config, inherited), logs, strict=True):
                processes.append(_start(command, environment, log if processes else None))
            for number, told in signals:
                for process in processes[told:]:
                    _signal(process, number)
            failed = _wait(processes)
        finally:
            for process in processes:
                _signal(process, signal.SIGKILL)
                process.wait()
            for number, handler in previous.items():
                signal.signal(number, handler)
        if not failed:
            return 0
        codes = {processes.index(process): _exit_code(process) for process in failed}
        if codes.get(0) in (BAD_INPUT, NOT_FINITE):
            # What the others said when they lost it would hide that.
            return codes[0]
        asked = {128 + number for number, _ in signals}
        unasked = {index: code for index, code in codes.items() if code not in asked}
        for index, code in unasked.items():
            ended = f"process {index} ended first, exit code {code}"
            if index:
                lines = logs[index].read_text(errors="replace").splitlines()[-LINES_SHOWN:]
                print(f"{ended}:", *lines, sep="\n  ", file=sys.stderr)
            elif code > 128:
                # Its lines were shown, but what a signal has ended could not say so itself.
                print(ended, file=sys.stderr)
        if any(code > 128 for code in unasked.values()):
            print("a training run goes on from its last checkpoint, if it has one, with --resume", file=sys.stderr)
        return next(iter(codes.values()))


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def _start(command: Sequence[str], environment: Mapping[str, str], log: pathlib.Path | None) -> subprocess.Popen[bytes]:
    # In a session of its own, for Ctrl-C reaches the whole session of a terminal, and forwarded it would come twice.
    try:
        if log is None:
            return subprocess.Popen(command, env=environment, start_new_session=True)
        with log.open("wb") as output:
            return subprocess.Popen(
                command, env=environment, start_new_session=True, stdout=output, stderr=subprocess.STDOUT
            )
    except OSError as error:
        raise ValueError(f"command must be a program and its arguments, got {command[0]}: {error.strerror}") from error


def _exit_code(process: subprocess.Popen[bytes]) -> int:
    """As a shell gives it: 128 + n where signal n ended the process."""
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    """To all that the process has started, too: its group is its own."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> list[subprocess.Popen[bytes]]:
    """Returns the processes that failed first, once all have ended or the time is over.

    Several where one look found them: one of them brought the others down.
    """
    failed, deadline = [], math.inf
    while True:
        running = [process for process in processes if process.poll() is None]
        if not failed and (failed := [process for process in processes if process.returncode]):
            deadline = time.monotonic() + GRACE_SECONDS
        if not running or time.monotonic() > deadline:
            return failed
        time.sleep(0.05)


def main(arguments: Sequence[str] | None = None) -> int:
    """Reads the command line, starts the processes and waits for them."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    split = arguments.index("--") if "--" in arguments else len(arguments)
    options, command = arguments[:split], arguments[split + 1 :]
    if not command and not {"-h", "--help"} & set(options):
        raise ValueError("command must follow behind --, got none")
    return launch(given_config("launch", LaunchConfig, options, __doc__), command)


if __name__ == "__main__":
    # Not `runtime.exit_with`: that imports JAX, for which only the processes should have to wait.
    try:
        sys.exit(main())
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(BAD_INPUT)
