"""The user's cache folder, and files that appear in it whole or not at all."""

import contextlib
import errno
import os
import pathlib
import secrets
import sys
from collections.abc import Iterator
from typing import BinaryIO

CACHE_VARIABLE = "SPEC_JAX_CACHE"
WRITE_ERRORS = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT})


def cache_folder() -> pathlib.Path:
    """Returns the folder for downloaded and expanded text; it need not exist yet.

    `SPEC_JAX_CACHE` where set; otherwise `spec-jax` in the platform's cache folder: `XDG_CACHE_HOME` where
    that is an absolute path, `%LOCALAPPDATA%` on Windows, `~/Library/Caches` on macOS, `~/.cache`
    elsewhere.
    """
    if chosen := os.environ.get(CACHE_VARIABLE):
        return pathlib.Path(chosen).expanduser().absolute()
    # The XDG specification says that a relative path is to be ignored.
    if os.path.isabs(xdg := os.environ.get("XDG_CACHE_HOME", "")):
        return pathlib.Path(xdg) / "spec-jax"
    if sys.platform == "win32" and (local := os.environ.get("LOCALAPPDATA")):
        return pathlib.Path(local) / "spec-jax"
    if sys.platform == "darwin":
        return pathlib.Path.home() / "Library" / "Caches" / "spec-jax"
    return pathlib.Path.home() / ".cache" / "spec-jax"


@contextlib.contextmanager
def writing(folder: pathlib.Path) -> Iterator[None]:
    """Makes the cache folder, and says what to do where it cannot be written or is full.

    Raises:
      ValueError: it cannot be made, or the block failed for want of a permission or of space.
    """
    made = False
    try:
        folder.mkdir(parents=True, exist_ok=True)
        made = True
        yield
    except OSError as error:
        if made and error.errno not in WRITE_ERRORS:
            raise
        raise ValueError(
            f"the cache folder must be writable, got {folder}: {error}; set {CACHE_VARIABLE} to another one"
        ) from error


@contextlib.contextmanager
def new_file(path: pathlib.Path) -> Iterator[BinaryIO]:
    """Opens a file to write that takes its place at `path` when the block ends, or vanishes when it raises.

    Every caller writes to a name of its own, so processes that start together do not disturb each other: each
    puts a whole file in place, and the last one stays.

    Args:
      path: where the file shall be; its folder is made.

    Raises:
      ValueError: the folder cannot be made or written, or is full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    with writing(path.parent):
        try:
            with temporary.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
