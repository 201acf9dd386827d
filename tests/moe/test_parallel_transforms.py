"""A parallel layer inside checkpointed scans, with weights spread over the data axis, found through `jax.set_mesh`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from moe_jax import MoE, SparseMoEBlock, TopN, param_shardings, token_sharding
from tests.moe.meshes import DIM, Case, all_on, assert_equal, mesh_of, on, results
from tests.moe.support import ALL, assert_trees_close, config, hidden_states, initial_layer

LAYERS, BATCH, LENGTH = 2, 4, 6
OPTIONS = {"num_experts": 4, "capacity_factor_train": 1.0, "min_capacity": 1, "param_dtype": jnp.float32}


def stacked_blocks() -> Any:
    """The weights of two layers, stacked for `jax.lax.scan`."""
    blocks = [SparseMoEBlock(initial_layer(config(**OPTIONS), seed), add_ff_after=False) for seed in range(LAYERS)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)


def scanned_loss(blocks: SparseMoEBlock, x: jax.Array) -> jax.Array:
    """Layers one after the other, each recomputed in the backward pass."""

    @jax.checkpoint
    def layer(x: jax.Array, block: SparseMoEBlock) -> tuple[jax.Array, jax.Array]:
        out = block(x, train=True)
        return out.outputs, out.total_aux_loss

    x, losses = jax.lax.scan(layer, x, blocks)
    return jnp.sum(x**2) + 100 * losses.sum()


def unrolled_loss(blocks: SparseMoEBlock, x: jax.Array) -> jax.Array:
    total = jnp.zeros(())
    for index in range(LAYERS):
        out = jax.tree.map(lambda leaf, index=index: leaf[index], blocks)(x, train=True)
        x, total = out.outputs, total + out.total_aux_loss
    return jnp.sum(x**2) + 100 * total


OPTIMISER = optax.adam(1e-2)


def one_step(loss: Any, blocks: Any, state: Any, x: jax.Array) -> Any:
    value, (blocks_bar, x_bar) = jax.value_and_grad(loss, argnums=(0, 1))(blocks, x)
    _, state = OPTIMISER.update(blocks_bar, state)
    return value, blocks_bar, x_bar, state


@pytest.mark.mixed_dtypes
@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True])
def test_a_checkpointed_scan_of_spread_weights_under_set_mesh(fsdp: bool):
    """Nothing is said of the mesh but `jax.set_mesh` and where the arrays are."""
    blocks, x = stacked_blocks(), hidden_states(BATCH, LENGTH, DIM)
    state = OPTIMISER.init(blocks)
    wanted = jax.jit(one_step, static_argnums=0)(unrolled_loss, blocks, state, x)
    mesh = mesh_of(2, 2)
    shardings = (
        param_shardings(blocks, mesh, fsdp=fsdp),
        param_shardings(state, mesh, fsdp=fsdp),
        token_sharding(mesh, BATCH),
    )
    step = jax.jit(
        one_step,
        static_argnums=0,
        out_shardings=(None, shardings[0], shardings[2], shardings[1]),
    )
    with jax.set_mesh(mesh):
        got = step(scanned_loss, *jax.device_put((blocks, state, x), shardings))
    assert_trees_close(jax.device_get(got), jax.device_get(wanted), relative=1e-5)
    moment = got[3][0].mu.moe.experts.w_in_edf[...]
    assert moment.sharding.shard_shape(moment.shape) == (2, 2, 8, 10 if fsdp else 20)


def test_a_mesh_without_the_axes_and_no_mesh_at_all_leave_one_device():
    moe, x = initial_layer(config(**OPTIONS)), hidden_states(BATCH, LENGTH, DIM)

    def program() -> str:
        return jax.jit(lambda moe, x: moe(x, train=True).outputs).lower(moe, x).as_text()

    plain = program()
    with jax.set_mesh(mesh_of(2, 2, ("rows", "model"))):
        assert "all_to_all" not in program()
    with jax.set_mesh(mesh_of(2, 2)):
        assert program().count("all_to_all") == 2
    assert "all_to_all" not in plain


def test_axes_of_other_names_and_other_axes():
    """On a mesh of three axes, one of which is somebody else's: outputs and gradients."""
    mesh = jax.make_mesh((2, 2, 2), ("model", "rows", "specialists"), axis_types=(AxisType.Auto,) * 3)
    names = {"data_axis": "rows", "expert_axis": "specialists"}
    cases = [Case(initial_layer(config(**(OPTIONS | names))), hidden_states(3, 5, DIM))]
    assert_equal(results(all_on(mesh, cases)), results(cases), relative=1e-5)


@pytest.mark.parametrize("axis", ["data", "expert"])
def test_one_axis_is_enough(axis: str):
    mesh = jax.make_mesh((4,), (axis,), axis_types=(AxisType.Auto,))
    moe, x = initial_layer(config(**OPTIONS)), hidden_states(3, 5, DIM)
    call = jax.jit(lambda moe, x: moe(x, train=True).outputs)
    np.testing.assert_allclose(call(on(mesh, moe), x), call(moe, x), atol=1e-5)


def test_routing_noise_does_not_depend_on_the_mesh():
    """Random second choices, Gumbel noise and jitter, with one key: the same experts for every token."""
    noisy = config(**(OPTIONS | {"router": TopN(), "gumbel_noise": 1.0, "input_jitter": 0.2}))
    moe, x = initial_layer(noisy), hidden_states(3, 5, DIM)
    call = jax.jit(lambda moe, x, key: moe(x, train=True, key=key))
    alone = call(moe, x, jax.random.key(0))
    other = call(moe, x, jax.random.key(1))
    assert_trees_close(call(on(mesh_of(3, 2), moe), x, jax.random.key(0)), alone, relative=1e-5)
    assert (alone.metrics.load_e != other.metrics.load_e).any()


def test_refused():
    moe = config(router=ALL)
    with pytest.raises(ValueError, match="mesh must be a Mesh, got 'cpu'"):
        MoE(moe, rngs=anything(None), mesh=anything("cpu"))
    with pytest.raises(ValueError, match=r"mesh must have an axis 'data' or 'expert', got \('rows', 'model'\)"):
        MoE(moe, rngs=anything(None), mesh=mesh_of(2, 2, ("rows", "model")))
    with pytest.raises(ValueError, match=r"with its Explicit axes \['data', 'expert'\], got none set"):
        MoE(moe, rngs=anything(None), mesh=jax.make_mesh((2, 2), ("data", "expert")))
    taken = jax.shard_map(
        lambda x: MoE(moe, rngs=nnx.Rngs(0))(x, train=False).outputs,
        mesh=mesh_of(2, 2),
        in_specs=P("data"),
        out_specs=P("data"),
    )
    with pytest.raises(ValueError, match=r"mesh axis 'data' must be left to the layer, got it in a jax.shard_map over"):
        taken(hidden_states(2, 4, DIM))
    turned = mesh_of(4, 2, ("expert", "data"))
    for mesh, got in ((mesh_of(2, 2), "{'data': 2, 'expert': 2}"), (turned, "{'expert': 4, 'data': 2}")):
        other = f"mesh must be that of jax.set_mesh, {{'data': 2, 'expert': 4}}, or not be given, got {got}"
        with jax.set_mesh(mesh_of(2, 4)), pytest.raises(ValueError, match=other):
            MoE(moe, rngs=anything(None), mesh=mesh)
    with pytest.raises(ValueError, match="data_axis and expert_axis must be different names, got 'x' twice"):
        config(data_axis="x", expert_axis="x")


def anything(value: Any) -> Any:
    """A value of the wrong type, which the constructor must not get as far as using."""
    return value
