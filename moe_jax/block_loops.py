"""Feed-forwards on groups of rows, one block of rows after the other: what a CPU does with groups that are not short.

    rows    0         5             12                  24              sizes_e = 5, 7
            |--- 0 ---|----- 1 -----|    of no group    |               blocks of 4 or 8
    blocks  [       0       ]
                      [       1       ]

Where a block is longer than what is left of its group, its last rows are zero and what becomes of them is dropped. A
block takes its rows from the tokens and adds to the sums of the tokens, so that no buffer holds all rows. Its hidden
states are used while they are in the processor's cache; those of all rows are kept for the gradient only, unless it
is to compute them again. Where they fit, they are kept where a gradient will be, and take no memory of their own:

    gradient of the first half's weights, (E, D, F)     group 0             group 1
    after the forward pass                              hidden | zeros      hidden | zeros
    after the gradients of group 0                      its gradient        hidden | zeros
"""

from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.blocks import Blocks, Place, Window, blocks_of_equal_groups, blocks_of_groups
from moe_jax.dtypes import wide_dtype
from moe_jax.grouping import OneGroup
from moe_jax.halves import Operands, Rows, TwoLayers, Weights, both_halves, gradients_of_halves
from moe_jax.layout import taken


def kept_for_gradients(layers: TwoLayers, operands: Operands) -> jax.ShapeDtypeStruct:
    """What hidden states are kept in: (S, F), or where a gradient will be, (E, D, F), the first S / E of every D.

    The latter on a CPU, if groups are of one size, one block each, and need at least half the place: in a loop over
    layers, gradients are kept elsewhere. The gradient is that of the first of the first half's weights. A program for
    another device than the default one is right with either.
    """
    first = jax.tree.leaves(operands.weights.hidden)[0]

    def of_first_group(weights: Any, x: jax.Array) -> jax.Array:
        return layers.hidden(OneGroup(), jax.tree.map(lambda weight: weight[0], weights), x)

    hidden_tf = jax.eval_shape(of_first_group, operands.weights.hidden, operands.rows.x)
    size, width = operands.equal_size, hidden_tf.shape[1]
    in_place = (
        jax.default_backend() == "cpu"
        and operands.sizes_e is None
        and blocks_of_equal_groups(operands.num_groups, size).lengths == (size,)
        and size <= first.shape[1] <= 2 * size
        and (first.shape[2:], wide_dtype(first.dtype)) == ((width,), hidden_tf.dtype)
    )
    return jax.ShapeDtypeStruct(first.shape if in_place else (operands.num_rows, width), hidden_tf.dtype)


def _cut(operands: Operands) -> tuple[Blocks, Place]:
    """Blocks, and the place of each group."""
    sizes_e, num_groups, size = operands.sizes_e, operands.num_groups, operands.equal_size
    number_e = jnp.arange(num_groups, dtype=jnp.int32)
    if sizes_e is not None:
        start_e = jnp.cumsum(sizes_e, dtype=jnp.int32) - sizes_e
        return blocks_of_groups(num_groups, operands.num_rows), Place(number_e, start_e, sizes_e)
    # Sizes that XLA does not know: of a single block it would make a part of the loop over groups, where it copies the
    # second half's weights while it multiplies by the first's, a third slower.
    size_e = jax.lax.optimization_barrier(jnp.full(num_groups, size, jnp.int32))
    return blocks_of_equal_groups(num_groups, size), Place(number_e, number_e * size, size_e)


def _read(operands: Operands, window: Window) -> tuple[jax.Array, Rows]:
    """(L,) where in the input a block's rows are, beyond its end where they are not the block's own; and the rows.

    Where they are not its own, they and their factors are zero.
    """
    x, *factors = operands.rows
    layout = operands.layout
    index_l = window.rows_l if layout is None else layout.token_of(window.read(layout.assignment_s))
    index_l = window.own(index_l, len(x))
    return index_l, Rows(taken(x, index_l), *jax.tree.map(window.read_own, factors))


def _corner(place: Place) -> tuple[jax.Array, ...]:
    """Where a group begins in an array with a leading axis of groups."""
    return place.number, jnp.int32(0), jnp.int32(0)


def _write_kept(kept: jax.Array, window: Window, place: Place, hidden_lf: jax.Array) -> jax.Array:
    """What `kept_for_gradients` describes, with a block's hidden states."""
    if kept.ndim == 2:
        return window.write(kept, hidden_lf)
    return jax.lax.dynamic_update_slice(kept, hidden_lf[None], _corner(place))


