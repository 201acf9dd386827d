"""Peak memory of one call, in a process of its own, as the operating system sees it."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import pathlib
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

CLEAR_REFS = pathlib.Path("/proc/self/clear_refs")
STATUS = pathlib.Path("/proc/self/status")


def peak_memory(make_call: Callable[..., Callable[[int], Any]], *args: Any) -> int:
    """Bytes that a call adds to the resident memory of a fresh process at its highest point.

    Args:
      make_call: makes the call, with everything that is to be there before it (weights, inputs, compiled programs).
        It is sent to the process by name: a function of a module.
      *args: its arguments.

    Raises:
      ValueError: the system is not Linux.
    """
    check_measurable()
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_added_by_call, make_call, args).result()


def check_measurable() -> None:
    """Raises ValueError where the system is not Linux: resetting a process's high-water mark is a file to write to."""
    if not CLEAR_REFS.exists():
        raise ValueError(f"memory must be left out where the system is not Linux, got one without {CLEAR_REFS}")


def _added_by_call(make_call: Callable[..., Callable[[int], Any]], args: tuple[Any, ...]) -> int:
    call = make_call(*args)
    # Memory that was freed but not given back would hide as much of what the call needs.
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = _resident("VmRSS")
    CLEAR_REFS.write_text("5")
    call(0)
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return int(lines[field].removesuffix("kB")) * 1024
