"""The source of the Python standard library beside the running interpreter: text without a download."""

import hashlib
import os
import pathlib
import platform
import sysconfig

from experiments.data.cache import new_file

# Not part of the library, or part of it in some distributions only: Debian and Docker's slim images leave
# out the tests, which are more than half of CPython's own bytes. `pydoc_data` is one generated file, larger
# than a whole validation split.
EXCLUDED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "pydoc_data"}
)
# Written when the interpreter is built, with the paths and flags of that machine.
EXCLUDED_PREFIX = "_sysconfigdata"


def stdlib_file(cache: pathlib.Path, root: pathlib.Path | None = None) -> tuple[pathlib.Path, str]:
    """Writes the library's source to one file of the cache, unless it is there.

    Every `*.py` below `root` is taken as bytes, except `EXCLUDED_FOLDERS`, hidden files and folders, and
    what the interpreter's build wrote. The files come in the order of the SHA-256 of their relative paths,
    not of the alphabet, whose end (`xml`, `xmlrpc`, `zipfile`, `zoneinfo`) would be a test split of a kind
    that the training split never shows. The order is the same everywhere, so one Python release gives one
    text wherever it is installed whole.

    The result is named by the version and the SHA-256 of the contents, which are read anew each time (about
    11 MB): an interpreter that was upgraded or patched gives another file.

    Args:
      cache: the folder for the result.
      root: the library's folder; by default that of the running interpreter.

    Returns:
      The file, and a line that says what it is.

    Raises:
      ValueError: there is no source below `root`, or the cache cannot be written.
    """
    root = root or pathlib.Path(sysconfig.get_path("stdlib"))
    names = _source_names(root)
    if not names:
        raise ValueError(
            f"data 'stdlib' must find the standard library's *.py files, got none in {root}; "
            "this interpreter keeps no source: choose --data enwik8 or --data PATH"
        )
    text = b"".join(_with_newline((root / name).read_bytes()) for name in names)
    version = platform.python_version()
    path = cache / f"stdlib-{version}-{hashlib.sha256(text).hexdigest()[:16]}.txt"
    if not path.is_file() or path.stat().st_size != len(text):
        with new_file(path) as file:
            file.write(text)
    return path, f"source of the Python {version} standard library, {len(names)} files"


def _source_names(root: pathlib.Path) -> list[str]:
    names = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in EXCLUDED_FOLDERS and not name.startswith(".")]
        for name in files:
            path = pathlib.Path(folder, name)
            if name.endswith(".py") and not name.startswith((EXCLUDED_PREFIX, ".")) and path.is_file():
                names.append(path.relative_to(root).as_posix())
    return sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())


def _with_newline(source: bytes) -> bytes:
    return source if source.endswith(b"\n") or not source else source + b"\n"
