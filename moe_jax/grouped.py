"""Feed-forwards on groups of rows, each with weights of its own: `by_group`.

On a GPU or TPU, all groups at once: a batched product for groups of one size, `jax.lax.ragged_dot` for groups of any.
On a CPU, groups of one size are multiplied at once if they are short.

Other groups on a CPU, where XLA computes `ragged_dot` as a dense product per group over all rows, go one after the
other in blocks of rows:

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

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.custom_batching import sequential_vmap

from moe_jax.blocks import Blocks, Place, Window, blocks_of_equal_groups, blocks_of_groups
from moe_jax.grouping import EqualGroups, Grouping, OneGroup, ShortGroups, SortedGroups
from moe_jax.layout import Layout, Sent, collect, scaled, spread, taken

# With so few rows a group, products took two cores of an EPYC 1.5 to 1.9 times as long when each group's weights were
# cut out of the stack.
SHORT_GROUP = 64


class Weights(NamedTuple):
    """Of the two halves of a feed-forward: of one group, or of all with an axis of groups in front."""

    hidden: Any
    output: Any


class Rows(NamedTuple):
    """(S, D) rows, and what each is multiplied with before and after: (S,), or None for not at all."""

    x: jax.Array
    weight_s: jax.Array | None
    gate_s: jax.Array | None


class Operands(NamedTuple):
    """What is computed from, as in `by_group`. With a layout, `rows.x` are the (T, D) tokens that are in the rows."""

    weights: Weights
    rows: Rows
    sizes_e: jax.Array | None
    layout: Layout | None

    @property
    def num_rows(self) -> int:
        """S."""
        return len(self.rows.x if self.layout is None else self.layout.assignment_s)

    @property
    def num_groups(self) -> int:
        """E."""
        return len(jax.tree.leaves(self.weights)[0])

    @property
    def equal_size(self) -> int:
        """S / E, the rows of every group where groups are of one size."""
        return self.num_rows // self.num_groups

    @property
    def no_sums(self) -> jax.Array:
        """Outputs to add to. Made of the input: on a mesh it is a device's own, as what a loop starts with must be."""
        x = self.rows.x
        return jnp.zeros_like(x, x.dtype if self.layout is None else jnp.promote_types(x.dtype, jnp.float32))


class TwoLayers(Protocol):
    """A feed-forward in two halves. Hashable."""

    def hidden(self, grouping: Grouping, weights: Any, rows: jax.Array) -> jax.Array:
        """(S, D) to (S, F)."""
        ...

    def output(self, grouping: Grouping, weights: Any, hidden: jax.Array, gate_s: jax.Array | None) -> jax.Array:
        """(S, F) to (S, D), each row times its gate if there are gates."""
        ...


def by_group(
    layers: TwoLayers,
    weights: Weights,
    x: jax.Array,
    sizes_e: jax.Array | None,
    *,
    sent: Sent | None = None,
    recompute: bool = False,
) -> jax.Array:
    """Each row through the feed-forward of its group. Can be differentiated once, in reverse.

    Args:
      layers: the feed-forward. Static.
      weights: of its halves, each array with a leading axis of E groups.
      x: (S, D) rows sorted by group; or, with `sent`, (T, D) tokens.
      sizes_e: (E,) int32, rows per group; None where every group has S / E. Their sum may be less than S.
      sent: which token each row is, and what it is multiplied with.
      recompute: whether the gradient computes the hidden states again, and none are kept for it. Static.

    Returns:
      (S, D) in the dtype of `x`. Rows beyond the last group are undefined, here and in the gradient with respect to
      `x`; whatever they hold, nothing else depends on it. With `sent`, (T, D) sums of each token's rows, in at least
      float32.
    """
    rows = Rows(x, None, None) if sent is None else Rows(x, sent.weight_s, sent.gate_s)
    operands = Operands(weights, rows, sizes_e, None if sent is None else sent.layout)
    if operands.num_rows == 0:
        # No block is so short.
        return operands.no_sums
    # Under `jax.shard_map`, all are made to differ between the same devices: a sum of gradients over devices is then
    # taken here, once, and not in each block, of which devices have different numbers.
    axes = frozenset().union(*(jax.typeof(leaf).manual_axis_type.varying for leaf in jax.tree.leaves(operands)))

    def varying(leaf: jax.Array) -> jax.Array:
        missing = tuple(axes - jax.typeof(leaf).manual_axis_type.varying)
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return _by_group(layers, recompute, jax.tree.map(varying, operands))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _by_group(layers: TwoLayers, recompute: bool, operands: Operands) -> jax.Array:
    return _forward(layers, True, operands)[0]


