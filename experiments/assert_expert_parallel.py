"""Is a mixture of experts over the devices at hand equal to the same one on a single device?

    python -m experiments.assert_expert_parallel                              # all devices there are
    python -m experiments.assert_expert_parallel --devices 8 --data 2         # 8 devices forced on a CPU
    python -m experiments.assert_expert_parallel --devices 8 --dtype float64 --dispatch ragged --num-experts 5

Compares outputs, losses, metrics, the gradient of the input and that of every parameter. An error is the largest
difference in an array over its largest entry, so that small gradients are held to the same standard as large ones.
Exit code 1 when an error is above the tolerance, or a gradient is zero throughout and would prove nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh
from rich.console import Console
from rich.table import Table

from experiments.checks import at_least, check_seed
from experiments.command_line import given_config
from experiments.runtime import exit_with
from moe_jax import MoE, MoEConfig, MoEOutput, TopN
from moe_jax.checks import renamed
from moe_jax.dispatch import Dispatch
from moe_jax.routing import SlotOrder

DIFFERENT = 1
# What fields of the layer are called here.
OUR_NAMES = {"n": "experts_per_token", "capacity_factor_train": "capacity_factor"}
TOLERANCES = {"float32": 1e-5, "float64": 1e-12, "bfloat16": 2e-2}


@dataclasses.dataclass(frozen=True, kw_only=True)
class AssertConfig:
    """What to compare.

    Attributes:
      devices: how many devices to force on a CPU; by default those that there are.
      data: devices along the data axis; by default what the expert axis leaves over.
      expert: devices along the expert axis; by default what the data axis leaves over, or all.
      num_experts: any number.
      experts_per_token: how many of them each token asks for; by default 2, or the one that there is.
      dim: width of the hidden states.
      batch: sequences. Any number.
      length: tokens per sequence, about a tenth of them padding. Any number.
      dispatch: dense, index or ragged.
      slot_order: token, choice or priority.
      group_size: tokens that share a capacity: batch, sequence or a number.
      capacity_factor: slots per expert as a share of group tokens / experts.
      dtype: of weights and hidden states.
      tolerance: the largest error allowed; by default 1e-5, 1e-12 or 2e-2, by dtype.
      seed: of weights, inputs and routing noise.
    """

    devices: int | None = None
    data: int | None = None
    expert: int | None = None
    num_experts: int = 8
    experts_per_token: int | None = None
    dim: int = 64
    batch: int = 5
    length: int = 67
    dispatch: Dispatch = "index"
    slot_order: SlotOrder = "token"
    group_size: int | Literal["batch", "sequence"] = "sequence"
    capacity_factor: float = 1.25
    dtype: Literal["float32", "float64", "bfloat16"] = "float32"
    tolerance: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        at_least(1, self, "devices", "data", "expert", "num_experts", "experts_per_token", "batch", "length")
        at_least(0, self, "tolerance")
        check_seed(self.seed)
        try:
            self.layer()
        except ValueError as error:
            raise renamed(error, OUR_NAMES) from error

    def layer(self) -> MoEConfig:
        """The layer's configuration, noise and random second choices included."""
        per_token = min(2, self.num_experts) if self.experts_per_token is None else self.experts_per_token
        return MoEConfig(
            dim=self.dim,
            num_experts=self.num_experts,
            router=TopN(n=per_token),
            capacity_factor_train=self.capacity_factor,
            group_size=self.group_size,
            slot_order=self.slot_order,
            dispatch=self.dispatch,
            gumbel_noise=0.5,
            input_jitter=0.01,
            init="original",
            param_dtype=jnp.dtype(self.dtype),
        )


@dataclasses.dataclass(frozen=True)
class Row:
    """One array on the mesh against the same on one device.

    Attributes:
      name: where it is.
      largest: its largest entry.
      error: the largest difference over `largest`.
    """

    name: str
    largest: float
    error: float

    @property
    def is_gradient(self) -> bool:
        return self.name.startswith("gradient of ")

    def passes(self, tolerance: float) -> bool:
        return self.error <= tolerance and not (self.is_gradient and self.largest == 0)


