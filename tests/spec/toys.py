"""Tabular models whose next-token law is known exactly, with a cache that notices stale slots.

The law of the next token depends on the last two tokens and on the parity of Σ (s + 1)·token[s] over the whole row, so
one wrong, missing or shifted token anywhere in the cache changes it.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct


@struct.dataclass
class TokenCache:
    """Tokens at slots, valid up to a length; everything beyond is garbage that no correct caller reads.

    Attributes:
      tokens_bs: (B, S) int32.
      length_b: (B,) int32.
    """

    tokens_bs: jax.Array
    length_b: jax.Array

    def with_length(self, length_b: jax.Array) -> TokenCache:
        return dataclasses.replace(self, length_b=length_b)

    def resized(self, size: int) -> TokenCache:
        """Other slots: new ones hold 1, not 0, so that reading one counts in the parity."""
        missing = max(size - self.tokens_bs.shape[1], 0)
        grown_bs = jnp.pad(self.tokens_bs, ((0, 0), (0, missing)), constant_values=1)
        return dataclasses.replace(self, tokens_bs=grown_bs[:, :size])


@struct.dataclass
class ToyOutput:
    logits: jax.Array
    hidden: jax.Array
    cache: TokenCache | None


@struct.dataclass
class Toy:
    """A language model that is a table.

    Attributes:
      table: (2, V + 1, V, V) logits of the next token given parity, the token before the last (V: none), and the last.
    """

    table: jax.Array

    @property
    def vocab_size(self) -> int:
        return self.table.shape[2]

    def init_cache(self, batch: int, size: int) -> TokenCache:
        return TokenCache(jnp.ones((batch, size), jnp.int32), jnp.zeros((batch,), jnp.int32))

    def __call__(self, tokens_bt: jax.Array, cache: TokenCache | None = None) -> ToyOutput:
        batch, positions = tokens_bt.shape
        slots = self.init_cache(batch, positions) if cache is None else cache
        position_bt = slots.length_b[:, None] + jnp.arange(positions, dtype=jnp.int32)[None, :]
        row_b1 = jnp.arange(batch, dtype=jnp.int32)[:, None]
        tokens_bs = slots.tokens_bs.at[row_b1, position_bt].set(tokens_bt, mode="drop")

        slot_11s = jnp.arange(tokens_bs.shape[1], dtype=jnp.int32)[None, None, :]
        read_bts = slot_11s <= position_bt[:, :, None]
        parity_bt = jnp.where(read_bts, ((slot_11s + 1) * tokens_bs[:, None, :]) % 2, 0).sum(-1) % 2
        before_bt = jnp.take_along_axis(tokens_bs, jnp.maximum(position_bt - 1, 0), axis=1, mode="clip")
        before_bt = jnp.where(position_bt == 0, self.vocab_size, before_bt)
        last_bt = jnp.take_along_axis(tokens_bs, position_bt, axis=1, mode="clip")
        logits_btv = self.table[parity_bt, before_bt, last_bt]
        new_cache = None if cache is None else TokenCache(tokens_bs, slots.length_b + positions)
        return ToyOutput(logits_btv, hidden=position_bt[:, :, None], cache=new_cache)


def next_logits(table: np.ndarray, row: tuple[int, ...]) -> np.ndarray:
    """(V,) logits after a whole row, read off the table without any cache."""
    parity = sum((slot + 1) * token for slot, token in enumerate(row)) % 2
    before = row[-2] if row[:-1] else table.shape[-1]
    return table[parity, before, row[-1]]


def random_toy(seed: int, vocab_size: int, *, zeros: float = 0.0, spread: float = 1.2) -> Toy:
    """A toy with normal logits, of which about a fraction `zeros` are −inf (at least one in each row stays)."""
    rng = np.random.default_rng(seed)
    shape = (2, vocab_size + 1, vocab_size, vocab_size)
    table = rng.normal(size=shape) * spread
    impossible = rng.random(shape) < zeros
    impossible[:, :, :, rng.integers(vocab_size)] = False
    return Toy(jnp.asarray(np.where(impossible, -np.inf, table), jnp.float32))


def deterministic_toy(next_token: list[int]) -> Toy:
    """After token x comes next_token[x], with probability 1."""
    vocab_size = len(next_token)
    logits_vv = np.where(np.eye(vocab_size)[next_token] > 0, 0.0, -np.inf)
    return Toy(jnp.asarray(np.broadcast_to(logits_vv, (2, vocab_size + 1, vocab_size, vocab_size)), jnp.float32))


def avoiding_toy(never: list[int]) -> Toy:
    """After token x comes anything with equal probability, but never never[x]."""
    vocab_size = len(never)
    logits_vv = np.where(np.eye(vocab_size)[never] > 0, -np.inf, 0.0)
    return Toy(jnp.asarray(np.broadcast_to(logits_vv, (2, vocab_size + 1, vocab_size, vocab_size)), jnp.float32))
