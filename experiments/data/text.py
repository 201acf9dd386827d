"""`load_text`: a source's name or a path in, three memory-mapped splits of bytes out."""

import dataclasses
import hashlib
import os
import pathlib

import numpy as np
from numpy.typing import NDArray

from experiments.data import local, remote, stdlib
from experiments.data.cache import cache_folder

TRAIN_PERCENT = 90
VALIDATION_PERCENT = 5
READ_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Text:
    """A text in three parts, each a memory map: nothing is read before it is indexed.

    Attributes:
      name: 'stdlib', 'enwik8', or the name of the file or folder.
      description: one line that says where the bytes come from.
      train: (N_train,) uint8, the first 90 % of the bytes.
      validation: (N_validation,) uint8, the next 5 %.
      test: (N_test,) uint8, the rest.
    """

    name: str
    description: str
    train: NDArray[np.uint8]
    validation: NDArray[np.uint8]
    test: NDArray[np.uint8]

    def __len__(self) -> int:
        """The number of bytes in all three parts."""
        return len(self.train) + len(self.validation) + len(self.test)

    def check(self, sequence_length: int) -> None:
        """Raises ValueError unless each part holds a row of a batch, which is `sequence_length + 1` bytes."""
        need = sequence_length + 1
        for part in ("train", "validation", "test"):
            if (length := len(getattr(self, part))) < need:
                raise ValueError(
                    f"data must have at least sequence_length + 1 = {need} bytes in each part, got {length} "
                    f"in the {part} part of {self.name!r} ({len(self)} bytes, split 90 / 5 / 5); give at "
                    f"least {need * 100 // VALIDATION_PERCENT} bytes of text"
                )

    def fingerprint(self) -> str:
        """Returns the SHA-256 of the whole text, by which a resumed run can tell that its data changed."""
        digest = hashlib.sha256()
        for part in (self.train, self.validation, self.test):
            for start in range(0, len(part), READ_BYTES):
                digest.update(part[start : start + READ_BYTES].tobytes())
        return digest.hexdigest()


def load_text(name_or_path: str | os.PathLike[str], *, cache: pathlib.Path | None = None) -> Text:
    """Opens a text and splits its bytes 90 / 5 / 5 into train, validation and test, in this order.

    Args:
      name_or_path: 'stdlib' (the standard library's source, `stdlib.py`), 'enwik8' (the first 100,000,000
        bytes of an English Wikipedia dump, downloaded once, `remote.py`), or the path of a file, `.gz`,
        `.zip` or folder (`local.py`). A file that is called as a source is reached as './stdlib'.
      cache: the folder for what has to be downloaded or expanded; by default `cache_folder()`.

    Returns:
      The text; the splits of enwik8 are the customary 90 / 5 / 5 million bytes.

    Raises:
      ValueError: there is no such text, it is empty or cannot be read, the download failed (the message says
        how to put the file there by hand), or the cache folder cannot be written.
    """
    cache = cache or cache_folder()
    name = os.fspath(name_or_path)
    if name == "stdlib":
        path, description = stdlib.stdlib_file(cache)
    elif name == "enwik8":
        path = remote.fetch(remote.ENWIK8, cache)
        description = f"the first 100 MB of an English Wikipedia dump, from {remote.ENWIK8.url}"
    else:
        path, description = local.local_file(name, cache)
        name = pathlib.Path(name).expanduser().resolve().name
    if path.stat().st_size == 0:
        raise ValueError(f"data must be a text of at least one byte, got the empty file {path}")
    return _split(np.memmap(path, np.uint8, mode="r"), name, description)


def is_read(name: str, path: pathlib.Path) -> bool:
    """Whether what is written to a path would become part of the text: it is in the text's folder and not hidden."""
    folder = pathlib.Path(name).expanduser().resolve()
    path = path.resolve()
    if name in ("stdlib", "enwik8") or not folder.is_dir() or not path.is_relative_to(folder):
        return False
    return not any(part.startswith(".") for part in path.relative_to(folder).parts)


def _split(text_n: NDArray[np.uint8], name: str, description: str) -> Text:
    validation = len(text_n) * TRAIN_PERCENT // 100
    test = validation + len(text_n) * VALIDATION_PERCENT // 100
    return Text(
        name=name,
        description=description,
        train=text_n[:validation],
        validation=text_n[validation:test],
        test=text_n[test:],
    )
