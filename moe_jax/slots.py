"""Capacity: which assignments get a slot in their expert's buffer, and which slot.

One mechanism serves every slot order, group size and mask: assignments are sorted into one queue per (expert, group),
and an assignment's place in its queue is its slot, if the queue's limit reaches that far.
"""

import math
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from moe_jax.checks import array, one_of, positive, whole
from moe_jax.routing import Choice, Routing, SlotOrder

SLOT_ORDERS: tuple[str, ...] = get_args(SlotOrder)


@struct.dataclass
class TokenGroups:
    """Tokens that share a capacity.

    Attributes:
      group_t: (T,) int32 in [0, G).
      count_g: (G,) int32, tokens per group, without padding.
      size: the most tokens that a group can have. Static.
    """

    group_t: jax.Array
    count_g: jax.Array
    size: int = struct.field(pytree_node=False)

    @property
    def num_groups(self) -> int:
        """G."""
        return self.count_g.shape[0]


def token_groups(mask_t: jax.Array, sequence_length: int, group_size: int | str) -> TokenGroups:
    """Divides the tokens into groups.

    Args:
      mask_t: (T,) bool, false for padding.
      sequence_length: tokens per sequence, padding included.
      group_size: "batch" (all tokens together), "sequence", or a number of tokens. A number counts along the batch,
        sequence after sequence, and passes over padding, so that a padded batch has the groups of the compacted one.

    Raises:
      ValueError: `mask_t` is no such mask, `group_size` something else, or sequences are to be groups and the tokens no
        whole ones.
    """
    array("mask_t", mask_t)
    if mask_t.ndim != 1 or mask_t.dtype != jnp.bool_:
        raise ValueError(f"mask_t must be (T,) bool, got {mask_t.shape} {mask_t.dtype}")
    tokens = mask_t.shape[0]
    check_group_size(group_size)
    whole("sequence_length", sequence_length, 1)
    if group_size == "sequence" and tokens % sequence_length:
        raise ValueError(f"sequence_length must divide the {tokens} tokens, got {sequence_length}")
    used_t = mask_t.astype(jnp.int32)
    if group_size == "batch":
        group_t, groups, size = jnp.zeros(tokens, jnp.int32), 1, tokens
    elif group_size == "sequence":
        group_t = jnp.arange(tokens, dtype=jnp.int32) // sequence_length
        groups, size = tokens // sequence_length, int(sequence_length)
    else:
        size = max(min(int(group_size), tokens), 1)
        groups = -(-tokens // size)
        group_t = jnp.minimum((jnp.cumsum(used_t, dtype=jnp.int32) - used_t) // size, groups - 1)
    count_g = jnp.zeros(groups, jnp.int32).at[group_t].add(used_t)
    return TokenGroups(group_t=group_t, count_g=count_g, size=size)


def check_group_size(group_size: int | str) -> None:
    """Raises ValueError when `group_size` is neither a name nor a number of tokens."""
    if isinstance(group_size, str):
        one_of("group_size", group_size, ("batch", "sequence"))
    else:
        whole("group_size", group_size, 1, otherwise=", 'batch' or 'sequence'")


def capacity(tokens: int, num_experts: int, factor: float | None, min_capacity: int) -> int:
    """Slots per expert for a group of this many tokens.

    floor(tokens * factor / E), at least `min_capacity`, at most one slot per token (an expert never gets a token
    twice). Without a factor there is a slot for every token, and nothing is ever dropped.

    Raises:
      ValueError: `factor` is not positive, or another argument no integer or too small.

    Source: ST-MoE 2202.08906 section 2; the factor multiplies tokens, not assignments.
    """
    whole("tokens", tokens, 0)
    whole("num_experts", num_experts, 1)
    whole("min_capacity", min_capacity, 0)
    if factor is not None:
        positive("factor", factor, otherwise=", or None")
    return int(_capacity_table(np.asarray(int(tokens)), num_experts, factor, min_capacity))


def _capacity_table(tokens: np.ndarray, num_experts: int, factor: float | None, min_capacity: int) -> np.ndarray:
    """For each of these int64 numbers of tokens."""
    if factor is None:
        return tokens
    # 100 * 1.15 / 5 is 23, and a little less in floating point.
    slots = np.floor(tokens * float(factor) / int(num_experts) * (1 + 1e-12))
    return np.minimum(np.maximum(slots, min_capacity), tokens).astype(np.int64)


def assign_slots(
    choice: Choice,
    groups: TokenGroups,
    *,
    num_experts: int,
    capacity_factor: float | None,
    min_capacity: int = 4,
    slot_order: SlotOrder = "token",
) -> Routing:
    """Gives out the slots of every expert.

    Args:
      choice: what the tokens ask for.
      groups: who shares a capacity.
      num_experts: E.
      capacity_factor: slots per expert as a share of group tokens / E, or None for no limit.
      min_capacity: a lower bound on the slots per expert.
      slot_order: who comes first in an expert's queue. "token": earlier tokens, so that a token's slot never depends
        on later ones (where a group has tokens of several sequences, those of the first come first, all of them). The
        end of a group is dropped first then.
        "choice": first choices of all tokens, then second choices. "priority": as "choice", but the
        tokens most sure of their first choice go first (batch priority routing).

    Returns:
      A `Routing`. Gates are zero where not kept.

    Raises:
      ValueError: `slot_order` is unknown, `capacity_factor` not positive, `min_capacity` no integer of at least 0, the
        choice is among other experts, the groups are of other tokens, or there are too many queues for int32.

    Source: "choice": GShard 2006.16668 algorithm 1; "priority": Riquelme et al. 2106.05974 section 4.
    """
    one_of("slot_order", slot_order, SLOT_ORDERS)
    whole("num_experts", num_experts, 1)
    if num_experts != choice.probs_te.shape[1]:
        raise ValueError(f"num_experts must be the choice's {choice.probs_te.shape[1]}, got {num_experts}")
    tokens = len(choice.expert_index_ta)
    if len(groups.group_t) != tokens:
        raise ValueError(f"groups must be of the choice's {tokens} tokens, got {len(groups.group_t)}")
    if capacity_factor is not None:
        positive("capacity_factor", capacity_factor, otherwise=", or None")
    whole("min_capacity", min_capacity, 0)
    sizes = num_experts, groups.num_groups, choice.expert_index_ta.shape[1]
    if math.prod(sizes) >= 2**31:
        raise ValueError(f"num_experts · groups · choices must fit int32, got {' · '.join(map(str, sizes))}")
    # The number of real tokens decides, not the padded length: a padded batch drops what the compacted one drops.
    limit_by_count = _capacity_table(np.arange(groups.size + 1), num_experts, capacity_factor, min_capacity)
    slots = int(limit_by_count[-1])
    limit_g = jnp.asarray(limit_by_count, jnp.int32)[groups.count_g]

    queue_ta = choice.expert_index_ta * groups.num_groups + groups.group_t[:, None]
    place_ta, length_q = _places(choice, queue_ta, num_experts * groups.num_groups, slot_order)
    keep_ta = choice.wanted_ta & (place_ta < limit_g[groups.group_t][:, None])
    available_eg = jnp.broadcast_to(limit_g[None], (num_experts, groups.num_groups))
    return Routing(
        expert_index_ta=choice.expert_index_ta,
        gate_ta=jnp.where(keep_ta, choice.gate_ta, 0),
        keep_ta=keep_ta,
        slot_ta=groups.group_t[:, None] * slots + jnp.minimum(place_ta, slots - 1),
        count_eg=jnp.minimum(length_q.reshape(available_eg.shape), available_eg),
        available_eg=available_eg,
        capacity=slots,
    )


def _places(choice: Choice, queue_ta: jax.Array, num_queues: int, slot_order: SlotOrder) -> tuple[jax.Array, jax.Array]:
    """(T, A) place of each assignment in its queue, and the (Q,) length of each queue, both int32."""
    choices = queue_ta.shape[1]
    # Assignments that nobody wants stand in a queue of their own behind all others.
    queue_ta = jnp.where(choice.wanted_ta, queue_ta, num_queues)
    order_key_ta = queue_ta
    if slot_order != "token":
        order_key_ta = queue_ta * choices + jnp.arange(choices, dtype=jnp.int32)[None]
    keys = [order_key_ta.reshape(-1)]
    if slot_order == "priority":
        keys.append(-jax.lax.stop_gradient(choice.priority_ta).reshape(-1))
    flat = jnp.arange(queue_ta.size, dtype=jnp.int32)
    # A stable sort leaves equal keys in the order of the flat index: token by token.
    sorted_flat = jax.lax.sort([*keys, flat], num_keys=len(keys), is_stable=True)[-1]
    queue = queue_ta.reshape(-1)
    length_q = jnp.zeros(num_queues + 1, jnp.int32).at[queue].add(1)
    start_q = jnp.cumsum(length_q, dtype=length_q.dtype) - length_q
    rank = jnp.zeros_like(flat).at[sorted_flat].set(flat, unique_indices=True)
    return (rank - start_q[queue]).reshape(queue_ta.shape), length_q[:-1]
