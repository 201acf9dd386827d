"""The drafter protocol: what a strategy must be able to do for the decoding loop."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
from flax import struct

from spec_jax.scalars import is_integer
from spec_jax.verification import Draft

State = TypeVar("State")

Choose = Callable[[jax.Array, int | jax.Array], tuple[jax.Array, jax.Array]]
"""Draws the drafted token at offset j: (logits (B, V), j) → (token (B,) int32, log-probabilities (B, V) float32)."""

Step = Callable[[jax.Array, State, jax.Array], tuple[jax.Array, State]]
"""Reads the drafted token at offset j − 1: (token (B,), state, j) → (logits (B, V) of the token at j, state)."""


class Cache(Protocol):
    """What the loop needs of a cache, which is a pytree; `spec_jax.cache.KVCache` is one."""

    length_b: jax.Array

    def with_length(self, length_b: jax.Array) -> Any:
        """The same with other lengths."""
        ...

    def resized(self, size: int) -> Any:
        """The same at another number of slots."""
        ...


class Output(Protocol):
    """What the loop needs of a forward's output; `spec_jax.decoder.DecoderOutput` is one."""

    @property
    def logits(self) -> jax.Array:
        """(B, T, V). A target's must not be NaN, +inf or all −inf; where a draft's are, nothing is drafted."""
        ...

    @property
    def hidden(self) -> Any:
        """Whatever the drafter wants to see of the target; the loop hands it through."""
        ...

    @property
    def cache(self) -> Any:
        """The cache T positions longer."""
        ...


class LanguageModel(Protocol):
    """What the loop needs of a model, which is a pytree of its weights; `spec_jax.decoder.Decoder` is one."""

    @property
    def vocab_size(self) -> int:
        """Number of tokens; no weight."""
        ...

    def init_cache(self, batch: int, size: int) -> Cache:
        """An empty cache."""
        ...

    def __call__(self, tokens_bt: jax.Array, cache: Any = None) -> Output:
        """T tokens a row behind the cache."""
        ...


def check_model(name: str, model: Any) -> None:
    """Raises ValueError when `model` is none."""
    called = callable(model) and callable(getattr(model, "init_cache", None))
    if not called or not is_integer(getattr(model, "vocab_size", None)):
        raise ValueError(f"{name} must be a model, such as a spec_jax.Decoder, got {type(model).__name__}")
    if jax.tree_util.all_leaves([model]):
        raise ValueError(
            f"{name} must be a pytree of its weights, such as a flax.nnx.Module or a flax.struct.dataclass, got "
            f"{type(model).__name__}"
        )


@struct.dataclass
class Sequence:
    """What each row has so far.

    Attributes:
      tokens_bs: (B, S) int32, prompt and output; what lies at and beyond `length_b` means nothing.
      length_b: (B,) int32, at least 1. The last known token is at `length_b − 1`, and the target's cache holds the
        ones before it.
    """

    tokens_bs: jax.Array
    length_b: jax.Array

    def window(self, start_b: jax.Array, width: int) -> jax.Array:
        """(B, width) tokens from each row's own start on."""
        slot_bw = start_b[:, None] + jnp.arange(width, dtype=jnp.int32)[None, :]
        return jnp.take_along_axis(self.tokens_bs, slot_bw, axis=1)

    @property
    def last_b1(self) -> jax.Array:
        """(B, 1), the last known token."""
        return self.window(self.length_b - 1, 1)


@struct.dataclass
class Proposal:
    """A draft and what must be carried to scoring and to the next round.

    Attributes:
      draft: up to gamma tokens a row.
      target_cache: the target's cache, which a strategy may have written into beyond its length.
      state: the drafter's own state, whatever it is.
    """

    draft: Draft
    target_cache: Any
    state: Any


class Drafter(abc.ABC):
    """One strategy. A subclass is a frozen pytree (`flax.struct.dataclass`) that holds weights and `gamma`.

    A round is `propose → score → (verification) → update`. All methods are traced inside the decoding loop: fixed
    shapes, no side effects, all state in and out.
    """

    gamma: int
    """Tokens drafted a round, at most; static, at least 0. With 0 `Plain` decodes in the strategy's place."""

    @property
    def vocab_size(self) -> int | None:
        """Number of tokens the draft knows, or None when it takes whatever the target has."""
        return None

    def check(self, target: LanguageModel) -> None:
        """Whether this strategy can draft for this target; called on the host, before anything is traced.

        Raises:
          ValueError: it cannot.
        """
        del target

    def start(self, target: LanguageModel, sequence: Sequence, prefill: Output, size: int) -> Any:
        """The strategy's state after the target has read the prompts; nothing by default.

        Args:
          target: the target.
          sequence: the prompts, padded; `tokens_bs` is as wide as the padded prompts.
          prefill: the target's forward over them.
          size: slots a row that any cache of the strategy's own needs.
        """
        del target, sequence, prefill, size
        return ()

    @abc.abstractmethod
    def propose(
        self, target: LanguageModel, sequence: Sequence, target_cache: Any, state: Any, choose: Choose
    ) -> Proposal:
        """Up to gamma tokens behind each row's last known one, each drawn with `choose`, or with probability 1."""

    def score(self, target: LanguageModel, proposal: Proposal, window_bt: jax.Array) -> Output:
        """The target's forward over `window_bt` (B, gamma + 1): the last known token, then the draft."""
        return target(window_bt, proposal.target_cache)

    def update(self, state: Any, scored: Output, emitted_b: jax.Array) -> Any:
        """The state after the round: `emitted_b` (B,) tokens were added, so `scored` is valid up to that offset."""
        del scored, emitted_b
        return state


def token_by_token(
    logits_bv: jax.Array, state: State, step: Step[State], choose: Choose, gamma: int
) -> tuple[Draft, State]:
    """A draft of gamma tokens in every row, and the state behind it.

    A loop on the device: gamma copies of the step take longer to compile (12.4 s for a program of gamma 8, not 10.3)
    and run no faster on a CPU.

    Args:
      logits_bv: (B, V), of the first drafted token.
      state: what the steps read and write, caches above all.
      step: reads a drafted token and gives the logits of the next.
      choose: draws the tokens.
      gamma: tokens drafted, at least 1.
    """

    def one_more(carry: tuple[jax.Array, State], offset: jax.Array) -> Any:
        logits_bv, state = step(*carry, offset)
        chosen = choose(logits_bv, offset)
        return (chosen[0], state), chosen

    first = choose(logits_bv, 0)
    (_, state), others = jax.lax.scan(one_more, (first[0], state), jnp.arange(1, gamma, dtype=jnp.int32))
    tokens_bj, log_probs_bjv = (
        jnp.concatenate((x[:, None], jnp.moveaxis(others_j, 0, 1)), axis=1)
        for x, others_j in zip(first, others, strict=True)
    )
    return Draft(tokens_bj, log_probs_bjv, jnp.full(tokens_bj.shape[:1], gamma, jnp.int32)), state
