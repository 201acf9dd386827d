"""Which drafted tokens are kept and what follows them: three rules, all exact.

A rule takes probabilities and noise and returns how many drafted tokens it accepts and the token after them. None of
them branches: the draft's probabilities get a zero row at the end (and wherever a row drafted less than J tokens), so
that the bonus token after a full accept is one more residual, max(p − 0, 0) = p.
"""

from __future__ import annotations

import enum

import jax
import jax.numpy as jnp
from flax import struct

from spec_jax.sampling import draw


class Verification(enum.StrEnum):
    """The verification rules by name."""

    REJECTION = "rejection"
    BLOCK = "block"
    COUPLED = "coupled"


@struct.dataclass
class Draft:
    """What a drafter proposes.

    Attributes:
      tokens_bj: (B, J) int32.
      log_probs_bjv: (B, J, V) float32, the distribution each token was drawn from (a point mass where the draft is
        deterministic).
      count_b: (B,) int32 in [0, J]: how many of them the row really drafted. Whether one is may depend on those before
        it and on its distribution; were it to depend on what was drawn from that, verification would not be exact.
    """

    tokens_bj: jax.Array
    log_probs_bjv: jax.Array
    count_b: jax.Array


@struct.dataclass
class Verdict:
    """What verification decides.

    Attributes:
      accepted_b: (B,) int32 in [0, count_b]: the drafted tokens kept.
      next_token_b: (B,) int32, the token after them: a correction, or a bonus when all were kept.
    """

    accepted_b: jax.Array
    next_token_b: jax.Array


def rejection(
    draft: Draft,
    target_log_probs_btv: jax.Array,
    uniform_bj: jax.Array,
    gumbel_bv: jax.Array,
    *,
    lenience: jax.Array,
) -> Verdict:
    """Speculative sampling: each token is accepted with probability min(1, p/q), until one is not.

    Args:
      draft: J drafted tokens and their distributions q.
      target_log_probs_btv: (B, J + 1, V), the target's distribution p at each drafted position and after the last.
      uniform_bj: (B, J) in [0, 1), fresh.
      gumbel_bv: (B, V), fresh.
      lenience: in (0, 1]; multiplies q in the acceptance test only. Below 1 it accepts more, and the output is no
        longer distributed as the target's. The residual stays max(p − q, 0): it never adds to a token that the
        lenient test has let through too often already, which makes it the residual closest to p in total variation.

    Source: Leviathan 2211.17192, Algorithm 1 and section A.5; Chen 2302.01318, Algorithm 2.
    """
    draft_probs_btv = _with_zero_rows(draft)
    target_probs_btv = jnp.exp(target_log_probs_btv)
    draft_prob_bj = _of_tokens(draft_probs_btv, draft.tokens_bj)
    target_prob_bj = _of_tokens(target_probs_btv, draft.tokens_bj)
    # Strict, so that a token of target probability 0 is refused even by u = 0.
    accept_bj = (uniform_bj * lenience * draft_prob_bj < target_prob_bj) & _drafted(draft)
    accepted_b = leading(accept_bj)
    target_bv, draft_bv = _at(target_probs_btv, accepted_b), _at(draft_probs_btv, accepted_b)
    return Verdict(accepted_b, _draw_residual(target_bv, draft_bv, target_bv, gumbel_bv))


