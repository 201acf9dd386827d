"""The decoding loop: start, one round, and rounds until every row is finished; all of it traced."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from spec_jax.drafters.base import Choose, Drafter, LanguageModel, Sequence
from spec_jax.noise import Purpose, gumbel, position_gumbel, round_noise, uniform
from spec_jax.result import DecodeResult, DecodeStats
from spec_jax.sampling import Sampling, draw, filtered_log_probs
from spec_jax.sharding import left_to_compiler, over_rows
from spec_jax.verification import Draft, Verdict, Verification, block, coupled, leading, rejection


@struct.dataclass
class Request:
    """What was asked for. Every array may change without a recompile.

    Attributes:
      key: the random key.
      row_ids_b: (B,) uint32, the rows' names for the noise.
      sampling: temperature and filters.
      lenience: () float32.
      eos_id: () int32, the end token, −1 for none.
      pad_id: () int32.
      max_new_tokens: () int32.
      verification: the rule, part of the compiled program.
    """

    key: jax.Array
    row_ids_b: jax.Array
    sampling: Sampling
    lenience: jax.Array
    eos_id: jax.Array
    pad_id: jax.Array
    max_new_tokens: jax.Array
    verification: Verification = struct.field(pytree_node=False)

    @classmethod
    def of_batch(
        cls,
        batch: int,
        *,
        key: jax.Array,
        max_new_tokens: int | jax.Array,
        verification: Verification,
        sampling: Sampling = Sampling(),  # noqa: B008 - immutable
    ) -> Request:
        """For so many rows, without an end token."""
        return cls(
            key=key,
            row_ids_b=jnp.arange(batch, dtype=jnp.uint32),
            sampling=sampling.checked(),
            lenience=jnp.float32(1),
            eos_id=jnp.int32(-1),
            pad_id=jnp.int32(0),
            max_new_tokens=jnp.int32(max_new_tokens),
            verification=verification,
        )


@struct.dataclass
class DecodeState:
    """Everything that changes from round to round.

    Attributes:
      sequence: prompt and output of each row. The target's cache is valid up to `sequence.length_b − 1`.
      prompt_length_b: (B,) int32.
      done_b: (B,) bool, rows that are finished.
      target_cache: the target's cache.
      drafter_state: the drafter's own.
      stats: counts so far.
    """

    sequence: Sequence
    prompt_length_b: jax.Array
    done_b: jax.Array
    target_cache: Any
    drafter_state: Any
    stats: DecodeStats


@struct.dataclass
class Emission:
    """What one round added.

    Attributes:
      tokens_bt: (B, J + 1) int32.
      count_b: (B,) int32, how many of them were added; 0 in finished rows.
      accepted_b: (B,) int32, how many of those were drafted; the one after them is the target's own.
    """

    tokens_bt: jax.Array
    count_b: jax.Array
    accepted_b: jax.Array


@left_to_compiler
def start(
    target: LanguageModel,
    drafter: Drafter,
    prompt_bp: jax.Array,
    prompt_length_b: jax.Array,
    request: Request,
    *,
    size: int,
) -> DecodeState:
    """Prefill: target and drafter read the right-padded prompts; caches then get `size` slots a row.

    The caches are made as wide as the prompts first, because attention over `size` slots for every prompt position
    would cost more than the copy.
    """
    batch, width = prompt_bp.shape
    prompt_bp, prompt_length_b = over_rows((prompt_bp, prompt_length_b))
    prefill = target(prompt_bp, over_rows(target.init_cache(batch, width)))
    sequence = Sequence(prompt_bp, prompt_length_b)
    state = DecodeState(
        sequence=Sequence(jnp.pad(prompt_bp, ((0, 0), (0, size - width))), prompt_length_b),
        prompt_length_b=prompt_length_b,
        done_b=jnp.broadcast_to(request.max_new_tokens <= 0, (batch,)),
        target_cache=prefill.cache.resized(size).with_length(prompt_length_b - 1),
        drafter_state=drafter.start(target, sequence, prefill, size),
        stats=DecodeStats.zeros(batch, drafter.gamma),
    )
    return over_rows(state)


@left_to_compiler
def decode_round(
    target: LanguageModel, drafter: Drafter, state: DecodeState, request: Request
) -> tuple[DecodeState, Emission]:
    """Propose gamma tokens, score gamma + 1 positions, verify, commit.

    Finished rows are computed along with the others and change nothing.
    """
    sequence = state.sequence
    noise_position_bt = sequence.length_b[:, None] + jnp.arange(drafter.gamma + 1, dtype=jnp.int32)[None, :]
    position_noise_btv = (
        position_gumbel(request.key, request.row_ids_b, noise_position_bt, target.vocab_size)
        if request.verification == Verification.COUPLED
        else None
    )
    choose = _chooser(request, sequence, drafter.gamma, target.vocab_size, position_noise_btv)
    cache = state.target_cache.with_length(sequence.length_b - 1)
    proposal = drafter.propose(target, sequence, cache, state.drafter_state, choose)
    proposal = dataclasses.replace(proposal, draft=_usable(proposal.draft, state.done_b))
    window_bt = jnp.concatenate((sequence.last_b1, proposal.draft.tokens_bj), axis=1)
    scored = drafter.score(target, proposal, window_bt)
    target_log_probs_btv = filtered_log_probs(scored.logits, request.sampling)
    verdict = _verify(request, sequence, proposal.draft, target_log_probs_btv, position_noise_btv)
    emission, done_b = _cut(proposal.draft, verdict, state, request)
    state = dataclasses.replace(
        state,
        sequence=_extend(sequence, emission),
        done_b=done_b,
        target_cache=scored.cache,
        drafter_state=drafter.update(proposal.state, scored, emission.count_b),
        stats=_count(state, proposal.draft, emission, request),
    )
    return over_rows((state, emission))


@left_to_compiler
def decode(
    target: LanguageModel,
    drafter: Drafter,
    prompt_bp: jax.Array,
    prompt_length_b: jax.Array,
    request: Request,
    *,
    size: int,
    width: int,
) -> DecodeResult:
    """Prefill and one `lax.while_loop` for the whole batch; tokens come back `width` wide."""
    state = start(target, drafter, prompt_bp, prompt_length_b, request, size=size)
    state = jax.lax.while_loop(
        lambda state: ~jnp.all(state.done_b),
        lambda state: decode_round(target, drafter, state, request)[0],
        state,
    )
    return finish(state, request, width=width)


def finish(state: DecodeState, request: Request, *, width: int) -> DecodeResult:
    """The output of each row, cut out of its sequence and padded."""
    emitted_b = state.sequence.length_b - state.prompt_length_b
    offset_1n = jnp.arange(width, dtype=jnp.int32)[None, :]
    tokens_bn = jnp.take_along_axis(
        state.sequence.tokens_bs, state.prompt_length_b[:, None] + offset_1n, axis=1, mode="clip"
    )
    tokens_bn = jnp.where(offset_1n < emitted_b[:, None], tokens_bn, request.pad_id)
    return over_rows(DecodeResult(tokens=tokens_bn, lengths=emitted_b, stats=state.stats))


def _chooser(
    request: Request, sequence: Sequence, gamma: int, vocab_size: int, position_noise_btv: jax.Array | None
) -> Choose:
    """The drafter's way to draw: the filters of the target, and noise of its own unless the rule couples the two."""
    if position_noise_btv is None:
        noise_bjv = round_noise(
            request.key,
            Purpose.DRAFT,
            request.row_ids_b,
            sequence.length_b,
            (gamma, vocab_size),
            gumbel,
        )
    else:
        noise_bjv = position_noise_btv
    return choose_by(noise_bjv, request.sampling)


