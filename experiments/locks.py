"""One process at a time: where it downloads, and where a run writes."""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def locked(path: pathlib.Path, busy: Callable[[], None]) -> Iterator[None]:
    """Lets one process at a time past, and frees the place when a process dies.

    Past everyone where there are no locks: on Windows and on some file systems.

    Args:
      path: a folder, or a file, which is made.
      busy: called where another process is past it, which is waited for unless this raises.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT, 0o666)
    try:
        with contextlib.suppress(OSError):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                busy()
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
