"""The cache against a NumPy model, driven by hypothesis: append, roll back, resize, write past the end."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from spec_jax import KVCache

BATCH, LAYERS, HEADS, WIDTH = 3, 2, 2, 2
SIZES = (4, 6, 9)

append = jax.jit(KVCache.append, static_argnums=1)


class CacheMachine(RuleBasedStateMachine):
    """What is live in the cache is what a list of lists says, whatever happened before."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = KVCache.create(batch=BATCH, size=SIZES[1], layers=LAYERS, kv_heads=HEADS, dim_head=WIDTH)
        # rows[b][layer] is the list of live (keys, values) of a row, newest last.
        self.rows: list[list[list[tuple[np.ndarray, np.ndarray]]]] = [[[] for _ in range(LAYERS)] for _ in range(BATCH)]
        self.rng = np.random.default_rng(0)

    @rule(positions=st.sampled_from([1, 2, 4]))
    def append_to_every_layer(self, positions: int) -> None:
        """Rows fill up at their own lengths; what does not fit is dropped, and nothing live is overwritten."""
        for layer in range(LAYERS):
            keys, values = self.rng.normal(size=(2, BATCH, HEADS, positions, WIDTH)).astype(np.float32)
            self.cache = append(self.cache, layer, keys, values)
            for row in range(BATCH):
                live = self.rows[row][layer]
                live += [(keys[row, :, t], values[row, :, t]) for t in range(positions)]
                del live[self.cache.size :]
        lengths = [min(int(length) + positions, self.cache.size) for length in self.cache.length_b]
        self.cache = self.cache.with_length(jnp.array(lengths))

    @rule(kept=st.lists(st.integers(0, 9), min_size=BATCH, max_size=BATCH))
    def roll_back(self, kept: list[int]) -> None:
        lengths = [min(keep, int(length)) for keep, length in zip(kept, self.cache.length_b)]
        self.cache = self.cache.with_length(jnp.array(lengths))
        for row, length in enumerate(lengths):
            for live in self.rows[row]:
                del live[length:]

    @rule(size=st.sampled_from(SIZES))
    def resize(self, size: int) -> None:
        self.cache = self.cache.resized(size)
        assert self.cache.size == size
        self.cache = self.cache.with_length(jnp.minimum(self.cache.length_b, size))
        for row in self.rows:
            for live in row:
                del live[size:]

    @invariant()
    def live_slots_are_right(self) -> None:
        for row, length in enumerate(np.asarray(self.cache.length_b)):
            for layer, live in enumerate(self.rows[row]):
                assert len(live) == length
                for slot, (key, value) in enumerate(live):
                    np.testing.assert_array_equal(self.cache.keys[layer][row, :, slot], key)
                    np.testing.assert_array_equal(self.cache.values[layer][row, :, slot], value)


class TestCache(CacheMachine.TestCase):
    settings = settings(max_examples=25, stateful_step_count=12, deadline=None, derandomize=True)


@pytest.mark.parametrize("length", [2, 3, 4])
def test_past_the_end_is_dropped(length: int):
    """Two live slots stay as they are where `dynamic_update_slice` would have moved the write back over them."""
    cache = KVCache.create(batch=1, size=4, layers=1, kv_heads=1, dim_head=1)
    cache = cache.append(0, jnp.full((1, 1, 4, 1), 5.0), jnp.full((1, 1, 4, 1), 6.0))
    new = jnp.arange(1.0, 4.0).reshape(1, 1, 3, 1)
    cache = cache.with_length(jnp.array([length])).append(0, new, -new)
    expected = [5.0] * length + [1.0, 2.0, 3.0][: 4 - length]
    assert cache.keys[0].ravel().tolist() == expected
    assert cache.values[0].ravel().tolist() == [6.0 if x == 5 else -x for x in expected]


def test_lengths_stay_and_other_layers_too():
    """An append writes one layer and does not advance the rows: the forward does, once."""
    cache = KVCache.create(batch=2, size=3, layers=2, kv_heads=1, dim_head=1, dtype=jnp.bfloat16)
    after = cache.append(1, jnp.ones((2, 1, 1, 1)), jnp.ones((2, 1, 1, 1)))
    assert after.length_b.tolist() == [0, 0]
    assert float(after.keys[0].sum()) == 0
    assert after.keys[1][:, 0, :, 0].tolist() == [[1, 0, 0], [1, 0, 0]]
    assert after.keys[1].dtype == jnp.bfloat16


def test_lengths_are_int32_whatever_is_given():
    with jax.enable_x64(True):
        cache = KVCache.create(batch=2, size=2, layers=1, kv_heads=1, dim_head=2)
        assert cache.with_length(jnp.array([1, 2])).length_b.dtype == jnp.int32
