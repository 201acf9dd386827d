"""Drafting nothing: with it the speculative loop is plain decoding."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import struct

from spec_jax.drafters.base import Choose, Drafter, LanguageModel, Proposal, Sequence
from spec_jax.verification import Draft


@struct.dataclass
class Plain(Drafter):
    """No draft: each round reads one token and emits one."""

    gamma: int = struct.field(pytree_node=False, default=0)

    def propose(
        self, target: LanguageModel, sequence: Sequence, target_cache: Any, state: Any, choose: Choose
    ) -> Proposal:
        """An empty draft."""
        del choose
        batch = sequence.length_b.shape[0]
        log_probs_bjv = jnp.zeros((batch, 0, target.vocab_size), jnp.float32)
        draft = Draft(jnp.zeros((batch, 0), jnp.int32), log_probs_bjv, jnp.zeros((batch,), jnp.int32))
        return Proposal(draft, target_cache, state)
