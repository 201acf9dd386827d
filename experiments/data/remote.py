"""A text that is downloaded once: resumed after a break, checked, and put in place whole or not at all."""

import contextlib
import dataclasses
import hashlib
import http.client
import pathlib
import ssl
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Generator
from email.message import Message
from typing import IO

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from experiments.data.cache import CACHE_VARIABLE, new_file, writing
from experiments.locks import locked

CHUNK_BYTES = 1 << 18
TIMEOUT_S = 30.0
RETRIED_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})


@dataclasses.dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """A file inside a zip archive on the web, with what proves that it is the right one.

    Attributes:
      name: what the user calls it; the member's and, with `.zip`, the archive's name in the cache.
      url: where the archive is.
      archive_bytes: the archive's size.
      member: the file's name in the archive.
      member_bytes: the file's size.
      member_sha256: the file's SHA-256, in hexadecimal.
    """

    name: str
    url: str
    archive_bytes: int
    member: str
    member_bytes: int
    member_sha256: str


ENWIK8 = RemoteFile(
    name="enwik8",
    url="https://mattmahoney.net/dc/enwik8.zip",
    archive_bytes=36_445_475,
    member="enwik8",
    member_bytes=100_000_000,
    member_sha256="2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8",
)


class _TransferError(Exception):
    """The download did not end and may be continued. `final`: another attempt now would be in vain."""

    def __init__(self, reason: str, final: bool = False):
        super().__init__(reason)
        self.final = final


class _WrongFileError(Exception):
    """The bytes that came are not those of the file that was asked for."""


def fetch(remote: RemoteFile, cache: pathlib.Path, *, attempts: int = 5, first_wait_s: float = 1.0) -> pathlib.Path:
    """Returns the unpacked file in the cache, downloading it where it is not there already.

    The file is checked (size and SHA-256) every time, so one that was put there by hand, packed or
    unpacked, is as good as a downloaded one, and a wrong one is never used. A download that broke off is
    continued where it stopped, also by a later process; of several processes one downloads and the others
    wait for it.

    Args:
      remote: what to get.
      cache: the folder for it.
      attempts: how many connections may fail before the download is given up.
      first_wait_s: pause after the first failure in seconds; it doubles with each further one.

    Raises:
      ValueError: the file cannot be had (the message says how to put it there by hand), or the cache cannot
        be written.
    """
    target = cache / remote.name
    if not _difference(remote, target):
        return target

    def wait() -> None:
        Console(stderr=True).print(f"waiting for another process that downloads to {cache}")

    with writing(cache), locked(cache / f"{remote.name}.lock", wait):
        if not _difference(remote, target):
            return target
        try:
            _install(remote, target, attempts, first_wait_s)
        except (_TransferError, _WrongFileError) as error:
            # Three chained tracebacks of urllib would hide the message, which has the reason in it.
            raise ValueError(_by_hand(remote, cache, str(error))) from None
    return target


def _install(remote: RemoteFile, target: pathlib.Path, attempts: int, first_wait_s: float) -> None:
    placed = _archive(remote, target.parent)
    if placed.exists():
        with contextlib.suppress(_WrongFileError):
            _unpack(remote, placed, target)
            return
    partial = _partial(remote, target.parent)
    resumed = partial.exists()
    try:
        _download(remote, partial, attempts, first_wait_s)
        _unpack(remote, partial, target)
    except _TransferError:
        if partial.stat().st_size == 0:
            partial.unlink()
        raise
    except _WrongFileError:
        partial.unlink()
        if not resumed:
            raise
        # The part from an earlier run may have been the wrong one: once more from the start.
        _install(remote, target, attempts, first_wait_s)
    partial.unlink(missing_ok=True)


def _archive(remote: RemoteFile, cache: pathlib.Path) -> pathlib.Path:
    return cache / f"{remote.name}.zip"


def _partial(remote: RemoteFile, cache: pathlib.Path) -> pathlib.Path:
    return cache / f"{remote.name}.zip.part"


def _difference(remote: RemoteFile, path: pathlib.Path) -> str:
    """Says what is wrong with an unpacked file; empty where it is the right one."""
    if not path.is_file():
        return "not there"
    if (size := path.stat().st_size) != remote.member_bytes:
        return f"expected {remote.member_bytes:,} bytes, got {size:,}"
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return "" if digest == remote.member_sha256 else f"expected SHA-256 {remote.member_sha256}, got {digest}"


