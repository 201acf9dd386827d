import os
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console

from experiments import check_resume, signals, training
from experiments.checkpoints import open_run
from experiments.metrics import read_metrics
from experiments.signals import StopRequest
from tests.experiments.runs import tiny_config


def start(config):
    command = [*check_resume.command(config), "--data", config.data]
    one_device = {**os.environ, "XLA_FLAGS": ""}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=one_device)


def wait_for_steps(process, config):
    deadline = time.monotonic() + 300
    while not read_metrics(config.output):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_exits(tmp_path, number):
    config = tiny_config(tmp_path, steps=1_000_000, checkpoint_every=1_000_000)
    with start(config) as process:
        wait_for_steps(process, config)
        process.send_signal(number)
        printed, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + number
    assert "Stopping at the end of a step" in printed
    assert "Traceback" not in printed
    with open_run(config.output) as checkpoints:
        assert f"Stopped after step {checkpoints.latest:,}; go on with --resume" in printed


@pytest.mark.slow
def test_a_second_interrupt_does_not_wait():
    """Even while the main thread is inside a call that never looks at signals."""
    program = (
        "import hashlib; from rich.console import Console; from experiments.signals import StopRequest\n"
        "with StopRequest(Console()):\n"
        "    print('ready', flush=True); hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        assert "Stopping at the end of a step" in process.stdout.readline()
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 130
        assert time.monotonic() - began < 10


def test_a_signal_that_comes_while_processes_agree_is_not_lost(monkeypatch: pytest.MonkeyPatch):
    stop = StopRequest(Console())

    def gather(mine: np.ndarray) -> np.ndarray:
        stop.signal = stop.signal or signal.SIGTERM
        return np.array([mine, 0])

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(signals.multihost_utils, "process_allgather", gather)
    assert [stop.agreed(), stop.agreed()] == [None, signal.SIGTERM]
    assert stop.exit_code == 128 + signal.SIGTERM


def reader_of(received: tuple[int, ...]) -> socket.socket:
    """What `StopRequest` listens to, with signals that came."""
    reader, writer = socket.socketpair()
    with writer:
        writer.sendall(bytes(received))
    return reader


@pytest.mark.parametrize(("log_every", "asked_at"), [(2, 2), (10**6, training.MOST_STEPS_UNASKED)])
def test_a_signal_to_another_process_is_this_ones_too(log_every: int, asked_at: int, monkeypatch: pytest.MonkeyPatch):
    """Which it learns of at the next step at which they ask each other."""
    to = types.SimpleNamespace(stop=StopRequest(Console()))
    loop: Any = types.SimpleNamespace(config=types.SimpleNamespace(log_every=log_every), to=to)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(signals.multihost_utils, "process_allgather", lambda mine: np.array([mine, signal.SIGTERM]))
    assert [training._Loop.asked_to_stop(loop, step) for step in (asked_at - 1, asked_at)] == [False, True]
    assert to.stop.signal == signal.SIGTERM


def test_a_first_interrupt_after_another_process_was_asked_does_not_end_this_one(monkeypatch: pytest.MonkeyPatch):
    """The checkpoint would be lost."""
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(signals.multihost_utils, "process_allgather", lambda mine: np.array([mine, signal.SIGTERM]))
    stop = StopRequest(Console(quiet=True))
    assert stop.agreed() == signal.SIGTERM
    stop._listen(reader_of((signal.SIGINT,)))
    assert (stop.exit_code, codes) == (143, [])
    stop._listen(reader_of((signal.SIGINT, signal.SIGINT)))
    assert (stop.exit_code, codes) == (143, [130])


@pytest.mark.parametrize(
    ("received", "code", "ended"),
    [
        ((), 0, []),
        ((signal.SIGCHLD,), 0, []),
        ((signal.SIGCHLD, signal.SIGTERM), 143, []),
        ((signal.SIGTERM, signal.SIGTERM), 143, []),
        ((signal.SIGINT, signal.SIGTERM), 130, []),
        ((signal.SIGTERM, signal.SIGINT), 143, [130]),
    ],
)
def test_the_first_signal_counts_and_only_a_second_interrupt_ends(
    received: tuple[int, ...], code: int, ended: list[int], monkeypatch: pytest.MonkeyPatch
):
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    stop = StopRequest(Console(quiet=True))
    stop._listen(reader_of(received))
    assert (stop.exit_code, codes) == (code, ended)


def test_signals_have_their_usual_effect_afterwards():
    def handlers() -> list[Any]:
        return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    before = handlers()
    with StopRequest(Console(quiet=True)):
        assert handlers() != before
    assert handlers() == before
    # The number of a closed socket may be that of a file by now, which a signal would be written to.
    assert signal.set_wakeup_fd(-1) == -1


@pytest.mark.parametrize("ignored", [(signal.SIGINT,), (signal.SIGINT, signal.SIGTERM)])
def test_a_signal_that_is_ignored_stays_ignored(ignored: tuple[signal.Signals, ...]):
    previous = {number: signal.signal(number, signal.SIG_IGN) for number in ignored}
    try:
        with StopRequest(Console(quiet=True)) as stop, signals.ended_by_interrupt():
            signal.raise_signal(signal.SIGINT)
            for number in ignored:
                assert signal.getsignal(number) is signal.SIG_IGN
            assert stop.signal is None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    assert signal.set_wakeup_fd(-1) == -1


def test_a_run_in_a_thread_goes_without_signals():
    entered = []

    def enter() -> None:
        with StopRequest(Console(quiet=True)) as stop:
            entered.append(stop.signal)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert entered == [None]


def test_an_interrupt_ends_a_process_at_once_where_it_may():
    before = signal.getsignal(signal.SIGINT)
    with signals.ended_by_interrupt():
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is before
