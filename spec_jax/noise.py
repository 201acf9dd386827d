"""Where the randomness of decoding comes from.

Noise belongs to a row and a place in that row's own sequence, never to a slot of the batch, so that a row's tokens do
not depend on which other rows are decoded beside it.

It is drawn with as few axes as it can be and reshaped after. With more of them, all short, XLA's code of the generator
took up to 2.7 times as long to compile on a CPU, where it was half of a decoding program's time.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

# Of 23 random bits, as by default, the largest of a million numbers is there twice in one draw of 17, and the token
# that comes first would win.
gumbel = partial(jax.random.gumbel, mode="high")


def uniform(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
    """Numbers in [0, 1) of float32, below a half multiples of 2^-46.

    Of 23 random bits, as by default, 0 comes once in eight million draws, and would accept a token that is less likely
    by far.
    """
    coarse, fine = jax.random.uniform(key, (2 * math.prod(shape),), dtype).reshape(2, *shape)
    return jnp.where(coarse < 0.5, coarse + fine * 2.0**-23, coarse)


class Purpose(enum.IntEnum):
    """What a stream of noise is for; no two purposes share a stream."""

    POSITION = 0
    DRAFT = 1
    ACCEPTANCE = 2
    RESIDUAL = 3


def position_gumbel(key: jax.Array, row_ids_b: jax.Array, position_bt: jax.Array, vocab_size: int) -> jax.Array:
    """(B, T, V) Gumbel noise keyed by (row, absolute position): plain decoding and the coupled rule share it."""

    def one_position(row_id: jax.Array, position: jax.Array) -> jax.Array:
        position_key = jax.random.fold_in(_row_key(key, Purpose.POSITION, row_id), position)
        return gumbel(position_key, (vocab_size,), jnp.float32)

    row_ids_n = jnp.repeat(row_ids_b, position_bt.shape[1])
    return jax.vmap(one_position)(row_ids_n, position_bt.reshape(-1)).reshape(*position_bt.shape, vocab_size)


def round_noise(
    key: jax.Array,
    purpose: Purpose,
    row_ids_b: jax.Array,
    round_start_b: jax.Array,
    shape: tuple[int, ...],
    sampler: Callable[..., jax.Array],
) -> jax.Array:
    """(B, *shape) noise keyed by (row, position where the row's round starts).

    The rules that test a draft need noise that no earlier round has looked at. A position is drafted again after a
    rejection before it, and block verification has then already used what the first draft drew there, so the round's
    start is part of the key and the position alone would not do.
    """

    def one_row(row_id: jax.Array, round_start: jax.Array) -> jax.Array:
        round_key = jax.random.fold_in(_row_key(key, purpose, row_id), round_start)
        return sampler(round_key, (math.prod(shape),), jnp.float32).reshape(shape)

    return jax.vmap(one_row)(row_ids_b, round_start_b)


def _row_key(key: jax.Array, purpose: Purpose, row_id: jax.Array) -> jax.Array:
    return jax.random.fold_in(jax.random.fold_in(key, jnp.uint32(purpose)), row_id)
