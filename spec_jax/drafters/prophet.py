"""Drafting with a prophet: a small decoder that starts from the target's hidden states."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from spec_jax.decoder import Decoder
from spec_jax.drafters.base import Choose, Drafter, LanguageModel, Proposal, Sequence, token_by_token
from spec_jax.prophet import ModelWithProphet, ProphetModel


@struct.dataclass
class Prophet(Drafter):
    """The prophet of a `ModelWithProphet` drafts for its target.

    Each round starts afresh from the target's hidden states at each row's own last accepted positions, so there is
    no cache to keep and nothing to catch up with. A row shorter than the window starts from the states it has.

    Attributes:
      prophet: a `ModelWithProphet`, of which only the prophet's part is kept, or that part.
      gamma: tokens drafted a round.
    """

    prophet: Any
    gamma: int = struct.field(pytree_node=False, default=5)

    def __post_init__(self) -> None:
        if isinstance(self.prophet, ModelWithProphet):
            object.__setattr__(self, "prophet", self.prophet.prophet)

    @property
    def vocab_size(self) -> int:
        """Number of tokens the prophet knows."""
        return self.prophet.decoder.vocab_size

    def check(self, target: LanguageModel) -> None:
        """Raises ValueError unless this is a prophet, and the target's hidden states are as wide as it expects."""
        if not isinstance(self.prophet, ProphetModel):
            raise ValueError(f"prophet must be a ModelWithProphet or its prophet, got {type(self.prophet).__name__}")
        if not isinstance(target, Decoder):
            raise ValueError(f"target must be a Decoder for Prophet, got {type(target).__name__}")
        self.prophet.check_target(target)

    def start(self, target: LanguageModel, sequence: Sequence, prefill: Any, size: int) -> jax.Array:
        """(B, N, D), the target's last hidden states before the last known token."""
        del target, size
        starts = self.prophet.num_leading_start_tokens
        position_bn = sequence.length_b[:, None] - 1 - starts + jnp.arange(starts, dtype=jnp.int32)[None, :]
        return jnp.take_along_axis(prefill.hidden, jnp.maximum(position_bn, 0)[:, :, None], axis=1)

    def propose(
        self, target: LanguageModel, sequence: Sequence, target_cache: Any, state: jax.Array, choose: Choose
    ) -> Proposal:
        """gamma tokens a row: the start states and the last known token in one forward, then one for each token."""
        del target
        batch, starts = state.shape[:2]
        # With two start states, rows of length 4, 2 and 1 read h1 h2 x3, h0 x1 and x0: what a short row does not have
        # is shifted out, and leftovers behind its last known token are overwritten.
        present_b = jnp.minimum(starts, sequence.length_b - 1)
        inputs_btd = self.prophet.embed(state, sequence.last_b1)
        index_bt = jnp.minimum(jnp.arange(starts + 1, dtype=jnp.int32)[None, :] + (starts - present_b)[:, None], starts)
        inputs_btd = jnp.take_along_axis(inputs_btd, index_bt[:, :, None], axis=1)
        output = self.prophet.read(inputs_btd, self.prophet.decoder.init_cache(batch, starts + self.gamma))
        logits_bv = jnp.take_along_axis(output.logits, present_b[:, None, None], axis=1)[:, 0]

        def step(token_b: jax.Array, cache: Any, offset: jax.Array) -> tuple[jax.Array, Any]:
            output = self.prophet.decoder(token_b[:, None], cache.with_length(present_b + offset))
            return output.logits[:, 0], output.cache

        draft, _ = token_by_token(logits_bv, output.cache, step, choose, self.gamma)
        return Proposal(draft, target_cache, state)

    def update(self, state: jax.Array, scored: Any, emitted_b: jax.Array) -> jax.Array:
        """The start states at each row's own last accepted positions."""
        known_btd = jnp.concatenate((state, scored.hidden), axis=1)
        index_bn = emitted_b[:, None] + jnp.arange(state.shape[1], dtype=jnp.int32)[None, :]
        return jnp.take_along_axis(known_btd, index_bn[:, :, None], axis=1)
