"""Where parameters and tokens belong on a mesh."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from moe_jax import MoE, SparseMoEBlock, TopN, param_shardings, token_sharding
from moe_jax.sharding import OWN_AXES, STACKED
from tests.moe.meshes import mesh_of
from tests.moe.support import assert_trees_close, config, initial_layer


class Model(nnx.Module):
    """Layers of experts in a list, beside other weights."""

    def __init__(self, num_experts: int, rngs: nnx.Rngs) -> None:
        options = config(num_experts=num_experts, dim=8, hidden=16, num_shared_experts=1)
        self.blocks = nnx.List([SparseMoEBlock(MoE(options, rngs=rngs), rngs=rngs) for _ in range(2)])
        self.head = nnx.Param(jnp.zeros((8, 5)))


def model(num_experts: int = 8) -> Model:
    return nnx.eval_shape(lambda: Model(num_experts, nnx.Rngs(0)))


def specs(tree: Any, *, layers: int = 0, **options: Any) -> dict[str, P]:
    """The specification of each array by the last part of its name that is one."""
    shardings = jax.tree.leaves_with_path(param_shardings(tree, mesh_of(2, 4), **options))
    named = {}
    for path, sharding in shardings:
        parts = jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value").split(".")
        named.setdefault(".".join(parts[-2:]), set()).add(sharding.spec)
    return {name: found.pop() for name, found in named.items() if len(found) == 1}


def test_experts_are_split_and_nothing_else():
    found = specs(model())
    assert found["experts.w_in_edf"] == P("expert", None, None)
    assert found["experts.b_out_ed"] == P("expert", None)
    assert found["moe.router_de"] == found["shared.w_in_df"] == found["head"] == P(None, None)
    assert found["norm_moe.scale_d"] == P(None)
    split = {name.split(".")[-1] for name, spec in found.items() if "expert" in spec}
    assert split == set(STACKED)


def test_factored_states_of_an_optimiser_are_placed():
    """Adafactor keeps rows, columns and placeholders of one entry under the names of the weights."""
    state = jax.eval_shape(optax.adafactor(1e-3, min_dim_size_to_factor=2).init, model())
    placed = param_shardings(state, mesh_of(2, 4), fsdp=True)
    for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(placed), strict=True):
        assert all(size > 0 for size in sharding.shard_shape(leaf.shape))


@pytest.mark.mixed_dtypes
@pytest.mark.parametrize("layers", [None, 2, 3])
def test_a_step_of_an_optimiser_with_factored_states_over_explicit_axes(layers: int | None):
    """Of stacked weights the factors have as many axes as a single layer's weights."""
    mesh, optimiser = jax.make_mesh((2, 2), ("data", "expert")), optax.adafactor(1e-2, min_dim_size_to_factor=4)
    layer: Any = initial_layer(config(num_experts=4, dim=8, hidden=12))
    if layers:
        layer = jax.tree.map(lambda leaf: jnp.stack([leaf] * layers), layer)

    @jax.jit
    def updated(layer: Any, state: optax.OptState) -> Any:
        return optax.apply_updates(layer, optimiser.update(jax.tree.map(jnp.sin, layer), state, layer)[0])

    state = optimiser.init(layer)
    alone = updated(layer, state)
    with jax.set_mesh(mesh):
        layer, state = (jax.device_put(x, param_shardings(x, mesh, fsdp=True)) for x in (layer, state))
        assert_trees_close(updated(layer, state), alone, relative=1e-5)


