"""What the compiled program of a parallel layer sends, and what it keeps on each device."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh

from experiments.collectives import Collective, collectives
from moe_jax import MoE, param_shardings, token_sharding
from tests.moe.meshes import mesh_of, on
from tests.moe.support import ALL, config, initial_layer

BATCH, LENGTH, DIM, EXPERTS, CAPACITY_FACTOR = 8, 64, 32, 8, 1.0
FLOAT32 = 4


@cache
def compiled(shape: tuple[int, int], *, backward: bool, **options: Any) -> Any:
    """A layer whose input, weights and results are where they belong, compiled but never run."""
    mesh = mesh_of(*shape)
    settings = {"dim": DIM, "num_experts": EXPERTS, "router": ALL, "capacity_factor_train": CAPACITY_FACTOR}
    moe = on(mesh, initial_layer(config(**(settings | options))))
    x = jax.ShapeDtypeStruct((BATCH, LENGTH, DIM), jnp.float32)
    shardings = param_shardings(moe, mesh), token_sharding(mesh, BATCH)

    def forward(moe: MoE, x: jax.Array) -> jax.Array:
        return moe(x, train=True, key=jax.random.key(0)).outputs

    def loss(moe: MoE, x: jax.Array) -> jax.Array:
        out = moe(x, train=True, key=jax.random.key(0))
        return jnp.sum(out.outputs**2) + out.total_aux_loss

    function, results = (jax.grad(loss, argnums=(0, 1)), shardings) if backward else (forward, shardings[1])
    lowered = jax.jit(function, in_shardings=shardings, out_shardings=results).lower(moe, x)
    return lowered.compile()


def of_kind(found: Sequence[Collective], kind: str) -> list[Collective]:
    return [collective for collective in found if collective.kind == kind]


def buffer_bytes(shape: tuple[int, int]) -> float:
    """What the capacity buffer of one device sends to others: E * C * D, less what stays."""
    data, expert = shape
    capacity = int(LENGTH * CAPACITY_FACTOR / EXPERTS) * BATCH // (data * expert)
    return EXPERTS * capacity * DIM * FLOAT32 * (expert - 1) / expert


@pytest.mark.parametrize("shape", [(1, 8), (2, 4)], ids=str)
def test_forward_sends_the_capacity_buffer_once_each_way(shape: tuple[int, int]):
    """Routing is random here, and still nothing is sent for it but the sums over devices."""
    found = collectives(compiled(shape, backward=False, gumbel_noise=0.5, input_jitter=0.1).as_text())
    there_and_back = of_kind(found, "all-to-all")
    assert [collective.sent_bytes for collective in there_and_back] == [buffer_bytes(shape)] * 2
    assert {collective.kind for collective in found} <= {"all-to-all", "all-reduce"}
    rest = sum(collective.sent_bytes for collective in found) - 2 * buffer_bytes(shape)
    assert rest <= 0.05 * 2 * buffer_bytes(shape)


@pytest.mark.parametrize("shape", [(1, 8), (2, 4)], ids=str)
def test_backward_sends_it_once_more_each_way(shape: tuple[int, int]):
    found = collectives(compiled(shape, backward=True).as_text())
    assert [collective.sent_bytes for collective in of_kind(found, "all-to-all")] == [buffer_bytes(shape)] * 4
    # Besides: the sums of gradients, and of counts.
    assert {collective.kind for collective in found} <= {"all-to-all", "all-reduce"}
    if shape[0] == 1:
        # With no axis of data, that is the router's gradient and little else.
        rest = sum(collective.sent_bytes for collective in of_kind(found, "all-reduce"))
        router = 2 * DIM * EXPERTS * FLOAT32 * 7 / 8
        assert router <= rest <= router + 0.05 * 4 * buffer_bytes(shape)


def test_groups_cut_by_devices_gather_integers_only():
    """And send no more than the slots of two groups, the most that the 64 tokens of a device can be of."""
    found = collectives(compiled((2, 4), backward=True, group_size=96).as_text())
    gathered = of_kind(found, "all-gather")
    assert gathered
    assert not [dtype for collective in gathered for dtype in collective.dtypes if "f" in dtype]
    slots = 2 * 96 // EXPERTS
    assert [c.sent_bytes for c in of_kind(found, "all-to-all")] == [EXPERTS * slots * DIM * FLOAT32 * 3 / 4] * 4


@pytest.mark.parametrize(("shape", "parts"), [((1, 8), 8), ((2, 4), 4)], ids=str)
def test_memory_for_the_experts_falls_with_the_devices(shape: tuple[int, int], parts: int):
    whole = initial_layer(config(dim=DIM, num_experts=EXPERTS, router=ALL))
    expert_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(whole.experts))
    router_bytes = whole.router_de[...].nbytes
    x_bytes = BATCH * LENGTH * DIM * FLOAT32 // 8
    memory = compiled(shape, backward=True).memory_analysis()
    assert memory.argument_size_in_bytes == expert_bytes // parts + router_bytes + x_bytes


def test_a_gather_of_hidden_states_would_be_found():
    """The same layer, asked for its outputs on every device."""
    mesh = mesh_of(1, 8)
    moe = on(mesh, initial_layer(config(dim=DIM, num_experts=EXPERTS)))
    gathered = gathering_program(moe, mesh)
    assert [collective.dtypes for collective in of_kind(gathered, "all-gather")] == [("f32",)]
    assert of_kind(gathered, "all-gather")[0].sent_bytes == BATCH * LENGTH * DIM * FLOAT32 * 7 / 8


def gathering_program(moe: MoE, mesh: Mesh) -> list[Collective]:
    everywhere = jax.NamedSharding(mesh, jax.P())
    function = jax.jit(
        lambda moe, x: moe(x, train=False).outputs,
        in_shardings=(param_shardings(moe, mesh), token_sharding(mesh, BATCH)),
        out_shardings=everywhere,
    )
    x = jax.ShapeDtypeStruct((BATCH, LENGTH, DIM), jnp.float32)
    return collectives(function.lower(moe, x).compile().as_text() or "")


def test_collectives_by_hand():
    text = """