def choose_by(noise_bjv: jax.Array, sampling: Sampling) -> Choose:
    """Draws drafted tokens under filters by (B, J, V) Gumbel noise."""

    def choose(logits_bv: jax.Array, offset: int | jax.Array) -> tuple[jax.Array, jax.Array]:
        log_probs_bv = filtered_log_probs(logits_bv, sampling)
        token_b = draw(log_probs_bv, noise_bjv[:, offset])
        # Greedy is certain of a token even where there is no distribution.
        proper_b1 = jnp.isfinite(logits_bv.max(axis=-1, keepdims=True))
        return token_b, jnp.where(proper_b1, log_probs_bv, jnp.nan)

    return choose


def _usable(draft: Draft, done_b: jax.Array) -> Draft:
    """The draft without what follows a distribution that is none: NaN, as logits give that are all −inf or overflow.

    Finished rows draft nothing: a strategy that scores less where no row has drafted does not wait for them.
    """
    real_b = leading(~jnp.isnan(draft.log_probs_bjv).any(axis=-1))
    return dataclasses.replace(draft, count_b=jnp.where(done_b, 0, jnp.minimum(draft.count_b, real_b)))


def _verify(
    request: Request,
    sequence: Sequence,
    draft: Draft,
    target_log_probs_btv: jax.Array,
    position_noise_btv: jax.Array | None,
) -> Verdict:
    if position_noise_btv is not None:
        return coupled(draft, target_log_probs_btv, position_noise_btv)
    gamma, vocab_size = draft.log_probs_bjv.shape[1:]
    place = (request.row_ids_b, sequence.length_b)
    uniform_bj = round_noise(request.key, Purpose.ACCEPTANCE, *place, (gamma,), uniform)
    gumbel_bv = round_noise(request.key, Purpose.RESIDUAL, *place, (vocab_size,), gumbel)
    if request.verification == Verification.BLOCK:
        return block(draft, target_log_probs_btv, uniform_bj, gumbel_bv)
    return rejection(draft, target_log_probs_btv, uniform_bj, gumbel_bv, lenience=request.lenience)


