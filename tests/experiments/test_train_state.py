import typing

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from experiments.train_draft import TrainDraftConfig, make_loss_fn
from experiments.train_state import (
    LossFn,
    TrainState,
    check_batch,
    device_mesh,
    local_copy,
    make_train_step,
    replicated,
    shard_rows,
)
from spec_jax import Decoder, DecoderConfig
from tests.experiments.runs import leaves

loss_fn = make_loss_fn(TrainDraftConfig())
OPTIMIZER = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(1e-2))


def models(seed=0):
    config = DecoderConfig(dim=16, depth=1, heads=1, dim_head=16)
    return {name: Decoder(config, rngs=nnx.Rngs(seed + i)) for i, name in enumerate(("target", "draft"))}


def tokens(*shape):
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.int32)


def test_loss_falls_and_the_step_is_traced_once():
    step = make_train_step(typing.cast(LossFn, chex.assert_max_traces(loss_fn, n=2)), OPTIMIZER)
    state = TrainState.create(models(), OPTIMIZER)
    batch = jnp.array(tokens(1, 8, 9))
    reports = []
    for _ in range(20):
        state, report = step(state, batch)
        reports.append(report)
    losses = [float(report["loss"]) for report in reports]
    assert losses[-1] < losses[0] - 1
    assert int(state.step) == 20
    assert set(reports[0]) == {"loss", "target_loss", "draft_loss"}
    assert losses[0] == pytest.approx(2 * np.log(256), rel=0.2)


def test_state_is_donated():
    step = make_train_step(loss_fn, OPTIMIZER)
    before = TrainState.create(models(), OPTIMIZER)
    after, _ = step(before, jnp.array(tokens(1, 2, 9)))
    jax.block_until_ready(after)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before.models))


def test_accumulation_equals_one_large_batch():
    batch = tokens(8, 9)
    step = make_train_step(loss_fn, optax.sgd(1.0))
    results = [
        step(TrainState.create(models(), optax.sgd(1.0)), jnp.array(batch.reshape(split, -1, 9))) for split in (1, 4)
    ]
    for one, four in zip(leaves(results[0]), leaves(results[1]), strict=True):
        np.testing.assert_allclose(one, four, atol=2e-6)


def test_each_model_is_clipped_by_itself():
    def steep(models, tokens_bt):
        del tokens_bt
        loss = 1000 * models["target"].sum() + 0.01 * models["draft"].sum()
        return loss, {}

    optimizer = optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(1.0))
    state = TrainState.create({"target": jnp.zeros(4), "draft": jnp.zeros(4)}, optimizer)
    state, _ = make_train_step(steep, optimizer)(state, jnp.zeros((1, 2, 3), jnp.int32))
    np.testing.assert_allclose(state.models["target"], -0.25)
    np.testing.assert_allclose(state.models["draft"], -0.01)


def test_steps_are_those_of_optax():
    """Each model's optimiser goes on from its own state."""
    curvatures = {"target": 1.0, "draft": 3.0}

    def bowl(models, tokens_bt):
        del tokens_bt
        return sum((c * (models[name] ** 2).sum() / 2 for name, c in curvatures.items()), jnp.zeros(())), {}

    start = {"target": jnp.array([1.0, -2.0]), "draft": jnp.array([3.0, 4.0])}
    optimizer = optax.adam(optax.linear_schedule(0.0, 0.1, 4))
    state = TrainState.create(jax.tree.map(jnp.copy, start), optimizer)
    step = make_train_step(bowl, optimizer)
    for _ in range(4):
        state, _ = step(state, jnp.zeros((1, 2, 3), jnp.int32))
    for name, curvature in curvatures.items():
        weights: typing.Any = start[name]
        optimizer_state = optimizer.init(weights)
        for _ in range(4):
            updates, optimizer_state = optimizer.update(curvature * weights, optimizer_state)
            weights = optax.apply_updates(weights, updates)
        np.testing.assert_allclose(state.models[name], weights, rtol=1e-6)


def test_eight_devices_train_as_one():
    batch = tokens(2, 8, 9)
    types = (AxisType.Auto, AxisType.Auto)
    one = jax.make_mesh((1, 1), ("data", "expert"), axis_types=types, devices=jax.devices()[:1])
    ends = []
    for mesh in (one, device_mesh()):
        state = jax.device_put(TrainState.create(models(), optax.sgd(1.0)), replicated(mesh))
        step = make_train_step(loss_fn, optax.sgd(1.0))
        rows = shard_rows(batch, mesh, axis=1)
        state, _ = step(state, rows)
        state, report = step(state, rows)
        assert len(rows.addressable_shards) == mesh.size
        assert rows.addressable_shards[0].data.shape == (2, 8 // mesh.size, 9)
        assert all(leaf.sharding.is_equivalent_to(replicated(mesh), leaf.ndim) for leaf in jax.tree.leaves(state))
        ends.append((local_copy(state, mesh), float(report["loss"])))
    assert device_mesh().size == 8
    assert ends[0][1] == pytest.approx(ends[1][1], rel=1e-5)
    for a, b in zip(leaves(ends[0][0]), leaves(ends[1][0]), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)


@pytest.mark.parametrize(
    ("expert_parallel", "batch_size", "accumulation", "message"),
    [
        (1, 4, 4, "multiple of the 8 devices that share it, got 4: --batch-size 8 --accumulation 2 reads the same"),
        (1, 3, 1, "multiple of the 8 devices that share it, got 3$"),
        (4, 3, 1, "multiple of the 2 devices that share it, got 3$"),
    ],
)
def test_batches_that_devices_cannot_share(expert_parallel, batch_size, accumulation, message):
    with pytest.raises(ValueError, match=message):
        check_batch(batch_size, accumulation, device_mesh(expert_parallel))


def test_experts_that_devices_cannot_share():
    with pytest.raises(ValueError, match="expert_parallel must divide the 8 devices, got 3"):
        device_mesh(3)


@pytest.mark.parametrize(("batch_size", "rows_of_a_device"), [(8, 1), (4, 2)])
def test_rows_are_shared_by_all_devices_or_by_those_along_data(batch_size, rows_of_a_device):
    rows = tokens(3, batch_size, 9)
    shared = shard_rows(rows, device_mesh(4), axis=1)
    assert {shard.data.shape for shard in shared.addressable_shards} == {(3, rows_of_a_device, 9)}
    np.testing.assert_array_equal(shared, rows)


def test_local_copies_are_whole():
    mesh = device_mesh(2)
    values = {"split": np.arange(16.0).reshape(8, 2), "whole": np.arange(3.0)}
    spread = {
        "split": jax.device_put(values["split"], NamedSharding(mesh, PartitionSpec("data", "expert"))),
        "whole": jax.device_put(values["whole"], replicated(mesh)),
    }
    copies = local_copy(spread, mesh)
    for name, value in values.items():
        assert copies[name].devices() == {jax.devices()[0]}
        np.testing.assert_array_equal(copies[name], value)
