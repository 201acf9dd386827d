"""Expert parallelism: one layer over a mesh of devices, with the results and gradients of one device.

The mesh has an axis of data and an axis of experts (either may be missing); tokens are split over both, experts over
the second, routers are on every device. On each device, what `MoE.mix` does on one: route the tokens at hand, give
out slots, ship the rows to their experts and back (`moe_jax.exchange`), sum. Three things are not local:

- randomness, groups of tokens and the mask are made for all tokens before they are split (a router of your own must
  choose for each token alone);
- who gets a slot is decided over each whole group of tokens: where groups are cut by devices, every device gathers
  what all tokens ask for (integers, and priorities where they decide; no hidden states) and decides for all, and the
  buffers that travel are as large as the worst case needs (whole sequences on each device, or no capacity, avoid
  both);
- counts and probabilities are summed over all devices before anything is multiplied.

Within a `jax.shard_map` over another axis of the same mesh it computes, but JAX cannot take the gradient.

    device (data 0, expert 0)   tokens 0 .. 5     experts 0, 1
    device (data 0, expert 1)   tokens 6 .. 11    experts 2, 3
    device (data 1, expert 0)   tokens 12 .. 17   experts 0, 1
    device (data 1, expert 1)   tokens 18 .. 23   experts 2, 3
"""

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from moe_jax.checks import device_mesh
from moe_jax.config import MoEConfig
from moe_jax.exchange import Exchange, ExchangedExperts
from moe_jax.experts import Experts
from moe_jax.losses import RouterTotals
from moe_jax.noise import RouterNoise
from moe_jax.routing import Choice, RouterInputs, Routing, chosen
from moe_jax.slots import TokenGroups, assign_slots, token_groups