# What is kept for the gradient: the hidden states are None where they are to be computed again, and have three axes
# where they are in the place of a gradient (see `kept_for_gradients`).
Saved = tuple[Operands, jax.Array | None]


def _forward(layers: TwoLayers, recompute: bool, operands: Operands) -> tuple[jax.Array, Saved]:
    kept = None if recompute else kept_for_gradients(layers, operands)
    hidden, outputs = _where_it_runs(forward_in_blocks, forward_at_once, (layers, kept), operands)
    return outputs, (operands, hidden)


def _backward(layers: TwoLayers, recompute: bool, saved: Saved, outputs_bar: jax.Array) -> tuple[Operands]:
    weights_bar, rows_bar = _where_it_runs(gradients_in_blocks, gradients_at_once, (layers,), *saved, outputs_bar)
    return (Operands(weights_bar, rows_bar, None, None),)


_by_group.defvjp(_forward, _backward)


# A function of its own to JAX, so that of layers that are alike only the first is traced.
@partial(jax.jit, static_argnums=(0, 1, 2))
def _where_it_runs(
    in_blocks: Callable[..., Any], at_once: Callable[..., Any], static: tuple[Any, ...], operands: Operands, *rest: Any
) -> Any:
    """One of two functions of the same arguments, on a CPU the first unless groups are short."""
    if short_on_cpu(operands):
        return at_once(*static, operands, *rest)

    def compute(*arrays: Any) -> Any:
        return jax.lax.platform_dependent(*arrays, cpu=partial(in_blocks, *static), default=partial(at_once, *static))

    # Under `jax.vmap`, groups of any size go one batch entry after the other: `ragged_dot` takes no other, and of loops
    # of different lengths every step would copy what all of them carry.
    return (compute if operands.sizes_e is None else sequential_vmap(compute))(operands, *rest)


def short_on_cpu(operands: Operands) -> bool:
    """Whether the default device is a CPU and groups are of one size and short, in all little beside their weights.

    A program for another device than the default one is right with either answer.
    """
    longest = min(SHORT_GROUP, operands.rows.x.shape[1] // 8)
    return jax.default_backend() == "cpu" and operands.sizes_e is None and operands.equal_size <= longest


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
        and (first.shape[2:], jnp.promote_types(first.dtype, jnp.float32)) == ((width,), hidden_tf.dtype)
    )
    return jax.ShapeDtypeStruct(first.shape if in_place else (operands.num_rows, width), hidden_tf.dtype)


def _hidden(layers: TwoLayers, grouping: Grouping, weights: Any, rows: Rows) -> jax.Array:
    return layers.hidden(grouping, weights, scaled(rows.x, rows.weight_s))


def _both(layers: TwoLayers, grouping: Grouping, rows: Rows, weights: Weights) -> tuple[jax.Array, jax.Array]:
    """Hidden states and outputs."""
    hidden = _hidden(layers, grouping, weights.hidden, rows)
    return hidden, layers.output(grouping, weights.output, hidden, rows.gate_s).astype(rows.x.dtype)


def _gradients(
    layers: TwoLayers,
    grouping: Grouping,
    rows: Rows,
    weights: Weights,
    hidden: jax.Array | None,
    outputs_bar: jax.Array,
) -> tuple[Weights, Rows]:
    first_half = partial(_hidden, layers, grouping)
    if hidden is None:
        hidden = first_half(weights.hidden, rows)
    outputs, pull = jax.vjp(partial(layers.output, grouping), weights.output, hidden, rows.gate_s)
    # One half after the other: with both at once, XLA would keep the arrays of both.
    output_weights_bar, hidden_bar, gate_bar_s = jax.lax.optimization_barrier(pull(outputs_bar.astype(outputs.dtype)))
    hidden_weights_bar, rows_bar = jax.vjp(first_half, weights.hidden, rows)[1](hidden_bar)
    return Weights(hidden_weights_bar, output_weights_bar), rows_bar._replace(gate_s=gate_bar_s)


def _at_once(operands: Operands) -> tuple[Grouping, Rows]:
    """How the rows meet their weights, and the rows."""
    _, rows, sizes_e, layout = operands
    if sizes_e is None:
        grouping = ShortGroups(operands.num_rows) if short_on_cpu(operands) else EqualGroups(operands.num_rows)
    else:
        grouping = SortedGroups(sizes_e, operands.num_rows)
    return grouping, rows if layout is None else rows._replace(x=spread(layout, rows.x))


