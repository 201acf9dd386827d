"""Plain and speculative decoding: the whole batch, prompts to output, in one compiled call."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from numpy.typing import ArrayLike

from spec_jax import checks, loop
from spec_jax.drafters.base import Drafter, LanguageModel, check_model
from spec_jax.drafters.plain import Plain
from spec_jax.result import DecodeResult
from spec_jax.sampling import Sampling
from spec_jax.verification import Verification

compiled_decode = jax.jit(loop.decode, static_argnames=("size", "width"))
compiled_start = jax.jit(loop.start, static_argnames=("size",))
compiled_round = jax.jit(loop.decode_round, donate_argnames=("state",))


def base_decoding(
    target: LanguageModel,
    prompt: ArrayLike,
    *,
    max_new_tokens: int,
    key: jax.Array,
    prompt_length: ArrayLike | None = None,
    sampling: Sampling = Sampling(),  # noqa: B008 - immutable
    eos_id: int | None = None,
    pad_id: int = 0,
    row_ids: ArrayLike | None = None,
    cache_size: int | None = None,
) -> DecodeResult:
    """Decodes one token per target forward.

    The speculative loop with nothing drafted: what `verification="coupled"` reproduces token for token. Inside
    `jax.jit`, `jax.vmap` and `jax.lax.scan` weights, `key`, temperature, top-p and min-p may be traced; all else is
    checked on the host, before.

    Args:
      target: the model.
      prompt: (B, P) integer tokens, right-padded.
      max_new_tokens: tokens to emit a row, at most.
      key: one random key. A row's tokens depend on it, on the row's own id and prompt, and but for rounding on nothing
        else.
      prompt_length: (B,) tokens of each prompt; None is P for all.
      sampling: temperature and filters.
      eos_id: the token that ends a row, or None. It is part of the output.
      pad_id: what fills the output after the end.
      row_ids: (B,) names of the rows for the noise; None is 0…B−1.
      cache_size: slots a row, at least P + max_new_tokens + 1; None is that with P and max_new_tokens rounded up to
        multiples of 64, and the sum to one of 8. Attention reads all of them.

    Returns:
      Tokens, lengths and statistics.

    Raises:
      ValueError: an argument that cannot be; named, with what was expected and what came.
    """
    return speculative_decoding(
        target,
        Plain(),
        prompt,
        max_new_tokens=max_new_tokens,
        key=key,
        prompt_length=prompt_length,
        sampling=sampling,
        eos_id=eos_id,
        pad_id=pad_id,
        verification=Verification.COUPLED,
        row_ids=row_ids,
        cache_size=cache_size,
    )


def speculative_decoding(
    target: LanguageModel,
    drafter: Drafter,
    prompt: ArrayLike,
    *,
    max_new_tokens: int,
    key: jax.Array,
    prompt_length: ArrayLike | None = None,
    sampling: Sampling = Sampling(),  # noqa: B008 - immutable
    eos_id: int | None = None,
    pad_id: int = 0,
    verification: str = "rejection",
    lenience: float = 1.0,
    row_ids: ArrayLike | None = None,
    cache_size: int | None = None,
) -> DecodeResult:
    """Decodes up to gamma + 1 tokens per target forward, distributed exactly as `base_decoding`'s.

    Args:
      target: the model whose distribution is sampled.
      drafter: the strategy that proposes gamma tokens a round, such as `SmallModel(draft, gamma=5)`.
      prompt: as in `base_decoding`, like all arguments not named here.
      max_new_tokens: as there.
      key: as there.
      prompt_length: as there.
      sampling: used for target and draft alike.
      eos_id: as there.
      pad_id: as there.
      verification: "rejection" (Leviathan 2211.17192), "block" (Sun 2403.10444; never accepts fewer in expectation)
        or "coupled" (Gumbel coupling; token for token `base_decoding` with the same key).
      lenience: in (0, 1], for "rejection" only: below 1 trades exactness for acceptance.
      row_ids: as there.
      cache_size: as there; needs gamma slots more.

    Returns:
      Tokens, lengths and statistics.

    Raises:
      ValueError: an argument that cannot be; named, with what was expected and what came.
    """
    prepared = _prepare(
        target, drafter, prompt, prompt_length, max_new_tokens, key, sampling, eos_id, pad_id, verification, lenience,
        row_ids, cache_size,
    )  # fmt: skip
    result = compiled_decode(
        target,
        prepared.drafter,
        prepared.prompt_bp,
        prepared.prompt_length_b,
        prepared.request,
        size=prepared.size,
        width=checks.bucket(max_new_tokens),
    )
    return dataclasses.replace(result, tokens=result.tokens[:, :max_new_tokens])


@struct.dataclass
class StreamedRound:
    """The tokens one round added, on the host.

    Attributes:
      tokens_bt: (B, J + 1) int32.
      count_b: (B,) how many of them count; 0 in rows that were finished before.
      accepted_b: (B,) the first so many were drafted and kept. The one after them, where it counts, is the target's:
        a correction, or a bonus when every drafted token was kept.
    """

    tokens_bt: np.ndarray
    count_b: np.ndarray
    accepted_b: np.ndarray

    def row(self, row: int) -> tuple[list[int], list[bool]]:
        """The tokens one row got, and which of them were drafted."""
        count, accepted = int(self.count_b[row]), int(self.accepted_b[row])
        return self.tokens_bt[row, :count].tolist(), [offset < accepted for offset in range(count)]


def stream(
    target: LanguageModel,
    drafter: Drafter | None,
    prompt: ArrayLike,
    *,
    max_new_tokens: int,
    key: jax.Array,
    prompt_length: ArrayLike | None = None,
    sampling: Sampling = Sampling(),  # noqa: B008 - immutable
    eos_id: int | None = None,
    pad_id: int = 0,
    verification: str = "rejection",
    lenience: float = 1.0,
    row_ids: ArrayLike | None = None,
    cache_size: int | None = None,
) -> Iterator[StreamedRound]:
    """The rounds of `speculative_decoding` one by one, driven from Python; the same tokens for the same key.

    Args: as in `speculative_decoding`, but none of them traced; `drafter=None` streams `base_decoding`, by whatever
    rule.

    Returns:
      An iterator of rounds, until every row is finished. Arguments are checked when it is made, not when it is read.

    Raises:
      ValueError: an argument that cannot be; named, with what was expected and what came.
    """
    if drafter is None:
        drafter = Plain()
        checks.checked_rule(verification, lenience)
        verification, lenience = Verification.COUPLED, 1.0
    prepared = _prepare(
        target, drafter, prompt, prompt_length, max_new_tokens, key, sampling, eos_id, pad_id, verification, lenience,
        row_ids, cache_size,
    )  # fmt: skip
    checks.check_not_traced(target=target, drafter=drafter, key=key, sampling=sampling)
    checks.check_outside_traces(prepared.request)
    return _rounds(target, prepared)


class _Prepared(NamedTuple):
    drafter: Drafter
    prompt_bp: np.ndarray
    prompt_length_b: np.ndarray
    request: loop.Request
    size: int


def _prepare(
    target: LanguageModel,
    drafter: Drafter,
    prompt: ArrayLike,
    prompt_length: ArrayLike | None,
    max_new_tokens: int,
    key: jax.Array,
    sampling: Sampling,
    eos_id: int | None,
    pad_id: int,
    verification: str,
    lenience: float,
    row_ids: ArrayLike | None,
    cache_size: int | None,
) -> _Prepared:
    """Checks the arguments and pads the prompt to its bucket."""
    check_model("target", target)
    vocab_size = target.vocab_size
    checks.check_drafter(target, drafter)
    rule = checks.checked_rule(verification, lenience)
    # NumPy's small integers would overflow.
    if type(drafter.gamma) is not int:
        drafter = dataclasses.replace(cast(Any, drafter), gamma=int(drafter.gamma))
    prompt_bp, prompt_length_b = checks.checked_prompt(prompt, prompt_length, vocab_size)
    batch, width = prompt_bp.shape
    padded = checks.bucket(width)
    room = {"max_new_tokens": max_new_tokens, "gamma": drafter.gamma}
    size = checks.checked_size(cache_size, width=width if cache_size is not None else padded, **room)
    request = loop.Request(
        key=checks.checked_key(key),
        row_ids_b=checks.checked_row_ids(row_ids, batch),
        sampling=checks.checked_sampling(sampling),
        lenience=jnp.float32(lenience),
        eos_id=jnp.int32(-1) if eos_id is None else checks.checked_token("eos_id", eos_id, vocab_size),
        pad_id=checks.checked_pad(pad_id),
        max_new_tokens=jnp.int32(max_new_tokens),
        verification=rule,
    )
    prompt_bp = np.pad(prompt_bp, ((0, 0), (0, min(padded, size) - width)))
    return _Prepared(drafter if drafter.gamma else Plain(), prompt_bp, prompt_length_b, request, size)


def _rounds(target: Any, prepared: _Prepared) -> Iterator[StreamedRound]:
    drafter = prepared.drafter
    state = compiled_start(
        target, drafter, prepared.prompt_bp, prepared.prompt_length_b, prepared.request, size=prepared.size
    )
    while not np.asarray(state.done_b).all():
        state, emission = compiled_round(target, drafter, state, prepared.request)
        yield StreamedRound(*(np.asarray(x) for x in (emission.tokens_bt, emission.count_b, emission.accepted_b)))