if TYPE_CHECKING:
    from moe_jax.layer import MoE


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where the tokens and experts of a layer are.

    Attributes:
      mesh: the devices.
      axes: names of the axes that tokens are split over, data first.
      exchange: which expert lives where.
    """

    mesh: Mesh | AbstractMesh
    axes: tuple[str, ...]
    exchange: Exchange

    @property
    def devices(self) -> int:
        """Devices that tokens are split over."""
        return math.prod(self.mesh.shape[axis] for axis in self.axes)


def placement(config: MoEConfig, mesh: Mesh | None) -> Placement | None:
    """Where a layer computes: on `mesh`, or on that of `jax.set_mesh`; None for one device.

    Raises:
      ValueError: `mesh` is no mesh, has neither of the axes, is not the one set or has to be, or an axis is not the
        layer's to use.
    """
    if mesh is not None:
        device_mesh("mesh", mesh)
    names = (config.data_axis, config.expert_axis)
    around = jax.sharding.get_abstract_mesh()
    found = around if around.axis_names or mesh is None else mesh
    if mesh is not None and mesh.shape_tuple != found.shape_tuple:
        sizes = dict(found.shape), dict(mesh.shape)
        raise ValueError(f"mesh must be that of jax.set_mesh, {sizes[0]}, or not be given, got {sizes[1]}")
    axes = tuple(name for name in names if name in found.axis_names)
    if not axes:
        if mesh is not None:
            raise ValueError(f"mesh must have an axis {names[0]!r} or {names[1]!r}, got {mesh.axis_names}")
        return None
    if not around.axis_names and (explicit := [name for name in axes if name in found.explicit_axes]):
        raise ValueError(f"mesh must be that of jax.set_mesh, with its Explicit axes {explicit}, got none set")
    for name in axes:
        if name in found.manual_axes:
            raise ValueError(
                f"mesh axis {name!r} must be left to the layer, got it in a jax.shard_map over it: leave it out of "
                "that one's axis_names, or call the layer's axes otherwise (data_axis, expert_axis)"
            )
    expert_axis = config.expert_axis if config.expert_axis in axes else None
    expert_devices = found.shape[expert_axis] if expert_axis else 1
    return Placement(found, axes, Exchange(config.num_experts, expert_axis, expert_devices))


def with_auto_axes(call: Callable[..., Any], places: Any, *arguments: Any) -> Any:
    """`call` of the arguments, within which Explicit axes of the mesh in force are Auto.

    Args:
      call: a function of arrays.
      places: a prefix of its result, of how arrays are split.
      arguments: its own.

    Raises:
      ValueError: an argument is split over Explicit axes of a mesh that is not in force.
    """
    if axes := jax.sharding.get_abstract_mesh().explicit_axes:
        within: Any = jax.sharding.auto_axes(call, axes=axes, out_sharding=places)
        return within(*jax.tree.map(_no_longer_reduced, arguments))
    for leaf in jax.tree.leaves(arguments):
        if any(jax.typeof(leaf).sharding.spec.partitions):
            raise ValueError(
                "the mesh of arrays that are split over Explicit axes must be that of jax.set_mesh, got "
                f"{jax.typeof(leaf)} without"
            )
    return call(*arguments)


def _no_longer_reduced(x: jax.Array) -> jax.Array:
    """JAX 0.10.2 forgets what is reduced where Explicit axes become Auto: gradients could be summed twice."""
    spec = jax.typeof(x).sharding.spec
    return jax.reshard(x, P(*spec.partitions)) if spec.reduced else x


def mix_over_mesh(
    where: Placement,
    moe: "MoE",
    x_td: jax.Array,
    mask_t: jax.Array | None,
    noise: RouterNoise,
    *,
    sequence_length: int,
    train: bool,
) -> tuple[jax.Array, RouterTotals]:
    """`MoE.mix` of tokens split over a mesh.

    Args:
      where: the mesh.
      moe: the layer.
      x_td: (T, D), zero at padding.
      mask_t: (T,) bool, or None where there is no padding.
      noise: for all tokens.
      sequence_length: tokens per sequence.
      train: static.

    Returns:
      (T, D) outputs, split over the mesh, and the totals of all tokens.
    """
    tokens = x_td.shape[0]
    local_tokens = -(-tokens // where.devices)

    def padded(x: jax.Array) -> jax.Array:
        missing = local_tokens * where.devices - tokens
        return jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1))

    everyones_mask_t = jnp.ones(tokens, bool) if mask_t is None else mask_t
    groups = token_groups(everyones_mask_t, sequence_length, moe.config.group_size)
    groups = dataclasses.replace(groups, group_t=padded(groups.group_t))
    # Groups of so many tokens count real tokens only: padding moves their borders.
    moving = isinstance(moe.config.group_size, int) and mask_t is not None
    most_groups = _most_groups(where, groups, local_tokens, moving=moving)
    local_group = _local_group_size(where, moe.config, sequence_length, local_tokens, moving=moving, train=train)

    def on_device(
        moe: "MoE", x_td: jax.Array, mask_t: jax.Array, noise: RouterNoise, groups: TokenGroups
    ) -> tuple[jax.Array, RouterTotals]:
        moe = on_every_device(moe, where)

        def route(inputs: RouterInputs) -> tuple[Choice, Routing]:
            choice = chosen(moe.config.router, inputs, train=train)
            if local_group is None:
                routing = _route_among_all(where, moe, choice, groups, most_groups=most_groups, train=train)
            else:
                routing = moe.assign(choice, token_groups(inputs.mask_t, sequence_length, local_group), train=train)
            return choice, where.exchange.placed(routing)

        choices = moe.config.router.num_choices(moe.config.num_experts)
        max_rows = x_td.shape[0] * min(choices, where.exchange.per_device)
        experts = ExchangedExperts(local=moe.experts, exchange=where.exchange, max_rows=max_rows)
        outputs_td, totals = moe.mix(x_td, mask_t, noise, route=route, experts=experts, train=train)
        return outputs_td, summed_over_devices(totals, where)

    split = P(where.axes)
    moe, specs = _arranged(where, moe)
    outputs_td, totals = jax.shard_map(
        on_device,
        mesh=where.mesh,
        in_specs=(specs, split, split, split, P()),
        out_specs=(split, P()),
        axis_names=set(where.axes),
        check_vma=True,
    )(moe, padded(x_td), padded(everyones_mask_t), jax.tree.map(padded, noise), groups)
    return outputs_td[:tokens], totals


def on_every_device(moe: "MoE", where: Placement) -> "MoE":
    """Weights that are equal on several devices, to be used by each for its own tokens.

    Nothing moves here; it is the transpose that matters: gradients are summed over the devices.
    """
    over_data = tuple(axis for axis in where.axes if axis != where.exchange.axis)

    def varying(axes: tuple[str, ...]) -> Callable[[jax.Array], jax.Array]:
        return lambda leaf: jax.lax.pcast(leaf, axes, to="varying") if axes else leaf

    return each_weight(moe, experts=varying(over_data), others=varying(where.axes))


def summed_over_devices(totals: RouterTotals, where: Placement) -> RouterTotals:
    """The totals of all tokens, on every device."""
    flat, restore = ravel_pytree(totals)
    return restore(jax.lax.psum(flat, where.axes))


def _arranged(where: Placement, moe: "MoE") -> tuple["MoE", "MoE"]:
    """The layer with its experts' weights by place, and how each weight is split over the mesh."""
    exchange = where.exchange
    if exchange.moves_weights:
        moe = each_weight(moe, experts=lambda leaf: jnp.take(leaf, exchange.hosted, axis=0), others=lambda leaf: leaf)
    return moe, each_weight(moe, experts=lambda _: P(exchange.axis), others=lambda _: P())


