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

Models = Mapping[str, Any]
LossFn = Callable[[Models, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]
"""(models, tokens (B, T + 1) int32) → (the scalar to descend, scalars to report). Every reported value is a mean over
the batch's rows, so that microbatches can be averaged."""


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
    loss_fn: LossFn, optimizer: optax.GradientTransformation
) -> Callable[[TrainState, jax.Array], tuple[TrainState, dict[str, jax.Array]]]:
    """The compiled step: (state, tokens (A, B, T + 1)) → (next state, the loss function's reports and `loss`).

    The state is donated: its buffers are overwritten by the next one's.
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

    return jax.jit(train_step, donate_argnums=0)


def data_mesh() -> Mesh:
    """All devices of all processes in one axis, `data`."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of the state: every device holds all of it."""
    return NamedSharding(mesh, PartitionSpec())


def check_batch(batch_size: int, accumulation: int, mesh: Mesh) -> None:
    """Raises ValueError unless the devices can share the sequences of a microbatch."""
    if batch_size % mesh.size:
        total = batch_size * accumulation
        hint = f": --batch-size {mesh.size} --accumulation {total // mesh.size} is the same step"
        raise ValueError(
            f"batch_size must be a multiple of the {mesh.size} devices, got {batch_size}"
            + (hint if total % mesh.size == 0 else "")
        )


def shard_rows(local: np.ndarray, mesh: Mesh, *, axis: int) -> jax.Array:
    """The global array whose rows along `axis` are shared by all devices; each process passes its own rows."""
    sharding = NamedSharding(mesh, PartitionSpec(*[None] * axis, "data"))
    return jax.make_array_from_process_local_data(sharding, local)


def local_copy(tree: Any) -> Any:
    """Replicated arrays as arrays of this process's first device: what decoding takes.

    They share memory with the state, so they are good until the next step.
    """
    return jax.tree.map(lambda x: x.addressable_data(0), tree)
