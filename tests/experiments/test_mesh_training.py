"""Training with experts on several meshes of several processes: everywhere the same run."""

import collections
import dataclasses
import io
import math
import os
import pathlib
import shutil
import subprocess
import sys
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console

from experiments import train_moe
from experiments.checkpoints import open_run
from experiments.collectives import collectives
from experiments.config import as_json
from experiments.data import batch_at, load_text
from experiments.expert_decoder import ExpertsConfig, make_decoder
from experiments.launch import LaunchConfig, environments
from experiments.metrics import read_metrics
from experiments.session import first_state, run, state_template
from experiments.train_state import device_mesh, local_copy, make_train_step, shard_rows
from experiments.training import restored_state
from experiments.upcycling import upcycled
from spec_jax import DecoderConfig
from tests.experiments.runs import leaves, tiny_text
from tests.experiments.strategies import MODULES

STEPS = 10
NEXT = STEPS + 1
PATIENCE_SECONDS = 900
SMALL = DecoderConfig(dim=16, depth=2, heads=2, dim_head=8)
# Where it is exact float32 that is compared: the mesh changes the order of sums.
TOLERANCE = 1e-6


def config_of(folder, **changes):
    config = train_moe.TrainMoEConfig(
        data=str(folder / "text.txt"),
        output=folder / "run",
        target=SMALL,
        draft=dataclasses.replace(SMALL, depth=1),
        experts=ExpertsConfig(num_experts=8, hidden=16, every=1, add_ff_after=False),
        steps=NEXT,
        batch_size=8,
        sequence_length=16,
        learning_rate=1e-3,
        log_every=1,
        validate_every=STEPS,
        validation_batches=2,
        sample_every=STEPS,
        checkpoint_every=STEPS,
        gamma=1,
        prompt_length=4,
        generate_length=4,
        report=False,
        expert_parallel=4,
    )
    return dataclasses.replace(config, **changes)


def command(config):
    """The command line of such a run."""

    def flags(fields, prefix=""):
        for name, value in fields.items():
            flag = f"{prefix}{name.replace('_', '-')}"
            if isinstance(value, dict):
                yield from flags(value, f"{flag}.")
            elif isinstance(value, bool):
                head, _, tail = flag.rpartition(".")
                yield f"--{flag}" if value else f"--{head}{'.' if head else ''}no-{tail}"
            else:
                yield from (f"--{flag}", str(value))

    return [sys.executable, "-m", "experiments.train_moe", "cpu", *flags(as_json(config))]


