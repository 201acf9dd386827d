"""Losses of language models. Logits come in any float dtype; every loss is float32, in nats per token."""

from __future__ import annotations

import math
from typing import TypeVar

import jax
import jax.numpy as jnp

Number = TypeVar("Number", float, jax.Array)


def next_token_loss(logits_btv: jax.Array, next_tokens_bt: jax.Array, *, mask_bt: jax.Array | None = None) -> jax.Array:
    """Mean cross-entropy of the next token.

    Args:
      logits_btv: (B, T, V), the model's output after reading the token at each position.
      next_tokens_bt: (B, T) integers, the token that follows each position: for rows of T + 1 tokens,
        `next_token_loss(model(rows[:, :-1]).logits, rows[:, 1:])`.
      mask_bt: (B, T) booleans, or None. Positions that are False (padding) enter neither the sum nor the count, in
        values and in gradients.

    Returns:
      () float32, nats per counted token; 0 where none is counted.

    Raises:
      ValueError: shapes that do not go together, or tokens that are not integers.
    """
    if logits_btv.ndim != 3:
        raise ValueError(f"logits must be (B, T, V), got {logits_btv.shape}")
    expected = logits_btv.shape[:2]
    if next_tokens_bt.shape != expected or not jnp.issubdtype(next_tokens_bt.dtype, jnp.integer):
        raise ValueError(f"next_tokens must be {expected} integers, got {next_tokens_bt.shape} {next_tokens_bt.dtype}")
    if mask_bt is not None and (mask_bt.shape != expected or mask_bt.dtype != jnp.bool_):
        raise ValueError(f"mask must be {expected} booleans, got {mask_bt.shape} {mask_bt.dtype}")
    logits_btv = logits_btv.astype(jnp.float32)
    if mask_bt is None:
        return _surprise(logits_btv, next_tokens_bt).mean()
    # Masked before the logarithm and not after: 0 · inf in the gradient of a padded position would be NaN.
    logits_btv = jnp.where(mask_bt[:, :, None], logits_btv, 0.0)
    surprise_bt = jnp.where(mask_bt, _surprise(logits_btv, jnp.where(mask_bt, next_tokens_bt, 0)), 0.0)
    return surprise_bt.sum() / jnp.maximum(mask_bt.sum(), 1)


def bits_per_byte(nats_per_byte: Number) -> Number:
    """Bits per byte from a loss in nats, for models whose tokens are bytes."""
    return nats_per_byte / math.log(2)


def _surprise(logits_btv: jax.Array, tokens_bt: jax.Array) -> jax.Array:
    """(B, T) −log p(token)."""
    token_logits_bt = jnp.take_along_axis(logits_btv, tokens_bt[:, :, None], axis=-1)[:, :, 0]
    return jax.nn.logsumexp(logits_btv, axis=-1) - token_logits_bt
