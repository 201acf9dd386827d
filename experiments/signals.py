"""Stopping a run from outside: the first signal asks, a second Ctrl-C does not wait."""

from __future__ import annotations

import gc
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

import jax
import numpy as np
from jax.experimental import multihost_utils
from rich.console import Console

from experiments.start import answered


def interrupt(number: int, frame: FrameType | None) -> None:
    """Raises KeyboardInterrupt, as Python's own handler of SIGINT does, but not where it would be lost.

    What a function raises that Python calls at a garbage collection, as JAX has one called, is printed and forgotten.
    The signal comes again when that function is over.
    """
    if frame is not None and any(getattr(called, "__code__", None) is frame.f_code for called in gc.callbacks):
        threading.Timer(0.01, os.kill, (os.getpid(), number)).start()
        return
    raise KeyboardInterrupt


@contextmanager
def ended_by_interrupt() -> Iterator[None]:
    """While entered, SIGINT ends the process unless ignored, for waits in which Python runs no handler."""
    if threading.current_thread() is not threading.main_thread() or not answered(signal.SIGINT):
        yield
        return
    previous = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


class StopRequest:
    """While entered, SIGINT and SIGTERM set `signal` in place of their usual effect, but where they are ignored.

    A thread reads the signals through `signal.set_wakeup_fd`, because Python runs handlers only between bytecodes of
    the main thread, and a compilation or a wait for the device keeps that busy for many seconds. So the answer is
    immediate, and a second SIGINT ends the process at once, with exit code 130.

    Attributes:
      signal: number of the first signal received, here or in another process (see `agreed`), or None.
    """

    def __init__(self, console: Console) -> None:
        self.signal: int | None = None
        self._console = console
        self._previous: dict[int, signal._HANDLER] = {}
        self._writer: socket.socket | None = None

    def __enter__(self) -> StopRequest:
        # Signals can be set up from the main thread only; a run started from another one goes without.
        if threading.current_thread() is not threading.main_thread():
            return self
        reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number in answered(signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, lambda *_: None)
        threading.Thread(target=self._listen, args=(reader,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is None:
            return
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        # The listening thread sees the end of its stream, leaves its loop, and closes its own side.
        self._writer.close()

    def agreed(self) -> int | None:
        """The signal that any process got before all of them asked, for which they wait; None where none did.

        It is then everyone's: none reports what the others do not, or ends as if all were done.
        """
        if jax.process_count() == 1:
            return self.signal
        received = int(multihost_utils.process_allgather(np.array(self.signal or 0)).max())
        # One that came to this process while it waited for the others is for the next time it asks.
        if received:
            self.signal = received
        return received or None

    @property
    def exit_code(self) -> int:
        """What a shell reports of a process that such a signal ended: 130 for SIGINT, 143 for SIGTERM; else 0."""
        return 0 if self.signal is None else 128 + self.signal

    def _listen(self, reader: socket.socket) -> None:
        # Not `self.signal`, which may be another process's: the first that comes here is not a second Ctrl-C.
        told = False
        with reader:
            while received := reader.recv(1):
                number = received[0]
                if number not in (signal.SIGINT, signal.SIGTERM):
                    continue
                if not told:
                    told = True
                    self.signal = self.signal or number
                    self._console.print(
                        "[yellow]Stopping at the end of a step, with a checkpoint. Ctrl-C ends at once."
                    )
                elif number == signal.SIGINT:
                    os._exit(128 + number)