def run_processes(config, folder, *, processes, devices_per_process):
    """Runs to the end; returns what process 0 printed."""
    size = LaunchConfig(processes=processes, devices_per_process=devices_per_process)
    logs = [folder / f"{index}.log" for index in range(processes)]
    started = []
    try:
        for environment, path in zip(environments(size, os.environ), logs, strict=True):
            with path.open("wb") as log:
                started.append(subprocess.Popen(command(config), env=environment, stdout=log, stderr=log))
        codes = [process.wait(PATIENCE_SECONDS) for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    texts = [path.read_text() for path in logs]
    assert codes == [0] * processes, texts
    return texts[0]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run of two processes of two devices, its experts spread over all four."""
    folder = tmp_path_factory.mktemp("saved")
    tiny_text(folder)
    config = config_of(folder)
    printed = run_processes(config, folder, processes=2, devices_per_process=2)
    assert f"4 device(s); from step 0 to {NEXT}" in printed
    assert f"step {STEPS}" in printed
    return config


def state_of(config, step, mesh):
    """A checkpoint's state, and where its arrays lie."""
    template = state_template(config, train_moe.task(config), mesh)
    with open_run(config.output) as checkpoints:
        state = restored_state(checkpoints, step, template)
    return state, jax.tree.map(lambda x: x.sharding, template)


def mesh_of(data, expert):
    types = (AxisType.Auto, AxisType.Auto)
    return jax.make_mesh((data, expert), ("data", "expert"), axis_types=types, devices=jax.devices()[: data * expert])


def logged(config, name):
    return {record["step"]: record[name] for record in read_metrics(config.output) if name in record}


def assert_close(first, second):
    for a, b in zip(leaves(first), leaves(second), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE)


@pytest.mark.slow
def test_two_processes_end_like_one(saved, tmp_path):
    alone = dataclasses.replace(saved, output=tmp_path / "alone", sample_every=0)
    run_processes(alone, tmp_path, processes=1, devices_per_process=4)
    one = mesh_of(1, 1)
    assert_close(state_of(alone, STEPS, one)[0], state_of(saved, STEPS, one)[0])
    losses = [list(logged(config, "train/loss").values()) for config in (alone, saved)]
    assert len(losses[0]) == NEXT
    assert losses[0][0] - losses[0][-1] > 0.1
    np.testing.assert_allclose(losses[0], losses[1], rtol=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("data", "expert", "fsdp"), [(8, 1, False), (4, 2, False), (2, 3, False), (1, 8, False), (4, 2, True)]
)
def test_a_checkpoint_goes_on_on_another_mesh(saved, data, expert, fsdp):
    """The next loss, and all parameters and optimiser states after the next step."""
    mesh = mesh_of(data, expert)
    config = dataclasses.replace(saved, fsdp=fsdp)
    task = train_moe.task(config)
    state, shardings = state_of(config, STEPS, mesh)
    weights_edf = state.models["target"].blocks[0].feed_forward.block.moe.experts.w_in_edf[...]
    held = weights_edf.sharding.shard_shape(weights_edf.shape)
    split = expert * (data if fsdp else 1)
    assert np.prod(held) * split == weights_edf.size or 8 % expert
    text = load_text(config.data)
    rows = batch_at(
        text.train, seed=config.seed, step=STEPS, batch_size=config.batch_size, sequence_length=config.sequence_length
    )
    with jax.set_mesh(mesh):
        step_fn = make_train_step(task.loss_fn, config.optimizer(), shardings)
        state, report = step_fn(state, shard_rows(rows[None], mesh, axis=1))
    assert float(report["loss"]) == pytest.approx(logged(config, "train/loss")[NEXT], rel=TOLERANCE)
    assert jax.tree.leaves(jax.tree.map(lambda x: x.sharding, state)) == jax.tree.leaves(shardings)
    assert_close(local_copy(state, mesh), state_of(saved, NEXT, mesh_of(1, 1))[0])


# Of one of two layers, and its dense equal.
MIXTURES = {
    kind: (partial(config_of, experts=ExpertsConfig(num_experts=8, hidden=16, every=2, kind=kind)), train_moe)
    for kind in ("sparse", "equal_flops")
}


@pytest.mark.parametrize("expert", [1, 2])
@pytest.mark.parametrize("kind", [*MODULES, *MIXTURES])
def test_of_split_weights_only_weights_and_gradients_travel(kind, expert, tmp_path):
    """With `fsdp`, where tokens are more than a layer is wide. Left to itself, the compiler moves hidden states."""
    make, module = (MODULES | MIXTURES)[kind]
    tiny_text(tmp_path)
    # Wider than there are bytes: the embedding is split between its columns, like the hidden states it would give.
    wide = DecoderConfig(dim=320, depth=2, heads=4, dim_head=32, early_exit_layer=1 if kind == "early exit" else None)
    config = make(tmp_path, target=wide, batch_size=16, sequence_length=256, fsdp=True, expert_parallel=expert)
    task, mesh = module.task(config), mesh_of(8 // expert, expert)
    template = state_template(config, task, mesh)
    tokens_abt = jax.ShapeDtypeStruct(
        (1, config.batch_size, config.sequence_length + 1),
        np.int32,
        sharding=NamedSharding(mesh, P(None, ("data", "expert"))),
    )
    with jax.set_mesh(mesh):
        step_fn: Any = make_train_step(task.loss_fn, config.optimizer(), jax.tree.map(lambda x: x.sharding, template))
        found = collectives(step_fn.lower(template, tokens_abt).compile().as_text())

    weights = jax.tree.leaves(template.models)
    split = [x for x in weights if "data" in x.sharding.spec]
    assert split
    gathered = sum(math.prod(x.sharding.shard_shape(x.shape)) for x in split) * 4 * (mesh.shape["data"] - 1)
    summed = sum(x.size for x in weights) * 4 * 2 * 7 / 8
    sent: dict[str, float] = collections.defaultdict(float)
    for collective in found:
        sent[collective.kind] += collective.sent_bytes
    assert sent["all-gather"] == pytest.approx(gathered, rel=0.02)
    # Losses and norms, too.
    assert sent["all-reduce"] < 1.02 * summed
    exchanges = {"all-to-all"} if (kind, expert) == ("sparse", 2) else set()
    assert sent.keys() == {"all-gather", "all-reduce"} | exchanges


def dense_run(folder):
    tiny_text(folder)
    experts = ExpertsConfig(every=2, kind="equal_flops", num_experts=8, hidden=16, add_ff_after=False)
    config = config_of(
        folder, output=folder / "dense", experts=experts, steps=4, validate_every=4, sample_every=0, expert_parallel=1
    )
    assert run(config, train_moe.task(config), Console(file=io.StringIO())) == 0
    return config


def upcycled_config(dense, folder, **changes):
    experts = ExpertsConfig(every=2, num_experts=6, hidden=changes.pop("hidden"), threshold=1e-6, add_ff_after=False)
    return dataclasses.replace(
        dense, output=folder / "sparse", upcycle_from=dense.output, experts=experts, expert_parallel=2, **changes
    )


@pytest.mark.parametrize(
    ("every", "message"),
    [
        (1, "experts.every must be that of the dense run, .* in layer 0 too, got 2"),
        (3, "layer 1 of the dense run must"),
    ],
)
def test_dense_runs_with_feed_forwards_in_other_layers_are_not_upcycled(every: int, message: str):
    config = dataclasses.replace(SMALL, depth=4)
    dense = make_decoder(config, ExpertsConfig(every=every, kind="equal_flops", hidden=16), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=message):
        upcycled(dense, ExpertsConfig(every=2, hidden=23, add_ff_after=False), rngs=nnx.Rngs(0))


def test_runs_of_other_models_are_not_upcycled(tmp_path):
    experts = ExpertsConfig(every=2, hidden=16, add_ff_after=False)
    config = config_of(tmp_path, upcycle_from=tmp_path, experts=experts)
    origin: Any = train_moe.origin(config)
    with pytest.raises(ValueError, match=r"must be a run of train_moe, got .*, a run of train_draft"):
        origin.models_of({"kind": "train_draft"})
    other = dataclasses.replace(
        config, upcycle_from=None, experts=dataclasses.replace(experts, kind="equal_flops"), draft=SMALL
    )
    with pytest.raises(ValueError, match=r"draft must be that of .*: draft\.depth: expected 2, got 1"):
        origin.convert(nnx.eval_shape(lambda: train_moe.make_models(other)))


def test_an_upcycled_router_is_drawn_apart(tmp_path):
    """From the dense run's own weights, though both runs may have one seed."""
    experts = ExpertsConfig(every=2, num_experts=6, hidden=16, threshold=1e-6, add_ff_after=False)
    config = config_of(tmp_path, upcycle_from=tmp_path, experts=experts)
    dense = dataclasses.replace(
        config, upcycle_from=None, experts=ExpertsConfig(every=2, kind="equal_flops", hidden=16)
    )
    models: Any = train_moe.make_models(dense)
    hidden = models["target"].blocks[1].feed_forward.feed_forward.w_out_fd.shape[0]
    config = dataclasses.replace(config, experts=dataclasses.replace(experts, hidden=hidden))
    origin: Any = train_moe.origin(config)
    router_de = origin.convert(models)["target"].blocks[1].feed_forward.block.moe.router_de[...]
    weights = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(models)])
    assert not np.isin(router_de, weights).any()


