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
only.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

# Of the two halves of a feed-forward; a block's are those of one group, elsewhere there is an axis of groups in front.
Weights = tuple[Any, Any]

# Blocks are one to LENGTHS steps long, and each length is code of its own. A step is a sixteenth of the mean group, but
# within these bounds: products of fewer rows are no faster, and hidden states of more leave the processor's cache.
LENGTHS = 20
SHORTEST_STEP, LONGEST_STEP = 8, 32


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


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def by_group(layers: TwoLayers, weights: Weights, rows: jax.Array, sizes_e: jax.Array | None) -> jax.Array:
    """Each row through the feed-forward of its group.

    Args:
      layers: the feed-forward. Static.
      weights: of its halves, each array with a leading axis of E groups.
      rows: (E, C, D), or (S, D) sorted by group.
      sizes_e: (E,) int32, rows per group where they are sorted, else None. Their sum may be less than S.

    Returns:
      The shape of `rows`. Rows beyond the last group are undefined, here and in the gradient with respect to `rows`;
      whatever they hold, nothing else depends on it.
    """
    return jax.lax.platform_dependent(
        weights, rows, sizes_e, cpu=partial(outputs_in_blocks, layers), default=partial(outputs_at_once, layers)
    )


def _forward(
    layers: TwoLayers, weights: Weights, rows: jax.Array, sizes_e: jax.Array | None
) -> tuple[jax.Array, tuple[Any, ...]]:
    hidden, outputs = jax.lax.platform_dependent(
        weights, rows, sizes_e, cpu=partial(both_in_blocks, layers), default=partial(both_at_once, layers)
    )
    return outputs, (weights, rows, sizes_e, hidden)


def _backward(layers: TwoLayers, saved: tuple[Any, ...], outputs_bar: jax.Array) -> tuple[Weights, jax.Array, None]:
    weights_bar, rows_bar = jax.lax.platform_dependent(
        *saved, outputs_bar, cpu=partial(gradients_in_blocks, layers), default=partial(gradients_at_once, layers)
    )
    return weights_bar, rows_bar, None


by_group.defvjp(_forward, _backward)


def outputs_at_once(layers: TwoLayers, weights: Weights, rows: jax.Array, sizes_e: jax.Array | None) -> jax.Array:
    """The outputs, where an accelerator computes them."""
    return both_at_once(layers, weights, rows, sizes_e)[1]


