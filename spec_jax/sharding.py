"""Decoding over a device mesh: rows over its axis `data`, heads and hidden units over its axis `model`.

    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    target, draft = (jax.device_put(m, decoder_shardings(m, mesh)) for m in (target, draft))
    with jax.set_mesh(mesh):
        result = speculative_decoding(target, SmallModel(draft), prompts, ...)

The loop says where rows lie and the weights say the rest; the compiler puts the communication in between. A mesh may
have either axis, both, or others besides, which are left alone. Nothing here changes what is computed.
"""

from __future__ import annotations

import re
from typing import Any, TypeVar

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

DATA, MODEL = "data", "model"
Tree = TypeVar("Tree")

# Which axis of a block's weight is cut: what a layer's first product cuts, its second sums over.
CUT = {
    "to_qkv.kernel": 1,
    "to_out.kernel": 0,
    "up.kernel": 1,
    "up.bias": 0,
    "down.kernel": 0,
}
BLOCKS_WEIGHT = re.compile(rf"(^|\.)blocks\.\d+\.(attention|feed_forward)\.(?P<end>{'|'.join(CUT)})(\.value)?$")


def decoder_shardings(model: Tree, mesh: Mesh) -> Tree:
    """Where each weight of a model lies on a mesh: attention and feed-forwards are cut along `model`.

    What has no axis that divides, and all that is not of a `Decoder`'s blocks, lies whole on every device.

    Args:
      model: a `Decoder`, or any pytree with decoders in it: a pair with a prophet, an optimiser's state.
      mesh: with or without an axis `model`.

    Returns:
      A pytree of `NamedSharding` like `model`, for `jax.device_put`.

    Raises:
      ValueError: no mesh, or an axis `data` or `model` that is not of type Auto: where arrays lie on it is left to the
        compiler.

    Source: Megatron-LM 1909.08053 section 3 (columns of the first product, rows of the second).
    """
    if not isinstance(mesh, Mesh | AbstractMesh):
        raise ValueError(f"mesh must be a Mesh, got {mesh!r}")
    for name, kind in zip(mesh.axis_names, mesh.axis_types):
        if name in (DATA, MODEL) and kind != AxisType.Auto:
            raise ValueError(
                f"mesh axis {name!r} must be of type Auto, got {kind.name}: jax.make_mesh(..., axis_types=...)"
            )
    size = mesh.shape.get(MODEL, 1)

    def sharding(path: tuple[Any, ...], weight: Any) -> NamedSharding:
        found = BLOCKS_WEIGHT.search(jax.tree_util.keystr(path, simple=True, separator="."))
        if found and size > 1:
            axis = CUT[found["end"]]
            # An optimiser's state may have fewer axes.
            if axis < weight.ndim and weight.shape[axis] % size == 0:
                return NamedSharding(mesh, PartitionSpec(*[None] * axis, MODEL))
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(sharding, model)


def over_rows(tree: Tree) -> Tree:
    """The same arrays, the first axis of each over `data` of the mesh in force, where there is one.

    Rows that it does not divide are on every device.
    """
    return jax.tree.map(_rows_constrained, tree)


def over_heads(features: jax.Array, axis: int) -> jax.Array:
    """The same array, the named axis over `model` of the mesh in force, where there is one that divides it."""
    size = _axis_size(MODEL)
    if size == 1 or features.shape[axis] % size:
        return features
    axes: list[Any] = [PartitionSpec.UNCONSTRAINED] * features.ndim
    axes[axis] = MODEL
    return jax.lax.with_sharding_constraint(features, PartitionSpec(*axes))


def _rows_constrained(x: jax.Array) -> jax.Array:
    size = _axis_size(DATA)
    if size == 1 or not x.ndim:
        return x
    # Further axes of caches and hidden states may be cut. Of tokens and counts they are not worth it, and left to the
    # compiler they may be cut in a way that no mesh describes.
    further = PartitionSpec.UNCONSTRAINED if x.ndim > 2 else None
    rows = DATA if x.shape[0] % size == 0 else None
    return jax.lax.with_sharding_constraint(x, PartitionSpec(rows, *[further] * (x.ndim - 1)))


def _axis_size(name: str) -> int:
    """Of the mesh in force; 1 where it is not the compiler's to use.

    Inside a `shard_map` over the axis the caller has cut the arrays already; explicit axes carry their own types.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if dict(zip(mesh.axis_names, mesh.axis_types)).get(name) != AxisType.Auto:
        return 1
    return mesh.shape[name]
