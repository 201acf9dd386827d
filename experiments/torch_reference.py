"""PyTorch decoding loops to compare against: the original package's, and a plain one with a static cache.

Needs the `bench` extra.
"""

# torch comes with the `bench` extra only.
# pyright: reportMissingImports=false

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from spec_jax import Decoder
from spec_jax.interop import decoder_to_torch

# What must be installed.
MODULES = ("torch", "speculative_decoding")


def original_decoder(decoder: Decoder) -> Any:
    """The original package's `Decoder` with the same weights, in evaluation mode."""
    import torch
    from speculative_decoding import Decoder as OriginalDecoder

    config = decoder.config
    original = OriginalDecoder(
        num_tokens=config.vocab_size,
        dim=config.dim,
        depth=config.depth,
        heads=config.heads,
        dim_head=config.dim_head,
        ff_mult=config.ff_mult,
    )
    weights = {name: torch.from_numpy(array.copy()) for name, array in decoder_to_torch(decoder).items()}
    left_over = original.load_state_dict(weights, strict=False)
    # The rotary frequencies are a buffer of the original's, made by its constructor.
    if left_over.unexpected_keys or left_over.missing_keys != ["rotary_emb.inv_freq"]:
        raise ValueError(f"the original must take exactly our weights, got {left_over}")
    return original.eval()


def original_plain(original: Any, prompt: np.ndarray, *, max_new_tokens: int) -> Callable[[int], np.ndarray]:
    """The original's `base_decoding`, as it ships: temperature 1, the 10 % most probable tokens kept."""
    import torch
    from speculative_decoding.speculative_decoding import base_decoding

    tokens = torch.from_numpy(prompt.astype(np.int64))

    def call(repeat: int) -> np.ndarray:
        torch.manual_seed(repeat)
        return base_decoding(original, tokens, prompt.shape[1] + max_new_tokens).numpy()

    return call


def original_speculative(
    original: Any, draft: Any, prompt: np.ndarray, *, max_new_tokens: int, gamma: int
) -> Callable[[int], tuple[np.ndarray, float]]:
    """The original's `speculative_decoding`; gives its tokens and mean accepted length."""
    import torch
    from speculative_decoding.speculative_decoding import (
        speculative_decoding,
    )

    tokens = torch.from_numpy(prompt.astype(np.int64))

    def call(repeat: int) -> tuple[np.ndarray, float]:
        torch.manual_seed(repeat)
        output, accepted = speculative_decoding(original, draft, tokens, prompt.shape[1] + max_new_tokens, gamma=gamma)
        return output.numpy(), float(accepted)

    return call


def static_cache_plain(
    decoder: Decoder, prompt: np.ndarray, *, max_new_tokens: int, filter_thres: float = 0.9
) -> Callable[[int], np.ndarray]:
    """Plain decoding as one would write it in PyTorch by hand: keys and values in a buffer made once, rotated once.

    Reads only the live part of the buffer, uses the fused attention, and draws with the Gumbel-max trick.
    """
    import torch
    import torch.nn.functional as F

    config = decoder.config
    weights = {name: torch.from_numpy(array.copy()) for name, array in decoder_to_torch(decoder).items()}
    batch, length = prompt.shape
    size, head_dim, heads = length + max_new_tokens, config.dim_head, config.heads
    kept = math.ceil((1 - filter_thres) * config.vocab_size)
    exponent = torch.arange(0, head_dim, 2).float() / head_dim
    angles = torch.outer(torch.arange(size).float(), config.rotary_base**-exponent)
    cosine, sine = angles.cos(), angles.sin()
    layers = [{name: weights[f"layers.{i}.{name}"] for name in _LAYER_NAMES} for i in range(config.depth)]

    def rotate(features: Any, start: int, stop: int) -> Any:
        first, second = features.chunk(2, dim=-1)
        c, s = cosine[start:stop], sine[start:stop]
        return torch.cat((first * c - second * s, second * c + first * s), dim=-1)

    def norm(hidden: Any, scale: Any) -> Any:
        return F.rms_norm(hidden, (config.dim,), scale)

    def forward(tokens: Any, keys: Any, values: Any, start: int) -> Any:
        hidden = F.embedding(tokens, weights["token_emb.weight"])
        stop = start + tokens.shape[1]
        for index, w in enumerate(layers):
            qkv = F.linear(norm(hidden, w["0.norm.weight"]), w["0.to_qkv.weight"])
            query, key, value = qkv.view(batch, -1, 3, heads, head_dim).permute(2, 0, 3, 1, 4).unbind(0)
            keys[index, :, :, start:stop] = rotate(key, start, stop)
            values[index, :, :, start:stop] = value
            mixed = F.scaled_dot_product_attention(
                rotate(query, start, stop), keys[index, :, :, :stop], values[index, :, :, :stop], is_causal=start == 0
            )
            hidden = hidden + F.linear(mixed.transpose(1, 2).reshape(batch, -1, heads * head_dim), w["0.to_out.weight"])
            inner = F.gelu(F.linear(norm(hidden, w["1.0.weight"]), w["1.1.weight"], w["1.1.bias"]))
            hidden = hidden + F.linear(inner, w["1.3.weight"], w["1.3.bias"])
        return F.linear(norm(hidden[:, -1], weights["to_logits.0.weight"]), weights["to_logits.1.weight"])

    @torch.inference_mode()
    def call(repeat: int) -> np.ndarray:
        torch.manual_seed(repeat)
        keys = torch.zeros(config.depth, batch, heads, size, head_dim)
        values = torch.zeros_like(keys)
        output = torch.zeros(batch, max_new_tokens, dtype=torch.int64)
        tokens, start = torch.from_numpy(prompt.astype(np.int64)), 0
        for step in range(max_new_tokens):
            logits = forward(tokens, keys, values, start)
            start += tokens.shape[1]
            best, index = logits.topk(kept)
            gumbel = -torch.log(-torch.log(torch.rand_like(best).clamp(1e-20)).clamp(1e-20))
            tokens = index.gather(1, (best + gumbel).argmax(1, keepdim=True))
            output[:, step] = tokens[:, 0]
        return output.numpy()

    return call


_LAYER_NAMES = (
    "0.norm.weight",
    "0.to_qkv.weight",
    "0.to_out.weight",
    "1.0.weight",
    "1.1.weight",
    "1.1.bias",
    "1.3.weight",
    "1.3.bias",
)


def versions() -> dict[str, str]:
    """The versions of what is compared against, and the threads torch uses."""
    import importlib.metadata

    import torch

    return {
        "torch": torch.__version__,
        "speculative-decoding": importlib.metadata.version("speculative-decoding"),
        "torch_threads": str(torch.get_num_threads()),
        "jax_devices": ", ".join(str(device) for device in jax.devices()),
    }
