"""Feed-forwards on groups of rows, each with weights of its own: `by_group`.

On a GPU or TPU, all groups at once: a batched product for groups of one size, `jax.lax.ragged_dot` for groups of any.

On a CPU, where XLA computes `ragged_dot` as a dense product per group over all rows, one group after the other in
blocks of rows:

    rows    0         5             12                  24              sizes_e = 5, 7
            |--- 0 ---|----- 1 -----|    of no group    |               blocks of 4 or 8
    blocks  [       0       ]
                      [       1       ]

Where a block is longer than what is left of its group, what it makes of the rows behind is thrown away. The hidden
states of a block are used while they are in the processor's cache, and those of all rows are kept for the gradient
only, unless it is to compute them again.
"""

from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from moe_jax.blocks import Blocks, Place, Window, blocks_of_equal_groups, blocks_of_groups


class Weights(NamedTuple):
    """Of the two halves of a feed-forward: of one group, or of all with an axis of groups in front."""

    hidden: Any
    output: Any


class Operands(NamedTuple):
    """What is computed from, as in `by_group`."""

    weights: Weights
    rows: jax.Array
    sizes_e: jax.Array | None


class Grouping(Protocol):
    """How rows meet the weights of their group."""

    def product(self, rows: jax.Array, weights: jax.Array) -> jax.Array:
        """Each row times its group's matrix: (..., D) and ([E,] D, F) to (..., F)."""
        ...

    def each(self, vectors: jax.Array) -> jax.Array:
        """Each row's group's vector, of ([E,] F), to be added to the rows or multiplied with them."""
        ...


class TwoLayers(Protocol):
    """A feed-forward in two halves. Hashable."""

    def hidden(self, grouping: Grouping, weights: Any, rows: jax.Array) -> jax.Array:
        """(..., D) to (..., F)."""
        ...

    def output(self, grouping: Grouping, weights: Any, hidden: jax.Array) -> jax.Array:
        """(..., F) to (..., D)."""
        ...


class OneGroup:
    """(L, ...) rows of a single group, whose weights have no axis of groups."""

    def product(self, rows: jax.Array, weights: jax.Array) -> jax.Array:
        """As in `Grouping`."""
        return rows @ weights

    def each(self, vectors: jax.Array) -> jax.Array:
        """As in `Grouping`."""
        return vectors[None]


class EqualGroups:
    """(E, C, ...) rows: every group has C."""

    def product(self, rows: jax.Array, weights: jax.Array) -> jax.Array:
        """As in `Grouping`."""
        return jnp.matmul(rows, weights)

    def each(self, vectors: jax.Array) -> jax.Array:
        """As in `Grouping`."""
        return vectors[:, None]


class SortedGroups:
    """(S, ...) rows sorted by group, `sizes_e` each. What becomes of those beyond the last group is zero."""

    def __init__(self, sizes_e: jax.Array, num_rows: int) -> None:
        self.sizes_e = sizes_e
        self.group_s = jnp.repeat(jnp.arange(len(sizes_e)), sizes_e, total_repeat_length=num_rows)
        self.used_s1 = (jnp.arange(num_rows) < sizes_e.sum())[:, None]

    def product(self, rows: jax.Array, weights: jax.Array) -> jax.Array:
        """As in `Grouping`."""
        # Rows beyond the last group may come out as NaN, of the product and of its gradient: the second `where` stops
        # the one, the first stops the other. Multiplying by 0 would not.
        rows = jnp.where(self.used_s1, rows, 0)
        return jnp.where(self.used_s1, jax.lax.ragged_dot(rows, weights, self.sizes_e), 0)

    def each(self, vectors: jax.Array) -> jax.Array:
        """As in `Grouping`."""
        return jnp.where(self.used_s1, vectors.at[self.group_s].get(indices_are_sorted=True), 0)


