"""Drafting without a model: what followed the last time the row's newest tokens stood in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from spec_jax.drafters.base import Choose, Drafter, LanguageModel, Output, Proposal, Sequence
from spec_jax.scalars import check_integer
from spec_jax.verification import Draft


@struct.dataclass
class Scored:
    """A forward's output, as wide as the window whatever was read.

    Attributes:
      logits: (B, T, V).
      cache: the target's.
      hidden: nothing: looking tokens up needs no more of the target.
    """

    logits: jax.Array
    cache: Any
    hidden: None = None


@struct.dataclass
class NGram(Drafter):
    """Prompt lookup: the longest n-gram at the row's end that stood in it before, and what followed it there.

    Of several places with the same length of match, the latest counts. The draft goes on copying past the row's end
    from what it has itself drafted, so a row that repeats itself drafts gamma tokens whatever its period. A row
    without a match drafts nothing; a round in which no row has one costs one plain step. The draft is deterministic:
    its distribution is a point mass, and the rules are exact as they stand. Works for any target.

    Source: prompt lookup decoding (Saxena 2023), a case of speculative decoding (Leviathan 2211.17192) with q = 1.

    Attributes:
      max_ngram: longest n-gram looked for.
      gamma: tokens drafted a round.
      min_ngram: shortest n-gram that counts as a match.
    """

    max_ngram: int = struct.field(pytree_node=False, default=3)
    gamma: int = struct.field(pytree_node=False, default=8)
    min_ngram: int = struct.field(pytree_node=False, default=2)

    def check(self, target: LanguageModel) -> None:
        """Raises ValueError unless 1 ≤ min_ngram ≤ max_ngram, both integers."""
        del target
        for name in ("min_ngram", "max_ngram"):
            check_integer(name, getattr(self, name), 1)
        if self.min_ngram > self.max_ngram:
            raise ValueError(
                f"min_ngram must be at most max_ngram, got min_ngram {self.min_ngram} and max_ngram {self.max_ngram}"
            )

    def propose(
        self, target: LanguageModel, sequence: Sequence, target_cache: Any, state: Any, choose: Choose
    ) -> Proposal:
        """What followed the latest longest match, in each row that has one."""
        del choose
        # NumPy's integers promote what they meet.
        shortest, longest = int(self.min_ngram), int(self.max_ngram)
        tokens_bj, found_b = lookup(sequence, gamma=self.gamma, min_ngram=shortest, max_ngram=longest)
        is_token_bjv = tokens_bj[:, :, None] == jnp.arange(target.vocab_size, dtype=jnp.int32)[None, None, :]
        log_probs_bjv = jnp.where(is_token_bjv, 0.0, -jnp.inf)
        count_b = jnp.where(found_b, self.gamma, 0).astype(jnp.int32)
        return Proposal(Draft(tokens_bj, log_probs_bjv, count_b), target_cache, state)

    def score(self, target: LanguageModel, proposal: Proposal, window_bt: jax.Array) -> Output:
        """The whole window where any row drafted; otherwise one plain step, its output padded to the same shape."""

        def whole(before: Scored) -> Scored:
            output = target(window_bt, before.cache)
            return Scored(output.logits, output.cache)

        def one_step(before: Scored) -> Scored:
            output = target(window_bt[:, :1], before.cache)
            return Scored(jnp.pad(output.logits, ((0, 0), (0, window_bt.shape[1] - 1), (0, 0))), output.cache)

        logits = jax.eval_shape(lambda *read: target(*read).logits, window_bt, proposal.target_cache)
        scored = Scored(jnp.zeros(logits.shape, logits.dtype), proposal.target_cache)
        any_drafted = (proposal.draft.count_b > 0).any()
        return _run_if(~any_drafted, one_step, _run_if(any_drafted, whole, scored))


def _run_if(wanted: jax.Array, step: Callable[[Scored], Scored], before: Scored) -> Scored:
    """`step(before)` or `before`, as a loop of one round or none.

    What passes through `lax.cond` is copied on a CPU, the whole cache with it (3.7 ms a step, not 2.7); what a loop
    carries stays in place.
    """
    start = (wanted, before)
    return jax.lax.while_loop(lambda carry: carry[0], lambda carry: (jnp.zeros_like(wanted), step(carry[1])), start)[1]


def lookup(sequence: Sequence, *, gamma: int, min_ngram: int, max_ngram: int) -> tuple[jax.Array, jax.Array]:
    """The continuation of the latest longest match.

    Args:
      sequence: rows of tokens.
      gamma: tokens to continue by.
      min_ngram: shortest match that counts.
      max_ngram: longest match looked for.

    Returns:
      (B, gamma) int32 tokens and (B,) bool, whether the row has a match.
    """
    # Row a b c a b, length 5: the match of length 2 ends at slot 1, and what follows slot 1 is c, then a, b, c, a, …
    tokens_bs, length_b = sequence.tokens_bs, sequence.length_b
    slot_1s = jnp.arange(tokens_bs.shape[1], dtype=jnp.int32)[None, :]
    length_bs = jnp.zeros(tokens_bs.shape, jnp.int32)
    alive_bs = slot_1s < length_b[:, None] - 1
    for back in range(max_ngram):
        wanted_b1 = sequence.window(jnp.maximum(length_b - 1 - back, 0), 1)
        here_bs = jnp.pad(tokens_bs, ((0, 0), (back, 0)))[:, : tokens_bs.shape[1]]
        alive_bs &= (here_bs == wanted_b1) & (slot_1s >= back)
        length_bs += alive_bs.astype(jnp.int32)
    # The longest first, the latest among those: one number that grows with both.
    rank_bs = length_bs * tokens_bs.shape[1] + slot_1s
    end_b = jnp.argmax(jnp.where(length_bs >= min_ngram, rank_bs, -1), axis=1).astype(jnp.int32)
    found_b = (length_bs >= min_ngram).any(axis=1)
    period_b1 = (length_b - 1 - end_b)[:, None]
    slot_bj = end_b[:, None] + 1 + jnp.arange(gamma, dtype=jnp.int32)[None, :] % jnp.maximum(period_b1, 1)
    return jnp.take_along_axis(tokens_bs, slot_bj, axis=1, mode="clip").astype(jnp.int32), found_b