HloModule jit_f, entry_computation_layout={}, num_partitions=4
  %a = (f32[2,8]{1,0}, f32[2,8]{1,0}) all-to-all(%x, %y), channel_id=1, replica_groups={{0,1},{2,3}}, dimensions={0}
  ROOT %g = bf16[4,8]{1,0} all-gather(%z), channel_id=2, replica_groups=[1,4]<=[4], dimensions={0}
  %r = s32[] all-reduce(%n), channel_id=3, replica_groups={}, to_apply=%add
  %s = (f32[3]{0}, f32[12]{0}) all-gather-start(%w), replica_groups={{0,1,2,3}}, dimensions={0}
  %d = f32[12]{0} all-gather-done(%s)
  %m = f32[4,8]{1,0} all-gather(%z), channel_id=4, replica_groups=mesh['data'=2,'expert'=8] {'expert'}, dimensions={0}
  %n = s32[] all-reduce(%n), channel_id=5, replica_groups=mesh['a'=2,'b'=8] {'a','b'}, to_apply=%add
  %fused = f32[2]{0} fusion(%a), kind=kLoop, calls=%all-to-all.clone
"""
    assert collectives(text) == [
        Collective("all-to-all", ("f32", "f32"), 128, 2),
        Collective("all-gather", ("bf16",), 64, 4),
        Collective("all-reduce", ("s32",), 4, 4),
        Collective("all-gather", ("f32",), 48, 4),
        Collective("all-gather", ("f32",), 128, 8),
        Collective("all-reduce", ("s32",), 4, 16),
    ]
    assert [collective.sent_bytes for collective in collectives(text)] == [64, 48, 6, 36, 112, 7.5]
