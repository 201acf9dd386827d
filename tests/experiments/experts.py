"""Tiny decoders with mixtures of experts, with random weights: what their tests share."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.expert_decoder import ExpertsConfig, SparseFeedForward, make_decoder
from spec_jax import Decoder, DecoderConfig
from tests.spec.transformers import random_weights

# The mixture is the feed-forward of layer 1, and the attention of layer 2 reads what it made of earlier positions.
CONFIG = DecoderConfig(vocab_size=24, dim=32, depth=3, heads=2, dim_head=16, ff_mult=2)
EXPERTS = ExpertsConfig(num_experts=4, hidden=24)


@functools.cache
def sparse_decoder(
    config: DecoderConfig = CONFIG, experts: ExpertsConfig = EXPERTS, *, head_scale: float = 4.0, **changes: Any
) -> Decoder:
    """A decoder with random weights; `changes` are to the configuration of its mixtures, for the same weights."""
    shapes = nnx.eval_shape(lambda: make_decoder(config, experts, rngs=nnx.Rngs(0)))
    for block in shapes.blocks:
        if isinstance(block.feed_forward, SparseFeedForward):
            moe = block.feed_forward.block.moe
            moe.config = dataclasses.replace(moe.config, **changes)
    return jax.tree_util.tree_map_with_path(_scaled, random_weights(0, shapes, head_scale=head_scale))


def _scaled(path: tuple, weight: jax.Array) -> jax.Array:
    """The weights of moe_jax, which `random_weights` drew from a standard normal: by the number of their inputs."""
    name = jax.tree_util.keystr(path)
    if ".w_in_" in name or ".w_out_" in name:
        return 1.5 * weight * weight.shape[-2] ** -0.5
    if ".router_de" in name:
        # Steep enough that many second candidates are below the threshold, and many above.
        return 1.5 * weight * weight.shape[0] ** -0.5
    if ".scale_d" in name or ".mult_bias_" in name:
        return 1 + 0.1 * weight
    return 0.1 * weight if ".b_in_" in name or ".b_out_" in name else weight


@functools.cache
def dense_draft(
    config: DecoderConfig = CONFIG, experts: ExpertsConfig = EXPERTS, *, head_scale: float = 4.0
) -> Decoder:
    """A dense decoder with the target's weights but in place of the mixtures: a draft that has learnt a part."""
    target = sparse_decoder(config, experts, head_scale=head_scale)
    known = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(target)}
    draft = random_weights(1, nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))), head_scale=head_scale)

    def shared(path: tuple, weight: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path)
        return known.get(name, 0.3 * weight if ".down" in name else weight)

    return jax.tree_util.tree_map_with_path(shared, draft)


def random_tokens(*shape: int, vocab_size: int = CONFIG.vocab_size, seed: int = 3) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(0, vocab_size, shape), jnp.int32)