def _cut(draft: Draft, verdict: Verdict, state: DecodeState, request: Request) -> tuple[Emission, jax.Array]:
    """What the round adds, up to the end token and the wanted length; and which rows are then finished."""
    offset_1t = jnp.arange(draft.tokens_bj.shape[1] + 1, dtype=jnp.int32)[None, :]
    tokens_bt = jnp.pad(draft.tokens_bj, ((0, 0), (0, 1)))
    tokens_bt = jnp.where(offset_1t == verdict.accepted_b[:, None], verdict.next_token_b[:, None], tokens_bt)

    room_b = _room(state, request)
    count_b = jnp.minimum(verdict.accepted_b + 1, room_b)
    is_end_bt = (tokens_bt == request.eos_id) & (offset_1t < count_b[:, None])
    ended_b = is_end_bt.any(axis=1)
    count_b = jnp.where(ended_b, jnp.argmax(is_end_bt, axis=1).astype(jnp.int32) + 1, count_b)
    count_b = jnp.where(state.done_b, 0, count_b)
    accepted_b = jnp.minimum(verdict.accepted_b, count_b)
    return Emission(tokens_bt, count_b, accepted_b), state.done_b | ended_b | (count_b >= room_b)


def _room(state: DecodeState, request: Request) -> jax.Array:
    """(B,), how many tokens each row's output can still take."""
    return state.prompt_length_b + request.max_new_tokens - state.sequence.length_b


def _extend(sequence: Sequence, emission: Emission) -> Sequence:
    """The rows with the round's tokens behind them."""
    offset_1t = jnp.arange(emission.tokens_bt.shape[1], dtype=jnp.int32)[None, :]
    nowhere = sequence.tokens_bs.shape[1]
    slot_bt = jnp.where(offset_1t < emission.count_b[:, None], sequence.length_b[:, None] + offset_1t, nowhere)

    def extend_row(tokens_s: jax.Array, new_t: jax.Array, slot_t: jax.Array) -> jax.Array:
        return tokens_s.at[slot_t].set(new_t, mode="drop")

    tokens_bs = jax.vmap(extend_row)(sequence.tokens_bs, emission.tokens_bt, slot_bt)
    return Sequence(tokens_bs, sequence.length_b + emission.count_b)


def _count(state: DecodeState, draft: Draft, emission: Emission, request: Request) -> DecodeStats:
    """The counts after the round. Draft positions that the row's output could not take do not count."""
    active_b = ~state.done_b
    position_1j = jnp.arange(draft.tokens_bj.shape[1], dtype=jnp.int32)[None, :]
    room_b = _room(state, request)
    last_bt = jnp.take_along_axis(emission.tokens_bt, jnp.maximum(emission.count_b - 1, 0)[:, None], axis=1)
    places_b = jnp.where(last_bt[:, 0] == request.eos_id, emission.count_b, room_b)
    # What was drafted behind an end token could not have been kept, even if that is refused.
    before_end_b = leading(draft.tokens_bj != request.eos_id)
    counted_b = jnp.minimum(draft.count_b, jnp.minimum(places_b, before_end_b + 1))
    counted_b = jnp.where(active_b, counted_b, 0)
    return DecodeStats(
        rounds_b=state.stats.rounds_b + active_b.astype(jnp.int32),
        refused_b=state.stats.refused_b + (emission.accepted_b < counted_b).astype(jnp.int32),
        drafted_bj=state.stats.drafted_bj + (position_1j < counted_b[:, None]).astype(jnp.int32),
        accepted_bj=state.stats.accepted_bj + (position_1j < emission.accepted_b[:, None]).astype(jnp.int32),
    )
