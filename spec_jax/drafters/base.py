"""The drafter protocol: what a strategy must be able to do for the decoding loop."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import struct

from spec_jax.integers import is_integer
from spec_jax.verification import Draft

Choose = Callable[[jax.Array, int], tuple[jax.Array, jax.Array]]
"""Draws the drafted token at offset j: (logits (B, V), j) → (token (B,) int32, log-probabilities (B, V) float32)."""


class Cache(Protocol):
    """What the loop needs of a cache; `spec_jax.cache.KVCache` is one."""

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
    """What the loop needs of a model; `spec_jax.decoder.Decoder` is one."""

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        ...

    def init_cache(self, batch: int, size: int) -> Any:
        """An empty cache."""
        ...

    def __call__(self, tokens_bt: jax.Array, cache: Any = None) -> Output:
        """T tokens a row behind the cache."""
        ...


def check_model(name: str, model: Any) -> None:
    """Raises ValueError when `model` is none."""
    if not callable(model) or not is_integer(getattr(model, "vocab_size", None)):
        raise ValueError(f"{name} must be a model, such as a spec_jax.Decoder, got {model!r}")


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
        return jnp.take_along_axis(self.tokens_bs, start_b[:, None] + jnp.arange(width)[None, :], axis=1)

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
    """Tokens drafted a round, at most; static, at least 0."""

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


def stack_draft(tokens_jb: list[jax.Array], log_probs_jbv: list[jax.Array], *, batch: int, vocab_size: int) -> Draft:
    """A draft of J tokens in every row, J = 0 included."""
    if not tokens_jb:
        return Draft(
            jnp.zeros((batch, 0), jnp.int32),
            jnp.zeros((batch, 0, vocab_size)),
            jnp.zeros((batch,), jnp.int32),
        )
    count_b = jnp.full((batch,), len(tokens_jb), jnp.int32)
    return Draft(jnp.stack(tokens_jb, axis=1), jnp.stack(log_probs_jbv, axis=1), count_b)
