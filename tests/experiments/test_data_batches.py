"""Batches are functions of (seed, step); validation windows cover the split."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.data import batch_at, validation_batches

SPLIT = np.random.default_rng(0).integers(0, 256, 5000, np.uint8)
PINNED_STARTS = [181, 250]


def test_rows_are_windows_of_the_split():
    tokens = batch_at(SPLIT, seed=3, step=7, batch_size=5, sequence_length=16)
    assert tokens.shape == (5, 17)
    assert tokens.dtype == np.int32
    windows = np.lib.stride_tricks.sliding_window_view(SPLIT, 17)
    for row in tokens:
        assert np.any(np.all(windows == row, axis=1))


def test_batch_is_pinned_across_versions():
    # Windows of a ramp show their starts: (first two Philox words of key (1, 2)) mod (256 - 4).
    tokens = batch_at(np.arange(256, dtype=np.uint8), seed=1, step=2, batch_size=2, sequence_length=4)
    words = np.random.Philox(key=np.array([1, 2], np.uint64)).random_raw(2)
    expected = [int(word) % 252 for word in words]
    assert tokens[:, 0].tolist() == expected == PINNED_STARTS
    np.testing.assert_array_equal(tokens - tokens[:, :1], np.broadcast_to(np.arange(5), (2, 5)))


def test_resumed_run_sees_what_an_uninterrupted_one_sees(tmp_path):
    path = tmp_path / "split"
    SPLIT.tofile(path)

    def run(steps):
        split = np.memmap(path, np.uint8, mode="r")
        return [batch_at(split, seed=5, step=step, batch_size=4, sequence_length=32) for step in steps]

    np.testing.assert_array_equal(run(range(10)), run(range(6)) + run(range(6, 10)))
    np.testing.assert_array_equal(run(range(10)), run(reversed(range(10)))[::-1])


def test_seeds_and_steps_give_different_batches():
    seen = {
        batch_at(SPLIT, seed=seed, step=step, batch_size=2, sequence_length=8).tobytes()
        for seed, step in itertools.product(range(8), range(8))
    }
    assert len(seen) == 64


def test_every_start_is_drawn_including_the_first_and_the_last():
    split = np.arange(11, dtype=np.uint8)
    tokens = batch_at(split, seed=0, step=0, batch_size=9000, sequence_length=2)
    counts = np.bincount(tokens[:, 0], minlength=9)
    assert len(counts) == 9
    # 1000 expected each with a standard deviation of 30.
    assert counts.min() > 850
    assert counts.max() < 1150


def test_split_of_exactly_one_window_is_enough():
    split = np.arange(9, dtype=np.uint8)
    np.testing.assert_array_equal(
        batch_at(split, seed=0, step=0, batch_size=3, sequence_length=8), np.tile(split, (3, 1))
    )
    (batch,) = validation_batches(split, batch_size=2, sequence_length=8, max_batches=4)
    np.testing.assert_array_equal(batch, np.tile(split, (2, 1)))


@settings(max_examples=100, deadline=None)
@given(
    size=st.integers(2, 251) | st.integers(2, 3000),
    batch=st.integers(1, 8),
    length=st.integers(1, 40),
    most=st.integers(1, 20),
)
def test_validation_windows_do_not_overlap_and_reach_both_ends(size, batch, length, most):
    size = max(size, length + 1)
    places = np.arange(size) % 251
    split = places.astype(np.uint8)
    batches = list(validation_batches(split, batch_size=batch, sequence_length=length, max_batches=most))
    assert {b.shape for b in batches} == {(batch, length + 1)}
    assert len(batches) == min(most, max(1, size // (length + 1) // batch))
    windows = np.concatenate(batches)
    np.testing.assert_array_equal(windows[0], split[: length + 1])
    if len(windows) > 1:
        np.testing.assert_array_equal(windows[-1], split[-length - 1 :])
    if len(windows) * (length + 1) <= size and size <= 251:
        # Up to 251 bytes each byte of this split names its place.
        assert len(np.unique(windows)) == windows.size


GOOD = {"seed": 0, "step": 0, "batch_size": 4, "sequence_length": 8}
BAD = [
    ({"sequence_length": 5000}, r"split must hold at least sequence_length \+ 1 = 5001 bytes, got 5000"),
    ({"sequence_length": 0}, "sequence_length must be at least 1, got 0"),
    ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *BAD,
        ({"seed": -1}, r"seed must be in \[0, 2\*\*64\), got -1"),
        ({"step": 2**64}, r"step must be in \[0, 2\*\*64\), got 18446744073709551616"),
    ],
)
def test_bad_batch_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        batch_at(SPLIT, **(GOOD | change))


@pytest.mark.parametrize(("change", "message"), [*BAD, ({"max_batches": 0}, "max_batches must be .* got 0")])
def test_bad_validation_arguments_are_told_at_the_call(change, message):
    good = {"batch_size": 4, "sequence_length": 8, "max_batches": 1}
    with pytest.raises(ValueError, match=message):
        validation_batches(SPLIT, **(good | change))


@pytest.mark.parametrize("split", [SPLIT.reshape(50, 100), SPLIT.astype(np.int32)])
def test_split_must_be_flat_bytes(split):
    with pytest.raises(ValueError, match=r"split must be \(N,\) uint8, got \("):
        batch_at(split, **GOOD)


def test_seed_must_be_whole():
    with pytest.raises(TypeError):
        batch_at(SPLIT, **(GOOD | {"seed": 0.5}))  # pyright: ignore[reportArgumentType]
