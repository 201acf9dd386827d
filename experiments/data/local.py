"""Text of the user's own: a file, a `.gz`, a `.zip` or a folder, as one file that can be memory-mapped."""

import gzip
import hashlib
import lzma
import os
import pathlib
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterable
from typing import IO, BinaryIO

from experiments.data.cache import new_file

# As git does: a file with a zero byte near its start is no text.
BINARY_PROBE_BYTES = 8192


def local_file(name: str, cache: pathlib.Path) -> tuple[pathlib.Path, str]:
    """Returns a plain file with the text at a path.

    - A file is taken as it is, whatever its bytes.
    - A `.gz` is expanded.
    - A folder gives its files, at any depth, in the alphabetical order of their relative paths, joined with
      a newline where a file does not end in one. Left out are hidden files and folders, links to folders,
      what is not a regular file, and binary files (a zero byte in the first 8 KiB). Encodings are not
      looked at: a model of bytes takes any.
    - A `.zip` gives its members by the same rules.

    What is expanded lies in the cache under a name made of the path, size and modification time of each
    source file, so it is written once and made anew when a source changes.

    Args:
      name: the path; a leading `~` is the home folder.
      cache: the folder for expanded text.

    Returns:
      The file, and a line that says what it is.

    Raises:
      ValueError: the path does not exist, cannot be read, is a damaged archive or holds no text.
    """
    if not name:
        raise ValueError("data must be 'stdlib', 'enwik8' or the path of a text, got an empty string")
    try:
        path = pathlib.Path(name).expanduser()
        suffix = path.suffix.lower()
        if path.is_dir():
            return _expanded(path, _folder_files(path), cache, _write_folder)
        if not path.is_file():
            what = "neither a file nor a folder" if path.exists() else "no such path"
            raise ValueError(f"data must be 'stdlib', 'enwik8' or the path of a text, got {name!r}: {what}")
        if suffix == ".tgz" or path.name.lower().endswith(".tar.gz"):
            raise ValueError(f"data must be a file, .gz, .zip or folder, got {name!r}: unpack it, give the folder")
        if suffix in (".gz", ".zip"):
            return _expanded(path, [path], cache, _write_gzip if suffix == ".gz" else _write_zip)
        with path.open("rb"):
            return path, f"the file {path.resolve()}"
    # RuntimeError is how pathlib says that `~name` has no home folder.
    except (OSError, RuntimeError) as error:
        raise ValueError(f"data must be readable, got {name!r}: {error}") from error


def _expanded(
    path: pathlib.Path,
    sources: list[pathlib.Path],
    cache: pathlib.Path,
    write: Callable[[pathlib.Path, list[pathlib.Path], BinaryIO], None],
) -> tuple[pathlib.Path, str]:
    key = hashlib.sha256(os.fsencode(path.resolve()))
    for source in sources:
        state = source.stat()
        key.update(f"\0{state.st_size} {state.st_mtime_ns} ".encode() + os.fsencode(source))
    result = cache / f"text-{key.hexdigest()[:24]}.txt"
    if not result.is_file():
        with new_file(result) as file:
            write(path, sources, file)
            if file.tell() == 0:
                raise ValueError(f"data must hold text, got {str(path)!r}: no text in it (binary files do not count)")
    kind = "folder" if path.is_dir() else "archive"
    return result, f"the {kind} {path.resolve()}, expanded to {result}"


def _folder_files(root: pathlib.Path) -> list[pathlib.Path]:
    def stop(error: OSError) -> None:
        raise error

    files = []
    for folder, subfolders, names in os.walk(root, onerror=stop):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        files += [pathlib.Path(folder, name) for name in names if not name.startswith(".")]
    return sorted((file for file in files if file.is_file()), key=lambda file: file.relative_to(root).as_posix())


def _write_folder(root: pathlib.Path, sources: list[pathlib.Path], out: BinaryIO) -> None:
    _write_texts((source.open("rb") for source in sources), out)


def _write_gzip(path: pathlib.Path, sources: list[pathlib.Path], out: BinaryIO) -> None:
    try:
        with gzip.open(path) as file:
            shutil.copyfileobj(file, out)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"data must be a whole gzip file, got {str(path)!r}: {error}") from error


def _write_zip(path: pathlib.Path, sources: list[pathlib.Path], out: BinaryIO) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            visible = [
                member
                for member in archive.infolist()
                if not member.is_dir() and not any(part.startswith(".") for part in member.filename.split("/"))
            ]
            _write_texts((archive.open(m) for m in sorted(visible, key=lambda member: member.filename)), out)
    # RuntimeError is how zipfile says that a member is encrypted; one of its kinds, that it is packed in another way.
    except (zipfile.BadZipFile, EOFError, zlib.error, lzma.LZMAError, UnicodeDecodeError, RuntimeError) as error:
        raise ValueError(f"data must be a whole zip file without a password, got {str(path)!r}: {error}") from error


def _write_texts(files: Iterable[IO[bytes]], out: BinaryIO) -> None:
    ends_in_newline = True
    for file in files:
        with file:
            chunk = file.read(BINARY_PROBE_BYTES)
            if b"\0" in chunk or not chunk:
                continue
            if not ends_in_newline:
                out.write(b"\n")
            while chunk:
                out.write(chunk)
                ends_in_newline = chunk.endswith(b"\n")
                chunk = file.read(1 << 20)
