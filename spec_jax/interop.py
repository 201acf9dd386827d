"""Weights from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from numpy.typing import ArrayLike

from spec_jax.config import DecoderConfig
from spec_jax.decoder import Decoder
from spec_jax.layers import FeedForward
from spec_jax.prophet import ModelWithProphet

# The original's constructor arguments, and what they are called here.
_CONFIG_NAMES = {
    "num_tokens": "vocab_size",
    "dim": "dim",
    "depth": "depth",
    "heads": "heads",
    "dim_head": "dim_head",
    "ff_mult": "ff_mult",
    "early_exit_layer": "early_exit_layer",
    "early_exit_extra_transformer_blocks": "early_exit_extra_blocks",
    "detach_early_exit_hiddens": "detach_early_exit_hiddens",
}
# What the original has no argument for.
_FIXED = {"rotary_base": 10_000.0, "norm_epsilon": 2.0**-23, "early_exit_recycling": 0}
# Recomputed here, never a weight.
_IGNORED = "rotary_emb.inv_freq"


def decoder_from_torch(state_dict: Mapping[str, ArrayLike], **constructor_args: Any) -> Decoder:
    """A decoder with the weights of one trained with the PyTorch package `speculative-decoding`.

    Args:
      state_dict: names to arrays (`{k: v.numpy() for k, v in model.state_dict().items()}`); torch is not needed.
      constructor_args: the arguments that model was made with, under the original's names: num_tokens, dim, depth,
        heads, dim_head, ff_mult, early_exit_layer, early_exit_extra_transformer_blocks, detach_early_exit_hiddens.

    Returns:
      The same function of the tokens.

    Raises:
      ValueError: an unknown argument; no mapping, or weights that are missing, left over, of another shape or not
        floating point.
    """
    decoder = nnx.eval_shape(lambda: Decoder(_config(constructor_args), rngs=nnx.Rngs(0)))
    return _load(decoder, torch_names(decoder.config), state_dict)


def pair_from_torch(
    state_dict: Mapping[str, ArrayLike],
    *,
    model: Mapping[str, Any],
    prophet: Mapping[str, Any],
    prophet_train_length: int = 8,
    detach_model_embed_for_prophet: bool = False,
    num_leading_start_tokens: int = 1,
) -> ModelWithProphet:
    """A target and its prophet with the weights of the original's `ModelWithProphetWrapper`.

    Args:
      state_dict: names to arrays, of the wrapper.
      model: the arguments the target was made with, as in `decoder_from_torch`.
      prophet: the prophet's.
      prophet_train_length: the wrapper's own, like the other two.
      detach_model_embed_for_prophet: as there.
      num_leading_start_tokens: as there.

    Returns:
      The same weights. The original never applies the feed-forward layers of either decoder, so a pair that was
      trained there has random ones: train it further before use.

    Raises:
      ValueError: an unknown argument; no mapping, or weights that are missing, left over, of another shape or not
        floating point.
    """

    def make() -> ModelWithProphet:
        rngs = nnx.Rngs(0)
        return ModelWithProphet(
            Decoder(_config(model, "model"), rngs=rngs),
            Decoder(_config(prophet, "prophet"), rngs=rngs),
            prophet_train_length=prophet_train_length,
            num_leading_start_tokens=num_leading_start_tokens,
            detach_target_hiddens=detach_model_embed_for_prophet,
            rngs=rngs,
        )

    pair = nnx.eval_shape(make)
    return _load(pair, pair_torch_names(pair), state_dict)


def pair_torch_names(pair: ModelWithProphet) -> dict[str, str]:
    """As `torch_names`, of a target and its prophet."""
    names = {f".target{ours}": f"model.{theirs}" for ours, theirs in torch_names(pair.target.config).items()}
    decoder = torch_names(pair.prophet.decoder.config)
    names |= {f".prophet.decoder{ours}": f"prophet.{theirs}" for ours, theirs in decoder.items()}
    return names | {".prophet.project.kernel": "to_prophet_start_token.weight"}


def decoder_to_torch(decoder: Decoder) -> dict[str, np.ndarray]:
    """The weights of a decoder under the original's names and in its layout: the inverse of `decoder_from_torch`.

    They are float32, whatever dtypes the decoder computes in and its weights have.

    Raises:
      ValueError: something else than a decoder, or one that the original cannot be: with fewer key-value heads than
        heads, recycling, other rotary frequencies or another norm than there, or feed-forward layers of the caller's.
    """
    if not isinstance(decoder, Decoder):
        raise ValueError(f"decoder must be a Decoder, got {type(decoder).__name__}")
    config = decoder.config
    if config.num_kv_heads != config.heads:
        raise ValueError(f"decoder must have as many kv_heads as heads, {config.heads}, got {config.kv_heads}")
    for name, theirs in _FIXED.items():
        if getattr(config, name) != theirs:
            raise ValueError(f"decoder must have {name} {theirs}, got {getattr(config, name)}")
    standard = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    other = sorted(name for name, _ in _shapes(decoder) ^ _shapes(standard))
    # Of the same weights another class may make something else.
    blocks = [*decoder.blocks, *([] if decoder.early_exit is None else decoder.early_exit.blocks)]
    classes = {type(block.feed_forward) for block in blocks} - {FeedForward}
    if other := other or sorted(one.__name__ for one in classes):
        raise ValueError(f"decoder must have the feed-forward layers of its config, got others: {', '.join(other)}")
    names, weights = torch_names(config), {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(decoder):
        weights[names[_name(path)]] = in_torch_layout(_name(path), np.asarray(leaf, np.float32))
    return weights


def in_torch_layout(name: str, weight: Any) -> Any:
    """A weight of ours, or its gradient, as the original lays it out.

    Linear layers are (out, in) there, and queries of all heads come before all keys, those before all values.

    Args:
      name: its path in our tree.
      weight: an array; of attention, with as many key-value heads as heads.
    """
    if not name.endswith(".kernel"):
        return weight
    if name.endswith(".to_qkv.kernel"):
        return rearrange(weight, "d n c h -> (c n h) d")
    return weight.reshape(-1, weight.shape[-1]).T


def _from_torch_layout(name: str, weight: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The inverse of `in_torch_layout`, for a weight that has this shape here."""
    if not name.endswith(".kernel"):
        return weight
    if name.endswith(".to_qkv.kernel"):
        return rearrange(weight, "(c n h) d -> d n c h", n=shape[1], c=shape[2])
    return weight.T.reshape(shape)