def forward_at_once(
    layers: TwoLayers, kept: jax.ShapeDtypeStruct | None, operands: Operands
) -> tuple[jax.Array | None, jax.Array]:
    """Hidden states, if they are to be kept, and outputs, where all groups are computed at once."""
    hidden, outputs = _both(layers, *_at_once(operands), operands.weights)
    if operands.layout is not None:
        outputs = collect(operands.layout, outputs)
    if kept is None:
        return None, outputs
    if kept.ndim == 3:
        num_groups, room, width = kept.shape
        hidden_ecf = hidden.reshape(num_groups, -1, width)
        hidden = jnp.pad(hidden_ecf, ((0, 0), (0, room - hidden_ecf.shape[1]), (0, 0)))
    return hidden, outputs


def gradients_at_once(
    layers: TwoLayers, operands: Operands, hidden: jax.Array | None, outputs_bar: jax.Array
) -> tuple[Weights, Rows]:
    """The gradients of weights and rows, where all groups are computed at once."""
    if hidden is None:
        # Not at once with the forward pass, of whose product XLA would see that it is the same.
        rows, outputs_bar = jax.lax.optimization_barrier((operands.rows, outputs_bar))
        operands = operands._replace(rows=rows)
    elif hidden.ndim == 3:
        hidden = hidden[:, : operands.equal_size].reshape(-1, hidden.shape[2])
    layout, x = operands.layout, operands.rows.x
    bar_sd = outputs_bar if layout is None else spread(layout, outputs_bar)
    weights_bar, bars = _gradients(layers, *_at_once(operands), operands.weights, hidden, bar_sd)
    return weights_bar, bars if layout is None else bars._replace(x=collect(layout, bars.x).astype(x.dtype))


def _cut(operands: Operands) -> tuple[Blocks, Place]:
    """Blocks, and the place of each group."""
    sizes_e, num_groups, size = operands.sizes_e, operands.num_groups, operands.equal_size
    number_e = jnp.arange(num_groups)
    if sizes_e is not None:
        return blocks_of_groups(num_groups, operands.num_rows), Place(number_e, jnp.cumsum(sizes_e) - sizes_e, sizes_e)
    # Sizes that XLA does not know: of a single block it would make a part of the loop over groups, where it copies the
    # second half's weights while it multiplies by the first's, a third slower.
    size_e = jax.lax.optimization_barrier(jnp.full(num_groups, size, jnp.int32))
    return blocks_of_equal_groups(num_groups, size), Place(number_e, number_e * size, size_e)


def _read(operands: Operands, window: Window) -> tuple[jax.Array, Rows]:
    """(L,) where in the input a block's rows are, beyond its end where they are not the block's own; and the rows."""
    x, *factors = operands.rows
    layout = operands.layout
    index_l = window.rows_l if layout is None else layout.token_of(window.read(layout.assignment_s))
    index_l = window.own(index_l, len(x))
    return index_l, Rows(taken(x, index_l), *jax.tree.map(window.read, factors))


def _write_kept(kept: jax.Array, window: Window, place: Place, hidden_lf: jax.Array) -> jax.Array:
    """What `kept_for_gradients` describes, with a block's hidden states."""
    if kept.ndim == 2:
        return window.write(kept, hidden_lf)
    return jax.lax.dynamic_update_slice(kept, hidden_lf[None], (place.number, 0, 0))


def _read_kept(kept: jax.Array, window: Window, place: Place) -> jax.Array:
    """(L, F) a block's hidden states."""

    def read() -> jax.Array:
        if kept.ndim == 2:
            return window.read(kept)
        return jax.lax.dynamic_slice(kept, (place.number, 0, 0), (1, window.length, kept.shape[2]))[0]

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
            hidden_lf, outputs_ld = _both(layers, OneGroup(), rows, weights)
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
            summands, new = _gradients(layers, OneGroup(), rows, weights, hidden_lf, bar_ld)

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
        return jnp.zeros_like(x, jnp.promote_types(x.dtype, jnp.float32))

    differentiated = operands.weights, operands.rows
    weights_bar, rows_bar = jax.tree.map(zeros, differentiated)
    if in_place:
        leaves, structure = jax.tree.flatten(weights_bar.hidden)
        weights_bar = weights_bar._replace(hidden=structure.unflatten([hidden, *leaves[1:]]))
    bars, _ = jax.lax.scan(group, (weights_bar, rows_bar), (operands.weights, places))
    return jax.tree.map(lambda bar, x: bar.astype(x.dtype), bars, differentiated)