def _unpack(remote: RemoteFile, archive_path: pathlib.Path, target: pathlib.Path) -> None:
    try:
        with (
            zipfile.ZipFile(archive_path) as archive,
            archive.open(remote.member) as source,
            new_file(target) as out,
        ):
            digest, size = hashlib.sha256(), 0
            # One byte more than expected is enough to know that it is too long, however far it would expand.
            while chunk := source.read(min(CHUNK_BYTES, remote.member_bytes + 1 - size)):
                size += len(chunk)
                digest.update(chunk)
                out.write(chunk)
            if (size, digest.hexdigest()) != (remote.member_bytes, remote.member_sha256):
                raise _WrongFileError(
                    f"{remote.member} in the archive is not the right file: expected {remote.member_bytes:,} "
                    f"bytes with SHA-256 {remote.member_sha256}, got {size:,} with {digest.hexdigest()}"
                )
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, NotImplementedError, RuntimeError) as error:
        raise _WrongFileError(f"the archive is damaged or is no zip file with {remote.member}: {error}") from error


def _download(remote: RemoteFile, partial: pathlib.Path, attempts: int, first_wait_s: float) -> None:
    """Fills `partial` up to the archive's size, continuing what is there."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress, partial.open("ab") as out:
        bar = progress.add_task(f"downloading {remote.name}", total=remote.archive_bytes)
        failures = 0
        while (size := out.tell()) != remote.archive_bytes:
            if size > remote.archive_bytes:
                raise _WrongFileError(f"more than the {remote.archive_bytes:,} bytes of the archive came")
            try:
                with contextlib.closing(_chunks(remote, out)) as chunks:
                    for chunk in chunks:
                        out.write(chunk)
                        progress.update(bar, completed=out.tell())
                        if out.tell() > remote.archive_bytes:
                            break
                if out.tell() < remote.archive_bytes:
                    raise _TransferError(f"the connection broke off after {out.tell():,} bytes")
            except _TransferError as error:
                failures += 1
                if error.final or failures >= attempts:
                    raise
                wait_s = first_wait_s * 2 ** (failures - 1)
                console.print(f"{remote.name}: {error}; trying again in {wait_s:g} s", markup=False)
                time.sleep(wait_s)


def _chunks(remote: RemoteFile, out: IO[bytes]) -> Generator[bytes, None, None]:
    """Yields the archive from where `out` ends; empties `out` where the server sends it from the start."""
    start = out.tell()
    headers = {"User-Agent": "spec-jax", "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    request = urllib.request.Request(remote.url, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
            _check_response(remote, start, response.status, response.headers)
            if response.status == 200:
                out.seek(0)
                out.truncate()
            while chunk := response.read(CHUNK_BYTES):
                yield chunk
    except urllib.error.HTTPError as error:
        with error:
            raise _TransferError(str(error), final=error.code not in RETRIED_STATUS) from error
    except urllib.error.URLError as error:
        raise _TransferError(str(error.reason), final=isinstance(error.reason, ssl.SSLError)) from error
    except (OSError, http.client.HTTPException) as error:
        raise _TransferError(f"{type(error).__name__}: {error}") from error


def _check_response(remote: RemoteFile, start: int, status: int, headers: Message) -> None:
    """Raises before anything is written when the server announces another file, as a log-in page does."""
    if status == 206:
        got = headers.get("Content-Range", "")
        sizes = (f"{remote.archive_bytes}", "*")
        good = got.startswith(f"bytes {start}-") and got.rpartition("/")[2] in sizes
        expected = f"bytes {start}-{remote.archive_bytes - 1}/{remote.archive_bytes}"
    else:
        got, expected = headers.get("Content-Length"), f"{remote.archive_bytes} bytes"
        good = status == 200 and got in (None, f"{remote.archive_bytes}")
    if not good:
        raise _TransferError(
            f"the server has another file: expected {expected}, got {got} (status {status})", final=True
        )


def _by_hand(remote: RemoteFile, cache: pathlib.Path, reason: str) -> str:
    target, archive, partial = cache / remote.name, _archive(remote, cache), _partial(remote, cache)
    lines = [
        f"{remote.name} must be downloaded or put in place by hand, and the download failed: {reason}",
        "To put it there by hand:",
        f"  1. get {remote.url} ({remote.archive_bytes:,} bytes) on a machine that can",
        f"  2. copy it to {archive}",
        f"     or its member {remote.member!r}, unpacked, to {target}",
        f"     ({remote.member_bytes:,} bytes, SHA-256 {remote.member_sha256})",
        f"It is checked when it is used. {CACHE_VARIABLE} names another folder than {cache}.",
    ]
    if partial.exists():
        lines.append(f"The next run continues after the {partial.stat().st_size:,} bytes that came.")
    if target.exists():
        lines.append(f"The file that lies at {target} is another one: {_difference(remote, target)}.")
    if archive.exists():
        lines.append(f"The archive that lies at {archive} is damaged or another one.")
    return "\n".join(lines)
