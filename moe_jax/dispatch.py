"""Hidden states to the experts and back, three ways with the same answers and gradients.

`dense` multiplies with one-hot tensors: memory grows with T * E * C, and it is there to check the others against.
`index` has a fixed number of rows per expert. `ragged` sorts rows by expert and leaves no room between them, so that
its cost is that of the assignments kept, however they are spread.

`index` and `ragged` are the same over different layouts of rows (see `moe_jax.layout`). Experts at hand take their rows
from the tokens and sum what they make of them over each token (`moe_jax.grouped`); to others, rows travel in a buffer.
"""

import dataclasses
from functools import partial
from typing import Literal, Protocol, get_args

import jax
import jax.numpy as jnp

from moe_jax.checks import floating_array, one_of
from moe_jax.dtypes import wide_dtype
from moe_jax.layout import Sent, collect, layout, scaled, sent
from moe_jax.routing import Routing

Dispatch = Literal["dense", "index", "ragged"]
DISPATCHES: tuple[str, ...] = get_args(Dispatch)


class ExpertFunctions(Protocol):
    """What dispatch needs of the experts. Where a class derives from this one, `mixed` may be left out."""

    def batched(self, x_ecd: jax.Array) -> jax.Array:
        """Every expert on its own C rows: (E, C, D) to (E, C, D)."""
        ...

    def grouped(self, x_sd: jax.Array, sizes_e: jax.Array) -> jax.Array:
        """Rows sorted by expert, `sizes_e` each: (S, D) to (S, D). Rows beyond the last expert's are undefined."""
        ...

    def mixed(self, x_td: jax.Array, sent: Sent, sizes: jax.Array | int) -> jax.Array:
        """Each token's sum over its rows, (T, D) in at least float32.

        Args:
          x_td: (T, D).
          sent: which token is in each of S rows, and what it is multiplied with.
          sizes: (E,) int32, rows of each expert; or how many every expert has.
        """
        x_sd = sent.spread(x_td)
        if isinstance(sizes, int):
            y_sd = self.batched(x_sd.reshape(-1, sizes, x_sd.shape[1])).reshape(x_sd.shape)
        else:
            y_sd = self.grouped(x_sd, sizes)
        return collect(sent.layout, scaled(y_sd, sent.gate_s))


def dispatch_weight(gate_ta: jax.Array) -> jax.Array:
    """(T, A) ones whose gradient goes to the gates.

    Exact: g - g is 0 and 1 + 0 is 1 in floating point, which (1 + g) - g is not.
    """
    return jnp.ones_like(gate_ta) + (gate_ta - jax.lax.stop_gradient(gate_ta))


def mixture(
    x_td: jax.Array,
    routing: Routing,
    experts: ExpertFunctions,
    *,
    dispatch: Dispatch = "index",
    straight_through: bool = False,
) -> jax.Array:
    """Each token's sum of gate times expert output over the assignments it kept.

    Args:
      x_td: (T, D).
      routing: who goes where.
      experts: the experts' functions.
      dispatch: "dense", "index" or "ragged". Static.
      straight_through: whether dispatching passes a gradient to the gates, as if each row had been multiplied by its
        gate without changing its value. Static.

    Returns:
      (T, D) in the dtype of `x_td`, at least float32.

    Raises:
      ValueError: `dispatch` is unknown, `x_td` not floating point, or the routing of other tokens or experts.
    """
    one_of("dispatch", dispatch, DISPATCHES)
    x_td = floating_array("x_td", x_td)
    if x_td.ndim != 2 or len(x_td) != len(routing.keep_ta):
        raise ValueError(f"x_td must be (T, D) of the routing's {len(routing.keep_ta)} tokens, got {x_td.shape}")
    dtype = wide_dtype(x_td.dtype)
    routing = dataclasses.replace(routing, gate_ta=routing.gate_ta.astype(dtype))
    if routing.capacity == 0 or len(x_td) == 0:
        # No expert is asked.
        return jnp.zeros_like(x_td, dtype)
    weight_ta = dispatch_weight(routing.gate_ta) if straight_through else None
    if dispatch == "dense":
        return _dense(x_td, routing, experts, weight_ta)
    if dispatch == "index":
        num_experts, groups = routing.count_eg.shape
        sizes = groups * routing.capacity
        where = layout(routing.expert_index_ta * sizes + routing.slot_ta, routing.keep_ta, num_experts * sizes)
    else:
        sizes = routing.count_eg.sum(1, dtype=jnp.int32)
        where = layout(*sorted_rows(routing))
    return experts.mixed(x_td, sent(where, routing.gate_ta, weight_ta), sizes)


def sorted_rows(routing: Routing) -> tuple[jax.Array, jax.Array, int]:
    """Arguments of `layout` that put kept assignments side by side, by expert, group and slot."""
    num_experts, groups = routing.count_eg.shape
    count_q = routing.count_eg.reshape(-1)
    start_q = jnp.cumsum(count_q, dtype=count_q.dtype) - count_q
    group_ta, place_ta = jnp.divmod(routing.slot_ta, routing.capacity)
    row_ta = start_q[routing.expert_index_ta * groups + group_ta] + place_ta
    num_rows = min(routing.keep_ta.size, num_experts * groups * routing.capacity)
    return row_ta, routing.keep_ta, num_rows


def _dense(x_td: jax.Array, routing: Routing, experts: ExpertFunctions, weight_ta: jax.Array | None) -> jax.Array:
    num_experts, groups = routing.count_eg.shape
    dtype = routing.gate_ta.dtype
    expert_tae = jax.nn.one_hot(routing.expert_index_ta, num_experts, dtype=dtype)
    slot_tac = jax.nn.one_hot(routing.slot_ta, groups * routing.capacity, dtype=dtype)
    place = jnp.where(routing.keep_ta[:, :, None], expert_tae, 0), slot_tac
    weight_ta = jnp.ones_like(routing.gate_ta) if weight_ta is None else weight_ta
    # At full precision on every backend, as what the other two add up is.
    einsum = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    dispatch_tec = einsum("tae,tac,ta->tec", *place, weight_ta)
    combine_tec = einsum("tae,tac,ta->tec", *place, routing.gate_ta)
    x_ecd = einsum("td,tec->ecd", x_td.astype(dtype), dispatch_tec).astype(x_td.dtype)
    return einsum("ecd,tec->td", experts.batched(x_ecd).astype(dtype), combine_tec)
