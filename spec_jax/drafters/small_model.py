"""Drafting with a smaller model of the same vocabulary."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from spec_jax.drafters.base import (
    Choose,
    Drafter,
    LanguageModel,
    Output,
    Proposal,
    Sequence,
    check_model,
    token_by_token,
)


@struct.dataclass
class SmallModel(Drafter):
    """A draft model that continues the text by itself, gamma tokens a round (Leviathan 2211.17192).

    Its first step of a round reads the last two known tokens. After a full accept its cache lacks the last drafted
    token, which it never read, and otherwise lacks nothing: reading two always is cheaper than a catch-up forward.

    Attributes:
      draft: the draft model.
      gamma: tokens drafted a round.
    """

    draft: Any
    gamma: int = struct.field(pytree_node=False, default=5)

    @property
    def vocab_size(self) -> int:
        """Number of tokens the draft knows."""
        return self.draft.vocab_size

    def check(self, target: LanguageModel) -> None:
        """Raises ValueError unless the draft is a model."""
        del target
        check_model("draft", self.draft)

    def start(self, target: LanguageModel, sequence: Sequence, prefill: Output, size: int) -> Any:
        """The draft's cache after the prompts."""
        del target, prefill
        batch, width = sequence.tokens_bs.shape
        cache = self.draft(sequence.tokens_bs, self.draft.init_cache(batch, width)).cache
        return cache.resized(size).with_length(sequence.length_b)

    def propose(
        self, target: LanguageModel, sequence: Sequence, target_cache: Any, state: Any, choose: Choose
    ) -> Proposal:
        """gamma tokens a row, one forward each."""
        del target
        length_b = sequence.length_b
        # A row of one token has no second to last: its window is that token and a leftover, read and overwritten.
        start_b = jnp.maximum(length_b - 2, 0)
        output = self.draft(sequence.window(start_b, 2), state.with_length(start_b))
        logits_bv = jnp.take_along_axis(output.logits, (length_b - 1 - start_b)[:, None, None], axis=1)[:, 0]

        def step(token_b: jax.Array, cache: Any, offset: jax.Array) -> tuple[jax.Array, Any]:
            output = self.draft(token_b[:, None], cache.with_length(length_b - 1 + offset))
            return output.logits[:, 0], output.cache

        draft, cache = token_by_token(logits_bv, output.cache, step, choose, self.gamma)
        return Proposal(draft, target_cache, cache)
