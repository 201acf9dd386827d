"""Drafting nothing: with it the speculative loop is plain decoding."""

from __future__ import annotations

from typing import Any

from flax import struct

from spec_jax.drafters.base import Choose, Drafter, LanguageModel, Proposal, Sequence, no_draft


@struct.dataclass
class Plain(Drafter):
    """No draft: each round reads one token and emits one."""

    gamma: int = struct.field(pytree_node=False, default=0)

    def propose(
        self, target: LanguageModel, sequence: Sequence, target_cache: Any, state: Any, choose: Choose
    ) -> Proposal:
        """An empty draft."""
        del choose
        return Proposal(no_draft(sequence.length_b.shape[0], target.vocab_size), target_cache, state)
