"""Feed-forwards on groups of rows, each with weights of its own: `by_group`.

On a GPU or TPU, all groups at once: a batched product for groups of one size, `jax.lax.ragged_dot` for groups of any.
On a CPU, groups of one size are multiplied at once if they are short.

Other groups on a CPU, where XLA computes `ragged_dot` as a dense product per group over all rows, go one after the
other in blocks of rows (`moe_jax.block_loops`).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import sequential_vmap

from moe_jax.block_loops import forward_in_blocks, gradients_in_blocks, kept_for_gradients
from moe_jax.grouping import EqualGroups, Grouping, ShortGroups, SortedGroups
from moe_jax.halves import Operands, Rows, TwoLayers, Weights, both_halves, gradients_of_halves
from moe_jax.layout import Sent, collect, spread

# With so few rows a group, products took two cores of an EPYC 1.5 to 1.9 times as long when each group's weights were
# cut out of the stack.
SHORT_GROUP = 64


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
    hidden, outputs = both_halves(layers, *_at_once(operands), operands.weights)
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
    weights_bar, bars = gradients_of_halves(layers, *_at_once(operands), operands.weights, hidden, bar_sd)
    return weights_bar, bars if layout is None else bars._replace(x=collect(layout, bars.x).astype(x.dtype))
