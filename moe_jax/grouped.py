"""Products of groups of rows with a matrix per group, at the cost of the rows on a CPU too.

`grouped_product` is for groups of any size side by side, `batched_product` for groups of one size, `group_rows` for a
vector per group instead of a matrix.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

# XLA computes `ragged_dot` on a CPU as one dense product per group over all rows. There, groups are cut into blocks
# instead: as many whole ones as fit, longest first, then one of the shortest length that takes the rest, so that a
# matrix is read few times, and at most 31 rows per group are computed in vain.
WHOLE_BLOCKS = (512, 256)
REST_BLOCKS = (32, 64, 96, 128, 160, 192, 224, 256)
# Below this many rows per group, XLA's batched product on a CPU takes up to twice as long as the same products in turn.
FEW_ROWS = 128


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
        *saved, product_bar_sf, cpu=_transpose_in_blocks, default=transpose_of_ragged_dot
    )
    return rows_bar_sd, weights_bar_edf, None


grouped_product.defvjp(_forward, _backward)


def transpose_of_ragged_dot(
    rows_sd: jax.Array, weights_edf: jax.Array, sizes_e: jax.Array, product_bar_sf: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Gradients of rows and matrices where `ragged_dot` has a kernel of its own."""

    def product(rows_sd: jax.Array, weights_edf: jax.Array) -> jax.Array:
        return jax.lax.ragged_dot(rows_sd, weights_edf, sizes_e)

    return jax.vjp(product, rows_sd, weights_edf)[1](product_bar_sf)


def _transpose_in_blocks(
    rows_sd: jax.Array, weights_edf: jax.Array, sizes_e: jax.Array, product_bar_sf: jax.Array
) -> tuple[jax.Array, jax.Array]:
    rows_bar_sd = _product_in_blocks(product_bar_sf, weights_edf, sizes_e, transpose=True)
    return rows_bar_sd, _outer_in_blocks(rows_sd, product_bar_sf, sizes_e)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def group_rows(rows_ef: jax.Array, sizes_e: jax.Array, num_rows: int) -> jax.Array:
    """Each group's row, once for each of the group's own: (E, F) to (S, F), as `grouped_product` with ones.

    Rows beyond the last group are undefined, and so may be their gradient.
    """
    return rows_ef.at[_group_of_row(sizes_e, num_rows)].get(indices_are_sorted=True)


def _group_rows_forward(rows_ef: jax.Array, sizes_e: jax.Array, num_rows: int) -> tuple[jax.Array, jax.Array]:
    return group_rows(rows_ef, sizes_e, num_rows), sizes_e


def _group_rows_backward(num_rows: int, sizes_e: jax.Array, bar_sf: jax.Array) -> tuple[jax.Array, None]:
    return jax.lax.platform_dependent(bar_sf, sizes_e, cpu=_sums_in_blocks, default=sums_by_scatter), None


group_rows.defvjp(_group_rows_forward, _group_rows_backward)


def _group_of_row(sizes_e: jax.Array, num_rows: int) -> jax.Array:
    return jnp.repeat(jnp.arange(sizes_e.shape[0]), sizes_e, total_repeat_length=num_rows)


def _sums_in_blocks(rows_sf: jax.Array, sizes_e: jax.Array) -> jax.Array:
    # A scatter goes row by row on a CPU; a product with ones does not.
    return _outer_in_blocks(jnp.ones_like(rows_sf[:, :1]), rows_sf, sizes_e)[:, 0]


def sums_by_scatter(rows_sf: jax.Array, sizes_e: jax.Array) -> jax.Array:
    """(E, F): the sum over each group's rows, on an accelerator."""
    used_s1 = (jnp.arange(rows_sf.shape[0]) < sizes_e.sum())[:, None]
    sums_ef = jnp.zeros_like(rows_sf, shape=(sizes_e.shape[0], rows_sf.shape[1]))
    return sums_ef.at[_group_of_row(sizes_e, rows_sf.shape[0])].add(jnp.where(used_s1, rows_sf, 0))


