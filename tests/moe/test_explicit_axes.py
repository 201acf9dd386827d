"""Layers on meshes whose axes are Explicit, as `jax.make_mesh` makes them: arrays carry in their types how they lie."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax import MoE, MoEConfig, MoEOutput, SparseMoEBlock, param_shardings
from tests.moe.support import assert_trees_close, config, hidden_states

AXES = ("data", "expert", "model")
A, E = AxisType.Auto, AxisType.Explicit
OPTIONS = {"num_experts": 3, "num_shared_experts": 1, "capacity_factor_train": 1.0, "min_capacity": 1}


def moe(config: MoEConfig) -> MoE:
    return MoE(config, rngs=nnx.Rngs(0))


def block(config: MoEConfig) -> SparseMoEBlock:
    return SparseMoEBlock(moe(config), add_ff_before=True, rngs=nnx.Rngs(1))


def gradients(layer: Any, x: jax.Array, mask: jax.Array | None) -> Any:
    def loss(layer: Any, x: jax.Array) -> tuple[jax.Array, MoEOutput]:
        out = layer(x, train=True, mask=mask)
        return jnp.sum((x + out.outputs) ** 2) + 100 * out.total_aux_loss, out

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(layer, x)


def scanned_gradients(layer: Any, x: jax.Array, mask: jax.Array | None) -> Any:
    """Of two equal layers one after the other, recomputed in the backward pass."""

    @jax.checkpoint
    def step(x: jax.Array, layer: Any) -> tuple[jax.Array, jax.Array]:
        out = layer(x, train=True, mask=mask)
        return out.outputs, out.total_aux_loss

    def loss(layers: Any, x: jax.Array) -> tuple[jax.Array, MoEOutput]:
        x, losses = jax.lax.scan(step, x, layers)
        return jnp.sum(x**2) + 100 * losses.sum(), losses

    layers = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), layer)
    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(layers, x)


@pytest.mark.parametrize(
    ("make", "kinds", "spec", "fsdp", "masked", "compute"),
    [
        (moe, (E, E), P("data"), False, False, gradients),
        (moe, (E, E), P(("data", "expert")), True, True, gradients),
        (block, (E, E, E), P("data", None, "model"), True, True, gradients),
        (block, (A, A, E), P(None, None, "model"), False, True, gradients),
        (block, (E, A, A), P("data"), True, False, scanned_gradients),
        (block, (E, E), P(), False, True, scanned_gradients),
    ],
)
def test_as_on_one_device(make: Any, kinds: Any, spec: P, fsdp: bool, masked: bool, compute: Any):
    """Outputs, losses, metrics and gradients, the weights and the input lying where the types say."""
    layer, x = make(config(**OPTIONS)), hidden_states(4, 6, 8)
    mask = hidden_states(4, 6, 8)[..., 0] < 0.8 if masked else None
    alone = jax.jit(compute)(layer, x, mask)
    mesh = jax.make_mesh((2,) * len(kinds), AXES[: len(kinds)], axis_types=kinds)
    with jax.set_mesh(mesh):
        layer = jax.device_put(layer, param_shardings(layer, mesh, fsdp=fsdp))
        x = jax.device_put(x, NamedSharding(mesh, spec))
        spread = jax.jit(compute)(layer, x, mask)
        assert jax.typeof(spread[1][1]) == jax.typeof(x)
        for leaf, leaf_bar in zip(jax.tree.leaves(layer), jax.tree.leaves(spread[1][0]), strict=True):
            assert tuple(jax.typeof(leaf_bar).sharding.spec)[-leaf.ndim :] == tuple(jax.typeof(leaf).sharding.spec)
    assert_trees_close(spread, alone, relative=1e-5)


def test_layers_placed_for_a_scan():
    """And spread over `data`, whose size divides their number as it divides no hidden unit."""
    blocks, x = [block(config(**OPTIONS | {"hidden": 9})) for _ in range(2)], hidden_states(4, 6, 8)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)

    @jax.jit
    def call(stacked: SparseMoEBlock, x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, block: (block(x, train=True).outputs, None), x, stacked)[0]

    alone = call(stacked, x)
    mesh = jax.make_mesh((2, 2), ("data", "expert"))
    with jax.set_mesh(mesh):
        stacked = jax.device_put(stacked, param_shardings(stacked, mesh, fsdp=True))
        assert_trees_close(call(stacked, jax.device_put(x, P("data"))), alone, relative=1e-5)


def test_weights_that_are_reduced():
    """As where they were gathered over `data` for the forward, and their gradients are summed over it.

    3 experts on 2 devices: their weights move, and JAX 0.10.2 would sum the gradients of the moved ones twice.
    """
    layer, x = moe(config(**OPTIONS)), hidden_states(4, 6, 8)

    def loss(layer: MoE, x: jax.Array, reduced: bool) -> jax.Array:
        if reduced:
            layer = jax.tree.map(lambda leaf: jax.reshard(leaf, P(reduced=frozenset(("data",)))), layer)
        return jnp.sum(layer(x, train=True).outputs ** 2)

    gradient = jax.jit(jax.grad(loss), static_argnums=2)
    alone = gradient(layer, x, False)
    with jax.set_mesh(jax.make_mesh((2, 2), ("data", "expert"))):
        spread = gradient(jax.device_put(layer, P()), jax.device_put(x, P("data")), True)
    assert_trees_close(spread, alone, relative=1e-5)


def test_arrays_of_a_mesh_that_is_not_set_are_refused():
    mesh = jax.make_mesh((2, 2), ("data", "expert"))
    layer, x = moe(config(**OPTIONS | {"num_experts": 4})), hidden_states(4, 6, 8)
    placed = jax.device_put(layer, param_shardings(layer, mesh))
    split = jax.device_put(x, NamedSharding(mesh, P("data")))
    call = jax.jit(lambda layer, x: layer(x, train=True).outputs)
    for got, arguments in ((r"float32\[4@expert,.*", (placed, x)), (r"float32\[4@data,6,8\]", (layer, split))):
        with pytest.raises(ValueError, match=f"Explicit axes must be that of jax.set_mesh, got {got} without"):
            call(*arguments)


def test_outputs_lie_as_the_input_does():
    mesh = jax.make_mesh((2, 2), ("data", "expert"))
    with jax.set_mesh(mesh):
        layer = MoE(config(**OPTIONS), rngs=nnx.Rngs(0), mesh=mesh)
        for spec in (P("data", None, None), P(None, "expert", None), P(None, None, None)):
            x = jax.device_put(hidden_states(4, 6, 8), spec)
            out = jax.jit(lambda layer, x: layer(x, train=False))(layer, x)
            assert jax.typeof(out.outputs) == jax.typeof(x)
            assert {jax.typeof(leaf).sharding.spec for leaf in jax.tree.leaves(out.metrics)} <= {P(), P(None)}
