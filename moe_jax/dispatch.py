"""Hidden states to the experts and back, three ways with the same answers and gradients.

`dense` multiplies with one-hot tensors: memory grows with T * E * C, and it is there to check the others against.
`index` moves rows into one buffer of fixed capacity per expert. `ragged` sorts rows by expert and leaves no room
between them, so that its cost is that of the assignments kept, however they are spread.

`index` and `ragged` are the same two moves, `spread` and `collect`, over different layouts. Each move is a gather in
both directions: the layout knows where every assignment went and where every row came from, so the transpose of one
move is the other, and no gradient is a scatter of rows.
"""

from typing import Any, Literal, Protocol, get_args

import jax
import jax.numpy as jnp
from flax import struct

from moe_jax.routing import Routing, one_of

Dispatch = Literal["dense", "index", "ragged"]
DISPATCHES: tuple[str, ...] = get_args(Dispatch)


class ExpertFunctions(Protocol):
    """What dispatch needs of the experts."""

    def batched(self, x_ecd: jax.Array) -> jax.Array:
        """Every expert on its own C rows: (E, C, D) to (E, C, D)."""
        ...

    def grouped(self, x_sd: jax.Array, sizes_e: jax.Array) -> jax.Array:
        """Rows sorted by expert, `sizes_e` each: (S, D) to (S, D). Rows beyond the last expert's are undefined."""
        ...


@struct.dataclass
class Layout:
    """Where each assignment is in a buffer of S rows, and what is in each row.

    Attributes:
      row_ta: (T, A) int32, the row of each assignment; S where it was not kept.
      assignment_s: (S,) int32, the flat assignment t * A + a in each row; T * A where the row is empty.
    """

    row_ta: jax.Array
    assignment_s: jax.Array


def layout(row_ta: jax.Array, keep_ta: jax.Array, num_rows: int) -> Layout:
    """The layout that puts each kept assignment into its row. No two kept assignments share one."""
    row_ta = jnp.where(keep_ta, row_ta, num_rows)
    flat = jnp.arange(row_ta.size, dtype=jnp.int32)
    empty_s = jnp.full(num_rows, row_ta.size, jnp.int32)
    return Layout(row_ta=row_ta, assignment_s=empty_s.at[row_ta.reshape(-1)].set(flat, mode="drop"))


