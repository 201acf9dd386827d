"""Who hosts which expert, and the two ways to ship rows to them."""

import dataclasses
from collections import Counter
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moe_jax import exchange, token_groups
from moe_jax.exchange import Exchange, Sizes
from tests.moe.meshes import mesh_of
from tests.moe.support import assign_slots, choice, hidden_states


def test_places_by_hand():
    assert Exchange(5, "expert", 2).hosted.tolist() == [0, 1, 2, 3, 4, 0]
    assert Exchange(5, "expert", 8).hosted.tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert Exchange(3, "expert", 8).hosted.tolist() == [0, 1, 2, 0] * 2
    assert Exchange(3, "expert", 8).rings == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert Exchange(1, "expert", 8).hosted.tolist() == [0] * 8
    assert Exchange(4, None, 1).hosted.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("devices", [1, 2, 3, 4, 6, 7, 8, 12])
def test_every_ring_hosts_every_expert_and_no_device_idles(devices: int):
    for num_experts in range(1, 20):
        where = Exchange(num_experts, "expert", devices)
        assert devices % where.size == 0
        by_ring = where.hosted.reshape(-1, where.places)
        assert all(set(ring) == set(range(num_experts)) for ring in by_ring.tolist())
        # As few places as the largest share of a device needs.
        assert where.per_device == -(-num_experts // where.size)
        assert len(where.hosted) == devices * where.per_device
        counts = Counter(where.hosted.tolist()).values()
        assert max(counts) - min(counts) <= devices // where.size
        assert where.moves_weights == (len(where.hosted) != num_experts)


def ragged_by_gathering(
    operand: jax.Array,
    output: jax.Array,
    input_offsets: jax.Array,
    send_sizes: jax.Array,
    output_offsets: jax.Array,
    recv_sizes: jax.Array,
    *,
    axis_name: str,
    axis_index_groups: list[list[int]] | None,
) -> jax.Array:
    """What `jax.lax.ragged_all_to_all` is documented to do, one row after the other. A CPU has no such collective."""
    devices = jax.lax.axis_size(axis_name)
    rings = jnp.asarray(axis_index_groups or [list(range(devices))])
    size = rings.shape[1]
    me = jax.lax.axis_index(axis_name)
    ring = rings[me // size]
    gather = partial(jax.lax.all_gather, axis_name=axis_name)
    everyones = [gather(x) for x in (operand, input_offsets, send_sizes, output_offsets)]
    pieces_per_device = input_offsets.shape[0] // size
    for source in range(size):
        rows, starts, sizes, landings = (x[ring[source]] for x in everyones)
        for piece in range(pieces_per_device):
            index = me % size * pieces_per_device + piece
            row = jnp.arange(output.shape[0])
            within = row - landings[index]
            arrived = (within >= 0) & (within < sizes[index])
            # The receiver's own count must agree with what is sent.
            arrived &= sizes[index] == recv_sizes[source * pieces_per_device + piece]
            output = jnp.where(arrived[:, None], rows[jnp.clip(starts[index] + within, 0, len(rows) - 1)], output)
    return output


@pytest.mark.parametrize(("num_experts", "devices"), [(8, 4), (3, 8)])
def test_ragged_and_padded_exchange_ship_the_same(num_experts: int, devices: int, monkeypatch: pytest.MonkeyPatch):
    where = Exchange(num_experts, "expert", devices)
    # Up to 2 rows for each place: at most 16 in all, and 4 for each device. Device 0 has none.
    rows, max_rows = 16, 5
    counts = np.random.default_rng(0).integers(0, 3, (devices, where.places)).astype(np.int32)
    counts[0], counts[1, 0] = 0, 2

    def both(x_sd: jax.Array, count_e: jax.Array) -> dict[str, Any]:
        sent_gm = count_e.reshape(where.size, where.per_device)
        received_gm = where.all_to_all(sent_gm, split_axis=0, concat_axis=0)
        sizes = Sizes(sent_gm=sent_gm, received_gm=received_gm, rows=rows, max_rows=max_rows)
        padded = exchange._ship_padded(where, sizes, x_sd)
        ragged = exchange._ship_ragged(where, sizes, x_sd)
        return {
            "there": (padded, ragged),
            "back": (
                exchange._ship_back_padded(where, sizes, padded),
                exchange._ship_back_ragged(where, sizes, ragged),
            ),
        }

    monkeypatch.setattr(jax.lax, "ragged_all_to_all", ragged_by_gathering)
    mesh = mesh_of(1, devices)
    x_sd = hidden_states(devices * rows, 2)
    shipped = jax.jit(jax.shard_map(both, mesh=mesh, in_specs=(P("expert"), P("expert")), out_specs=P("expert")))(
        x_sd, jnp.asarray(counts.reshape(-1))
    )
    np.testing.assert_array_equal(*shipped["there"])
    np.testing.assert_array_equal(*shipped["back"])
    # All came back, and something went: rows in use are as they were, the others zero.
    used = np.arange(rows)[None] < counts.sum(1)[:, None]
    np.testing.assert_array_equal(shipped["back"][0], np.where(used.reshape(-1, 1), x_sd, 0))
    # Sorted by expert on the device that hosts it: device 0 begins with what device 1 has for place 0.
    arrived = np.asarray(shipped["there"][0]).reshape(devices, -1, 2)
    np.testing.assert_array_equal(arrived[0, :2], x_sd[rows : rows + 2])


def test_backends_with_the_collective_use_it():
    """Lowered for a GPU, not run: the ragged exchange there, the padded one on a CPU."""
    where = Exchange(8, "expert", 4)

    def there_and_back(x_sd: jax.Array, count_e: jax.Array) -> jax.Array:
        sent_gm = count_e.reshape(4, 2)
        received_gm = where.all_to_all(sent_gm, split_axis=0, concat_axis=0)
        sizes = Sizes(sent_gm=sent_gm, received_gm=received_gm, rows=9, max_rows=6)
        return exchange.ship_back(where, sizes, exchange.ship(where, sizes, x_sd))

    def loss(x_sd: jax.Array, count_e: jax.Array) -> jax.Array:
        specs = {"in_specs": (P("expert"), P("expert")), "out_specs": P("expert")}
        return jnp.sum(jax.shard_map(there_and_back, mesh=mesh_of(1, 4), **specs)(x_sd, count_e) ** 2)

    traced = jax.jit(jax.grad(loss)).trace(jnp.ones((36, 2)), jnp.ones(32, jnp.int32))
    text = {name: traced.lower(lowering_platforms=(name,)).as_text() for name in ("cuda", "cpu")}
    # There and back, and the same backward.
    assert text["cuda"].count("ragged_all_to_all") == 4
    assert "ragged_all_to_all" not in text["cpu"]


def test_devices_share_the_copies_of_an_expert():
    """Of experts 0, 1, 2 on rings of four, the first is hosted twice: half of the devices use each copy."""
    where = Exchange(3, "expert", 8)

    def placed(expert_t1: jax.Array) -> jax.Array:
        groups = token_groups(jnp.ones(1, bool), 1, "batch")
        asked = choice(expert_t1)
        asked = dataclasses.replace(asked, probs_te=asked.probs_te[:, :3])
        return where.placed(assign_slots(asked, groups, num_experts=3, capacity_factor=None)).expert_index_ta

    over_devices = jax.jit(jax.shard_map(placed, mesh=mesh_of(1, 8), in_specs=P("expert"), out_specs=P("expert")))
    for expert, places in ((0, [0, 3] * 4), (2, [2] * 8)):
        np.testing.assert_array_equal(over_devices(jnp.full((8, 1), expert))[:, 0], places)