def torch_names(config: DecoderConfig) -> dict[str, str]:
    """Each parameter's path in our tree (as `jax.tree_util.keystr` writes it) and the original's name of it."""
    names = {
        ".embed.embedding": "token_emb.weight",
        ".head.norm.scale": "to_logits.0.weight",
        ".head.to_logits.kernel": "to_logits.1.weight",
        ".early_exit.head.norm.scale": "to_early_exit_logits.0.weight",
        ".early_exit.head.to_logits.kernel": "to_early_exit_logits.1.weight",
    }
    for layer in range(config.depth):
        names |= _block_names(f".blocks[{layer}]", f"layers.{layer}")
    for layer in range(config.early_exit_extra_blocks):
        names |= _block_names(f".early_exit.blocks[{layer}]", f"early_exit_transformer_blocks.{layer}")
    return names


def _block_names(ours: str, theirs: str) -> dict[str, str]:
    return {
        f"{ours}.attention.norm.scale": f"{theirs}.0.norm.weight",
        f"{ours}.attention.to_qkv.kernel": f"{theirs}.0.to_qkv.weight",
        f"{ours}.attention.to_out.kernel": f"{theirs}.0.to_out.weight",
        f"{ours}.feed_forward.norm.scale": f"{theirs}.1.0.weight",
        f"{ours}.feed_forward.up.kernel": f"{theirs}.1.1.weight",
        f"{ours}.feed_forward.up.bias": f"{theirs}.1.1.bias",
        f"{ours}.feed_forward.down.kernel": f"{theirs}.1.3.weight",
        f"{ours}.feed_forward.down.bias": f"{theirs}.1.3.bias",
    }


def _config(constructor_args: Mapping[str, Any], of: str | None = None) -> DecoderConfig:
    """The configuration for the original's arguments, passed each by itself or, `of` a part of a pair, by its name."""
    name, prefix = ("constructor_args", "") if of is None else (of, f"{of}.")
    if not isinstance(constructor_args, Mapping):
        raise ValueError(f"{name} must map arguments to values, got {constructor_args!r}")
    unknown = sorted(set(constructor_args) - set(_CONFIG_NAMES))
    if unknown:
        raise ValueError(f"{name} must be among {sorted(_CONFIG_NAMES)}, got {unknown}")
    try:
        return DecoderConfig(**{_CONFIG_NAMES[given]: value for given, value in constructor_args.items()})
    except ValueError as error:
        # Its message begins with the argument.
        ours, _, rest = str(error).partition(" ")
        theirs = {ours: theirs for theirs, ours in _CONFIG_NAMES.items()}
        raise ValueError(f"{prefix}{theirs.get(ours, ours)} {rest}") from error


def _load(model: Any, names: Mapping[str, str], state_dict: Mapping[str, ArrayLike]) -> Any:
    """The module with the weights filled in; `names` may name more than it has."""
    if not isinstance(state_dict, Mapping):
        raise ValueError(f"state_dict must map names to arrays, got {type(state_dict).__name__}")
    named = {str(name): value for name, value in state_dict.items()}
    given = {name: _as_numpy(name, value) for name, value in named.items() if not name.endswith(_IGNORED)}
    paths, structure = jax.tree_util.tree_flatten_with_path(model)
    expected = {names[_name(path)] for path, _ in paths}
    missing, left_over = sorted(expected - set(given)), sorted(set(given) - expected)
    if missing or left_over:
        raise ValueError(f"state_dict must hold exactly the model's weights, missing {missing}, left over {left_over}")
    leaves = []
    for path, leaf in paths:
        ours = _name(path)
        name = names[ours]
        value = given[name]
        shape = jax.eval_shape(partial(in_torch_layout, ours), leaf).shape
        if value.shape != shape:
            raise ValueError(f"state_dict[{name!r}] must have shape {shape}, got {value.shape}")
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise ValueError(f"state_dict[{name!r}] must be floating point, got {value.dtype}")
        leaves.append(jnp.asarray(_from_torch_layout(ours, value, leaf.shape), leaf.dtype))
    return jax.tree_util.tree_unflatten(structure, leaves)


def _as_numpy(name: str, value: Any) -> np.ndarray:
    """A weight as an array; of tensors PyTorch refuses some, and does not say which."""
    try:
        return np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"state_dict[{name!r}] must be a CPU tensor or array of a dtype of NumPy's: {error}"
        ) from error


def _shapes(decoder: Decoder) -> set[tuple[str, tuple[int, ...]]]:
    return {(_name(path), leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(decoder)}


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path).removesuffix(".value")