def both_at_once(
    layers: TwoLayers, weights: Weights, rows: jax.Array, sizes_e: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Hidden states and outputs, where an accelerator computes them."""
    return _both(layers, _grouping(rows, sizes_e), weights, rows)


def gradients_at_once(
    layers: TwoLayers,
    weights: Weights,
    rows: jax.Array,
    sizes_e: jax.Array | None,
    hidden: jax.Array,
    outputs_bar: jax.Array,
) -> tuple[Weights, jax.Array]:
    """The gradients of weights and rows, where an accelerator computes them."""
    return _gradients(layers, _grouping(rows, sizes_e), weights, rows, hidden, outputs_bar)


def _grouping(rows: jax.Array, sizes_e: jax.Array | None) -> Grouping:
    return EqualGroups() if sizes_e is None else SortedGroups(sizes_e, len(rows))


def _both(layers: TwoLayers, grouping: Grouping, weights: Weights, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    hidden = layers.hidden(grouping, weights[0], rows)
    return hidden, layers.output(grouping, weights[1], hidden)


def _gradients(
    layers: TwoLayers,
    grouping: Grouping,
    weights: Weights,
    rows: jax.Array,
    hidden: jax.Array,
    outputs_bar: jax.Array,
) -> tuple[Weights, jax.Array]:
    second_bar, hidden_bar = jax.vjp(partial(layers.output, grouping), weights[1], hidden)[1](outputs_bar)
    first_bar, rows_bar = jax.vjp(partial(layers.hidden, grouping), weights[0], rows)[1](hidden_bar)
    return (first_bar, second_bar), rows_bar


class Window(NamedTuple):
    """The rows of a block: `length` from `at` on, those of `inside_l1` its own (None: all)."""

    at: jax.Array
    length: int
    inside_l1: jax.Array | None

    def read(self, rows_sd: jax.Array) -> jax.Array:
        """(L, D), zero where a row is not the block's own: it may hold anything, and 0 * NaN is not 0."""
        rows_ld = jax.lax.dynamic_slice_in_dim(rows_sd, self.at, self.length)
        return rows_ld if self.inside_l1 is None else jnp.where(self.inside_l1, rows_ld, 0)

    def write(self, rows_sd: jax.Array, new_ld: jax.Array) -> jax.Array:
        """All rows, with new ones where they are the block's own."""
        if self.inside_l1 is not None:
            old_ld = jax.lax.dynamic_slice_in_dim(rows_sd, self.at, self.length)
            new_ld = jnp.where(self.inside_l1, new_ld, old_ld)
        return jax.lax.dynamic_update_slice_in_dim(rows_sd, new_ld, self.at, axis=0)


class Place(NamedTuple):
    """A group's first row, and how many it has."""

    start: jax.Array
    size: jax.Array


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How groups are cut: into as many of the longest blocks as fit, and before them one that takes the rest.

    Attributes:
      num_rows: S.
      lengths: that blocks have, ascending, none longer than S.
      exact: whether one length divides every group.
    """

    num_rows: int
    lengths: tuple[int, ...]
    exact: bool = False

    def each(
        self,
        place: Place,
        block: Callable[[Window, bool, Any], Any],
        carry: Any,
        *,
        empty_too: bool = False,
    ) -> Any:
        """`block(window, first, carry)` for the blocks of a group, `first` and static for one of them.

        With `empty_too`, an empty group has a block with no row of its own.
        """
        longest = self.lengths[-1]
        whole = jnp.maximum(place.size - 1, 0) // longest
        rest = place.size - whole * longest

        def first_block(i: jax.Array, carry: Any, length: int) -> Any:
            # `i` is 0, but XLA is not to know: it would compute what does not depend on it whether there is a block
            # or not.
            at = jnp.minimum(place.start + i, self.num_rows - length)
            row_l = at + jnp.arange(length)
            inside_l1 = ((row_l >= place.start) & (row_l < place.start + rest))[:, None]
            return block(Window(at, length, None if self.exact else inside_l1), True, carry)

        # Loops of one step or none: a conditional would copy what it carries.
        shorter = -1 if empty_too else 0
        for length in self.lengths:
            there = ((rest > shorter) & (rest <= length)).astype(jnp.int32)
            carry = jax.lax.fori_loop(0, there, partial(first_block, length=length), carry)
            shorter = length

        def further_block(i: jax.Array, carry: Any) -> Any:
            return block(Window(place.start + rest + i * longest, longest, None), False, carry)

        return jax.lax.fori_loop(0, whole, further_block, carry)


def _cut(weights: Weights, rows: jax.Array, sizes_e: jax.Array | None) -> tuple[Blocks, jax.Array, Place]:
    """Blocks, (S, D) rows, and the place of each group."""
    num_groups = len(jax.tree.leaves(weights)[0])
    rows_sd = rows.reshape(-1, rows.shape[-1])
    num_rows = len(rows_sd)
    if sizes_e is None:
        size = rows.shape[1]
        length = -(-size // -(-size // (LENGTHS * LONGEST_STEP)))
        blocks = Blocks(num_rows, (length,), exact=size % length == 0)
        # Sizes that XLA does not know: of a single block it would make a part of the loop over groups, where it copies
        # the second half's weights while it multiplies by the first's, a third slower.
        sizes_e = jax.lax.optimization_barrier(jnp.full(num_groups, size, jnp.int32))
    else:
        step = -(-num_rows // (16 * num_groups * SHORTEST_STEP)) * SHORTEST_STEP
        step = min(max(step, SHORTEST_STEP), LONGEST_STEP)
        blocks = Blocks(num_rows, tuple(sorted({min(step * i, num_rows) for i in range(1, LENGTHS + 1)})))
    return blocks, rows_sd, Place(jnp.cumsum(sizes_e) - sizes_e, sizes_e)


def outputs_in_blocks(layers: TwoLayers, weights: Weights, rows: jax.Array, sizes_e: jax.Array | None) -> jax.Array:
    """The outputs, where a CPU computes them."""
    blocks, rows_sd, places = _cut(weights, rows, sizes_e)

    def group(outputs_sd: jax.Array, inputs: tuple[Weights, Place]) -> tuple[jax.Array, None]:
        weights, place = inputs

        def block(window: Window, first: bool, outputs_sd: jax.Array) -> jax.Array:
            # Outputs take the place of the rows they are made of.
            _, outputs_ld = _both(layers, OneGroup(), weights, window.read(outputs_sd))
            return window.write(outputs_sd, outputs_ld)

        return blocks.each(place, block, outputs_sd), None

    return jax.lax.scan(group, rows_sd, (weights, places))[0].reshape(rows.shape)


def both_in_blocks(
    layers: TwoLayers, weights: Weights, rows: jax.Array, sizes_e: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Hidden states and outputs, where a CPU computes them."""
    blocks, rows_sd, places = _cut(weights, rows, sizes_e)

    def group(both: tuple[jax.Array, jax.Array], inputs: tuple[Weights, Place]) -> tuple[Any, None]:
        weights, place = inputs

        def block(window: Window, first: bool, both: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            hidden_lf, outputs_ld = _both(layers, OneGroup(), weights, window.read(rows_sd))
            return window.write(both[0], hidden_lf), window.write(both[1], outputs_ld)

        return blocks.each(place, block, both), None

    first_group = jax.tree.map(lambda weight: weight[0], weights[0])
    hidden_dim = jax.eval_shape(partial(layers.hidden, OneGroup()), first_group, rows_sd).shape[1]
    # Zeros like the rows: on a mesh they are another device's own, and so must a loop's start be.
    start = jnp.zeros_like(rows_sd, shape=(len(rows_sd), hidden_dim)), jnp.zeros_like(rows_sd)
    (hidden_sf, outputs_sd), _ = jax.lax.scan(group, start, (weights, places))
    return hidden_sf.reshape(*rows.shape[:-1], hidden_dim), outputs_sd.reshape(rows.shape)


def gradients_in_blocks(
    layers: TwoLayers,
    weights: Weights,
    rows: jax.Array,
    sizes_e: jax.Array | None,
    hidden: jax.Array,
    outputs_bar: jax.Array,
) -> tuple[Weights, jax.Array]:
    """The gradients of weights and rows, where a CPU computes them."""
    blocks, rows_sd, places = _cut(weights, rows, sizes_e)
    hidden_sf = hidden.reshape(-1, hidden.shape[-1])

    def group(carry: tuple[jax.Array, Weights], inputs: tuple[Weights, Place]) -> tuple[Any, Weights]:
        weights, place = inputs

        def block(window: Window, first: bool, carry: tuple[jax.Array, Weights]) -> tuple[jax.Array, Weights]:
            # Of outputs before the block, of rows after it.
            bar_sd, sums = carry
            operands = (window.read(x) for x in (rows_sd, hidden_sf, bar_sd))
            summands, rows_bar_ld = _gradients(layers, OneGroup(), weights, *operands)
            sums = jax.tree.map(lambda sum, new: new.astype(sum.dtype) if first else sum + new, sums, summands)
            return window.write(bar_sd, rows_bar_ld), sums

        # The first block sets the sums, so that a group need not begin with zeros.
        bar_sd, sums = blocks.each(place, block, carry, empty_too=True)
        return (bar_sd, sums), jax.tree.map(lambda sum, weight: sum.astype(weight.dtype), sums, weights)

    sums = jax.tree.map(lambda x: jnp.zeros_like(x[0], jnp.promote_types(x.dtype, jnp.float32)), weights)
    start = outputs_bar.reshape(rows_sd.shape), sums
    (rows_bar_sd, _), weights_bar = jax.lax.scan(group, start, (weights, places))
    return weights_bar, rows_bar_sd.reshape(rows.shape)
