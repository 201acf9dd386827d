"""Mixture-of-experts layers in JAX: pure functions over fixed shapes, from router logits to summed outputs.

    config = MoEConfig(dim=512, num_experts=16, router=TopN(n=2))
    moe = MoE(config, rngs=nnx.Rngs(0))
    out = jax.jit(lambda moe, x, key: moe(x, train=True, key=key))(moe, x, key)
    loss = task_loss(out.outputs) + out.total_aux_loss

Axis letters, last in the names of arrays:

    B batch, N sequence, T tokens (B * N, flattened), D model dim
    E experts, A active experts per token (candidates), G groups of tokens that share a capacity
    C slots per expert, S rows of a dispatch buffer, F expert hidden (twice that before the gate)
    Q queues (one per expert and group)
"""

from moe_jax.config import MoEConfig
from moe_jax.coordinate_descent import CoordinateDescent, relaxed_top_k
from moe_jax.dispatch import ExpertFunctions, mixture
from moe_jax.expert_choice import ExpertChoice
from moe_jax.experts import Experts, FeedForward
from moe_jax.interop import block_from_torch, config_from_torch, moe_from_torch
from moe_jax.layer import MoE, MoEOutput, RMSNorm, SparseMoEBlock
from moe_jax.losses import Metrics, RouterTotals, balance_loss, metrics, router_totals, router_z_loss
from moe_jax.router_bias import RouterBias, updated_router_bias
from moe_jax.routing import Choice, Router, RouterInputs, Routing, TopN
from moe_jax.sharding import param_shardings, token_sharding
from moe_jax.slots import TokenGroups, assign_slots, capacity, token_groups
from moe_jax.upcycling import upcycle

__all__ = [
    "Choice",
    "CoordinateDescent",
    "ExpertChoice",
    "ExpertFunctions",
    "Experts",
    "FeedForward",
    "Metrics",
    "MoE",
    "MoEConfig",
    "MoEOutput",
    "RMSNorm",
    "Router",
    "RouterBias",
    "RouterInputs",
    "RouterTotals",
    "Routing",
    "SparseMoEBlock",
    "TokenGroups",
    "TopN",
    "assign_slots",
    "balance_loss",
    "block_from_torch",
    "capacity",
    "config_from_torch",
    "metrics",
    "mixture",
    "moe_from_torch",
    "param_shardings",
    "relaxed_top_k",
    "router_totals",
    "router_z_loss",
    "token_groups",
    "token_sharding",
    "upcycle",
    "updated_router_bias",
]