def own_axes(tree: Any) -> dict[str, int]:
    return {
        jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value").split(".")[-1]: leaf.ndim
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def test_every_weight_is_known_by_name():
    biased = config(dim=8, hidden=16, num_shared_experts=1, router=TopN(bias=True), bias=True)
    block = nnx.eval_shape(lambda: SparseMoEBlock(MoE(biased, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0)))
    assert own_axes(block.moe.experts) == STACKED
    assert own_axes(block) == OWN_AXES


def test_names_of_layers_weights_around_other_weights():
    """It is the weight's own name that counts."""
    others = {"scale_d": {"kernel": jax.ShapeDtypeStruct((64, 32), jnp.float32)}}
    assert specs(others, fsdp=True) == {"scale_d.kernel": P("data", None)}


def test_without_a_whole_share_of_experts_another_dimension_is_split():
    """5 experts on 4 devices: the largest dimension that 4 divides, or none."""
    found = specs(model(5))
    assert found["experts.w_in_edf"] == P(None, None, "expert")
    assert found["experts.w_out_efd"] == P(None, "expert", None)
    assert found["experts.b_out_ed"] == P(None, "expert")
    odd = nnx.eval_shape(lambda: MoE(config(num_experts=5, dim=7, hidden=9), rngs=nnx.Rngs(0)))
    assert specs(odd)["experts.w_out_efd"] == P(None, None, None)


def test_fsdp_splits_what_is_left_over_the_data_axis():
    found = specs(model(), fsdp=True)
    assert found["experts.w_in_edf"] == P("expert", None, "data")
    assert found["experts.w_out_efd"] == P("expert", "data", None)
    assert found["moe.router_de"] == P("data", None)
    assert found["head"] == P("data", None)
    assert found["norm_moe.scale_d"] == P(None)


@pytest.mark.parametrize("fsdp", [False, True])
def test_state_of_the_optimiser_lies_where_its_parameters_lie(fsdp: bool):
    mesh, parameters = mesh_of(2, 4), model()
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    state = jax.eval_shape(optimiser.init, parameters)
    wanted = jax.tree.leaves(param_shardings(parameters, mesh, fsdp=fsdp))
    found = jax.tree.leaves(param_shardings(state, mesh, fsdp=fsdp))
    # A count, then both moments.
    assert found == [jax.NamedSharding(mesh, P()), *wanted, *wanted]


def test_weights_of_layers_stacked_for_a_scan():
    stacked = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((3, *leaf.shape), leaf.dtype), model().blocks[0].moe)
    found = specs(stacked)
    assert found["experts.w_in_edf"] == P(None, "expert", None, None)
    assert found["experts.b_in_ef"] == P(None, "expert", None)


def test_layers_are_not_split():
    """4 of them, which the data axis divides as it divides no other dimension but the model's."""
    odd = config(num_experts=4, dim=8, hidden=21, num_shared_experts=1, router=TopN(bias=True))
    block = nnx.eval_shape(lambda: SparseMoEBlock(MoE(odd, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0)))
    stacked = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((4, *leaf.shape), leaf.dtype), block)
    shardings = jax.tree.leaves(param_shardings(stacked, mesh_of(2, 4), fsdp=True))
    assert all(sharding.spec[0] is None for sharding in shardings)
    found = specs(stacked, fsdp=True)
    assert found["experts.mult_bias_ef"] == P(None, "expert", None)
    assert found["experts.w_out_efd"] == P(None, "expert", None, "data")
    assert found["moe.router_de"] == P(None, "data", None)
    assert found["moe.router_bias_e"] == found["norm_moe.scale_d"] == P(None, None)


def test_memory_for_experts_is_that_of_the_experts_at_hand():
    experts = model(16).blocks[0].moe.experts
    for devices in (1, 2, 4, 8):
        shardings = param_shardings({"experts": experts}, mesh_of(1, devices))["experts"]
        for sharding, leaf in zip(jax.tree.leaves(shardings), jax.tree.leaves(experts)):
            assert sharding.shard_shape(leaf.shape) == (16 // devices, *leaf.shape[1:])


@pytest.mark.parametrize(
    ("batch", "spec"), [(16, P(("data", "expert"))), (6, P(("data",))), (5, P())], ids=["both", "data", "neither"]
)
def test_tokens_are_split_as_far_as_the_batch_divides(batch: int, spec: P):
    assert token_sharding(mesh_of(2, 4), batch).spec == spec


def test_axes_that_a_mesh_lacks_split_nothing():
    mesh = jax.make_mesh((4,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    assert all(sharding.is_fully_replicated for sharding in jax.tree.leaves(param_shardings(model(), mesh, fsdp=True)))
    assert token_sharding(mesh, 8).is_fully_replicated
    experts = model().blocks[0].moe.experts
    named = param_shardings(experts, mesh_of(2, 4, ("rows", "specialists")), expert_axis="specialists")
    assert all(sharding.spec[0] == "specialists" for sharding in jax.tree.leaves(named))


def test_layers_stacked_for_a_scan_are_not_split():
    odd = nnx.eval_shape(lambda: MoE(config(num_experts=5, dim=7, hidden=9), rngs=nnx.Rngs(0)))
    stacked = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((4, *leaf.shape), leaf.dtype), odd)
    placed = param_shardings(stacked, mesh_of(2, 4))
    assert all(sharding.is_fully_replicated for sharding in jax.tree.leaves(placed))
