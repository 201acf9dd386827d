"""Layers of `moe_jax` and compiled calls of them, for the benchmark."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import moe_jax
from experiments import moe_reference
from moe_jax.dispatch import Dispatch
from moe_jax.interop import config_from_torch

Layer = moe_jax.MoE | moe_jax.FeedForward
EVERY_CHOICE = moe_jax.TopN(policy_train="all", policy_eval="all")


def compiled(layer: Layer, x: jax.Array, *, backward: bool) -> Any:
    """The program of `timed_call`: of a layer, (B, N, D) hidden states and a key."""

    def loss(layer: Layer, x: jax.Array, key: jax.Array) -> jax.Array:
        outputs, aux_loss = _outputs(layer, x, key, train=True)
        return jnp.sum(outputs**2) + aux_loss

    forward = partial(_outputs, train=False)
    function = jax.grad(loss, argnums=(0, 1)) if backward else lambda *inputs: forward(*inputs)[0]
    return jax.jit(function).lower(layer, x, jax.random.key(0)).compile()


def _outputs(layer: Layer, x: jax.Array, key: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
    if isinstance(layer, moe_jax.FeedForward):
        return layer(x), jnp.zeros(())
    out = layer(x, train=train, key=key)
    return out.outputs, out.total_aux_loss


def timed_call(layer: Layer, x: jax.Array, *, backward: bool, program: Any = None) -> Callable[[int], None]:
    """One forward in evaluation, or one forward and backward in training, as `moe_reference.timed_call`."""
    program = compiled(layer, x, backward=backward) if program is None else program

    def call(repeat: int) -> None:
        jax.block_until_ready(program(layer, x, jax.random.key(repeat)))

    return call


@partial(jax.jit, static_argnames="train")
def routed(moe: moe_jax.MoE, x: jax.Array, *, train: bool) -> moe_jax.MoEOutput:
    """Outputs and metrics of one call."""
    return moe(x, train=train, key=jax.random.key(0))


def initial_layer(config: moe_jax.MoEConfig) -> moe_jax.MoE:
    """A new layer."""
    return jax.jit(lambda: moe_jax.MoE(config, rngs=nnx.Rngs(0)))()


def hidden_states(shape: tuple[int, int], dim: int) -> jax.Array:
    """(B, N, D) standard normal numbers."""
    return jnp.asarray(np.random.default_rng(0).standard_normal((*shape, dim), np.float32))


def roomy_config(dim: int, num_experts: int, dispatch: Dispatch) -> moe_jax.MoEConfig:
    """Two experts for every token and as many slots as assignments: what varies is not the experts' work."""
    return moe_jax.MoEConfig(
        dim=dim,
        num_experts=num_experts,
        router=EVERY_CHOICE,
        capacity_factor_train=2.0,
        capacity_factor_eval=2.0,
        dispatch=dispatch,
        init="original",
    )


def like_original(original: Any, dim: int, num_experts: int, *, recompute: bool = False) -> moe_jax.MoE:
    """`moe_jax` with the weights, the slot order and the dispatch gradient of `moe_reference.original_moe`."""
    arguments = _original_arguments(dim, num_experts)
    return moe_jax.moe_from_torch(moe_reference.weights(original), **arguments, recompute=recompute)


def our_call(
    dim: int, num_experts: int, shape: tuple[int, int], backward: bool, *, recompute: bool = False
) -> Callable[[int], None]:
    """The call that `moe_reference.original_call` is compared with, for a process of its own."""
    layer = initial_layer(config_from_torch(**_original_arguments(dim, num_experts), recompute=recompute))
    return timed_call(layer, hidden_states(shape, dim), backward=backward)


def _original_arguments(dim: int, num_experts: int) -> dict[str, Any]:
    return {"dim": dim, "num_experts": num_experts, **moe_reference.ORIGINAL_THRESHOLDS}


def like_mixtral(weights: Mapping[str, np.ndarray]) -> moe_jax.MoE:
    """`moe_jax` with the weights of `moe_reference.mixtral_block`: dropless, without biases or auxiliary loss."""
    num_experts, dim, hidden = weights["experts.down_proj"].shape
    config = moe_jax.MoEConfig(
        dim=dim,
        num_experts=num_experts,
        hidden=hidden,
        router=EVERY_CHOICE,
        dispatch="ragged",
        activation=jax.nn.silu,
        bias=False,
        mult_bias=False,
        balance_coef=0.0,
        router_z_coef=0.0,
    )
    moe = initial_layer(config)
    # Gates then values there, values then gates here.
    gates, values = np.split(weights["experts.gate_up_proj"].swapaxes(1, 2), 2, axis=2)
    moe.router_de[...] = jnp.asarray(weights["gate.weight"].T)
    moe.experts.w_in_edf[...] = jnp.asarray(np.concatenate((values, gates), axis=2))
    moe.experts.w_out_efd[...] = jnp.asarray(weights["experts.down_proj"].swapaxes(1, 2))
    return moe