@jax.custom_vjp
def spread(where: Layout, x_td: jax.Array, weight_ta: jax.Array) -> jax.Array:
    """(S, D): each row holds its token's hidden state times the assignment's weight; empty rows are zero."""
    choices = weight_ta.shape[1]
    rows_sd = jnp.take(x_td, where.assignment_s // choices, axis=0, mode="fill", fill_value=0)
    weight_s = jnp.take(weight_ta.reshape(-1), where.assignment_s, mode="fill", fill_value=0)
    return (rows_sd * weight_s[:, None]).astype(x_td.dtype)


@jax.custom_vjp
def collect(where: Layout, y_sd: jax.Array, weight_ta: jax.Array) -> jax.Array:
    """(T, D): the weighted sum over each token's rows, in `weight_ta`'s dtype. Rows of no token are never read."""
    total_td = jnp.zeros((weight_ta.shape[0], y_sd.shape[1]), weight_ta.dtype)
    for a in range(weight_ta.shape[1]):
        total_td = total_td + _rows_of(where, y_sd, a) * weight_ta[:, a, None]
    return total_td


def _rows_of(where: Layout, y_sd: jax.Array, choice: int) -> jax.Array:
    return jnp.take(y_sd, where.row_ta[:, choice], axis=0, mode="fill", fill_value=0)


def _weight_bar(where: Layout, x_td: jax.Array, y_sd: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """(T, A): the inner product of each token with each of its rows."""
    products = [(x_td.astype(dtype) * _rows_of(where, y_sd, a)).sum(-1) for a in range(where.row_ta.shape[1])]
    return jnp.stack(products, axis=1)


def _spread_forward(where: Layout, x_td: jax.Array, weight_ta: jax.Array) -> tuple[jax.Array, Any]:
    return spread(where, x_td, weight_ta), (where, x_td, weight_ta)


def _spread_backward(saved: Any, rows_bar_sd: jax.Array) -> tuple[None, jax.Array, jax.Array]:
    where, x_td, weight_ta = saved
    x_bar_td = collect(where, rows_bar_sd, weight_ta).astype(x_td.dtype)
    return None, x_bar_td, _weight_bar(where, x_td, rows_bar_sd, weight_ta.dtype)


def _collect_forward(where: Layout, y_sd: jax.Array, weight_ta: jax.Array) -> tuple[jax.Array, Any]:
    return collect(where, y_sd, weight_ta), (where, y_sd, weight_ta)


def _collect_backward(saved: Any, total_bar_td: jax.Array) -> tuple[None, jax.Array, jax.Array]:
    where, y_sd, weight_ta = saved
    y_bar_sd = spread(where, total_bar_td, weight_ta).astype(y_sd.dtype)
    return None, y_bar_sd, _weight_bar(where, total_bar_td, y_sd, weight_ta.dtype)


spread.defvjp(_spread_forward, _spread_backward)
collect.defvjp(_collect_forward, _collect_backward)


def dispatch_weight(routing: Routing, straight_through: bool) -> jax.Array:
    """(T, A) ones; with `straight_through`, ones whose gradient goes to the gates.

    Exact: g - g is 0 and 1 + 0 is 1 in floating point, which (1 + g) - g is not.
    """
    ones_ta = jnp.ones_like(routing.gate_ta)
    if not straight_through:
        return ones_ta
    return ones_ta + (routing.gate_ta - jax.lax.stop_gradient(routing.gate_ta))


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
      (T, D) in the gates' dtype: at least float32.

    Raises:
      ValueError: `dispatch` is unknown.
    """
    one_of("dispatch", dispatch, DISPATCHES)
    weight_ta = dispatch_weight(routing, straight_through)
    if dispatch == "dense":
        return _dense(x_td, routing, experts, weight_ta)
    num_experts, groups = routing.count_eg.shape
    if dispatch == "index":
        slots = groups * routing.capacity
        where = layout(routing.expert_index_ta * slots + routing.slot_ta, routing.keep_ta, num_experts * slots)
        x_ecd = spread(where, x_td, weight_ta).reshape(num_experts, slots, x_td.shape[1])
        y_sd = experts.batched(x_ecd).reshape(num_experts * slots, x_td.shape[1])
    else:
        where = layout(*sorted_rows(routing))
        y_sd = experts.grouped(spread(where, x_td, weight_ta), routing.count_eg.sum(1))
    return collect(where, y_sd, routing.gate_ta)


def sorted_rows(routing: Routing) -> tuple[jax.Array, jax.Array, int]:
    """Arguments of `layout` that put kept assignments side by side, by expert, group and slot."""
    num_experts, groups = routing.count_eg.shape
    count_q = routing.count_eg.reshape(-1)
    start_q = jnp.cumsum(count_q) - count_q
    group_ta, place_ta = jnp.divmod(routing.slot_ta, routing.capacity)
    row_ta = start_q[routing.expert_index_ta * groups + group_ta] + place_ta
    num_rows = min(routing.keep_ta.size, num_experts * groups * routing.capacity)
    return row_ta, routing.keep_ta, num_rows


def _dense(x_td: jax.Array, routing: Routing, experts: ExpertFunctions, weight_ta: jax.Array) -> jax.Array:
    num_experts, groups = routing.count_eg.shape
    dtype = routing.gate_ta.dtype
    expert_tae = jax.nn.one_hot(routing.expert_index_ta, num_experts, dtype=dtype)
    slot_tac = jax.nn.one_hot(routing.slot_ta, groups * routing.capacity, dtype=dtype)
    place = jnp.where(routing.keep_ta[:, :, None], expert_tae, 0), slot_tac
    dispatch_tec = jnp.einsum("tae,tac,ta->tec", *place, weight_ta)
    combine_tec = jnp.einsum("tae,tac,ta->tec", *place, routing.gate_ta)
    x_ecd = jnp.einsum("td,tec->ecd", x_td.astype(dtype), dispatch_tec).astype(x_td.dtype)
    return jnp.einsum("ecd,tec->td", experts.batched(x_ecd).astype(dtype), combine_tec)
