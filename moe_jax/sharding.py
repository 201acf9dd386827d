"""How the parameters of a model with expert layers, and tokens, are spread over a mesh."""

import math
import re
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax.checks import device_mesh, two_axes, whole

# Parameters, known by their names: these are the same in a module, its gradients, the state of an optimiser and a
# checkpoint. The number is that of their own axes; axes before those are layers. Those of `Experts` have experts first.
STACKED = {"w_in_edf": 3, "b_in_ef": 2, "mult_bias_ef": 2, "w_out_efd": 3, "b_out_ed": 2}
OWN_AXES = STACKED | {
    "w_in_df": 2, "b_in_f": 1, "mult_bias_f": 1, "w_out_fd": 2, "b_out_d": 1,
    "router_de": 2, "router_bias_e": 1, "scale_d": 1,
}  # fmt: skip
# What Adafactor keeps of a weight under its name, without one of its axes.
FACTORS = {"v_row", "v_col"}


def param_shardings(
    tree: Any, mesh: Mesh, *, fsdp: bool = False, data_axis: str = "data", expert_axis: str = "expert"
) -> Any:
    """Where each array of a model or of its optimiser's state belongs.

    Weights of experts are split over the expert axis: by expert where the axis divides E, so that they are where they
    are used; over the largest other dimension that it divides where not, and moved on every use. Everything else is on
    every device.

        shardings = param_shardings(state, mesh)
        state = jax.device_put(state, shardings)
        step = jax.jit(step, out_shardings=(shardings, None))

    Args:
      tree: a module that contains `MoE`s at any depth, an Optax state for it, or any pytree of both, of arrays or
        `jax.ShapeDtypeStruct`s. Weights of several layers may be stacked in front, for `jax.lax.scan`.
      mesh: the devices. Axes that it lacks split nothing.
      fsdp: whether every array of two or more dimensions is also split over the data axis, along the largest dimension
        that is left and that the axis divides. Layers in which weights of `MoE`s or blocks are stacked do not count.
      data_axis: its name.
      expert_axis: its name.

    Returns:
      The tree with a `NamedSharding` for each array.

    Raises:
      ValueError: `mesh` is no mesh, or the axes have one name.
    """
    device_mesh("mesh", mesh)
    two_axes(data_axis, expert_axis)
    sizes = dict(mesh.shape)

    def sharding(path: tuple[Any, ...], leaf: jax.Array) -> NamedSharding:
        names: list[str | None] = [None] * leaf.ndim
        parts = [part for part in re.findall(r"\w+", jax.tree_util.keystr(path)) if part != "value"]
        name = parts[-1] if parts else ""
        own = OWN_AXES.get(name, leaf.ndim)
        first = leaf.ndim - own
        # What an optimiser keeps of a weight may have fewer axes, factors or a placeholder: it is on every device.
        if first < 0 or not FACTORS.isdisjoint(parts):
            return NamedSharding(mesh, P(*names))
        if name in STACKED and expert_axis in sizes:
            _split(names, leaf.shape, [first, *_largest_first(leaf.shape, first + 1)], expert_axis, sizes)
        if fsdp and data_axis in sizes and own >= 2:
            _split(names, leaf.shape, _largest_first(leaf.shape, first), data_axis, sizes)
        return NamedSharding(mesh, P(*names))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def token_sharding(mesh: Mesh, batch: int, *, data_axis: str = "data", expert_axis: str = "expert") -> NamedSharding:
    """Where (B, ...) tokens, targets and masks belong so that a layer on the mesh need not move them.

    Over both axes where they divide the batch, over that of data where only it does, else on every device.

    Args:
      mesh: the devices. Axes that it lacks split nothing.
      batch: B.
      data_axis: its name.
      expert_axis: its name.

    Raises:
      ValueError: `mesh` is no mesh, `batch` no integer above 0, or the axes have one name.
    """
    device_mesh("mesh", mesh)
    whole("batch", batch, 1)
    two_axes(data_axis, expert_axis)
    sizes = dict(mesh.shape)
    axes = tuple(axis for axis in (data_axis, expert_axis) if axis in sizes)
    for split in (axes, axes[:1]):
        if batch % math.prod(sizes[axis] for axis in split) == 0:
            return NamedSharding(mesh, P(split))
    return NamedSharding(mesh, P())


def _largest_first(shape: tuple[int, ...], start: int) -> list[int]:
    return sorted(range(start, len(shape)), key=lambda axis: -shape[axis])


def _split(names: list[str | None], shape: tuple[int, ...], order: list[int], name: str, sizes: dict[str, int]) -> None:
    """Gives the name to the first dimension in order that has none and is divisible."""
    for axis in order:
        if names[axis] is None and shape[axis] % sizes[name] == 0:
            names[axis] = name
            return
