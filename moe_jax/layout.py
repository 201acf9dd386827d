"""Where assignments of tokens to experts lie in a buffer of rows, and the moves there and back."""

import jax
import jax.numpy as jnp
from flax import struct

from moe_jax.dtypes import wide_dtype


@struct.dataclass
class Layout:
    """Where each assignment is in a buffer of S rows, and what is in each row.

    Attributes:
      row_ta: (T, A) int32, the row of each assignment; S where it was not kept.
      assignment_s: (S,) int32, the flat assignment t * A + a in each row; T * A where the row is empty.
    """

    row_ta: jax.Array
    assignment_s: jax.Array

    @property
    def token_s(self) -> jax.Array:
        """(S,) int32, the token in each row; T where the row is empty."""
        return self.token_of(self.assignment_s)

    def token_of(self, assignment: jax.Array) -> jax.Array:
        """The token of each flat assignment; T of what is none."""
        return assignment // self.row_ta.shape[1]


def layout(row_ta: jax.Array, keep_ta: jax.Array, num_rows: int) -> Layout:
    """The layout that puts each kept assignment into its row. No two kept assignments share one."""
    row_ta = jnp.where(keep_ta, row_ta, num_rows)
    flat = jnp.arange(row_ta.size, dtype=jnp.int32)
    empty_s = jnp.full(num_rows, row_ta.size, jnp.int32)
    return Layout(row_ta=row_ta, assignment_s=empty_s.at[row_ta.reshape(-1)].set(flat, mode="drop"))


def taken(x: jax.Array, index: jax.Array) -> jax.Array:
    """Entries of the first axis by index, zero where there is no such entry."""
    return jnp.take(x, index, axis=0, mode="fill", fill_value=0)


@jax.custom_vjp
def spread(where: Layout, x_td: jax.Array) -> jax.Array:
    """(S, D): each row is its token's; empty rows are zero."""
    return taken(x_td, where.token_s)


@jax.custom_vjp
def collect(where: Layout, y_sd: jax.Array) -> jax.Array:
    """(T, D) in at least float32: the sum of each token's rows. Rows of no token are never read."""
    tokens, choices = where.row_ta.shape
    total_td = jnp.zeros((tokens, y_sd.shape[1]), wide_dtype(y_sd.dtype))
    for a in range(choices):
        total_td = total_td + taken(y_sd, where.row_ta[:, a]).astype(total_td.dtype)
    return total_td


# Each is the transpose of the other: a layout knows both where every assignment went and where every row came from, so
# that no gradient is a scatter of rows. Saved is the dtype to answer in, as an empty array.
spread.defvjp(
    lambda where, x_td: (spread(where, x_td), (where, x_td[:0])),
    lambda saved, bar_sd: (None, collect(saved[0], bar_sd).astype(saved[1].dtype)),
)
collect.defvjp(
    lambda where, y_sd: (collect(where, y_sd), (where, y_sd[:0])),
    lambda saved, bar_td: (None, spread(saved[0], bar_td).astype(saved[1].dtype)),
)


@struct.dataclass
class Sent:
    """Assignments on their way to their experts and back, in S rows.

    Attributes:
      layout: which is where.
      gate_s: (S,) float, what each row is multiplied with after its expert; 0 where it is empty.
      weight_s: (S,) float, what it is multiplied with before, or None: not at all.
    """

    layout: Layout
    gate_s: jax.Array
    weight_s: jax.Array | None

    def spread(self, x_td: jax.Array) -> jax.Array:
        """(S, D) what the experts get."""
        return scaled(spread(self.layout, x_td), self.weight_s)


def sent(where: Layout, gate_ta: jax.Array, weight_ta: jax.Array | None) -> Sent:
    """By assignment what `Sent` has by row."""

    def by_row(x_ta: jax.Array) -> jax.Array:
        return taken(x_ta.reshape(-1), where.assignment_s)

    return Sent(layout=where, gate_s=by_row(gate_ta), weight_s=None if weight_ta is None else by_row(weight_ta))


def scaled(x_sd: jax.Array, factor_s: jax.Array | None) -> jax.Array:
    """(S, D): each row times its factor, if there are factors.

    Multiplied, and summed in the gradient of the factors, in the factors' dtype, which is the wider one.
    """
    return x_sd if factor_s is None else (x_sd.astype(factor_s.dtype) * factor_s[:, None]).astype(x_sd.dtype)
