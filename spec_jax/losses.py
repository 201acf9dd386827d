"""Losses of language models. Logits come in any float dtype; every loss is float32, in nats per token."""

from __future__ import annotations

import math
from typing import TypeVar

import jax
import jax.numpy as jnp

from spec_jax.decoder import Decoder
from spec_jax.prophet import ModelWithProphet, PairOutput

Number = TypeVar("Number", float, jax.Array)


def next_token_loss(logits_btv: jax.Array, next_tokens_bt: jax.Array, *, mask_bt: jax.Array | None = None) -> jax.Array:
    """Mean cross-entropy of the next token.

    Args:
      logits_btv: (B, T, V), the model's output after reading the token at each position.
      next_tokens_bt: (B, T) integers in [0, V), the token that follows each position: for rows of T + 1 tokens,
        `next_token_loss(model(rows[:, :-1]).logits, rows[:, 1:])`.
      mask_bt: (B, T) booleans, or None. Positions that are False (padding, whatever its tokens) enter neither the sum
        nor the count, in values and in gradients.

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
    _check_mask(mask_bt, expected)
    if mask_bt is not None:
        next_tokens_bt = jnp.where(mask_bt, next_tokens_bt, 0)
    return _counted_mean(_surprise(_counted_logits(logits_btv, mask_bt), next_tokens_bt), mask_bt)


def distillation_loss(
    draft_logits_btv: jax.Array, target_logits_btv: jax.Array, *, mask_bt: jax.Array | None = None
) -> jax.Array:
    """Mean forward KL divergence of the draft from the target, KL(target ‖ draft), over the whole vocabulary.

    Least where the draft has the target's distribution, and it bounds how often its tokens are refused: the
    acceptance rate of a position is 1 − TV(target, draft). On the target's own samples it is the on-policy distillation
    of DistillSpec (Zhou 2310.08461, section 3) with the forward KL.

    Args:
      draft_logits_btv: (B, T, V), of any draft model.
      target_logits_btv: (B, T, V), of the target at the same positions; no gradient goes there.
      mask_bt: (B, T) booleans, or None, as in `next_token_loss`.

    Returns:
      () float32, nats per counted token; 0 where none is counted.

    Raises:
      ValueError: shapes that do not go together.
    """
    if draft_logits_btv.ndim != 3 or draft_logits_btv.shape != target_logits_btv.shape:
        raise ValueError(
            f"draft_logits and target_logits must be (B, T, V) alike, "
            f"got {draft_logits_btv.shape} and {target_logits_btv.shape}"
        )
    _check_mask(mask_bt, draft_logits_btv.shape[:2])
    target_log_probs_btv = jax.nn.log_softmax(
        _counted_logits(jax.lax.stop_gradient(target_logits_btv), mask_bt), axis=-1
    )
    draft_log_probs_btv = jax.nn.log_softmax(_counted_logits(draft_logits_btv, mask_bt), axis=-1)
    target_probs_btv = jnp.exp(target_log_probs_btv)
    # What is impossible adds nothing, however impossible it is to the draft.
    difference_btv = jnp.where(target_probs_btv > 0, target_log_probs_btv - draft_log_probs_btv, 0.0)
    return _counted_mean((target_probs_btv * difference_btv).sum(-1), mask_bt)


def early_exit_logits(
    decoder: Decoder, tokens_bt: jax.Array, *, key: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Both logits of a decoder with an early exit, from one forward.

    An exit with recycling sees at each position the trunk's last hidden state at an earlier one, as in drafting,
    where the newest that is there lies 1 to gamma positions back: rounds of `early_exit_recycling` positions are laid
    over each row, from a random place on.

    Args:
      decoder: with `early_exit_layer`.
      tokens_bt: (B, T) integers.
      key: for the place of the rounds; needed with recycling only.

    Returns:
      The head's and the exit's logits, (B, T, V) float32 each.

    Raises:
      ValueError: a decoder without an exit, or a missing key.
    """
    if decoder.early_exit is None:
        raise ValueError("decoder must have early_exit_layer for an early-exit loss, got None")
    output = decoder(tokens_bt)
    recycled_btd = None
    if distance := decoder.config.early_exit_recycling:
        if key is None:
            raise ValueError("key must be given for an exit with early_exit_recycling, got None")
        batch, positions = tokens_bt.shape
        phase_b1 = jax.random.randint(key, (batch, 1), 0, distance, jnp.int32)
        source_bt = jnp.arange(positions, dtype=jnp.int32)[None, :] - 1
        source_bt = source_bt - (source_bt + phase_b1) % distance
        recycled_btd = jnp.take_along_axis(output.hidden, jnp.maximum(source_bt, 0)[:, :, None], axis=1)
        recycled_btd = jnp.where(source_bt[:, :, None] < 0, 0, recycled_btd)
    return output.logits, decoder.early_exit(output.early_hidden, None, recycled_btd)[0]


