"""The train state, the step from one to the next, and where both lie on the devices.

Axis letters: A microbatches, B sequences of a microbatch, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from moe_jax import token_sharding

Models = Mapping[str, Any]
LossFn = Callable[[Models, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]
"""(models, tokens (B, T + 1) int32) → (the scalar to descend, scalars to report). A step descends and reports the means
over its microbatches."""


def num_parameters(model: Any) -> int:
    """Number of weights, of arrays or of their shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(model))


@struct.dataclass
class TrainState:
    """Everything that changes from step to step.

    Attributes:
      step: () int32, optimiser steps done.
      models: one module (any pytree of arrays) per name.
      optimizer_states: one per name. Models are clipped and updated apart from each other.
    """

    step: jax.Array
    models: Models
    optimizer_states: Mapping[str, Any]

    @classmethod
    def create(cls, models: Models, optimizer: optax.GradientTransformation) -> TrainState:
        """The state before the first step."""
        states = {name: optimizer.init(model) for name, model in models.items()}
        return cls(step=jnp.zeros((), jnp.int32), models=dict(models), optimizer_states=states)


def make_train_step(
    loss_fn: LossFn, optimizer: optax.GradientTransformation, shardings: TrainState | None = None
) -> Callable[[TrainState, jax.Array], tuple[TrainState, dict[str, jax.Array]]]:
    """The compiled step: (state, tokens (A, B, T + 1)) → (next state, the loss function's reports and `loss`).

    The state is donated: its buffers are overwritten by the next one's, which lies where `shardings` says.
    """
    gradient_fn = jax.value_and_grad(loss_fn, has_aux=True)

    def train_step(state: TrainState, tokens_abt: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
        def add_microbatch(total: Any, tokens_bt: jax.Array) -> tuple[Any, None]:
            (loss, report), gradients = gradient_fn(state.models, tokens_bt)
            return jax.tree.map(jnp.add, total, (gradients, {"loss": loss, **report})), None

        (loss, report), gradients = jax.eval_shape(gradient_fn, state.models, tokens_abt[0])
        shapes = (gradients, {"loss": loss, **report})
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        total, _ = jax.lax.scan(add_microbatch, zeros, tokens_abt)
        gradients, report = jax.tree.map(lambda x: x / tokens_abt.shape[0], total)
        models, optimizer_states = {}, {}
        for name, model in state.models.items():
            updates, optimizer_states[name] = optimizer.update(gradients[name], state.optimizer_states[name], model)
            models[name] = optax.apply_updates(model, updates)
        return TrainState(state.step + 1, models, optimizer_states), report

    return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, None))


def device_mesh(expert_parallel: int = 1) -> Mesh:
    """All devices of all processes along the axes `data` and `expert`.

    Raises:
      ValueError: `expert_parallel`, the size of the second axis, does not divide their number.
    """
    devices = jax.device_count()
    if devices % expert_parallel:
        raise ValueError(f"expert_parallel must divide the {devices} devices, got {expert_parallel}")
    shape = (devices // expert_parallel, expert_parallel)
    return jax.make_mesh(shape, ("data", "expert"), axis_types=(AxisType.Auto, AxisType.Auto))


def connect(mesh: Mesh) -> None:
    """Lets every group of devices that training sums over exchange something now, while the processes are in step.

    Between CPUs a group connects when it is first used, and fails if one of its processes comes 30 seconds after
    another, as it may when each has a large program to compile. Connected, they wait for each other.
    """

    expert_parallel = mesh.shape["expert"]
    # With fewer experts than devices, neighbours exchange among themselves: see `moe_jax.exchange.Exchange`.
    rings = [size for size in range(2, expert_parallel) if expert_parallel % size == 0]

    def exchanged(ones: jax.Array, size: int) -> jax.Array:
        neighbours = np.arange(expert_parallel).reshape(-1, size).tolist()
        pieces = jnp.broadcast_to(ones.reshape(1), (size,))
        return jax.lax.all_to_all(pieces, "expert", 0, 0, axis_index_groups=neighbours, tiled=True).sum()

    def sums(ones: jax.Array) -> jax.Array:
        groups = ("data", "expert", ("data", "expert"))
        total = sum((jax.lax.psum(ones, group) for group in groups), jnp.zeros_like(ones))
        return sum((exchanged(ones, size) for size in rings), total)

    spread = PartitionSpec("data", "expert")
    ones = jnp.ones(tuple(mesh.shape.values()), device=NamedSharding(mesh, spread))
    jax.block_until_ready(jax.jit(jax.shard_map(sums, mesh=mesh, in_specs=spread, out_specs=spread))(ones))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of what every device holds all of."""
    return NamedSharding(mesh, PartitionSpec())


def check_batch(batch_size: int, accumulation: int, mesh: Mesh) -> None:
    """Raises ValueError unless the devices along `data` can share the sequences of a microbatch."""
    devices = mesh.shape["data"]
    if batch_size % devices:
        total = batch_size * accumulation
        hint = f": --batch-size {devices} --accumulation {total // devices} reads the same rows"
        raise ValueError(
            f"batch_size must be a multiple of the {devices} devices that share it, got {batch_size}"
            + (hint if total % devices == 0 else "")
        )


def shard_rows(tokens: np.ndarray, mesh: Mesh, *, axis: int) -> jax.Array:
    """The array whose rows along `axis` are shared by the devices, from all rows, which every process passes."""
    rows = token_sharding(mesh, tokens.shape[axis]).spec
    sharding = NamedSharding(mesh, PartitionSpec(*[None] * axis, *rows))
    return jax.make_array_from_callback(tokens.shape, sharding, lambda index: tokens[index])


def local_copy(tree: Any, mesh: Mesh) -> Any:
    """Arrays of a mesh as arrays of this process's first device, which is what decoding takes.

    All processes must call it, for what is spread over devices is gathered. Where nothing is, the copies share memory
    with the originals, so they are good until the next training step.
    """
    if not all(x.is_fully_replicated for x in jax.tree.leaves(tree)):
        tree = jax.jit(_same, out_shardings=replicated(mesh))(tree)
    return jax.tree.map(lambda x: x.addressable_data(0), tree)


def _same(tree: Any) -> Any:
    return tree