def block(draft: Draft, target_log_probs_btv: jax.Array, uniform_bj: jax.Array, gumbel_bv: jax.Array) -> Verdict:
    """Block verification: the longest prefix that passes its own test, tested jointly.

    Accepts at least as many tokens in expectation as `rejection`, for the same output distribution.

    Args: as in `rejection`.

    Source: Sun 2403.10444, Algorithm 2.
    """
    draft_probs_btv = _with_zero_rows(draft)
    target_probs_btv = jnp.exp(target_log_probs_btv)
    draft_prob_bj = _of_tokens(draft_probs_btv, draft.tokens_bj)
    ratio_bj = _of_tokens(target_probs_btv, draft.tokens_bj) / jnp.where(draft_prob_bj > 0, draft_prob_bj, 1.0)

    # reach_bt[:, i] is r_i: 1, then min(r_{i−1}·p(x_i)/q(x_i), 1). J is small and known, so the loop unrolls.
    reach = [jnp.ones_like(target_probs_btv[:, 0, 0])]
    for position in range(ratio_bj.shape[1]):
        reach.append(jnp.minimum(reach[-1] * ratio_bj[:, position], 1.0))
    reach_bt = jnp.stack(reach, axis=1)

    residual_btv = jnp.maximum(reach_bt[:, :, None] * target_probs_btv - draft_probs_btv, 0.0)
    mass_bt = residual_btv.sum(-1)
    # At the last drafted position the zero row makes the mass r_γ, and so the test r_γ / (r_γ + 1 − r_γ) = r_γ.
    # Where r_i = 1 and p = q the test is 0/0; all later tests then pass at least as easily, so 1 is its value.
    slack_bt = mass_bt + 1.0 - reach_bt
    # NaN, as a broken target has it, passes no test.
    test_bt = jnp.where(slack_bt == 0, 1.0, mass_bt / jnp.where(slack_bt == 0, 1.0, slack_bt))
    pass_bj = (uniform_bj < test_bt[:, 1:]) & _drafted(draft)
    length_bj = jnp.where(pass_bj, jnp.arange(1, pass_bj.shape[1] + 1, dtype=jnp.int32)[None, :], 0)
    accepted_b = jnp.max(length_bj, axis=1, initial=0).astype(jnp.int32)

    target_bv, draft_bv = _at(target_probs_btv, accepted_b), _at(draft_probs_btv, accepted_b)
    reach_b1 = jnp.take_along_axis(reach_bt, accepted_b[:, None], axis=1)
    return Verdict(accepted_b, _draw_residual(reach_b1 * target_bv, draft_bv, target_bv, gumbel_bv))


def coupled(draft: Draft, target_log_probs_btv: jax.Array, gumbel_btv: jax.Array) -> Verdict:
    """Gumbel coupling: the target draws with the noise the draft drew with; tokens are kept while the two agree.

    The output is token for token what plain decoding gives with the same noise, whatever the draft.

    Args:
      draft: J tokens, drawn with `gumbel_btv[:, :J]`.
      target_log_probs_btv: (B, J + 1, V).
      gumbel_btv: (B, J + 1, V), the noise of each absolute position.

    Source: after Daliri 2408.07978, section 3.
    """
    target_tokens_bt = draw(target_log_probs_btv, gumbel_btv)
    agree_bj = (draft.tokens_bj == target_tokens_bt[:, :-1]) & _drafted(draft)
    accepted_b = leading(agree_bj)
    return Verdict(accepted_b, jnp.take_along_axis(target_tokens_bt, accepted_b[:, None], axis=1)[:, 0])


def _drafted(draft: Draft) -> jax.Array:
    """(B, J) bool: the positions a row really drafted."""
    return jnp.arange(draft.tokens_bj.shape[1], dtype=jnp.int32)[None, :] < draft.count_b[:, None]


def _with_zero_rows(draft: Draft) -> jax.Array:
    """(B, J + 1, V) draft probabilities, zero where nothing was drafted."""
    probs_bjv = jnp.where(_drafted(draft)[:, :, None], jnp.exp(draft.log_probs_bjv), 0.0)
    return jnp.pad(probs_bjv, ((0, 0), (0, 1), (0, 0)))


def _of_tokens(probs_btv: jax.Array, tokens_bj: jax.Array) -> jax.Array:
    """(B, J) probability of each drafted token."""
    return jnp.take_along_axis(probs_btv[:, :-1], tokens_bj[:, :, None], axis=2)[:, :, 0]


def leading(true_bj: jax.Array) -> jax.Array:
    """(B,) int32, the length of the leading run of True."""
    return jnp.cumprod(true_bj.astype(jnp.int32), axis=1).sum(axis=1, dtype=jnp.int32)


def _at(probs_btv: jax.Array, position_b: jax.Array) -> jax.Array:
    """(B, V) of one position a row."""
    return jnp.take_along_axis(probs_btv, position_b[:, None, None], axis=1)[:, 0]


def _draw_residual(
    target_bv: jax.Array, draft_bv: jax.Array, fallback_bv: jax.Array, gumbel_bv: jax.Array
) -> jax.Array:
    """A token of max(target − draft, 0), which the Gumbel-max trick normalises; of the fallback where that is empty.

    It is empty only where both distributions are equal but for rounding, and then they differ by nothing that counts.
    """
    residual_bv = jnp.maximum(target_bv - draft_bv, 0.0)
    empty_b1 = residual_bv.sum(-1, keepdims=True) <= 0
    return draw(jnp.log(jnp.where(empty_b1, fallback_bv, residual_bv)), gumbel_bv)