def by_group(
    layers: TwoLayers, weights: Weights, rows: jax.Array, sizes_e: jax.Array | None, *, recompute: bool = False
) -> jax.Array:
    """Each row through the feed-forward of its group. Can be differentiated once, in reverse.

    Args:
      layers: the feed-forward. Static.
      weights: of its halves, each array with a leading axis of E groups.
      rows: (E, C, D), or (S, D) sorted by group.
      sizes_e: (E,) int32, rows per group where they are sorted, else None. Their sum may be less than S.
      recompute: whether the gradient computes the hidden states again, and none are kept for it. Static.

    Returns:
      The shape and dtype of `rows`. Rows beyond the last group are undefined, here and in the gradient with respect to
      `rows`; whatever they hold, nothing else depends on it.
    """
    if rows.size == 0:
        # No block is so short.
        return rows
    operands = Operands(weights, rows, sizes_e)
    # Under `jax.shard_map`, all are made to differ between the same devices: a sum of gradients over devices is then
    # taken here, once, and not in each block, of which devices have different numbers.
    axes = frozenset().union(*(jax.typeof(leaf).manual_axis_type.varying for leaf in jax.tree.leaves(operands)))

    def varying(leaf: jax.Array) -> jax.Array:
        missing = tuple(axes - jax.typeof(leaf).manual_axis_type.varying)
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return _by_group(layers, recompute, jax.tree.map(varying, operands))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _by_group(layers: TwoLayers, recompute: bool, operands: Operands) -> jax.Array:
    return jax.lax.platform_dependent(
        operands, cpu=partial(outputs_in_blocks, layers), default=partial(outputs_at_once, layers)
    )


# What is kept for the gradient: the hidden states are None where they are to be computed again.
Saved = tuple[Operands, jax.Array | None]


def _forward(layers: TwoLayers, recompute: bool, operands: Operands) -> tuple[jax.Array, Saved]:
    if recompute:
        return _by_group(layers, recompute, operands), (operands, None)
    hidden, outputs = jax.lax.platform_dependent(
        operands, cpu=partial(both_in_blocks, layers), default=partial(both_at_once, layers)
    )
    return outputs, (operands, hidden)


def _backward(layers: TwoLayers, recompute: bool, saved: Saved, outputs_bar: jax.Array) -> tuple[Operands]:
    weights_bar, rows_bar = jax.lax.platform_dependent(
        *saved, outputs_bar, cpu=partial(gradients_in_blocks, layers), default=partial(gradients_at_once, layers)
    )
    return (Operands(weights_bar, rows_bar, None),)


_by_group.defvjp(_forward, _backward)


def outputs_at_once(layers: TwoLayers, operands: Operands) -> jax.Array:
    """The outputs, where an accelerator computes them."""
    return both_at_once(layers, operands)[1]


def both_at_once(layers: TwoLayers, operands: Operands) -> tuple[jax.Array, jax.Array]:
    """Hidden states and outputs, where an accelerator computes them."""
    return _both(layers, _grouping(operands), operands.weights, operands.rows)


def gradients_at_once(
    layers: TwoLayers, operands: Operands, hidden: jax.Array | None, outputs_bar: jax.Array
) -> tuple[Weights, jax.Array]:
    """The gradients of weights and rows, where an accelerator computes them."""
    rows = operands.rows
    if hidden is None:
        # Not at once with the forward pass, of whose product XLA would see that it is the same.
        rows, outputs_bar = jax.lax.optimization_barrier((rows, outputs_bar))
    return _gradients(layers, _grouping(operands), operands.weights, rows, hidden, outputs_bar)


def _grouping(operands: Operands) -> Grouping:
    return EqualGroups() if operands.sizes_e is None else SortedGroups(operands.sizes_e, len(operands.rows))


