"""Product of groups of rows with a matrix per group: `jax.lax.ragged_dot` at the cost of the rows, on a CPU too."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# XLA computes `ragged_dot` on a CPU as one dense product per group over all rows. There, groups are cut into blocks
# of these lengths instead, longest first; the last length bounds the rows computed in vain, at most 31 per group.
BLOCK_LENGTHS = (256, 128, 64, 32)


@jax.custom_vjp
def grouped_product(rows_sd: jax.Array, weights_edf: jax.Array, sizes_e: jax.Array) -> jax.Array:
    """Each row times its group's matrix.

    Args:
      rows_sd: (S, D), sorted by group: the first `sizes_e[0]` rows belong to group 0, and so on.
      weights_edf: (E, D, F), one matrix per group.
      sizes_e: (E,) int32, rows per group. Their sum may be less than S.

    Returns:
      (S, F). Rows beyond the last group are undefined, here and in the gradient with respect to `rows_sd`.
    """
    return jax.lax.platform_dependent(rows_sd, weights_edf, sizes_e, cpu=_product_in_blocks, default=jax.lax.ragged_dot)


def _forward(rows_sd: jax.Array, weights_edf: jax.Array, sizes_e: jax.Array) -> tuple[jax.Array, Any]:
    return grouped_product(rows_sd, weights_edf, sizes_e), (rows_sd, weights_edf, sizes_e)


def _backward(saved: Any, product_bar_sf: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    rows_bar_sd, weights_bar_edf = jax.lax.platform_dependent(
        *saved, product_bar_sf, cpu=_transpose_in_blocks, default=_transpose_of_ragged_dot
    )
    return rows_bar_sd, weights_bar_edf, None


grouped_product.defvjp(_forward, _backward)


def _transpose_of_ragged_dot(
    rows_sd: jax.Array, weights_edf: jax.Array, sizes_e: jax.Array, product_bar_sf: jax.Array
) -> tuple[jax.Array, jax.Array]:
    def product(rows_sd: jax.Array, weights_edf: jax.Array) -> jax.Array:
        return jax.lax.ragged_dot(rows_sd, weights_edf, sizes_e)

    return jax.vjp(product, rows_sd, weights_edf)[1](product_bar_sf)


def _transpose_in_blocks(
    rows_sd: jax.Array, weights_edf: jax.Array, sizes_e: jax.Array, product_bar_sf: jax.Array
) -> tuple[jax.Array, jax.Array]:
    rows_bar_sd = _product_in_blocks(product_bar_sf, weights_edf, sizes_e, transpose=True)
    return rows_bar_sd, _outer_in_blocks(rows_sd, product_bar_sf, sizes_e)


def _product_in_blocks(
    rows_sd: jax.Array, weights_edf: jax.Array, sizes_e: jax.Array, *, transpose: bool = False
) -> jax.Array:
    num_rows, dim = rows_sd.shape
    out_dim = weights_edf.shape[1 if transpose else 2]
    # The last block of a group runs over into the next group, whose own blocks come later and overwrite it; the
    # last group's runs over into this padding.
    rows_sd = _padded(rows_sd)

    def group(product_sf: jax.Array, inputs: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        weights_df, start, size = inputs

        def block(at: jax.Array, length: int, product_sf: jax.Array) -> jax.Array:
            rows_ld = jax.lax.dynamic_slice(rows_sd, (at, 0), (length, dim))
            # Transposed here, where it is free: all matrices transposed beforehand would be a copy of them.
            product_lf = rows_ld @ (weights_df.T if transpose else weights_df)
            return jax.lax.dynamic_update_slice(product_sf, product_lf, (at, 0))

        return _over_blocks(start, size, num_rows, block, product_sf), None

    starts_e = jnp.cumsum(sizes_e) - sizes_e
    # Zeros like the rows, here and below: on a mesh they are another device's own, and so must a loop's start be.
    product_sf = jnp.zeros_like(rows_sd, shape=(rows_sd.shape[0], out_dim))
    product_sf, _ = jax.lax.scan(group, product_sf, (weights_edf, starts_e, sizes_e))
    return product_sf[:num_rows]


def _outer_in_blocks(rows_sd: jax.Array, rows_sf: jax.Array, sizes_e: jax.Array) -> jax.Array:
    """(E, D, F): the sum over each group's rows of their outer products."""
    num_rows, dims, dtype = rows_sd.shape[0], (rows_sd.shape[1], rows_sf.shape[1]), rows_sf.dtype
    rows_sd, rows_sf = _padded(rows_sd), _padded(rows_sf)

    def group(carry: None, inputs: tuple[jax.Array, jax.Array]) -> tuple[None, jax.Array]:
        start, size = inputs

        def block(at: jax.Array, length: int, outer_df: jax.Array) -> jax.Array:
            rows_ld = jax.lax.dynamic_slice(rows_sd, (at, 0), (length, dims[0]))
            rows_lf = jax.lax.dynamic_slice(rows_sf, (at, 0), (length, dims[1]))
            if length == BLOCK_LENGTHS[-1]:
                # Both sides: a row beyond the group may hold anything, and 0 * NaN is not 0.
                inside_l1 = (at + jnp.arange(length) < start + size)[:, None]
                rows_ld, rows_lf = jnp.where(inside_l1, rows_ld, 0), jnp.where(inside_l1, rows_lf, 0)
            return outer_df + jnp.matmul(rows_ld.T, rows_lf, preferred_element_type=outer_df.dtype)

        total_df = jnp.zeros_like(rows_sf, jnp.promote_types(dtype, jnp.float32), shape=dims)
        return carry, _over_blocks(start, size, num_rows, block, total_df).astype(dtype)

    return jax.lax.scan(group, None, (jnp.cumsum(sizes_e) - sizes_e, sizes_e))[1]


def _padded(rows_sd: jax.Array) -> jax.Array:
    return jnp.pad(rows_sd, ((0, BLOCK_LENGTHS[-1]), (0, 0)))


def _over_blocks(
    start: jax.Array,
    size: jax.Array,
    num_rows: int,
    block: Callable[[jax.Array, int, jax.Array], jax.Array],
    carry: jax.Array,
) -> jax.Array:
    """`block(at, length, carry)` over [start, start + size) in blocks; only the last may run over the end."""
    done = jnp.zeros_like(size)
    for length in BLOCK_LENGTHS:
        last = length == BLOCK_LENGTHS[-1]
        if length > num_rows and not last:
            continue
        left = size - done
        count = -(-left // length) if last else left // length

        def step(i: jax.Array, carry: jax.Array, length: int = length, at: jax.Array = start + done) -> jax.Array:
            return block(at + i * length, length, carry)

        carry = jax.lax.fori_loop(0, count, step, carry)
        done = done + count * length
    return carry
