"""Downloads against a local server that breaks off, ignores Range, sends wrong bytes or is not there."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import http.server
import io
import re
import socket
import struct
import threading
import zipfile

import numpy as np
import pytest

from experiments.data import remote as remote_module
from experiments.data.remote import ENWIK8, RemoteFile, fetch

# Random, so that the archive is as long as its member: several chunks.
MEMBER = np.random.default_rng(1).integers(0, 256, 700_001, np.uint8).tobytes()


def pack(contents, member="small8"):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(zipfile.ZipInfo(member), contents)
    return buffer.getvalue()


ARCHIVE = pack(MEMBER)


class Server(http.server.ThreadingHTTPServer):
    """Serves `archive`; each request takes the next word of `plan`, the last one stays.

    whole: all that was asked for; half: breaks off after half of it; the same with `plain-` for a server that
    ignores Range; `chunked`: without a length; a number: that status. `elsewhere`: another range than was asked for;
    `unknown`: a range of a file whose size is not said. `reset`: as half, with the connection reset; `garbage`: no
    HTTP.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.archive = ARCHIVE
        self.plan = collections.deque(["whole"])
        self.ranges = []


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self):
        asked = self.headers.get("Range")
        self.server.ranges.append(asked)
        plan = self.server.plan.popleft() if len(self.server.plan) > 1 else self.server.plan[0]
        if plan.isdigit():
            self.send_error(int(plan))
            return
        if plan == "garbage":
            self.wfile.write(b"SSH-2.0\r\n")
            return
        size = len(self.server.archive)
        start = 0
        if asked and plan in ("whole", "half", "reset", "elsewhere", "unknown"):
            start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])  # pyright: ignore[reportOptionalSubscript]
            if start >= size:
                self.send_error(416)
                return
            self.send_response(206)
            first, total = start * 10 if plan == "elsewhere" else start, "*" if plan == "unknown" else size
            self.send_header("Content-Range", f"bytes {first}-{size - 1}/{total}")
        else:
            self.send_response(200)
        body = self.server.archive[start:]
        if plan != "chunked":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            self.wfile.write(body[: len(body) // 2] if plan.endswith("half") or plan == "reset" else body)
        if plan == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    def log_message(self, format, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def small(server):
    return RemoteFile(
        name="small8",
        url=f"http://127.0.0.1:{server.server_port}/small8.zip",
        archive_bytes=len(ARCHIVE),
        member="small8",
        member_bytes=len(MEMBER),
        member_sha256=hashlib.sha256(MEMBER).hexdigest(),
    )


def get(remote, cache, attempts=5):
    return fetch(remote, cache, attempts=attempts, first_wait_s=0.0)


def kept(cache):
    return {path.name for path in cache.iterdir()} - {"small8.lock"}


def part_of(cache):
    return cache / "small8.zip.part"


def test_enwik8_is_the_published_file():
    assert (ENWIK8.archive_bytes, ENWIK8.member_bytes) == (36_445_475, 100_000_000)
    assert ENWIK8.url == "https://mattmahoney.net/dc/enwik8.zip"
    assert ENWIK8.member_sha256 == "2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8"


def test_downloads_once(server, small, tmp_path, capsys):
    path = get(small, tmp_path)
    assert path == tmp_path / "small8"
    assert path.read_bytes() == MEMBER
    assert kept(tmp_path) == {"small8"}
    assert get(small, tmp_path) == path
    assert server.ranges == [None]
    assert "downloading small8" in capsys.readouterr().err


def test_continues_after_a_break(server, small, tmp_path):
    server.plan = collections.deque(["half", "half", "whole"])
    assert get(small, tmp_path).read_bytes() == MEMBER
    half = len(ARCHIVE) // 2
    three_quarters = half + (len(ARCHIVE) - half) // 2
    assert server.ranges == [None, f"bytes={half}-", f"bytes={three_quarters}-"]


@pytest.mark.parametrize("plan", ["reset", "garbage"])
def test_continues_after_a_reset_or_garbage(server, small, tmp_path, plan):
    server.plan = collections.deque([plan, "whole"])
    assert get(small, tmp_path).read_bytes() == MEMBER
    assert len(server.ranges) == 2


def test_a_later_run_continues_what_an_earlier_one_left(server, small, tmp_path):
    server.plan = collections.deque(["half", "whole"])
    half = len(ARCHIVE) // 2
    with pytest.raises(ValueError, match=f"broke off after {half:,} bytes(.|\n)*continues after the {half:,} bytes"):
        get(small, tmp_path, attempts=1)
    assert part_of(tmp_path).read_bytes() == ARCHIVE[:half]
    assert get(small, tmp_path, attempts=1).read_bytes() == MEMBER
    assert server.ranges == [None, f"bytes={half}-"]
    assert kept(tmp_path) == {"small8"}


@pytest.mark.parametrize("plan", [["plain-half", "plain-half", "plain-whole"], ["half", "chunked"]])
def test_server_that_ignores_range_starts_anew(server, small, tmp_path, plan):
    server.plan = collections.deque(plan)
    assert get(small, tmp_path).read_bytes() == MEMBER
    assert len(server.ranges) == len(plan)
    assert all(asked is not None for asked in server.ranges[1:])


def test_complete_part_is_not_asked_for_again(server, small, tmp_path):
    part_of(tmp_path).write_bytes(ARCHIVE)
    assert get(small, tmp_path).read_bytes() == MEMBER
    assert server.ranges == []


@pytest.mark.parametrize("part", [b"x" * 1000, b"x" * len(ARCHIVE), b"x" * (len(ARCHIVE) + 1)])
def test_part_of_another_file_is_thrown_away(server, small, tmp_path, part):
    part_of(tmp_path).write_bytes(part)
    assert get(small, tmp_path).read_bytes() == MEMBER
    assert server.ranges[-1] is None
    assert kept(tmp_path) == {"small8"}


def changed(place, byte):
    """The archive with another byte at a place."""
    return ARCHIVE[:place] + bytes([byte]) + ARCHIVE[place + 1 :]


DIRECTORY = ARCHIVE.rindex(b"PK\1\2")
WRONG = {
    "other member": (pack(MEMBER[:-1] + b"!"), "is not the right file: expected 700,001 bytes with SHA-256"),
    "no archive": (bytes(len(ARCHIVE)), "the archive is damaged or is no zip file with small8"),
    "flipped bit": (changed(5000, ARCHIVE[5000] ^ 1), "damaged|not the right file"),
    # What is said to be compressed is not.
    "broken stream": (changed(DIRECTORY + 10, zipfile.ZIP_DEFLATED), "damaged.*small8: Error -3 while decompressing"),
    "unknown method": (changed(DIRECTORY + 10, 99), "damaged.*small8: That compression method is not supported"),
    "password": (changed(DIRECTORY + 8, 1), "damaged.*small8: .*encrypted"),
    "log-in page": (b"<html>Please log in", f"another file: expected {len(ARCHIVE)} bytes, got 19 "),
    "longer": (ARCHIVE + b"more", f"another file: expected {len(ARCHIVE)} bytes, got {len(ARCHIVE) + 4} "),
    "other name": (pack(MEMBER, member="other8"), "no zip file with small8"),
}


@pytest.mark.parametrize(("archive", "message"), WRONG.values(), ids=WRONG)
def test_wrong_bytes_are_told_and_not_kept(server, small, tmp_path, archive, message):
    server.archive = archive
    with pytest.raises(ValueError, match=message):
        get(small, tmp_path)
    assert kept(tmp_path) == set()
    server.archive = ARCHIVE
    assert get(small, tmp_path).read_bytes() == MEMBER


def test_wrong_bytes_without_a_length(server, small, tmp_path):
    server.archive, server.plan[0] = ARCHIVE + b"more", "chunked"
    with pytest.raises(ValueError, match=r"more than the .* bytes of the archive came"):
        get(small, tmp_path)
    assert kept(tmp_path) == set()


def test_member_that_expands_without_end_is_cut(server, small, tmp_path):
    bomb = pack(bytes(50_000_000))
    server.archive = bomb
    with pytest.raises(ValueError, match="got 700,002 with"):
        get(dataclasses.replace(small, archive_bytes=len(bomb)), tmp_path)
    assert kept(tmp_path) == set()


def test_ranges_must_begin_where_the_part_ends(server, small, tmp_path):
    part_of(tmp_path).write_bytes(ARCHIVE[:1000])
    server.plan = collections.deque(["elsewhere", "unknown"])
    with pytest.raises(ValueError, match=f"expected bytes 1000-{len(ARCHIVE) - 1}/{len(ARCHIVE)}, got bytes 10000-"):
        get(small, tmp_path)
    assert get(small, tmp_path).read_bytes() == MEMBER
    assert server.ranges == ["bytes=1000-"] * 2


def test_ranges_must_be_of_an_archive_of_the_size(server, small, tmp_path):
    part_of(tmp_path).write_bytes(ARCHIVE[:1000])
    server.archive = ARCHIVE + b"more"
    with pytest.raises(ValueError, match=f"another file: expected bytes 1000-.*, got .*/{len(server.archive)} "):
        get(small, tmp_path)
    assert part_of(tmp_path).read_bytes() == ARCHIVE[:1000]


def test_log_in_page_does_not_cost_the_part(server, small, tmp_path):
    part_of(tmp_path).write_bytes(ARCHIVE[:1000])
    server.archive, server.plan[0] = b"<html>", "plain-whole"
    with pytest.raises(ValueError, match="continues after the 1,000 bytes"):
        get(small, tmp_path)
    assert part_of(tmp_path).read_bytes() == ARCHIVE[:1000]


@pytest.mark.parametrize(
    ("status", "requests"),
    [
        *((status, 1) for status in ("404", "403", "204")),
        *((status, 3) for status in ("408", "425", "429", "500", "502", "503", "504")),
    ],
)
def test_statuses_are_retried_where_that_may_help(server, small, tmp_path, status, requests):
    server.plan[0] = status
    with pytest.raises(ValueError, match=rf"HTTP Error {status}|\(status {status}\)"):
        get(small, tmp_path, attempts=3)
    assert len(server.ranges) == requests


def test_pauses_double(server, small, tmp_path, monkeypatch):
    pauses = []
    monkeypatch.setattr(remote_module.time, "sleep", pauses.append)
    server.plan = collections.deque(["503", "503", "half", "503", "whole"])
    fetch(small, tmp_path, attempts=5, first_wait_s=0.5)
    assert pauses == [0.5, 1.0, 2.0, 4.0]


@pytest.fixture
def unreachable(server, small):
    # The port of a socket that was bound and closed: nobody listens.
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as closed:
        port = closed.server_port
    return dataclasses.replace(small, url=f"http://127.0.0.1:{port}/small8.zip")


def test_absent_server_says_how_to_place_the_file_by_hand(unreachable, tmp_path, capsys):
    cache = tmp_path / "cache"
    with pytest.raises(ValueError, match="by hand") as raised:
        get(unreachable, cache, attempts=2)
    message = str(raised.value)
    for part in (
        unreachable.url,
        f"2. copy it to {cache / 'small8.zip'}\n",
        f"unpacked, to {cache / 'small8'}\n",
        f"{len(ARCHIVE):,} bytes",
        "700,001 bytes",
        unreachable.member_sha256,
        "SPEC_JAX_CACHE",
        "Connection refused",
    ):
        assert part in message
    assert kept(cache) == set()
    assert capsys.readouterr().err.count("trying again") == 1


def test_a_server_without_a_certificate_is_asked_once(small, tmp_path, capsys):
    with pytest.raises(ValueError, match="SSL"):
        get(dataclasses.replace(small, url=small.url.replace("http", "https")), tmp_path)
    assert "SSL" not in capsys.readouterr().err


@pytest.mark.parametrize(("name", "contents"), [("small8.zip", ARCHIVE), ("small8", MEMBER)])
def test_file_placed_by_hand_needs_no_server(unreachable, tmp_path, name, contents):
    """And where it is unpacked, not even a lock is written."""
    (tmp_path / name).write_bytes(contents)
    assert get(unreachable, tmp_path).read_bytes() == MEMBER
    assert (tmp_path / name).read_bytes() == contents
    assert len(list(tmp_path.iterdir())) == (1 if name == "small8" else 3)


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("small8", MEMBER[:-1], "is another one: expected 700,001 bytes, got 700,000"),
        ("small8", MEMBER[:-1] + b"!", "is another one: expected SHA-256"),
        ("small8.zip", ARCHIVE[:-1], "small8.zip is damaged or another one"),
    ],
)
def test_wrong_file_placed_by_hand(small, unreachable, tmp_path, name, contents, message):
    (tmp_path / name).write_bytes(contents)
    with pytest.raises(ValueError, match=message):
        get(unreachable, tmp_path, attempts=1)
    assert get(small, tmp_path).read_bytes() == MEMBER


def test_runs_that_start_together_download_once(server, small, tmp_path):
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda _: get(small, tmp_path), range(4)))
    assert all(path.read_bytes() == MEMBER for path in paths)
    assert server.ranges == [None]
    assert kept(tmp_path) == {"small8"}