def _both(layers: TwoLayers, grouping: Grouping, weights: Weights, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    hidden = layers.hidden(grouping, weights.hidden, rows)
    return hidden, layers.output(grouping, weights.output, hidden).astype(rows.dtype)


def _gradients(
    layers: TwoLayers,
    grouping: Grouping,
    weights: Weights,
    rows: jax.Array,
    hidden: jax.Array | None,
    outputs_bar: jax.Array,
) -> tuple[Weights, jax.Array]:
    if hidden is None:
        hidden = layers.hidden(grouping, weights.hidden, rows)
    outputs, pull = jax.vjp(partial(layers.output, grouping), weights.output, hidden)
    output_weights_bar, hidden_bar = pull(outputs_bar.astype(outputs.dtype))
    hidden_weights_bar, rows_bar = jax.vjp(partial(layers.hidden, grouping), weights.hidden, rows)[1](hidden_bar)
    return Weights(hidden_weights_bar, output_weights_bar), rows_bar


def _cut(operands: Operands) -> tuple[Blocks, jax.Array, Place]:
    """Blocks, (S, D) rows, and the place of each group."""
    weights, rows, sizes_e = operands
    num_groups = len(jax.tree.leaves(weights)[0])
    rows_sd = rows.reshape(-1, rows.shape[-1])
    if sizes_e is not None:
        return blocks_of_groups(num_groups, len(rows_sd)), rows_sd, Place(jnp.cumsum(sizes_e) - sizes_e, sizes_e)
    size = rows.shape[1]
    # Sizes that XLA does not know: of a single block it would make a part of the loop over groups, where it copies the
    # second half's weights while it multiplies by the first's, a third slower.
    size_e = jax.lax.optimization_barrier(jnp.full(num_groups, size, jnp.int32))
    return blocks_of_equal_groups(num_groups, size), rows_sd, Place(jnp.arange(num_groups) * size, size_e)


def outputs_in_blocks(layers: TwoLayers, operands: Operands) -> jax.Array:
    """The outputs, where a CPU computes them."""
    blocks, rows_sd, places = _cut(operands)

    def group(outputs_sd: jax.Array, inputs: tuple[Weights, Place]) -> tuple[jax.Array, None]:
        weights, place = inputs

        def block(window: Window, first: bool, outputs_sd: jax.Array) -> jax.Array:
            # Outputs take the place of the rows they are made of.
            _, outputs_ld = _both(layers, OneGroup(), weights, window.read(outputs_sd))
            return window.write(outputs_sd, outputs_ld)

        return blocks.each(place, block, outputs_sd), None

    return jax.lax.scan(group, rows_sd, (operands.weights, places))[0].reshape(operands.rows.shape)


def both_in_blocks(layers: TwoLayers, operands: Operands) -> tuple[jax.Array, jax.Array]:
    """Hidden states and outputs, where a CPU computes them."""
    blocks, rows_sd, places = _cut(operands)

    def group(both: tuple[jax.Array, jax.Array], inputs: tuple[Weights, Place]) -> tuple[Any, None]:
        weights, place = inputs

        def block(window: Window, first: bool, both: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            hidden_lf, outputs_ld = _both(layers, OneGroup(), weights, window.read(rows_sd))
            return window.write(both[0], hidden_lf), window.write(both[1], outputs_ld)

        return blocks.each(place, block, both), None

    first_group = jax.tree.map(lambda weight: weight[0], operands.weights.hidden)
    hidden = jax.eval_shape(partial(layers.hidden, OneGroup()), first_group, rows_sd)
    # Zeros like the rows: on a mesh they are another device's own, and so must a loop's start be.
    start = jnp.zeros_like(rows_sd, hidden.dtype, shape=hidden.shape), jnp.zeros_like(rows_sd)
    (hidden_sf, outputs_sd), _ = jax.lax.scan(group, start, (operands.weights, places))
    return hidden_sf.reshape(*operands.rows.shape[:-1], -1), outputs_sd.reshape(operands.rows.shape)


def gradients_in_blocks(
    layers: TwoLayers, operands: Operands, hidden: jax.Array | None, outputs_bar: jax.Array
) -> tuple[Weights, jax.Array]:
    """The gradients of weights and rows, where a CPU computes them."""
    blocks, rows_sd, places = _cut(operands)

    def read_hidden(window: Window, place: Place) -> jax.Array | None:
        if hidden is None:
            return None
        hidden_sf = hidden.reshape(-1, hidden.shape[-1])
        # XLA makes one loop of a slice and the arithmetic behind it, which is not vectorised then; what a branch
        # gives it leaves alone.
        zeros_lf = jnp.zeros_like(hidden_sf, shape=(window.length, hidden_sf.shape[1]))
        return jax.lax.cond(place.size > 0, lambda: window.read(hidden_sf), lambda: zeros_lf)

    def group(carry: tuple[jax.Array, Weights], inputs: tuple[Weights, Place]) -> tuple[Any, Weights]:
        weights, place = inputs

        def block(window: Window, first: bool, carry: tuple[jax.Array, Weights]) -> tuple[jax.Array, Weights]:
            # Of outputs before the block, of rows after it.
            bar_sd, sums = carry
            rows_ld, bar_ld, hidden_lf = window.read(rows_sd), window.read(bar_sd), read_hidden(window, place)
            summands, rows_bar_ld = _gradients(layers, OneGroup(), weights, rows_ld, hidden_lf, bar_ld)
            sums = jax.tree.map(lambda total, new: new.astype(total.dtype) if first else total + new, sums, summands)
            return window.write(bar_sd, rows_bar_ld), sums

        # The first block sets the sums, so that a group need not begin with zeros.
        bar_sd, sums = blocks.each(place, block, carry, empty_too=True)
        return (bar_sd, sums), jax.tree.map(lambda total, weight: total.astype(weight.dtype), sums, weights)

    sums = jax.tree.map(lambda x: jnp.zeros_like(x[0], jnp.promote_types(x.dtype, jnp.float32)), operands.weights)
    start = outputs_bar.reshape(rows_sd.shape), sums
    (rows_bar_sd, _), weights_bar = jax.lax.scan(group, start, (operands.weights, places))
    return weights_bar, rows_bar_sd.reshape(operands.rows.shape)
