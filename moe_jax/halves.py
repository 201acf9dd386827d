"""A feed-forward in two halves on groups of rows: what it is computed from, its outputs and its gradients."""

from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from moe_jax.dtypes import wide_dtype
from moe_jax.grouping import Grouping
from moe_jax.layout import Layout, scaled


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
        return jnp.zeros_like(x, x.dtype if self.layout is None else wide_dtype(x.dtype))


class TwoLayers(Protocol):
    """A feed-forward in two halves. Hashable."""

    def hidden(self, grouping: Grouping, weights: Any, rows: jax.Array) -> jax.Array:
        """(S, D) to (S, F)."""
        ...

    def output(self, grouping: Grouping, weights: Any, hidden: jax.Array, gate_s: jax.Array | None) -> jax.Array:
        """(S, F) to (S, D), each row times its gate if there are gates."""
        ...


def _first_half(layers: TwoLayers, grouping: Grouping, weights: Any, rows: Rows) -> jax.Array:
    return layers.hidden(grouping, weights, scaled(rows.x, rows.weight_s))


def both_halves(layers: TwoLayers, grouping: Grouping, rows: Rows, weights: Weights) -> tuple[jax.Array, jax.Array]:
    """Hidden states and outputs."""
    hidden = _first_half(layers, grouping, weights.hidden, rows)
    return hidden, layers.output(grouping, weights.output, hidden, rows.gate_s).astype(rows.x.dtype)


def gradients_of_halves(
    layers: TwoLayers,
    grouping: Grouping,
    rows: Rows,
    weights: Weights,
    hidden: jax.Array | None,
    outputs_bar: jax.Array,
) -> tuple[Weights, Rows]:
    """Gradients of weights and rows, from those of the outputs; of hidden states that are None, computed again."""
    first_half = partial(_first_half, layers, grouping)
    if hidden is None:
        hidden = first_half(weights.hidden, rows)
    outputs, pull = jax.vjp(partial(layers.output, grouping), weights.output, hidden, rows.gate_s)
    # One half after the other: with both at once, XLA would keep the arrays of both.
    output_weights_bar, hidden_bar, gate_bar_s = jax.lax.optimization_barrier(pull(outputs_bar.astype(outputs.dtype)))
    hidden_weights_bar, rows_bar = jax.vjp(first_half, weights.hidden, rows)[1](hidden_bar)
    return Weights(hidden_weights_bar, output_weights_bar), rows_bar._replace(gate_s=gate_bar_s)