def _read_kept(kept: jax.Array, window: Window, place: Place) -> jax.Array:
    """(L, F) a block's hidden states, zero where rows are not its own."""

    def read() -> jax.Array:
        if kept.ndim == 2:
            return window.read_own(kept)
        return jax.lax.dynamic_slice(kept, _corner(place), (1, window.length, kept.shape[2]))[0]

    # XLA makes one loop of a slice and the arithmetic behind it, which is not vectorised then; what a branch gives it
    # leaves alone.
    zeros_lf = jnp.zeros_like(kept, shape=(window.length, kept.shape[-1]))
    return jax.lax.cond(place.size > 0, read, lambda: zeros_lf)


def forward_in_blocks(
    layers: TwoLayers, kept: jax.ShapeDtypeStruct | None, operands: Operands
) -> tuple[jax.Array | None, jax.Array]:
    """Hidden states, if they are to be kept, and outputs, one block after the other."""
    blocks, places = _cut(operands)

    def group(carry: tuple[jax.Array | None, jax.Array], inputs: tuple[Weights, Place]) -> tuple[Any, None]:
        weights, place = inputs

        def block(
            window: Window, first: bool, carry: tuple[jax.Array | None, jax.Array]
        ) -> tuple[jax.Array | None, jax.Array]:
            hidden, sums = carry
            index_l, rows = _read(operands, window)
            hidden_lf, outputs_ld = both_halves(layers, OneGroup(), rows, weights)
            if hidden is not None:
                hidden = _write_kept(hidden, window, place, hidden_lf)
            return hidden, sums.at[index_l].add(outputs_ld.astype(sums.dtype), mode="drop")

        return blocks.each(place, block, carry), None

    no_hidden = None if kept is None else jnp.zeros_like(operands.rows.x, kept.dtype, shape=kept.shape)
    return jax.lax.scan(group, (no_hidden, operands.no_sums), (operands.weights, places))[0]


def gradients_in_blocks(
    layers: TwoLayers, operands: Operands, hidden: jax.Array | None, outputs_bar: jax.Array
) -> tuple[Weights, Rows]:
    """The gradients of weights and rows, one block after the other."""
    blocks, places = _cut(operands)
    in_place = hidden is not None and hidden.ndim == 3

    def group(carry: tuple[Weights, Rows], inputs: tuple[Weights, Place]) -> tuple[Any, None]:
        weights, place = inputs

        def block(window: Window, first: bool, carry: tuple[Weights, Rows]) -> tuple[Weights, Rows]:
            weights_bar, (x_bar, *factors_bar) = carry
            index_l, rows = _read(operands, window)
            bar_ld = taken(outputs_bar, index_l)
            kept = jax.tree.leaves(weights_bar.hidden)[0] if in_place else hidden
            hidden_lf = None if kept is None else _read_kept(kept, window, place)
            summands, new = gradients_of_halves(layers, OneGroup(), rows, weights, hidden_lf, bar_ld)

            # The first block sets the sums, and does not read the zeros that are there; `at` would.
            def add(sums: jax.Array, summand: jax.Array) -> jax.Array:
                summand = summand.astype(sums.dtype)
                if first:
                    return jax.lax.dynamic_update_index_in_dim(sums, summand, place.number, axis=0)
                return sums.at[place.number].add(summand)

            x_bar = x_bar.at[index_l].add(new.x.astype(x_bar.dtype), mode="drop")
            factors_bar = jax.tree.map(window.write, factors_bar, list(new[1:]))
            return jax.tree.map(add, weights_bar, summands), Rows(x_bar, *factors_bar)

        return blocks.each(place, block, carry), None

    def zeros(x: jax.Array) -> jax.Array:
        return jnp.zeros_like(x, wide_dtype(x.dtype))

    differentiated = operands.weights, operands.rows
    weights_bar, rows_bar = jax.tree.map(zeros, differentiated)
    if in_place:
        leaves, structure = jax.tree.flatten(weights_bar.hidden)
        weights_bar = weights_bar._replace(hidden=structure.unflatten([hidden, *leaves[1:]]))
    bars, _ = jax.lax.scan(group, (weights_bar, rows_bar), (operands.weights, places))
    return jax.tree.map(lambda bar, x: bar.astype(x.dtype), bars, differentiated)
