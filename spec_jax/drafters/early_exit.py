"""Drafting with the target's own first layers and an exit branch."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from spec_jax.decoder import Decoder
from spec_jax.drafters.base import Choose, Drafter, LanguageModel, Output, Proposal, Sequence, token_by_token


@struct.dataclass
class EarlyExitState:
    """What goes from round to round.

    Attributes:
      before_bd: (B, D), the trunk's hidden state at the exit, at the position before the last known token; 0 in rows
        of one token.
      recycled_bd: (B, D), the trunk's last hidden state at that position: what an exit with recycling sees of it
        throughout the round.
      recycled_before_bd: (B, D), the same one position earlier, for the position that is read again.
      cache: of the exit's own blocks, valid up to that position, or None when it has none.
    """

    before_bd: jax.Array
    recycled_bd: jax.Array
    recycled_before_bd: jax.Array
    cache: Any


@struct.dataclass
class EarlyExit(Drafter):
    """Layers [0, e) of the target and its exit branch draft; layers [e, depth) score.

    Drafting writes into the target's own cache and keeps the hidden states at layer e; scoring goes on from them. So
    each layer runs once for each position of a round, and a draft costs no layer twice (as in LayerSkip, 2404.16710).
    The target is a `Decoder` with `early_exit_layer`.

    Attributes:
      gamma: tokens drafted a round.
    """

    gamma: int = struct.field(pytree_node=False, default=5)

    def check(self, target: LanguageModel) -> None:
        """Raises ValueError unless the target has an exit."""
        if not isinstance(target, Decoder) or target.early_exit is None:
            raise ValueError(f"target must be a Decoder with early_exit_layer for EarlyExit, got {_describe(target)}")

    def start(self, target: Any, sequence: Sequence, prefill: Any, size: int) -> EarlyExitState:
        """The exit's own blocks read the prompts; the rest is the prefill's."""
        batch, width = sequence.tokens_bs.shape
        cache = target.init_exit_cache(batch, width)
        if cache is not None:
            recycled_btd = jnp.pad(prefill.hidden, ((0, 0), (1, 0), (0, 0)))[:, :-1]
            cache = target.early_exit(prefill.early_hidden, cache, recycled_btd)[1].resized(size)
        last_b = sequence.length_b - 2
        return EarlyExitState(
            before_bd=_at(prefill.early_hidden, last_b),
            recycled_bd=_at(prefill.hidden, last_b),
            recycled_before_bd=_at(prefill.hidden, last_b - 1),
            cache=cache,
        )

    def propose(
        self, target: Any, sequence: Sequence, target_cache: Any, state: EarlyExitState, choose: Choose
    ) -> Proposal:
        """gamma tokens a row, each one pass through the first layers and the exit."""
        length_b = sequence.length_b
        early_b1d, target_cache = target.early(sequence.last_b1, target_cache.with_length(length_b - 1))
        logits_bv, cache = self._first_exit(target, state, length_b, early_b1d)

        def step(token_b: jax.Array, carried: Any, offset: jax.Array) -> tuple[jax.Array, Any]:
            target_cache, cache, early_bjd = carried
            early_b1d, target_cache = target.early(token_b[:, None], target_cache.with_length(length_b - 1 + offset))
            if cache is not None:
                cache = cache.with_length(length_b - 1 + offset)
            logits_b1v, cache = target.early_exit(early_b1d, cache, state.recycled_bd[:, None])
            return logits_b1v[:, 0], (target_cache, cache, early_bjd.at[:, offset].set(early_b1d[:, 0]))

        early_bjd = jnp.pad(early_b1d, ((0, 0), (0, self.gamma - 1), (0, 0)))
        carried = target_cache, cache, early_bjd
        draft, (target_cache, cache, early_bjd) = token_by_token(logits_bv, carried, step, choose, self.gamma)
        drafted = dataclasses.replace(state, cache=cache), early_bjd
        return Proposal(draft, target_cache.with_length(length_b - 1), drafted)

    def _first_exit(
        self, target: Any, state: EarlyExitState, length_b: jax.Array, early_b1d: jax.Array
    ) -> tuple[jax.Array, Any]:
        """(B, V) logits of the first drafted token, and the cache of the exit's own blocks behind it."""
        if state.cache is None:
            logits_b1v, _ = target.early_exit(early_b1d, None, state.recycled_bd[:, None])
            return logits_b1v[:, 0], None
        # After a full accept the exit's own blocks have not read the last drafted token: they always read it again.
        # A row of one token has nothing before it: its window is that token and a leftover, read and overwritten.
        start_b = jnp.maximum(length_b - 2, 0)
        alone_b11 = (length_b < 2)[:, None, None]
        window_btd = jnp.concatenate((jnp.where(alone_b11, early_b1d, state.before_bd[:, None]), early_b1d), axis=1)
        recycled_btd = jnp.stack((state.recycled_before_bd, state.recycled_bd), axis=1)
        logits_btv, cache = target.early_exit(window_btd, state.cache.with_length(start_b), recycled_btd)
        return jnp.take_along_axis(logits_btv, (length_b - 1 - start_b)[:, None, None], axis=1)[:, 0], cache

    def score(self, target: Any, proposal: Proposal, window_bt: jax.Array) -> Output:
        """The first layers for the last drafted token alone, then the other layers for the whole window."""
        cache, gamma = proposal.target_cache, window_bt.shape[1] - 1
        start_b = cache.length_b
        early_b1d, cache = target.early(window_bt[:, gamma:], cache.with_length(start_b + gamma))
        early_btd = jnp.concatenate((proposal.state[1], early_b1d), axis=1)
        return target.late(early_btd, cache.with_length(start_b))

    def update(self, state: Any, scored: Any, emitted_b: jax.Array) -> EarlyExitState:
        """The hidden states at the last position that the target has read."""
        kept, _ = state
        last_b = emitted_b - 1
        return dataclasses.replace(
            kept,
            before_bd=_at(scored.early_hidden, last_b),
            recycled_bd=_at(scored.hidden, last_b),
            recycled_before_bd=jnp.where(last_b[:, None] < 1, kept.recycled_bd, _at(scored.hidden, last_b - 1)),
        )


def _at(hidden_btd: jax.Array, index_b: jax.Array) -> jax.Array:
    """(B, D), each row's hidden state at its own position; 0 where that is negative."""
    picked_bd = jnp.take_along_axis(hidden_btd, jnp.maximum(index_b, 0)[:, None, None], axis=1)[:, 0]
    return jnp.where(index_b[:, None] < 0, 0, picked_bd)


def _describe(target: Any) -> str:
    return "a Decoder without one" if isinstance(target, Decoder) else type(target).__name__
