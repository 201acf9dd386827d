"""The key-value cache: fixed size, a length per row, roll-back by setting that length."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike


@struct.dataclass
class KVCache:
    """Keys and values of every layer, at a fixed number of slots.

    Slot `s` of row `b` holds position `s` of that row's sequence when `s < length_b[b]`, and leftovers that nobody
    reads otherwise. Rolling back is `cache.with_length(shorter_b)`: nothing is copied, cleared or moved, because the
    next append overwrites the slots from `length_b` on.

    Attributes:
      keys: one (B, K, S, H) array per layer, rotated already, in the compute dtype.
      values: one (B, K, S, H) array per layer, in the compute dtype.
      length_b: (B,) int32, the number of live slots of each row.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    length_b: jax.Array

    @classmethod
    def create(
        cls,
        *,
        batch: int,
        size: int,
        layers: int,
        kv_heads: int,
        dim_head: int,
        dtype: DTypeLike = jnp.float32,
    ) -> KVCache:
        """An empty cache of `size` slots a row."""
        shape = (batch, kv_heads, size, dim_head)
        return cls(
            keys=tuple(jnp.zeros(shape, dtype) for _ in range(layers)),
            values=tuple(jnp.zeros(shape, dtype) for _ in range(layers)),
            length_b=jnp.zeros((batch,), jnp.int32),
        )

    @property
    def size(self) -> int:
        """Slots a row."""
        return self.keys[0].shape[2]

    def with_length(self, length_b: jax.Array) -> KVCache:
        """The same slots with other lengths: a roll-back when they are shorter."""
        return dataclasses.replace(self, length_b=length_b.astype(jnp.int32))

    def resized(self, size: int) -> KVCache:
        """The same rows at another number of slots; what lies beyond a smaller size is dropped."""

        def resize(slots_bksh: jax.Array) -> jax.Array:
            missing = max(size - slots_bksh.shape[2], 0)
            return jnp.pad(slots_bksh, ((0, 0), (0, 0), (0, missing), (0, 0)))[:, :, :size]

        return dataclasses.replace(self, keys=tuple(map(resize, self.keys)), values=tuple(map(resize, self.values)))

    def append(self, layer: int, keys_bkth: jax.Array, values_bkth: jax.Array) -> KVCache:
        """Writes T new positions of one layer behind each row's live slots; the lengths stay.

        Lengths stay because every layer of one forward appends at the same place: the caller advances them once,
        with `with_length`. Positions past the last slot are dropped.
        """
        keys = append_slots(self.keys[layer], keys_bkth, self.length_b)
        values = append_slots(self.values[layer], values_bkth, self.length_b)
        return dataclasses.replace(
            self,
            keys=(*self.keys[:layer], keys, *self.keys[layer + 1 :]),
            values=(*self.values[:layer], values, *self.values[layer + 1 :]),
        )


def append_slots(slots_bksh: jax.Array, new_bkth: jax.Array, length_b: jax.Array) -> jax.Array:
    """Writes `new_bkth[b, :, t]` to slot `length_b[b] + t`, dropping what lies past the last slot.

    A scatter and not `dynamic_update_slice`, which clamps its start and would overwrite live slots near the end.
    """
    positions = new_bkth.shape[2]
    slot_bt = length_b[:, None] + jnp.arange(positions, dtype=jnp.int32)[None, :]
    # One more position, which is dropped. A scatter of a single position is a dynamic update slice to XLA, which on a
    # CPU is fused into its two readers and then copies the whole cache three times a step (12 ms a step, not 8).
    slot_bt = jnp.pad(slot_bt, ((0, 0), (0, 1)), constant_values=slots_bksh.shape[2])
    new_bkth = jnp.pad(new_bkth, ((0, 0), (0, 0), (0, 1), (0, 0))).astype(slots_bksh.dtype)

    def append_row(slots_ksh: jax.Array, new_kth: jax.Array, slot_t: jax.Array) -> jax.Array:
        return slots_ksh.at[:, slot_t].set(new_kth, mode="drop", unique_indices=True)

    # Row by row and not with row indices: only so does the compiler see that rows on other devices are not concerned.
    return jax.vmap(append_row)(slots_bksh, new_bkth, slot_bt)
