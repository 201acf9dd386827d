"""The stages of a decoding round, each repeated alone in a loop on the device, to be timed.

Every pass starts from what the one before gave, so that the compiler can neither move work out of the loop nor leave
any of it out.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import spec_jax
from spec_jax import checks, loop
from spec_jax.drafters.base import Proposal, Sequence
from spec_jax.verification import Verification

PASSES = 16
"""Times a stage runs in one call: enough that starting the call does not count."""


@dataclasses.dataclass(frozen=True)
class StageLoops:
    """The drafting and the scoring stage of one strategy, ready to run."""

    target: Any
    drafter: spec_jax.Drafter
    state: loop.DecodeState
    sampling: spec_jax.Sampling

    @classmethod
    def create(
        cls,
        target: Any,
        drafter: spec_jax.Drafter,
        prompt: np.ndarray,
        *,
        max_new_tokens: int,
        sampling: spec_jax.Sampling,
    ) -> StageLoops:
        """A state after the (B, P) prompts, with caches of the size that decoding uses.

        The caches hold zeros: a stage takes the same time whatever they hold, and so no prefill need be compiled.
        """
        batch, width = prompt.shape
        request = loop.Request.of_batch(
            batch,
            key=jax.random.key(0),
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            verification=Verification.REJECTION,
        )
        size = checks.checked_size(None, width=checks.bucket(width), max_new_tokens=max_new_tokens, gamma=drafter.gamma)
        length_b = jnp.full((batch,), width, jnp.int32)
        start = functools.partial(loop.start, size=size)
        state = _zeros(jax.eval_shape(start, target, drafter, jnp.asarray(prompt, jnp.int32), length_b, request))
        tokens_bs = jnp.asarray(np.pad(prompt, ((0, 0), (0, size - width))), jnp.int32)
        return cls(
            target, drafter, dataclasses.replace(state, sequence=Sequence(tokens_bs, length_b)), request.sampling
        )

    def draft(self) -> jax.Array:
        """Drafts gamma tokens, `PASSES` times."""
        return _draft(self.target, self.drafter, self.state, self.sampling)

    def score(self) -> jax.Array:
        """Scores gamma + 1 tokens, `PASSES` times."""
        return _score(self.target, self.drafter, self.state, self.sampling)


def _propose(
    target: Any, drafter: spec_jax.Drafter, state: loop.DecodeState, sampling: spec_jax.Sampling, index: jax.Array
) -> Proposal:
    batch = state.done_b.shape[0]
    key = jax.random.fold_in(jax.random.key(0), index)
    noise_bjv = jax.random.gumbel(key, (batch, drafter.gamma, target.vocab_size))
    choose = loop.choose_by(noise_bjv, sampling)
    cache = state.target_cache.with_length(state.sequence.length_b - 1)
    return drafter.propose(target, state.sequence, cache, state.drafter_state, choose)


def _window(state: loop.DecodeState, proposal: Proposal) -> jax.Array:
    """(B, J + 1): the last known token, then the draft."""
    return jnp.concatenate((state.sequence.last_b1, proposal.draft.tokens_bj), axis=1)


@jax.jit
def _draft(target: Any, drafter: spec_jax.Drafter, state: loop.DecodeState, sampling: spec_jax.Sampling) -> jax.Array:
    def first_score() -> Any:
        first = _propose(target, drafter, state, sampling, jnp.int32(0))
        return drafter.score(target, first, _window(state, first))

    scored = _zeros(jax.eval_shape(first_score))
    row_b = jnp.arange(state.done_b.shape[0])

    def once(index: jax.Array, state: loop.DecodeState) -> loop.DecodeState:
        proposal = _propose(target, drafter, state, sampling, index)
        # The last drafted token becomes the one that the next pass starts from, at the same place.
        last_b = proposal.draft.tokens_bj[:, -1]
        tokens_bs = state.sequence.tokens_bs.at[row_b, state.sequence.length_b - 1].set(last_b)
        return dataclasses.replace(
            state,
            sequence=dataclasses.replace(state.sequence, tokens_bs=tokens_bs),
            target_cache=proposal.target_cache,
            drafter_state=drafter.update(proposal.state, scored, jnp.ones_like(state.sequence.length_b)),
        )

    return jax.lax.fori_loop(0, PASSES, once, state).sequence.tokens_bs


@jax.jit
def _score(target: Any, drafter: spec_jax.Drafter, state: loop.DecodeState, sampling: spec_jax.Sampling) -> jax.Array:
    proposal = _zeros(jax.eval_shape(lambda: _propose(target, drafter, state, sampling, jnp.int32(0))))
    # Every row has drafted: a strategy may score less where none has.
    count_b = jnp.full_like(proposal.draft.count_b, drafter.gamma)
    proposal = dataclasses.replace(proposal, draft=dataclasses.replace(proposal.draft, count_b=count_b))

    def once(_: jax.Array, carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        window_bt, cache = carry
        cache = cache.with_length(state.sequence.length_b - 1)
        scored = drafter.score(target, dataclasses.replace(proposal, target_cache=cache), window_bt)
        return jnp.argmax(scored.logits, axis=-1).astype(jnp.int32), scored.cache

    window_bt = _window(state, proposal)
    return jax.lax.fori_loop(0, PASSES, once, (window_bt, proposal.target_cache))[0]


def _zeros(shapes: Any) -> Any:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