def mesh_of(config: AssertConfig) -> Mesh:
    """The mesh that the configuration asks for, over the first devices.

    Raises:
      ValueError: there are not as many devices.
    """
    available = jax.device_count()
    data, expert = config.data, config.expert
    if expert is None:
        expert = max(available // (data or 1), 1)
    if data is None:
        data = max(available // expert, 1)
    if data * expert > available:
        raise ValueError(f"data * expert must be at most the {available} devices, got {data} * {expert}")
    names, kinds = ("data", "expert"), (AxisType.Auto, AxisType.Auto)
    return jax.make_mesh((data, expert), names, axis_types=kinds, devices=jax.devices()[: data * expert])


def compare(config: AssertConfig, mesh: Mesh) -> list[Row]:
    """Every array that the layer computes, on the mesh and on one device."""
    random = np.random.default_rng(config.seed)
    x = jnp.asarray(random.standard_normal((config.batch, config.length, config.dim)), config.dtype)
    mask = jnp.asarray(random.random((config.batch, config.length)) < 0.9)
    key = jax.random.key(config.seed)
    make = jax.jit(lambda: MoE(config.layer(), rngs=nnx.Rngs(config.seed)))
    alone, parallel = make(), make()
    parallel.mesh = mesh

    @jax.jit
    def results(moe: MoE) -> dict[str, Any]:
        def loss(moe: MoE, x: jax.Array) -> tuple[jax.Array, MoEOutput]:
            out = moe(x, train=True, key=key, mask=mask)
            wide = out.outputs.astype(jnp.promote_types(x.dtype, jnp.float32))
            return jnp.mean(jnp.square(wide)) + out.total_aux_loss, out

        (moe_bar, x_bar), out = jax.grad(loss, argnums=(0, 1), has_aux=True)(moe, x)
        return {"": out, "gradient of ": {"input": x_bar, "parameters": moe_bar}}

    return _rows(results(parallel), results(alone))


def _rows(got: dict[str, Any], wanted: dict[str, Any]) -> list[Row]:
    rows = []
    for part, tree in wanted.items():
        leaves = zip(jax.tree.leaves_with_path(tree), jax.tree.leaves(got[part]), strict=True)
        for (path, target), leaf in leaves:
            leaf, target = np.asarray(leaf, np.float64), np.asarray(target, np.float64)
            largest, difference = float(np.abs(target).max()), float(np.abs(leaf - target).max())
            name = jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
            rows.append(Row(part + name, largest, difference / largest if largest else difference))
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Reads the command line, compares and prints; returns 1 when something differs."""
    config = given_config("assert_expert_parallel", AssertConfig, arguments, __doc__)
    if config.devices is not None:
        # Must come before anything asks for a device.
        jax.config.update("jax_num_cpu_devices", config.devices)
    tolerance = TOLERANCES[config.dtype] if config.tolerance is None else config.tolerance
    console = Console()
    with jax.enable_x64(config.dtype == "float64"), jax.default_matmul_precision("highest"):
        mesh = mesh_of(config)
        rows = compare(config, mesh)
    shape = " × ".join(f"{size} {name}" for name, size in mesh.shape.items())
    if mesh.size < jax.device_count():
        shape += f" ({mesh.size} of {jax.device_count()} devices)"
    kind = mesh.devices.flat[0].device_kind
    table = Table(title=f"{config.num_experts} experts on {kind}, {shape}, against one device, {config.dtype}")
    table.add_column("array")
    table.add_column("largest entry", justify="right")
    table.add_column("relative error", justify="right")
    for row in rows:
        style = None if row.passes(tolerance) else "red"
        table.add_row(row.name, f"{row.largest:.3g}", f"{row.error:.1e}", style=style)
    console.print(table)
    failed = [row.name for row in rows if not row.passes(tolerance)]
    worst = max(row.error for row in rows)
    verdict = f"[red]DIFFERENT: {', '.join(failed)}" if failed else "equal"
    console.print(f"worst relative error {worst:.1e}, tolerance {tolerance:.0e}: {verdict}")
    return DIFFERENT if failed else 0


if __name__ == "__main__":
    exit_with(main)