@jax.custom_vjp
def batched_product(rows_ecd: jax.Array, weights_edf: jax.Array) -> jax.Array:
    """Each group's rows times its matrix: (E, C, D) and (E, D, F) to (E, C, F)."""
    return _batched_product(rows_ecd, weights_edf, transpose=False)


def _batched_forward(rows_ecd: jax.Array, weights_edf: jax.Array) -> tuple[jax.Array, Any]:
    return batched_product(rows_ecd, weights_edf), (rows_ecd, weights_edf)


def _batched_backward(saved: Any, product_bar_ecf: jax.Array) -> tuple[jax.Array, jax.Array]:
    rows_ecd, weights_edf = saved
    rows_bar_ecd = _batched_product(product_bar_ecf, weights_edf, transpose=True)
    return rows_bar_ecd, jnp.matmul(rows_ecd.mT, product_bar_ecf)


batched_product.defvjp(_batched_forward, _batched_backward)


def _batched_product(rows_ecd: jax.Array, weights_edf: jax.Array, *, transpose: bool) -> jax.Array:
    def product(rows: jax.Array, weights: jax.Array) -> jax.Array:
        return jnp.matmul(rows, weights.mT if transpose else weights)

    def in_turn(rows_ecd: jax.Array, weights_edf: jax.Array) -> jax.Array:
        return jax.lax.map(lambda operands: product(*operands), (rows_ecd, weights_edf))

    if rows_ecd.shape[1] > FEW_ROWS:
        return product(rows_ecd, weights_edf)
    return jax.lax.platform_dependent(rows_ecd, weights_edf, cpu=in_turn, default=product)


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

        def block(at: jax.Array, length: int, whole: bool, product_sf: jax.Array) -> jax.Array:
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

        def block(at: jax.Array, length: int, whole: bool, outer_df: jax.Array) -> jax.Array:
            rows_ld = jax.lax.dynamic_slice(rows_sd, (at, 0), (length, dims[0]))
            rows_lf = jax.lax.dynamic_slice(rows_sf, (at, 0), (length, dims[1]))
            if not whole:
                # Both sides: a row beyond the group may hold anything, and 0 * NaN is not 0.
                inside_l1 = (at + jnp.arange(length) < start + size)[:, None]
                rows_ld, rows_lf = jnp.where(inside_l1, rows_ld, 0), jnp.where(inside_l1, rows_lf, 0)
            return outer_df + jnp.matmul(rows_ld.T, rows_lf, preferred_element_type=outer_df.dtype)

        total_df = jnp.zeros_like(rows_sf, jnp.promote_types(dtype, jnp.float32), shape=dims)
        return carry, _over_blocks(start, size, num_rows, block, total_df).astype(dtype)

    return jax.lax.scan(group, None, (jnp.cumsum(sizes_e) - sizes_e, sizes_e))[1]


def _padded(rows_sd: jax.Array) -> jax.Array:
    return jnp.pad(rows_sd, ((0, REST_BLOCKS[0]), (0, 0)))


def _over_blocks(
    start: jax.Array,
    size: jax.Array,
    num_rows: int,
    block: Callable[[jax.Array, int, bool, jax.Array], jax.Array],
    carry: jax.Array,
) -> jax.Array:
    """`block(at, length, whole, carry)` over [start, start + size); one that is not whole may run over the end."""

    def repeated(count: jax.Array, at: jax.Array, length: int, whole: bool, carry: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, count, lambda i, carry: block(at + i * length, length, whole, carry), carry)

    end = start + size
    for length in WHOLE_BLOCKS:
        if length <= num_rows:
            count = (end - start) // length
            carry = repeated(count, start, length, True, carry)
            start = start + count * length
    # Loops of one step or none: a conditional would copy what it carries.
    shortest = REST_BLOCKS[0]
    needed = -(-(end - start) // shortest) * shortest
    for length in REST_BLOCKS:
        if length < num_rows + shortest:
            carry = repeated((needed == length).astype(jnp.int32), start, length, False, carry)
    return carry