def each_weight(moe: "MoE", *, experts: Callable[[jax.Array], Any], others: Callable[[jax.Array], Any]) -> "MoE":
    """A function of each weight of the experts, and one of each other weight."""

    def is_stacked(node: Any) -> bool:
        return isinstance(node, Experts)

    return jax.tree.map(
        lambda node: jax.tree.map(experts, node) if is_stacked(node) else others(node), moe, is_leaf=is_stacked
    )


def _local_group_size(
    where: Placement, config: MoEConfig, sequence_length: int, local_tokens: int, *, moving: bool, train: bool
) -> int | str | None:
    """The group size with which a device can give out slots on its own, or None where groups are cut by devices."""
    if config.capacity_factor(train=train) is None:
        return "batch"
    if where.devices == 1:
        return config.group_size
    if config.group_size == "sequence" and local_tokens % sequence_length == 0:
        return "sequence"
    if isinstance(config.group_size, int) and not moving and local_tokens % config.group_size == 0:
        return config.group_size
    return None


def _most_groups(where: Placement, groups: TokenGroups, local_tokens: int, *, moving: bool) -> int:
    """The most groups that the tokens of one device can be of.

    Args:
      where: the mesh.
      groups: of all tokens: neighbours, `size` to each but the last.
      local_tokens: tokens per device.
      moving: whether padding moves the borders of the groups, so that they may fall anywhere.
    """
    if moving:
        most = (local_tokens + groups.size - 2) // groups.size + 1
    else:
        first = np.arange(where.devices) * local_tokens
        most = int(((first + local_tokens - 1) // groups.size - first // groups.size).max()) + 1
    return min(most, groups.num_groups)


def _route_among_all(
    where: Placement, moe: "MoE", choice: Choice, groups: TokenGroups, *, most_groups: int, train: bool
) -> Routing:
    """Slots for the tokens at hand, after the tokens of all devices have been served in their order.

    What counts among all is who is kept. The slots are then given out anew on each device, without gaps, in a buffer
    that is large enough however the kept tokens are spread: the slots of `most_groups` groups.
    """
    local_tokens = choice.expert_index_ta.shape[0]

    def of_all(x: jax.Array) -> jax.Array:
        return jax.lax.all_gather(jax.lax.stop_gradient(x), where.axes, tiled=True)

    # `assign` reads nothing else of a choice but the gates, which are of no use here.
    priority_ta = of_all(choice.priority_ta)
    everyones = dataclasses.replace(
        choice,
        expert_index_ta=of_all(choice.expert_index_ta),
        wanted_ta=of_all(choice.wanted_ta),
        priority_ta=priority_ta,
        gate_ta=priority_ta,
    )
    among_all = moe.assign(everyones, groups, train=train)
    device = jax.lax.axis_index(where.axes)
    keep_ta = jax.lax.dynamic_slice_in_dim(among_all.keep_ta, device * local_tokens, local_tokens)

    everyone_t = jnp.zeros(local_tokens, jnp.int32)
    local_group = TokenGroups(group_t=everyone_t, count_g=jnp.full(1, local_tokens, jnp.int32), size=local_tokens)
    kept = dataclasses.replace(choice, wanted_ta=keep_ta)
    packed = assign_slots(kept, local_group, num_experts=moe.config.num_experts, capacity_factor=None)
    available_e1 = among_all.available_eg.sum(1, keepdims=True, dtype=jnp.int32)
    return dataclasses.replace(
        packed,
        # Counted once, for the totals are summed over devices.
        available_eg=jnp.where(device == 0, available_e1, 0),
        capacity=min(local_tokens, most_groups * among_all.capacity),
    )
