"""Small random transformers with peaky laws, drafts of every quality, and the comparison of two decodings."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from spec_jax import Decoder, DecoderConfig, DecodeResult, Sampling
from spec_jax.noise import position_gumbel
from spec_jax.sampling import filtered_log_probs

CONFIG = DecoderConfig(vocab_size=24, dim=32, depth=2, heads=2, dim_head=16, ff_mult=2)


@functools.cache
def transformer(seed: int, config: DecoderConfig = CONFIG, *, head_scale: float = 4.0) -> Decoder:
    """A decoder with random weights."""
    return random_weights(seed, nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))), head_scale=head_scale)


def random_weights(seed: int, shapes: Any, *, head_scale: float = 4.0) -> Any:
    """Random weights, drawn by NumPy to spare compiles; heads are scaled up, lest all laws be almost uniform."""
    rng = np.random.default_rng(seed)

    def random_weight(path: tuple, shape: jax.ShapeDtypeStruct) -> jax.Array:
        name = jax.tree_util.keystr(path)
        normal = rng.normal(size=shape.shape)
        if ".scale" in name:
            return jnp.asarray(1 + 0.1 * normal, shape.dtype)
        if ".bias" in name:
            return jnp.asarray(0.1 * normal, shape.dtype)
        if ".kernel" in name:
            inputs = math.prod(shape.shape[:-1]) if ".to_out" in name else shape.shape[0]
            normal *= inputs**-0.5 * (head_scale if ".to_logits" in name else 1)
        return jnp.asarray(normal, shape.dtype)

    return jax.tree_util.tree_map_with_path(random_weight, shapes)


@functools.cache
def near(seed: int, noise: float) -> Decoder:
    """The transformer of that seed with noise on every weight, as a draft that has learnt most of it."""
    rng = np.random.default_rng(seed + 1000)

    def perturbed(weight: jax.Array) -> jax.Array:
        values = np.asarray(weight)
        return jnp.asarray(values + noise * values.std() * rng.normal(size=values.shape), weight.dtype)

    return jax.tree.map(perturbed, transformer(seed))


def ragged_prompts(seed: int, batch: int, width: int, vocab_size: int = CONFIG.vocab_size):
    """(B, P) tokens and (B,) lengths from 1 to P, both ends included."""
    rng = np.random.default_rng(seed)
    lengths_b = rng.integers(1, width + 1, batch)
    lengths_b[0], lengths_b[-1] = 1, width
    return rng.integers(0, vocab_size, (batch, width)), lengths_b


# Compiled as a whole: one operation after the other is slower, even once.
uncached = jax.jit(lambda model, tokens_bt: model(tokens_bt))
cached = jax.jit(lambda decoder, tokens_bt, cache: decoder(tokens_bt, cache))


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Of two decodings: rows compared, rows that differ, and rows that differ where no near tie excuses it."""

    rows: int = 0
    different: int = 0
    diverged: int = 0

    def __add__(self, other: Comparison) -> Comparison:
        return Comparison(self.rows + other.rows, self.different + other.different, self.diverged + other.diverged)


def compare(
    target: Decoder,
    prompts_bp: np.ndarray,
    lengths_b: np.ndarray,
    sampling: Sampling,
    key: jax.Array,
    left: DecodeResult,
    right: DecodeResult,
    tie: float = 1e-4,
) -> Comparison:
    """A difference is excused where the two best candidates are closer than `tie` in an uncached forward.

    The candidates are ranked by log-probability plus the position's noise, or by logits where decoding is greedy.
    """
    different = np.flatnonzero((np.asarray(left.tokens) != np.asarray(right.tokens)).any(1))
    diverged = 0
    for row in different:
        outputs = np.asarray(left.tokens)[row], np.asarray(right.tokens)[row]
        first = int(np.argmax(outputs[0] != outputs[1]))
        text = np.concatenate((prompts_bp[row, : lengths_b[row]], outputs[0][:first]))
        padded_1t = np.zeros((1, 64), np.int32)
        padded_1t[0, : len(text)] = text
        logits_v = uncached(target, padded_1t).logits[0, len(text) - 1]
        position = jnp.full((1, 1), len(text))
        noise_v = position_gumbel(key, jnp.full((1,), row, jnp.uint32), position, target.vocab_size)[0, 0]
        greedy = float(sampling.temperature) == 0
        score_v = logits_v if greedy else filtered_log_probs(logits_v, sampling.checked()) + noise_v
        second, best = np.sort(np.asarray(score_v))[-2:]
        diverged += bool(best - second > tie)
    return Comparison(len(prompts_bp), len(different), diverged)
