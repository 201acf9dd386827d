"""Batches of token windows: pure functions of their arguments, so that a resumed run repeats them.

Axis letters: B rows of the batch, T sequence length (predicted tokens a row), N bytes in the split.
"""

import operator
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray


def batch_at(
    split: NDArray[np.uint8],
    *,
    seed: int,
    step: int,
    batch_size: int,
    sequence_length: int,
) -> NDArray[np.int32]:
    """Returns the training batch of one step: windows at independent, uniformly random places of the split.

    The batch depends on nothing but the arguments. Starts come from the counter-based Philox generator keyed
    by (seed, step); its raw words are used because NumPy promises their stream for all versions, unlike that
    of `Generator`.

    Args:
      split: (N,) bytes; only the windows are read, so a memory map stays on disk.
      seed: in [0, 2**64); names the run.
      step: in [0, 2**64); the index of the batch.
      batch_size: B.
      sequence_length: T. Each row has one token more: `tokens[:, :-1]` predicts `tokens[:, 1:]`.

    Returns:
      (B, T + 1) int32 in [0, 256).

    Raises:
      ValueError: an argument is out of range, or the split is shorter than one window.
    """
    _check_batch_size(batch_size)
    count = _number_of_starts(split, sequence_length)
    for name, value in (("seed", seed), ("step", step)):
        if not 0 <= operator.index(value) < 2**64:
            raise ValueError(f"{name} must be in [0, 2**64), got {value}")
    words = np.random.Philox(key=np.array([seed, step], np.uint64)).random_raw(batch_size)
    # The remainder of a 64-bit word favours small starts by less than N / 2**64, which no run can notice.
    starts = (np.asarray(words, np.uint64) % np.uint64(count)).astype(np.int64)
    return _windows(split, starts, sequence_length)


def validation_batches(
    split: NDArray[np.uint8],
    *,
    batch_size: int,
    sequence_length: int,
    max_batches: int,
) -> Iterator[NDArray[np.int32]]:
    """Returns the same batches every time: windows that do not overlap, spread evenly from end to end.

    Every batch is full, so one compiled evaluation serves all. Of a split that holds fewer than `batch_size`
    windows one batch comes, whose windows are spread in the same way and do overlap.

    Args:
      split: (N,) bytes.
      batch_size: B.
      sequence_length: T; rows have T + 1 tokens, as in `batch_at`.
      max_batches: at most so many batches; fewer where the split has no more windows.

    Returns:
      An iterator over (B, T + 1) int32.

    Raises:
      ValueError: as `batch_at`, at the call and not at the first batch; or max_batches below 1.
    """
    _check_batch_size(batch_size)
    last_start = _number_of_starts(split, sequence_length) - 1
    if max_batches < 1:
        raise ValueError(f"max_batches must be at least 1, got {max_batches}")
    batches = min(max_batches, max(1, len(split) // (sequence_length + 1) // batch_size))
    # Whole-number division keeps the distance between starts at T + 1 or more wherever the windows fit.
    starts = np.arange(batches * batch_size, dtype=np.int64) * last_start // max(1, batches * batch_size - 1)
    return (_windows(split, block, sequence_length) for block in starts.reshape(batches, batch_size))


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")


def _number_of_starts(split: NDArray[np.uint8], sequence_length: int) -> int:
    if split.ndim != 1 or split.dtype != np.uint8:
        raise ValueError(f"split must be (N,) uint8, got {split.shape} {split.dtype}")
    if sequence_length < 1:
        raise ValueError(f"sequence_length must be at least 1, got {sequence_length}")
    if len(split) < sequence_length + 1:
        raise ValueError(
            f"split must hold at least sequence_length + 1 = {sequence_length + 1} bytes, got {len(split)}"
        )
    return len(split) - sequence_length


def _windows(split: NDArray[np.uint8], starts: NDArray[np.int64], sequence_length: int) -> NDArray[np.int32]:
    index_bt = starts[:, None] + np.arange(sequence_length + 1)[None, :]
    return np.asarray(split[index_bt], np.int32)
