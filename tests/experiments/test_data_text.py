"""Sources give the same bytes however they come, in splits of 90 / 5 / 5, and say what is wrong."""

import dataclasses
import errno
import gzip
import os
import pathlib
import zipfile

import numpy as np
import pytest

from experiments.data import batch_at, cache_folder, is_read, load_text, remote
from experiments.data.cache import new_file
from experiments.data.stdlib import stdlib_file

PLAIN = b"".join(b"line %d of a plain text\n" % i for i in range(400))
STDLIB_ORDER = ["# e.py", "# f.py", "# b/c.py", "# b/d.py", "# a.py"]


def whole(text):
    return np.concatenate([text.train, text.validation, text.test]).tobytes()


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def home(tmp_path, monkeypatch):
    for name in ("SPEC_JAX_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pathlib.Path, "home", lambda: tmp_path)
    return tmp_path


def write(path, contents=PLAIN):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(contents)
    return path


def write_gzip(path, contents=PLAIN):
    return write(path, gzip.compress(contents))


def write_zip(path, members, how=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", how) as archive:
        for name, contents in members.items():
            archive.writestr(name, contents)
    return path


def write_misnamed(folder):
    """A zip file whose member's name is said to be UTF-8 and is not."""
    path = write_zip(folder / "x.zip", {"ä": PLAIN})
    path.write_bytes(path.read_bytes().replace("ä".encode(), b"\xff\xff"))
    return path


def write_damaged(path, how):
    """A zip file with a byte in the middle of its only member changed."""
    contents = bytearray(write_zip(path, {"a": PLAIN}, how).read_bytes())
    contents[contents.index(b"PK\x01\x02") // 2] ^= 0xFF
    return write(path, bytes(contents))


@pytest.mark.parametrize("size", [1, 19, 20, 999, 1000, 1001])
def test_splits_are_90_5_5_and_leave_no_byte_out(tmp_path, cache, size):
    contents = bytes(i % 256 for i in range(size))
    text = load_text(write(tmp_path / "text", contents), cache=cache)
    assert (len(text.train), len(text.validation)) == (size * 90 // 100, size * 5 // 100)
    assert whole(text) == contents
    assert len(text) == size
    assert not cache.exists()


def test_text_is_a_frozen_read_only_memory_map(tmp_path, cache):
    text = load_text(write(tmp_path / "text.txt"), cache=cache)
    assert text.name == "text.txt"
    for part in (text.train, text.validation, text.test):
        assert isinstance(part, np.memmap)
        assert part.dtype == np.uint8
        assert not part.flags.writeable
    with pytest.raises(dataclasses.FrozenInstanceError):
        text.name = "other"  # pyright: ignore[reportAttributeAccessIssue]


def test_fingerprint_is_of_the_bytes_alone(tmp_path, cache):
    plain = load_text(write(tmp_path / "a.txt"), cache=cache)
    packed = load_text(write_gzip(tmp_path / "b.gz"), cache=cache)
    other = load_text(write(tmp_path / "c.txt", PLAIN[:-1] + b"!"), cache=cache)
    assert plain.fingerprint() == packed.fingerprint() != other.fingerprint()


def test_fingerprint_is_of_every_byte(tmp_path, cache):
    """It is read a mebibyte at a time."""
    late = bytes(1 << 21) + b"!" + bytes((1 << 20) - 1)
    texts = [load_text(write(tmp_path / f"{late == t}", t), cache=cache) for t in (bytes(3 << 20), late)]
    assert texts[0].fingerprint() != texts[1].fingerprint()


def test_gzip_zip_and_folder_equal_the_plain_file(tmp_path, cache):
    half = PLAIN.index(b"\n", len(PLAIN) // 2) + 1
    write(tmp_path / "folder" / "a" / "z.txt", PLAIN[:half])
    write(tmp_path / "folder" / "b.txt", PLAIN[half:])
    sources = [
        write(tmp_path / "plain.txt"),
        write_gzip(tmp_path / "packed.txt.gz"),
        write_gzip(tmp_path / "CAPITALS.GZ"),
        write_zip(tmp_path / "one.zip", {"plain.txt": PLAIN}),
        write_zip(tmp_path / "two.zip", {"b.txt": PLAIN[half:], "a/z.txt": PLAIN[:half]}),
        tmp_path / "folder",
    ]
    for source in sources:
        text = load_text(str(source), cache=cache)
        assert whole(text) == PLAIN, source
        assert text.name == source.name


def test_folder_and_zip_take_visible_text_in_the_order_of_names(tmp_path, cache):
    members = {
        "b/2": b"two, without a newline",
        "b/10": b"ten\n",
        "a": b"caf\xe9 in Latin-1\n",
        "c/empty": b"",
        "c/late": b"x" * 8192 + b"\0 behind what is looked at\n",
        "d": b"last",
        ".hidden": b"hidden\n",
        ".git/config": b"hidden too\n",
        "picture.png": b"\x89PNG" + b"x" * 8000 + b"\0",
    }
    for name, contents in members.items():
        write(tmp_path / "folder" / name, contents)
    (tmp_path / "folder" / "loop").symlink_to(tmp_path / "folder")
    (tmp_path / "folder" / "broken").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "folder" / "pipe")
    archive = write_zip(tmp_path / "folder.zip", members)
    expected = b"caf\xe9 in Latin-1\nten\ntwo, without a newline\n" + members["c/late"] + b"last"
    assert whole(load_text(tmp_path / "folder", cache=cache)) == expected
    assert whole(load_text(archive, cache=cache)) == expected


def test_expanded_once_and_again_when_the_source_changes(tmp_path, cache):
    source = write_gzip(tmp_path / "text.gz")
    load_text(source, cache=cache)
    (expanded,) = cache.iterdir()
    written = expanded.stat().st_mtime_ns
    load_text(source, cache=cache)
    assert [(p, p.stat().st_mtime_ns) for p in cache.iterdir()] == [(expanded, written)]
    # Stored without compression, so that only the time tells the two apart.
    for contents, time in ((PLAIN, 1), (PLAIN.upper(), 2)):
        source.write_bytes(gzip.compress(contents, 0))
        os.utime(source, ns=(time, time))
        assert whole(load_text(source, cache=cache)) == contents

    folder = write(tmp_path / "folder" / "a").parent
    assert whole(load_text(folder, cache=cache)) == PLAIN
    write(folder / "b", b"more")
    assert whole(load_text(folder, cache=cache)) == PLAIN + b"more"


def test_files_of_the_same_size_and_time_are_told_apart_by_their_names(tmp_path, cache):
    for name in ("a", "b"):
        os.utime(write(tmp_path / "folder" / name, name.encode() + b"\n"), ns=(1, 1))
    assert whole(load_text(tmp_path / "folder", cache=cache)) == b"a\nb\n"
    (tmp_path / "folder" / "a").rename(tmp_path / "folder" / "c")
    assert whole(load_text(tmp_path / "folder", cache=cache)) == b"b\na\n"


def test_a_text_has_the_name_of_its_folder_however_it_is_called(tmp_path, cache, monkeypatch):
    folder = write(tmp_path / "folder" / "a").parent
    monkeypatch.chdir(folder)
    assert [load_text(name, cache=cache).name for name in (".", "../folder", folder)] == ["folder"] * 3


def test_what_is_written_into_the_folder_of_a_text_would_be_read(tmp_path, monkeypatch):
    folder = str(write(tmp_path / "folder" / "a").parent)
    for path, read in (
        ("folder/run", True), ("folder/deep/run", True), ("folder/.runs/run", False), ("folder/run/.here", False),
        ("run", False), ("folder2/run", False),
    ):  # fmt: skip
        assert is_read(folder, tmp_path / path) is read
    assert not is_read(str(tmp_path / "folder" / "a"), tmp_path / "folder" / "run")
    monkeypatch.chdir(tmp_path / "folder")
    assert is_read(".", pathlib.Path("run"))
    assert not is_read(".", pathlib.Path("../run"))


def test_stdlib_is_the_same_file_in_two_caches(tmp_path):
    first, second = (load_text("stdlib", cache=tmp_path / name) for name in "ab")
    assert whole(first) == whole(second)
    (one,), (two,) = (list((tmp_path / name).iterdir()) for name in "ab")
    assert one.name == two.name
    assert one.read_bytes() == two.read_bytes()
    assert len(first) > 3_000_000
    assert b"class OrderedDict(dict):" in whole(first)
    tokens = batch_at(first.train, seed=0, step=0, batch_size=2, sequence_length=64)
    assert tokens.shape == (2, 65)
    written = one.stat().st_mtime_ns
    load_text("stdlib", cache=tmp_path / "a")
    assert one.stat().st_mtime_ns == written


def test_stdlib_takes_source_only_in_an_order_that_is_not_the_alphabet(tmp_path, cache):
    root = tmp_path / "lib"
    for name in ("a.py", "b/c.py", "b/d.py", "e.py", "f.py"):
        write(root / name, b"# " + name.encode())
    for name in (
        "test/t.py",
        "b/tests/t.py",
        "pydoc_data/p.py",
        "site-packages/s.py",
        "dist-packages/d.py",
        "b/idle_test/i.py",
        "b/__pycache__/c.py",
        ".i/i.py",
        "_sysconfigdata_x.py",
        "g.so",
        ".h.py",
    ):
        write(root / name, b"# no")
    path, description = stdlib_file(cache, root)
    lines = path.read_bytes().decode().splitlines()
    assert sorted(lines) == ["# a.py", "# b/c.py", "# b/d.py", "# e.py", "# f.py"]
    # By the SHA-256 of the names, as `printf %s a.py | sha256sum` gives it.
    assert lines == STDLIB_ORDER
    assert "5 files" in description
    write(root / "a.py", b"# patched")
    assert stdlib_file(cache, root)[0] != path
    path.write_bytes(b"cut sho")
    write(root / "a.py", b"# a.py")
    assert stdlib_file(cache, root)[0].read_bytes().decode().splitlines() == STDLIB_ORDER


def test_stdlib_without_source(tmp_path, cache):
    with pytest.raises(ValueError, match=r"data 'stdlib' must find .* got none in .*choose --data"):
        stdlib_file(cache, tmp_path)


def test_cache_folder(home, monkeypatch):
    monkeypatch.setattr("sys.platform", "linux")
    assert cache_folder() == home / ".cache" / "spec-jax"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder() == home / ".cache" / "spec-jax"
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "xdg"))
    assert cache_folder() == home / "xdg" / "spec-jax"
    monkeypatch.setenv("SPEC_JAX_CACHE", str(home / "mine"))
    assert cache_folder() == home / "mine"
    load_text(write_gzip(home / "text.gz"))
    assert len(list((home / "mine").iterdir())) == 1


def test_cache_folder_of_other_systems(home, monkeypatch):
    monkeypatch.setattr("sys.platform", "darwin")
    assert cache_folder() == home / "Library" / "Caches" / "spec-jax"
    monkeypatch.setattr("sys.platform", "win32")
    assert cache_folder() == home / ".cache" / "spec-jax"
    monkeypatch.setenv("LOCALAPPDATA", str(home / "local"))
    assert cache_folder() == home / "local" / "spec-jax"


@pytest.mark.parametrize(
    ("number", "error"), [(errno.ENOSPC, ValueError), (errno.EACCES, ValueError), (errno.EIO, OSError)]
)
def test_only_a_cache_that_is_full_or_closed_is_blamed_on_the_user(cache, number, error):
    def fails():
        with new_file(cache / "text.txt") as file:
            file.write(PLAIN)
            raise OSError(number, "what the system says")

    with pytest.raises(error, match="what the system says"):
        fails()
    assert not list(cache.iterdir())


def test_files_that_are_written_at_once_are_whole_and_the_last_one_stays(tmp_path):
    path = tmp_path / "text.txt"
    with new_file(path) as last:
        with new_file(path) as first:
            first.write(b"first")
            last.write(b"last")
            assert [unfinished.name[0] for unfinished in tmp_path.iterdir()] == [".", "."]
        assert path.read_bytes() == b"first"
    assert path.read_bytes() == b"last"
    assert list(tmp_path.iterdir()) == [path]


BAD = {
    "missing": (lambda p: p / "no" / "such", "got '.*such': no such path"),
    "empty name": (lambda p: "", "got an empty string"),
    "empty file": (lambda p: write(p / "empty", b""), "at least one byte, got the empty file .*empty"),
    "pipe": (lambda p: os.mkfifo(p / "pipe") or p / "pipe", "got '.*pipe': neither a file nor a folder"),
    "no home": (lambda p: "~nobody-of-this-name/text", "data must be readable, got '~nobody"),
    "too long": (lambda p: "x" * 5000, "data must be readable, got 'xxx"),
    "empty folder": (lambda p: write(p / "f" / ".hidden").parent, "data must hold text, got '.*f': no text"),
    "binary folder": (lambda p: write(p / "f" / "x", b"\0").parent, "data must hold text, got '.*f': no text"),
    "empty gzip": (lambda p: write_gzip(p / "e.gz", b""), "data must hold text"),
    "no gzip": (lambda p: write(p / "x.gz"), "must be a whole gzip file, got '.*x.gz'"),
    "cut gzip": (lambda p: write(p / "x.gz", gzip.compress(PLAIN)[:-9]), "must be a whole gzip file"),
    "no zip": (lambda p: write(p / "x.zip"), "must be a whole zip file without a password, got '.*x.zip'"),
    "damaged lzma": (lambda p: write_damaged(p / "x.zip", zipfile.ZIP_LZMA), "must be a whole zip file .*x.zip"),
    "zip with a name of no letters": (write_misnamed, "must be a whole zip file .*x.zip"),
    "empty zip": (lambda p: write_zip(p / "x.zip", {}), "data must hold text"),
    "tar": (lambda p: write_gzip(p / "x.tar.gz"), "got '.*x.tar.gz': unpack it, give the folder"),
    "tgz": (lambda p: write_gzip(p / "x.tgz"), "got '.*x.tgz': unpack it, give the folder"),
}


@pytest.mark.parametrize(("make", "message"), BAD.values(), ids=BAD)
def test_bad_paths(tmp_path, cache, make, message):
    with pytest.raises(ValueError, match=message):
        load_text(make(tmp_path), cache=cache)
    assert not cache.exists() or not list(cache.iterdir())


def test_damaged_gzip_is_named(tmp_path, cache):
    """Its checks pass up to where zlib's own fail."""
    contents = bytearray(gzip.compress(PLAIN))
    contents[10] ^= 0xFF
    with pytest.raises(ValueError, match="must be a whole"):
        load_text(write(tmp_path / "x.gz", bytes(contents)), cache=cache)


def test_enwik8_is_fetched(tmp_path, cache, monkeypatch):
    asked = []
    monkeypatch.setattr(remote, "fetch", lambda *arguments: asked.append(arguments) or write(tmp_path / "file"))
    assert whole(load_text("enwik8", cache=cache)) == PLAIN
    assert asked == [(remote.ENWIK8, cache)]


def test_a_file_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append((os.fstat(file).st_size, (tmp_path / "a").exists())))
    with new_file(tmp_path / "a") as file:
        file.write(b"abc")
    assert synced == [(3, False)]


def test_damaged_zip_member_is_not_kept(tmp_path, cache):
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("text", PLAIN)
    path.write_bytes(path.read_bytes().replace(b"line 7 ", b"lime 7 "))
    with pytest.raises(ValueError, match=r"must be a whole zip file.*CRC"):
        load_text(path, cache=cache)
    assert not list(cache.iterdir())


def test_cache_that_cannot_be_made(tmp_path):
    blocked = write(tmp_path / "file") / "cache"
    with pytest.raises(ValueError, match=r"the cache folder must be writable, got .*cache.*SPEC_JAX_CACHE"):
        load_text("stdlib", cache=blocked)


def test_text_shorter_than_a_sequence(tmp_path, cache):
    text = load_text(write(tmp_path / "text", PLAIN[:1280]), cache=cache)
    text.check(63)
    with pytest.raises(
        ValueError,
        match=r"data must have at least sequence_length \+ 1 = 65 bytes .* got 64 in the validation part "
        r"of 'text' \(1280 bytes.*at least 1300 bytes",
    ):
        text.check(64)
