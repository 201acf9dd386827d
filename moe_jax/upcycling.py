"""A mixture of experts from a trained dense feed-forward."""

from typing import Any

import jax.numpy as jnp
from flax import nnx

from moe_jax.checks import instance, whole
from moe_jax.config import MoEConfig
from moe_jax.experts import FeedForward
from moe_jax.layer import MoE
from moe_jax.routing import TopN


def upcycle(feed_forward: FeedForward, num_experts: int, *, rngs: nnx.Rngs, **options: Any) -> MoE:
    """An `MoE` in which every expert is a copy of a dense layer, so that at step 0 it computes what that layer does.

    The gates of a token must sum to 1 for that: the default is top-2 (top-1 for a single expert) with policy "all",
    dispatched by "ragged". Policies that leave out second choices and capacities that drop give up the equality where
    they bite.

    Args:
      feed_forward: the dense layer; its weights are copied.
      num_experts: E.
      rngs: for the router's initial weights.
      **options: of `MoEConfig`, besides what the dense layer determines.

    Raises:
      ValueError: `feed_forward` is not one layer, the router's gates do not sum to 1, an option is for the dense layer
        to determine, or another argument is out of range.

    Source: Komatsuzaki et al. 2212.05055 (sparse upcycling).
    """
    instance("feed_forward", feed_forward, FeedForward)
    whole("num_experts", num_experts, 1)
    if feed_forward.w_in_df.ndim != 2:
        shape = feed_forward.w_in_df.shape
        raise ValueError(f"feed_forward must be one layer, use jax.vmap for stacked ones, got w_in_df {shape}")
    defaults = {"router": TopN(n=min(2, num_experts), policy_train="all", policy_eval="all"), "dispatch": "ragged"}
    dim, hidden_twice = feed_forward.w_in_df.shape
    inherited = {
        "dim": dim,
        "hidden": hidden_twice // 2,
        "bias": feed_forward.b_in_f is not None,
        "mult_bias": feed_forward.mult_bias_f is not None,
        "activation": feed_forward.activation,
        "param_dtype": feed_forward.w_in_df.dtype,
    }
    if twice := sorted((inherited.keys() | {"hidden_mult"}) & options.keys()):
        raise ValueError(f"options must leave to the dense layer what it determines, got {', '.join(twice)}")
    config = MoEConfig(num_experts=num_experts, **inherited, **(defaults | options))
    router = config.router
    # With a single choice the gate is its score: 1 for the only expert of a softmax.
    if not isinstance(router, TopN) or (router.n == 1 and (num_experts > 1 or router.score != "softmax")):
        raise ValueError(f"router must be TopN with n of at least 2 (gates that sum to 1), got {router}")
    if config.num_shared_experts:
        raise ValueError(f"num_shared_experts must be 0, got {config.num_shared_experts}")
    moe = MoE(config, rngs=rngs)

    def copies(dense: nnx.Param) -> nnx.Param:
        return nnx.Param(jnp.repeat(dense[...][None], num_experts, axis=0))

    def optional(dense: nnx.Param | None) -> nnx.Param | None:
        return None if dense is None else copies(dense)

    experts = moe.experts
    experts.w_in_edf, experts.w_out_efd = copies(feed_forward.w_in_df), copies(feed_forward.w_out_fd)
    experts.b_in_ef, experts.b_out_ed = optional(feed_forward.b_in_f), optional(feed_forward.b_out_d)
    experts.mult_bias_ef = optional(feed_forward.mult_bias_f)
    return moe