def prophet_losses(
    pair: ModelWithProphet, output: PairOutput, tokens_bt: jax.Array, *, mask_bt: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """The next-token losses of the target and of the prophet in every window of every row.

    Args:
      pair: target and prophet.
      output: what `pair(tokens_bt)` gave.
      tokens_bt: (B, T + 1) integers.
      mask_bt: (B, T + 1) booleans, or None: tokens that are False (padding) count as nobody's next token.

    Returns:
      () float32 each, nats per counted token; 0 where none is counted.

    Raises:
      ValueError: shapes that do not go together, or tokens that are not integers.
    """
    expected = _checked_shape(pair, output)
    if tokens_bt.shape != expected:
        raise ValueError(f"tokens must be {expected}, those of output, got {tokens_bt.shape}")
    _check_mask(mask_bt, expected)
    next_bt = tokens_bt[:, 1:]
    mask_bt, in_windows_bt = _next_mask(pair, mask_bt)
    return (
        next_token_loss(output.logits, next_bt, mask_bt=mask_bt),
        next_token_loss(_joined(output.prophet_logits), _joined(pair.windows(next_bt)), mask_bt=in_windows_bt),
    )


def prophet_distillation_loss(
    pair: ModelWithProphet, output: PairOutput, *, mask_bt: jax.Array | None = None
) -> jax.Array:
    """How far the prophet is from the target in every window: `distillation_loss`.

    Args:
      pair: target and prophet.
      output: what `pair(tokens_bt)` gave.
      mask_bt: (B, T + 1) booleans, or None, as in `prophet_losses`.

    Returns:
      () float32, nats per counted token; 0 where none is counted.

    Raises:
      ValueError: shapes that do not go together.
    """
    _check_mask(mask_bt, _checked_shape(pair, output))
    target_logits = _joined(pair.windows(output.logits))
    return distillation_loss(_joined(output.prophet_logits), target_logits, mask_bt=_next_mask(pair, mask_bt)[1])


def bits_per_byte(nats_per_byte: Number) -> Number:
    """Bits per byte from a loss in nats, for models whose tokens are bytes."""
    return nats_per_byte / math.log(2)


def _checked_shape(pair: ModelWithProphet, output: PairOutput) -> tuple[int, int]:
    """(B, T + 1), of the tokens that an output is of."""
    if (got := output.prophet_logits.shape[2] + 1) != pair.prophet_train_length:
        raise ValueError(f"output must have windows of prophet_train_length = {pair.prophet_train_length}, got {got}")
    batch, positions = output.logits.shape[:2]
    return batch, positions + 1


def _check_mask(mask_bt: jax.Array | None, expected: tuple[int, ...]) -> None:
    if mask_bt is not None and (mask_bt.shape != expected or mask_bt.dtype != jnp.bool_):
        raise ValueError(f"mask must be {expected} booleans, got {mask_bt.shape} {mask_bt.dtype}")


def _next_mask(pair: ModelWithProphet, mask_bt: jax.Array | None) -> tuple[jax.Array, jax.Array] | tuple[None, None]:
    """Which next tokens count: of each position, and of each window's positions."""
    if mask_bt is None:
        return None, None
    next_bt = mask_bt[:, 1:]
    return next_bt, _joined(pair.windows(next_bt))


def _counted_logits(logits_btv: jax.Array, mask_bt: jax.Array | None) -> jax.Array:
    """As float32, 0 where nothing counts: masked after the logarithm, 0 · inf in a gradient would be NaN."""
    logits_btv = logits_btv.astype(jnp.float32)
    return logits_btv if mask_bt is None else jnp.where(mask_bt[:, :, None], logits_btv, 0.0)


def _counted_mean(nats_bt: jax.Array, mask_bt: jax.Array | None) -> jax.Array:
    """Over the counted positions."""
    if mask_bt is None:
        return nats_bt.sum() / max(nats_bt.size, 1)
    return jnp.where(mask_bt, nats_bt, 0.0).sum() / jnp.maximum(mask_bt.sum(dtype=nats_bt.dtype), 1)


def _surprise(logits_btv: jax.Array, tokens_bt: jax.Array) -> jax.Array:
    """(B, T) −log p(token); NaN where there is no such token."""
    # A negative index would count from the end, and a wider integer may wrap: both become V, of which the logit is NaN.
    index_bt = tokens_bt.astype(jnp.int32)
    outside_bt = (index_bt < 0) | (index_bt.astype(tokens_bt.dtype) != tokens_bt)
    tokens_bt = jnp.where(outside_bt, logits_btv.shape[-1], index_bt)
    token_logits_bt = jnp.take_along_axis(logits_btv, tokens_bt[:, :, None], axis=-1)[:, :, 0]
    return jax.nn.logsumexp(logits_btv, axis=-1) - token_logits_bt


def _joined(values_bwt: jax.Array) -> jax.Array:
    """(B, W, …) as (B·W, …)."""
    return values_bwt.reshape(-1, *values_bwt.shape[2:])
