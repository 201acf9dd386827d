"""Temperature and filters: one function from logits to the distribution that is sampled from."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.core import Tracer

from spec_jax.scalars import is_integer, is_number

Scalar = float | jax.Array | np.ndarray
_FLOAT32 = jnp.finfo(jnp.float32)


@struct.dataclass
class Sampling:
    """How a token is drawn from logits, in the order of Hugging Face: temperature, top-k, top-p, min-p.

    Each filter sees the distribution that the ones before it left. Tokens tied with the last one kept are kept.

    Attributes:
      temperature: divides the logits; 0 is greedy. A scalar that may change without a recompile.
      top_k: an integer keeps that many tokens; a float in [0, 1) is a fraction to leave out, as in the PyTorch package
        `speculative-decoding`, and keeps the ⌈(1 − top_k)·V⌉ largest, rounded as there (0.7 of 10 keeps 4); None keeps
        all. Part of the compiled program.
      top_p: keeps the smallest set of most probable tokens whose mass reaches top_p; 1 keeps all (nucleus sampling,
        Holtzman 1904.09751). May change without a recompile.
      min_p: keeps tokens at least min_p times as probable as the most probable one; 0 keeps all (Nguyen 2407.01082).
        May change without a recompile.
    """

    temperature: Scalar = 1.0
    top_k: int | float | None = struct.field(pytree_node=False, default=None)
    top_p: Scalar = 1.0
    min_p: Scalar = 0.0

    def check(self) -> None:
        """Raises ValueError where a value that the host can see is outside its range. Makes no array."""
        _require("temperature", self.temperature, lambda x: 0 <= x <= float(_FLOAT32.max), "a finite number >= 0")
        _require("top_p", self.top_p, lambda x: 0 < x <= 1, "in (0, 1]")
        _require("min_p", self.min_p, lambda x: 0 <= x <= 1, "in [0, 1]")
        if self.top_k is None:
            return
        if not is_number(self.top_k):
            raise ValueError(f"top_k must be an integer count, a float fraction or None, got {self.top_k!r}")
        if is_integer(self.top_k):
            if self.top_k < 1:
                raise ValueError(f"top_k must be at least 1, got {self.top_k}")
        elif not 0 <= self.top_k < 1:
            raise ValueError(f"top_k as a fraction must be in [0, 1), got {self.top_k}")

    def checked(self) -> Sampling:
        """The same with float32 scalars, after `check`."""
        self.check()
        return dataclasses.replace(
            self,
            temperature=jnp.asarray(self.temperature, jnp.float32),
            top_p=jnp.asarray(self.top_p, jnp.float32),
            min_p=jnp.asarray(self.min_p, jnp.float32),
        )


def _require(name: str, value: Scalar, holds, expected: str) -> None:
    is_array = isinstance(value, np.ndarray | jax.Array)
    numeric = jnp.isdtype(value.dtype, ("integral", "real floating")) if is_array else is_number(value)
    # Of a traced one only the shape is known.
    scalar = numeric and np.ndim(value) == 0
    if not scalar or not (isinstance(value, Tracer) or holds(float(value))):
        raise ValueError(f"{name} must be {expected}, got {repr(value) if isinstance(value, str) else value}")


def filtered_log_probs(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Log-probabilities of the distribution that is sampled from.

    Used for target and draft alike: the verification rules are exact only for the distributions sampled from.

    Args:
      logits: (..., V) in any float dtype.
      sampling: temperature and filters.

    Returns:
      (..., V) float32, normalised; −inf where a token is filtered out. Temperature 0 gives 0 at the first largest
      logit and −inf elsewhere; any other gives NaN where logits are all −inf, or one is NaN or +inf.
    """
    logits = logits.astype(jnp.float32)
    scalars = sampling.temperature, sampling.top_p, sampling.min_p
    temperature, top_p, min_p = (jnp.asarray(scalar, jnp.float32) for scalar in scalars)
    greedy = temperature == 0
    # Subtracting first keeps the largest at exactly 0, so that a tiny temperature cannot overflow; and a token that
    # is impossible stays so, where a huge one makes the division a product of −inf and 0.
    distance = logits - logits.max(-1, keepdims=True)
    scaled = distance / jnp.where(greedy, 1.0, temperature)
    scores = jnp.where(distance == -jnp.inf, -jnp.inf, scaled)
    if sampling.top_k is not None:
        scores = keep_top_k(scores, sampling.top_k)
    # A conditional, because sorting the vocabulary costs more than everything else here and 1 is the default.
    scores = jax.lax.cond(top_p < 1, keep_top_p, lambda scores, _: scores, scores, top_p)
    scores = jnp.where(scores < jnp.log(min_p), -jnp.inf, scores)
    best = jnp.argmax(logits, axis=-1)
    token_v = jax.lax.broadcasted_iota(best.dtype, logits.shape, logits.ndim - 1)
    point_mass = jnp.where(token_v == best[..., None], 0.0, -jnp.inf)
    return jnp.where(greedy, point_mass, jax.nn.log_softmax(scores, axis=-1))


def keep_top_k(scores: jax.Array, top_k: int | float) -> jax.Array:
    """−inf below the k-th largest score, with k counted or a fraction as in `Sampling.top_k`."""
    vocab_size = scores.shape[-1]
    count = min(int(top_k), vocab_size) if is_integer(top_k) else math.ceil((1 - float(top_k)) * vocab_size)
    smallest_kept = sort_descending(scores)[..., count - 1 : count]
    return jnp.where(scores < smallest_kept, -jnp.inf, scores)


def keep_top_p(scores: jax.Array, top_p: Scalar) -> jax.Array:
    """−inf outside the smallest set of most probable tokens whose mass reaches top_p."""
    descending = sort_descending(scores)
    probs = jax.nn.softmax(descending, axis=-1)
    mass_before = jnp.cumsum(probs, axis=-1) - probs
    # Numbers below the smallest normal one count as 0 on most devices, and 0 would keep nothing.
    top_p = jnp.maximum(top_p, _FLOAT32.tiny)
    smallest_kept = jnp.min(jnp.where(mass_before < top_p, descending, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(scores < smallest_kept, -jnp.inf, scores)


def sort_descending(scores: jax.Array) -> jax.Array:
    """(..., V) float32 sorted along the last axis, the largest first.

    Sorted as integers, whose order is that of the floats once the sign is taken care of: XLA sorts floats with a
    comparison function of its own on a CPU, five times as slow (25 µs, not 5, for 256 tokens).
    """
    bits = jax.lax.bitcast_convert_type(scores, jnp.int32)
    integers = jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)
    integers = ~jnp.sort(~integers, axis=-1)
    return jax.lax.bitcast_convert_type(
        jnp.where(integers < 0, integers ^ jnp.int32(0x7FFFFFFF), integers), jnp.float32
    )


def draw(log_probs: jax.Array, gumbel: jax.Array) -> jax.Array:
    """A token of each (..., V) distribution by the Gumbel-max trick: int32 (...)."""
    return jnp.argmax(log_probs + gumbel, axis=-1).astype(jnp.int32)
