"""Decoding over a device mesh: rows over its axes `data` and `expert`, heads and hidden units over its axis `model`.

    mesh = jax.make_mesh((4, 2), ("data", "model"))
    target, draft = (jax.device_put(m, decoder_shardings(m, mesh)) for m in (target, draft))
    with jax.set_mesh(mesh):
        result = speculative_decoding(target, SmallModel(draft), prompts, ...)

The loop and its decoders say where rows lie and the weights say the rest; the compiler puts the communication in
between. A mesh may have any of these axes, or others besides, which are left alone. (Over `expert` a layer of experts
splits its tokens, too.) Axes may be Auto or Explicit: the loop has them Auto within and returns tokens and counts on
every device. A `Decoder` called by itself, as in training, has its rows over Auto axes and follows JAX's rules of
Explicit ones; `left_to_compiler` is for losses that call it. The `spmd_axis_name` of a `jax.vmap` around either must be
another axis. Nothing here changes what is computed.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

ROWS, MODEL = ("data", "expert"), "model"
Tree = TypeVar("Tree")
Arguments = ParamSpec("Arguments")

# Which axis of a block's weight is cut: what a layer's first product cuts, its second sums over. In attention it is the
# key-value heads.
CUT = {
    "to_qkv.kernel": 1,
    "to_out.kernel": 0,
    "up.kernel": 1,
    "up.bias": 0,
    "down.kernel": 0,
}
# What Adafactor keeps of a weight under its name, without one of its axes.
FACTOR = re.compile(r"(^|\.)v_(row|col)\.")
BLOCKS_WEIGHT = re.compile(rf"(^|\.)blocks\.\d+\.(attention|feed_forward)\.(?P<end>{'|'.join(CUT)})(\.value)?$")


def decoder_shardings(model: Tree, mesh: Mesh) -> Tree:
    """Where each weight of a model lies on a mesh: attention and feed-forwards are cut along `model`.

    Attention is cut between key-value heads. Where `model` does not divide those, every device has all of it and
    computes it for all heads; so it is with a feed-forward whose hidden units it does not divide, and with all that is
    not of a `Decoder`'s blocks.

    Args:
      model: a `Decoder`, or any pytree with decoders in it: a pair with a prophet, an optimiser's state.
      mesh: with or without an axis `model`.

    Returns:
      A pytree of `NamedSharding` like `model`, for `jax.device_put`.

    Raises:
      ValueError: no mesh.

    Source: Megatron-LM 1909.08053 section 3 (columns of the first product, rows of the second).
    """
    if not isinstance(mesh, Mesh | AbstractMesh):
        raise ValueError(f"mesh must be a Mesh, got {mesh!r}")
    size = mesh.shape.get(MODEL, 1)

    def sharding(path: tuple[Any, ...], weight: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        found = BLOCKS_WEIGHT.search(name)
        if found and size > 1 and not FACTOR.search(name):
            axis = CUT[found["end"]]
            # An optimiser may have a placeholder for it.
            if axis < weight.ndim and weight.shape[axis] % size == 0:
                return NamedSharding(mesh, PartitionSpec(*[None] * axis, MODEL))
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(sharding, model)


def left_to_compiler(call: Callable[Arguments, Tree]) -> Callable[Arguments, Tree]:
    """The same function, within which the Explicit axes of the mesh in force are Auto.

    Arrays of the mesh must be arguments, not closed over, and gradients be taken of it, not within it. Of what it
    returns arrays of four axes lie over rows and heads, as caches do (weights of attention are better not returned),
    those of three over rows, and all others everywhere; if there are such of three or four, what `jax.vmap` maps must
    not be split over rows or heads.

    Raises:
      ValueError: by the function, where arrays are split over Explicit axes of a mesh that is not in force.
    """

    @functools.wraps(call)
    def wrapped(*arguments: Arguments.args, **options: Arguments.kwargs) -> Tree:
        mesh = jax.sharding.get_abstract_mesh()
        if not mesh.explicit_axes:
            for leaf in jax.tree.leaves((arguments, options)):
                _check_not_split(leaf)
            return call(*arguments, **options)
        arguments, options = jax.tree.map(_no_longer_reduced, (arguments, options))
        auto = dict.fromkeys(mesh.explicit_axes, AxisType.Auto)
        with jax.sharding.use_abstract_mesh(mesh.update_axis_types(auto)):
            arguments, options = jax.tree.map(_of_auto_axes, (arguments, options))
            result = call(*arguments, **options)
        return jax.tree.map(_of_explicit_axes, result)

    return wrapped


def over_rows(tree: Tree) -> Tree:
    """The same arrays, the first axis of each over `data` and `expert` of the mesh in force, where there are any.

    Rows are whole over an axis that, together with the one before it, does not divide them.
    """
    return jax.tree.map(_rows_constrained, tree)


def _rows_constrained(x: jax.Array) -> jax.Array:
    # A drafter's state may have numbers of Python.
    if not jnp.ndim(x) or all(_axis_size(name, AxisType.Auto) == 1 for name in ROWS):
        return x
    # Further axes of caches and hidden states may be cut. Of tokens and counts they are not worth it, and left to the
    # compiler they may be cut in a way that no mesh describes.
    further = PartitionSpec.UNCONSTRAINED if x.ndim > 2 else None
    rows = _row_axes(len(x), AxisType.Auto)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(rows, *[further] * (x.ndim - 1)))


def _row_axes(rows: int, *kinds: AxisType) -> tuple[str, ...]:
    """The axes of these kinds of the mesh in force that so many rows are split over."""
    chosen, devices = [], 1
    for name in ROWS:
        size = _axis_size(name, *kinds)
        if size > 1 and rows % (devices * size) == 0:
            chosen.append(name)
            devices *= size
    return tuple(chosen)


def _check_not_split(x: Any) -> None:
    if isinstance(x, jax.Array) and any(jax.typeof(x).sharding.spec.partitions):
        raise ValueError(
            "the mesh of arrays that are split over Explicit axes must be that of jax.set_mesh, got "
            f"{jax.typeof(x)} without"
        )


def _no_longer_reduced(x: Any) -> Any:
    """JAX 0.10.2 forgets what is reduced where Explicit axes become Auto: gradients could be summed twice."""
    if not isinstance(x, jax.Array) or not (spec := jax.typeof(x).sharding.spec).reduced:
        return x
    return jax.reshard(x, PartitionSpec(*spec.partitions))


def _of_auto_axes(x: Any) -> Any:
    return jax.reshard(x, PartitionSpec()) if isinstance(x, jax.Array) else x


def _of_explicit_axes(x: Any) -> Any:
    if not isinstance(x, jax.Array):
        return x
    cut: list[Any] = [None] * x.ndim
    if x.ndim in (3, 4):
        # As within, where all of them are Auto.
        rows = _row_axes(len(x), AxisType.Auto, AxisType.Explicit)
        cut[0] = tuple(name for name in rows if _axis_size(name, AxisType.Explicit) > 1)
    size = _axis_size(MODEL, AxisType.Explicit)
    if x.ndim == 4 and size > 1 and x.shape[1] % size == 0:
        cut[1] = MODEL
    return jax.reshard(x, PartitionSpec(*cut))


def _axis_size(name: str, *kinds: AxisType) -> int:
    """Of the mesh in force; 1 where it has no such axis of these kinds.

    Only Auto ones are the compiler's to use: inside a `shard_map` over the axis the caller has cut the arrays already;
    Explicit axes carry their own types.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if dict(zip(mesh.axis_names, mesh.axis_types)).get(name) not in kinds:
        return 1
    return mesh.shape[name]
