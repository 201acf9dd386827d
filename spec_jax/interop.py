"""Weights from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from numpy.typing import ArrayLike

from spec_jax.config import DecoderConfig
from spec_jax.decoder import Decoder

# The original's constructor arguments, and what they are called here.
_CONFIG_NAMES = {
    "num_tokens": "vocab_size",
    "dim": "dim",
    "depth": "depth",
    "heads": "heads",
    "dim_head": "dim_head",
    "ff_mult": "ff_mult",
}
# Recomputed here, never a weight.
_IGNORED = ("rotary_emb.inv_freq",)


def decoder_from_torch(state_dict: Mapping[str, ArrayLike], **constructor_args: Any) -> Decoder:
    """A decoder with the weights of one trained with the PyTorch package `speculative-decoding`.

    Args:
      state_dict: names to arrays (`{k: v.numpy() for k, v in model.state_dict().items()}`); torch is not needed.
      constructor_args: the arguments that model was made with, under the original's names: num_tokens, dim, depth,
        heads, dim_head, ff_mult.

    Returns:
      The same function of the tokens.

    Raises:
      ValueError: an unknown argument; weights that are missing, left over or of another shape.
    """
    unknown = sorted(set(constructor_args) - set(_CONFIG_NAMES))
    if unknown:
        raise ValueError(f"constructor_args must be among {sorted(_CONFIG_NAMES)}, got {unknown}")
    config = DecoderConfig(**{_CONFIG_NAMES[name]: value for name, value in constructor_args.items()})
    given = {name: np.asarray(value) for name, value in state_dict.items() if name not in _IGNORED}
    decoder = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    return _load(decoder, given)


def to_torch_names(decoder: Decoder) -> dict[str, np.ndarray]:
    """The weights of a decoder under the original's names and in its layout: the inverse of `decoder_from_torch`."""
    names, weights = torch_names(decoder.config), {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(decoder):
        value = np.asarray(leaf)
        weights[names[_name(path)]] = value.T if _name(path).endswith(".kernel") else value
    return weights


def torch_names(config: DecoderConfig) -> dict[str, str]:
    """Each parameter's path in our tree (as `jax.tree_util.keystr` writes it) and the original's name of it."""
    names = {
        ".embed.embedding": "token_emb.weight",
        ".head.norm.scale": "to_logits.0.weight",
        ".head.to_logits.kernel": "to_logits.1.weight",
    }
    for layer in range(config.depth):
        ours, theirs = f".blocks[{layer}]", f"layers.{layer}"
        names |= {
            f"{ours}.attention.norm.scale": f"{theirs}.0.norm.weight",
            f"{ours}.attention.to_qkv.kernel": f"{theirs}.0.to_qkv.weight",
            f"{ours}.attention.to_out.kernel": f"{theirs}.0.to_out.weight",
            f"{ours}.feed_forward.norm.scale": f"{theirs}.1.0.weight",
            f"{ours}.feed_forward.up.kernel": f"{theirs}.1.1.weight",
            f"{ours}.feed_forward.up.bias": f"{theirs}.1.1.bias",
            f"{ours}.feed_forward.down.kernel": f"{theirs}.1.3.weight",
            f"{ours}.feed_forward.down.bias": f"{theirs}.1.3.bias",
        }
    return names


def _load(decoder: Decoder, given: Mapping[str, np.ndarray]) -> Decoder:
    names = torch_names(decoder.config)
    paths, structure = jax.tree_util.tree_flatten_with_path(decoder)
    expected = {names[_name(path)]: leaf for path, leaf in paths}
    missing, left_over = sorted(set(expected) - set(given)), sorted(set(given) - set(expected))
    if missing or left_over:
        raise ValueError(f"state_dict must hold exactly the model's weights, missing {missing}, left over {left_over}")
    leaves = []
    for path, leaf in paths:
        value = given[names[_name(path)]]
        # torch keeps a linear layer's weight as (out, in).
        value = value.T if _name(path).endswith(".kernel") else value
        if value.shape != leaf.shape:
            raise ValueError(f"state_dict[{names[_name(path)]!r}] must have shape {leaf.shape}, got {value.shape}")
        leaves.append(jnp.asarray(value, leaf.dtype))
    return jax.tree_util.tree_unflatten(structure, leaves)


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path).removesuffix(".value")
