"""Rows to the devices that host their experts and back: what expert parallelism adds to the experts.

`mixture` needs two functions of the experts, `batched` and `grouped`. `ExchangedExperts` offers the same two on every
device for all experts: it ships the rows, lets the experts at hand work on what arrives, and ships the answers back.
So every dispatch is also a parallel one.

Letters here: g of the G devices that exchange with each other, m of the M experts on each, R rows.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from moe_jax.dispatch import ExpertFunctions
from moe_jax.layout import Layout, Sent, layout, taken
from moe_jax.routing import Routing

Move = Callable[["Exchange", "Sizes", jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Exchange:
    """Which expert lives where on an axis of the mesh.

    The axis is cut into rings of `size` neighbours that together host all experts. With fewer experts than devices
    there are several rings, each a copy. Within a ring there are `size * per_device` places, the first E of which host
    experts 0, 1, ... and the rest again 0, 1, ...: experts hosted twice share their rows, instead of devices idling.

        E = 5, 8 devices: one ring  [0 1 2 3 4 0 1 2]        E = 5, 2 devices: one ring  [0 1 2 | 3 4 0]
        E = 3, 8 devices: two rings [0 1 2 0] [0 1 2 0]

    Attributes:
      num_experts: E.
      axis: name of the mesh axis, or None where there is none.
      axis_size: devices along it.
    """

    num_experts: int
    axis: str | None
    axis_size: int

    @property
    def size(self) -> int:
        """G, devices per ring: all, or the fewest that divide the axis and hold every expert once."""
        if self.num_experts >= self.axis_size:
            return self.axis_size
        return next(n for n in range(self.num_experts, self.axis_size + 1) if self.axis_size % n == 0)

    @property
    def per_device(self) -> int:
        """M, experts on each device."""
        return -(-self.num_experts // self.size)

    @property
    def places(self) -> int:
        """E_padded, places for experts in a ring."""
        return self.size * self.per_device

    @property
    def hosted(self) -> np.ndarray:
        """(axis_size * M,) the expert at each place of the axis."""
        return np.tile(np.arange(self.places) % self.num_experts, self.axis_size // self.size)

    @property
    def moves_weights(self) -> bool:
        """Whether places and experts differ, so that weights must be arranged by place."""
        return len(self.hosted) != self.num_experts

    @property
    def rings(self) -> list[list[int]] | None:
        """Positions on the axis, ring by ring; None for a single ring."""
        if self.size == self.axis_size:
            return None
        return np.arange(self.axis_size).reshape(-1, self.size).tolist()

    def placed(self, routing: Routing) -> Routing:
        """The same routing with places for experts: of an expert's copies, a device always uses the same."""
        if self.places == self.num_experts:
            return routing
        expert_e = np.arange(self.num_experts, dtype=np.int32)
        copies_e = jnp.asarray(-(-(self.places - expert_e) // self.num_experts))
        place_e = expert_e + self.num_experts * (jax.lax.axis_index(self.axis) % copies_e)

        def by_place(x_eg: jax.Array) -> jax.Array:
            return jnp.zeros((self.places, x_eg.shape[1]), x_eg.dtype).at[place_e].set(x_eg)

        return dataclasses.replace(
            routing,
            expert_index_ta=place_e[routing.expert_index_ta],
            count_eg=by_place(routing.count_eg),
            available_eg=by_place(routing.available_eg),
        )

    def all_to_all(self, x: jax.Array, *, split_axis: int, concat_axis: int) -> jax.Array:
        """Piece i of `split_axis` to device i of the ring, the pieces that arrive side by side on `concat_axis`."""
        if self.size == 1 or self.axis is None:
            return x
        return jax.lax.all_to_all(
            x, self.axis, split_axis=split_axis, concat_axis=concat_axis, axis_index_groups=self.rings, tiled=True
        )


@struct.dataclass
class ExchangedExperts(ExpertFunctions):
    """All experts, as seen from one device.

    Attributes:
      local: the experts at hand.
      exchange: where the others are. Static.
      max_rows: the most rows that one device can have for another. Static.
    """

    local: ExpertFunctions
    exchange: Exchange = struct.field(pytree_node=False)
    max_rows: int = struct.field(pytree_node=False)

    def batched(self, x_ecd: jax.Array) -> jax.Array:
        """Every place's expert on this device's C rows: (E_padded, C, D) to (E_padded, C, D)."""
        x_mcd = self.exchange.all_to_all(x_ecd, split_axis=0, concat_axis=1)
        return self.exchange.all_to_all(self.local.batched(x_mcd), split_axis=1, concat_axis=0)

    def grouped(self, x_sd: jax.Array, sizes_e: jax.Array) -> jax.Array:
        """Rows sorted by place, `sizes_e` each: (S, D) to (S, D). Rows beyond the last place's are undefined."""
        sent_gm = sizes_e.reshape(self.exchange.size, self.exchange.per_device)
        sizes = Sizes(
            sent_gm=sent_gm,
            received_gm=self.exchange.all_to_all(sent_gm, split_axis=0, concat_axis=0),
            rows=x_sd.shape[0],
            max_rows=min(x_sd.shape[0], self.max_rows),
        )
        received_m = sizes.received_gm.sum(0, dtype=sizes.received_gm.dtype)
        y_rd = self.local.grouped(ship(self.exchange, sizes, x_sd), received_m)
        return ship_back(self.exchange, sizes, y_rd)

    def mixed(self, x_td: jax.Array, sent: Sent, sizes: jax.Array | int) -> jax.Array:
        """As in `ExpertFunctions`: by way of a buffer, unless all experts are at hand."""
        if self.exchange.size == 1:
            return self.local.mixed(x_td, sent, sizes)
        return super().mixed(x_td, sent, sizes)


@struct.dataclass
class Sizes:
    """How many rows of one device go where, and how many come.

    Attributes:
      sent_gm: (G, M) int32, rows for each expert of each device.
      received_gm: (G, M) int32, rows from each device for each expert at hand.
      rows: S, rows of the buffer at home, in order of (g, m) of `sent_gm`. Static.
      max_rows: the most rows that one device can have for another. Static.
    """

    sent_gm: jax.Array
    received_gm: jax.Array
    rows: int = struct.field(pytree_node=False)
    max_rows: int = struct.field(pytree_node=False)

    @property
    def rows_away(self) -> int:
        """Rows of the buffer of arrivals, which are in order of expert, then source."""
        return self.sent_gm.shape[0] * self.max_rows

    @property
    def start_home_gm(self) -> jax.Array:
        """(G, M) the first row of each piece at home."""
        flat = self.sent_gm.reshape(-1)
        return (jnp.cumsum(flat, dtype=flat.dtype) - flat).reshape(self.sent_gm.shape)

    @property
    def start_away_gm(self) -> jax.Array:
        """(G, M) the first row of each piece that arrived."""
        flat = self.received_gm.T.reshape(-1)
        return (jnp.cumsum(flat, dtype=flat.dtype) - flat).reshape(self.received_gm.T.shape).T


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def ship(exchange: Exchange, sizes: Sizes, x_sd: jax.Array) -> jax.Array:
    """(S, D) rows at home to (G * max_rows, D) rows sorted by expert on the device that hosts it; the rest is zero."""
    return _by_platform(_ship_padded, _ship_ragged, exchange, sizes, x_sd)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def ship_back(exchange: Exchange, sizes: Sizes, y_rd: jax.Array) -> jax.Array:
    """The transpose of `ship`, which is also its inverse."""
    return _by_platform(_ship_back_padded, _ship_back_ragged, exchange, sizes, y_rd)


ship.defvjp(
    lambda exchange, sizes, x_sd: (ship(exchange, sizes, x_sd), sizes),
    lambda exchange, sizes, bar_rd: (None, ship_back(exchange, sizes, bar_rd)),
)
ship_back.defvjp(
    lambda exchange, sizes, y_rd: (ship_back(exchange, sizes, y_rd), sizes),
    lambda exchange, sizes, bar_sd: (None, ship(exchange, sizes, bar_sd)),
)


def _by_platform(padded: Move, ragged: Move, exchange: Exchange, sizes: Sizes, x: jax.Array) -> jax.Array:
    return jax.lax.platform_dependent(sizes, x, cpu=partial(padded, exchange), default=partial(ragged, exchange))


def _layouts(sizes: Sizes) -> tuple[Layout, Layout]:
    """From the buffer at home to one padded piece per destination, and from those that arrive to sorted rows."""
    rows, length = sizes.rows, sizes.max_rows
    start_g = sizes.start_home_gm[:, 0]
    end_g = jnp.cumsum(sizes.sent_gm.sum(1), dtype=start_g.dtype)
    row_s = jnp.arange(rows, dtype=jnp.int32)
    to_s = _pieces_before(end_g, row_s)
    used_s = row_s < end_g[-1]
    outgoing = layout((to_s * length + row_s - start_g[to_s])[:, None], used_s[:, None], sizes.rows_away)

    end_gm = jnp.cumsum(sizes.received_gm, axis=1, dtype=sizes.received_gm.dtype)
    place_r = jnp.arange(length, dtype=jnp.int32)
    expert_gr = _pieces_before(end_gm, place_r)
    used_gr = place_r[None] < end_gm[:, -1:]
    offset_gm = sizes.start_away_gm - (end_gm - sizes.received_gm)
    row_gr = place_r[None] + jnp.take_along_axis(offset_gm, jnp.minimum(expert_gr, end_gm.shape[1] - 1), axis=1)
    incoming = layout(row_gr.reshape(-1, 1), used_gr.reshape(-1, 1), sizes.rows_away)
    return outgoing, incoming


def _pieces_before(end_gm: jax.Array, place_r: jax.Array) -> jax.Array:
    """(..., R) int32, how many pieces end at or before each place, given the ends (..., M) of all.

    Compared one with another, for `jnp.searchsorted` fails under a mesh that has further axes (JAX 0.10).
    """
    place_r1 = place_r.reshape((1,) * (end_gm.ndim - 1) + (-1, 1))
    return (end_gm[..., None, :] <= place_r1).sum(-1, dtype=jnp.int32)


def _ship_padded(exchange: Exchange, sizes: Sizes, x_sd: jax.Array) -> jax.Array:
    outgoing, incoming = _layouts(sizes)
    arrived_rd = exchange.all_to_all(taken(x_sd, outgoing.assignment_s), split_axis=0, concat_axis=0)
    return taken(arrived_rd, incoming.assignment_s)


def _ship_back_padded(exchange: Exchange, sizes: Sizes, y_rd: jax.Array) -> jax.Array:
    outgoing, incoming = _layouts(sizes)
    returned_rd = exchange.all_to_all(taken(y_rd, incoming.row_ta[:, 0]), split_axis=0, concat_axis=0)
    return taken(returned_rd, outgoing.row_ta[:, 0])


def _ship_ragged(exchange: Exchange, sizes: Sizes, x_sd: jax.Array) -> jax.Array:
    # A piece lands where the receiver, who alone knows what the others send, has room for it.
    landing_gm = exchange.all_to_all(sizes.start_away_gm, split_axis=0, concat_axis=0)
    return _ragged(exchange, x_sd, sizes.rows_away, sizes.start_home_gm, sizes.sent_gm, landing_gm, sizes.received_gm)


def _ship_back_ragged(exchange: Exchange, sizes: Sizes, y_rd: jax.Array) -> jax.Array:
    landing_gm = exchange.all_to_all(sizes.start_home_gm, split_axis=0, concat_axis=0)
    return _ragged(exchange, y_rd, sizes.rows, sizes.start_away_gm, sizes.received_gm, landing_gm, sizes.sent_gm)


def _ragged(
    exchange: Exchange,
    rows_sd: jax.Array,
    num_rows: int,
    start_gm: jax.Array,
    sent_gm: jax.Array,
    landing_gm: jax.Array,
    received_gm: jax.Array,
) -> jax.Array:
    empty_rd = jnp.zeros_like(rows_sd, shape=(num_rows, rows_sd.shape[1]))
    pieces = (x_gm.reshape(-1).astype(jnp.int32) for x_gm in (start_gm, sent_gm, landing_gm, received_gm))
    return jax.lax.ragged_all_to_all(
        rows_sd, empty_rd, *pieces, axis_name=exchange.axis, axis_index_groups=exchange.rings
    )
