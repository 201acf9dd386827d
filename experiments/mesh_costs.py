"""What a mixture of experts over a mesh sends, computes and keeps on each device, read from its programs.

Nothing is run and nothing is timed, so forced host devices tell as much as real ones. Every device has one sequence,
whatever the mesh (weak scaling).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from experiments.collectives import collectives
from experiments.flops import counted_flops
from moe_jax import MoE, MoEConfig, TopN, capacity, param_shardings, token_sharding
from moe_jax.exchange import Exchange

Row = dict[str, Any]


def parsed_mesh(text: str) -> tuple[int, int]:
    """(data, expert) from "2x4".

    Raises:
      ValueError: it is not of this form.
    """
    sizes = text.split("x")
    if len(sizes) != 2 or not all(size.isdecimal() and int(size) for size in sizes):
        raise ValueError(f"mesh must be DATAxEXPERT, such as 2x4, got {text!r}")
    return int(sizes[0]), int(sizes[1])


def over_meshes(meshes: Iterable[tuple[int, int]], *, dim: int, num_experts: int, length: int) -> Iterable[Row]:
    """A row for each mesh and mode; FLOPs and bytes are those of one device.

    Args:
      meshes: (data, expert) each.
      dim: width of the hidden states.
      num_experts: E. Two of them are asked for by each token, served in the order of tokens.
      length: tokens of a sequence.
    """
    config = MoEConfig(dim=dim, num_experts=num_experts, router=TopN(policy_train="all"))
    for shape in meshes:
        for mode in ("forward", "forward + backward"):
            yield _row(config, shape, mode, length)


def _row(config: MoEConfig, shape: tuple[int, int], mode: str, length: int) -> Row:
    function, arguments = _function(config, shape, length, backward=mode != "forward")
    program = function.lower(*arguments).compile()
    found = collectives(program.as_text() or "")
    exchanges = [collective for collective in found if collective.kind == "all-to-all"]
    exchanged = sum(collective.sent_bytes for collective in exchanges)
    others = sum(collective.sent_bytes for collective in found) - exchanged
    memory: Any = program.memory_analysis()
    expert_devices = shape[1]
    exchange = Exchange(config.num_experts, "expert", expert_devices)
    slots = capacity(length, config.num_experts, config.capacity_factor_train, config.min_capacity)
    buffer = exchange.places * slots * config.dim * 4 * (exchange.size - 1) / exchange.size
    return {
        "mesh": "x".join(map(str, shape)),
        "experts": config.num_experts,
        "tokens_per_device": length,
        "mode": mode,
        "all_to_alls": len(exchanges),
        "all_to_all_bytes": exchanged,
        "buffer_bytes": buffer,
        # Gradients of what every device has are summed in training, whatever the layer: not of the exchange.
        "other_bytes": others,
        "other_kinds": sorted({collective.kind for collective in found} - {"all-to-all"}),
        "flops": counted_flops(function, *arguments),
        "argument_bytes": memory.argument_size_in_bytes,
        "scratch_bytes": memory.temp_size_in_bytes,
    }


def _function(
    config: MoEConfig, shape: tuple[int, int], length: int, *, backward: bool
) -> tuple[Any, tuple[MoE, jax.ShapeDtypeStruct]]:
    """A jitted call of a layer, and the shapes of its arguments."""
    devices = jax.devices()[: shape[0] * shape[1]]
    axis_types = (AxisType.Auto, AxisType.Auto)
    mesh = jax.make_mesh(shape, ("data", "expert"), axis_types=axis_types, devices=devices)
    moe = jax.eval_shape(lambda: MoE(config, rngs=nnx.Rngs(0), mesh=mesh))
    x = jax.ShapeDtypeStruct((len(devices), length, config.dim), jnp.float32)
    places = param_shardings(moe, mesh), token_sharding(mesh, len(devices))

    def forward(moe: MoE, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = moe(x, train=True)
        return out.outputs, out.total_aux_loss

    def loss(moe: MoE, x: jax.Array) -> jax.Array:
        outputs, total_aux_loss = forward(moe, x)
        return jnp.sum(outputs**2) + total_aux_loss

    if backward:
        function, results = jax.grad(loss, argnums=(0, 1)), places
    else:
        function, results = forward, (places[1], NamedSharding(mesh, PartitionSpec()))
    return jax.jit(function, in_shardings=places, out_shardings=results), (moe, x)
