"""Auxiliary losses and metrics of a router, from sums over tokens.

`router_totals` sums; everything else divides. Over a mesh, add up the totals of all devices (`jax.lax.psum`) in
between: a product of two means over all tokens is not the mean of products over some.
"""

import jax
import jax.numpy as jnp
from flax import struct

from moe_jax.checks import array, floating_array
from moe_jax.dtypes import at_least_float32
from moe_jax.routing import Choice, Routing


@struct.dataclass
class RouterTotals:
    """Sums over tokens, padding left out. All float, so that the sum over devices is one operation.

    Attributes:
      tokens: (), number of tokens.
      probs_e: (E,) router probabilities. Differentiable.
      first_e: (E,) tokens whose favourite expert this is, before capacity.
      wanted_e: (E,) assignments asked for, before capacity.
      wanted_a: (A,) assignments asked for per rank.
      kept_a: (A,) assignments kept per rank.
      z_squared: (), squared logsumexp of the un-noised logits. Differentiable.
      entropy: (), entropy of the router probabilities, in nats.
      top_gate: (), largest gate among each token's candidates, asked for or not.
      available: (), slots that the capacity factor allows.
      nonfinite: (), tokens with a logit that is not finite.
    """

    tokens: jax.Array
    probs_e: jax.Array
    first_e: jax.Array
    wanted_e: jax.Array
    wanted_a: jax.Array
    kept_a: jax.Array
    z_squared: jax.Array
    entropy: jax.Array
    top_gate: jax.Array
    available: jax.Array
    nonfinite: jax.Array


@struct.dataclass
class Metrics:
    """What a router did. No gradient.

    Attributes:
      load_e: (E,) share of the assignments asked for, before capacity; sums to 1, or to 0 where nothing is asked for.
        Always uniform with `ExpertChoice`.
      wanted_a: (A,) share of tokens that asked for their candidate of each rank.
      dropped_a: (A,) share of the assignments asked for that capacity refused, per rank.
      router_entropy: (), mean entropy of the router probabilities, in nats; ln E when undecided.
      top_gate: (), mean over tokens of the largest gate among their candidates, asked for or not.
      capacity_used: (), share of the available slots in use.
      nonfinite_logits: (), share of tokens with a router logit that is not finite.
    """

    load_e: jax.Array
    wanted_a: jax.Array
    dropped_a: jax.Array
    router_entropy: jax.Array
    top_gate: jax.Array
    capacity_used: jax.Array
    nonfinite_logits: jax.Array


def router_totals(logits_te: jax.Array, choice: Choice, routing: Routing, mask_t: jax.Array) -> RouterTotals:
    """Sums over the tokens at hand.

    Args:
      logits_te: (T, E) un-noised router logits.
      choice: from the router.
      routing: from `assign_slots`.
      mask_t: (T,) bool, false for padding.

    Raises:
      ValueError: the logits or the mask are not those of the choice's tokens and experts.
    """
    logits_te = at_least_float32(floating_array("logits_te", logits_te))
    array("mask_t", mask_t)
    if logits_te.shape != (of_choice := choice.probs_te.shape):
        raise ValueError(f"logits_te must be {of_choice}, as the choice's probabilities are, got {logits_te.shape}")
    if mask_t.shape != of_choice[:1] or mask_t.dtype != jnp.bool_:
        raise ValueError(f"mask_t must be {of_choice[:1]} bool, got {mask_t.shape} {mask_t.dtype}")
    dtype = logits_te.dtype
    mask_t1 = mask_t[:, None]
    num_experts = logits_te.shape[1]

    def count(index: jax.Array, which: jax.Array) -> jax.Array:
        return jnp.zeros(num_experts, dtype).at[index].add(which.astype(dtype))

    # `where` before, not after: masked tokens get no gradient even where a function of theirs is infinite.
    probs_te = jnp.where(mask_t1, choice.probs_te, 0)
    z_t = jax.nn.logsumexp(jnp.where(mask_t1, logits_te, 0), axis=-1)
    # Not `entr`, which multiplies 0 by log 0 before it drops it: `jax_debug_nans` would stop there.
    constant_te = jax.lax.stop_gradient(probs_te)
    entropy_t = -(constant_te * jnp.log(jnp.where(constant_te > 0, constant_te, 1))).sum(-1)
    return RouterTotals(
        tokens=mask_t.sum(dtype=dtype),
        probs_e=probs_te.sum(0),
        first_e=count(choice.first_expert_t, mask_t),
        wanted_e=count(choice.expert_index_ta.reshape(-1), choice.wanted_ta.reshape(-1)),
        wanted_a=choice.wanted_ta.sum(0, dtype=dtype),
        kept_a=routing.keep_ta.sum(0, dtype=dtype),
        z_squared=jnp.where(mask_t, jnp.square(z_t), 0).sum(),
        entropy=entropy_t.sum(),
        top_gate=jnp.where(mask_t, jax.lax.stop_gradient(choice.gate_ta).max(1), 0).sum(),
        available=routing.available_eg.sum(dtype=dtype),
        nonfinite=(mask_t & ~jnp.isfinite(logits_te).all(1)).sum(dtype=dtype),
    )


def balance_loss(totals: RouterTotals) -> jax.Array:
    """E times the inner product of favourites and probabilities, each as a share of tokens.

    1 when both are uniform, E when every token goes to one expert with probability 1, 0 without tokens. Favourites are
    counted before capacity: counted after it, an overloaded expert would look no fuller than its capacity.

    Source: Switch 2101.03961 equations 4 to 6; GShard 2006.16668 section 2.2.
    """
    tokens = jnp.maximum(totals.tokens, 1)
    return totals.probs_e.shape[0] * jnp.sum((totals.first_e / tokens) * (totals.probs_e / tokens))


def router_z_loss(totals: RouterTotals) -> jax.Array:
    """Mean squared logsumexp of the un-noised logits. Source: ST-MoE 2202.08906 equation 5."""
    return totals.z_squared / jnp.maximum(totals.tokens, 1)


def metrics(totals: RouterTotals) -> Metrics:
    """Means from sums. Shares of nothing are 0."""
    totals = jax.lax.stop_gradient(totals)
    tokens = jnp.maximum(totals.tokens, 1)
    return Metrics(
        load_e=totals.wanted_e / jnp.maximum(totals.wanted_e.sum(), 1),
        wanted_a=totals.wanted_a / tokens,
        dropped_a=(totals.wanted_a - totals.kept_a) / jnp.maximum(totals.wanted_a, 1),
        router_entropy=totals.entropy / tokens,
        top_gate=totals.top_gate / tokens,
        capacity_used=totals.kept_a.sum() / jnp.maximum(totals.available, 1),
        nonfinite_logits=totals.nonfinite / tokens,
    )