@pytest.mark.slow
def test_upcycling_starts_where_the_dense_run_ended(tmp_path):
    dense = dense_run(tmp_path)
    hidden = 23  # 1.25 * 16 + 8 / 3
    config = upcycled_config(dense, tmp_path, hidden=hidden)
    task = train_moe.task(config)
    assert task.validation_loss_fn is not None
    mesh = device_mesh(config.expert_parallel)
    state = first_state(config, task, state_template(config, task, mesh), mesh)
    target = state.models["target"]
    experts = target.blocks[1].feed_forward.block.moe.experts
    assert experts.w_in_edf.shape == (6, 16, 2 * hidden)
    text = load_text(config.data)
    rows = batch_at(text.validation, seed=0, step=0, batch_size=8, sequence_length=64)
    with jax.set_mesh(mesh):
        _, got = jax.jit(task.validation_loss_fn)(state.models, shard_rows(rows, mesh, axis=0))
    before = state_of(dense, dense.steps, mesh_of(1, 1))[0]
    _, expected = jax.jit(train_moe.make_loss_fn(dense, train=False))(before.models, rows)
    for name in ("target_loss", "draft_loss"):
        assert float(got[name]) == pytest.approx(float(expected[name]), rel=TOLERANCE)
    # The experts are what carries the loss: with fresh ones it is another.
    fresh: Any = train_moe.make_models(dataclasses.replace(config, upcycle_from=None))["target"]
    target.blocks[1].feed_forward.block.moe.experts = fresh.blocks[1].feed_forward.block.moe.experts
    with jax.set_mesh(mesh):
        _, other = jax.jit(task.validation_loss_fn)(state.models, shard_rows(rows, mesh, axis=0))
    assert abs(float(other["target_loss"]) - float(expected["target_loss"])) > 1e-4

    # The run itself measures it.
    assert run(dataclasses.replace(config, steps=1), task, Console(file=io.StringIO())) == 0
    for name in ("validation/target_loss", "validation/draft_loss"):
        measured = logged(config, name)
        assert list(measured) == [0, 1]
        assert measured[0] == pytest.approx(logged(dense, name)[dense.steps], rel=TOLERANCE)
        assert measured[1] != measured[0]
    shutil.rmtree(config.output)

    # Refused before the run in the output folder is deleted, and before a folder is made.
    earlier = tmp_path / "earlier"
    shutil.copytree(dense.output, earlier)
    for changes, message in (
        ({"hidden": 24}, "experts.hidden must be the dense run's 23, got 24"),
        (
            {"target": dataclasses.replace(SMALL, heads=1)},
            "target must be that of .*dense, got other fields: target.heads: expected 2, got 1",
        ),
        ({"upcycle_from": tmp_path / "nowhere"}, "upcycle_from must be the output folder of a training run .* got"),
        ({"upcycle_from": earlier}, "upcycle_from must be another folder than output, got"),
        ({"upcycle_from": earlier / "checkpoints"}, "upcycle_from must be another folder than output, got"),
        ({"upcycle_from": pathlib.Path(os.path.relpath(earlier))}, "upcycle_from must be another folder than output"),
    ):
        wrong = dataclasses.replace(upcycled_config(dense, tmp_path, hidden=changes.pop("hidden", hidden)), **changes)
        over = dataclasses.replace(wrong, output=earlier, overwrite=True)
        with pytest.raises(ValueError, match=message):
            run(over, train_moe.task(over), Console(file=io.StringIO()))
        with open_run(earlier) as checkpoints:
            assert checkpoints.latest == dense.steps
        if "another folder" not in message:
            with pytest.raises(ValueError, match=message):
                run(wrong, train_moe.task(wrong), Console(file=io.StringIO()))
            assert not wrong.output.exists()
    with pytest.raises(ValueError, match="add_ff_after must be False to upcycle"):
        dataclasses.replace(config, experts=ExpertsConfig())
    with pytest.raises(ValueError, match=r"experts\.top_n must be at least 2 to upcycle .*, got 1"):
        dataclasses.replace(config, experts=dataclasses.replace(config.experts, top_n=1))
