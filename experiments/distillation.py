"""Text for distillation: the corpus, or the target's own continuations of it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

import spec_jax
from experiments.checks import at_least
from spec_jax import checks, loop
from spec_jax.drafters.plain import Plain


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """How a draft learns from its target, beside learning from the text (DistillSpec, Zhou 2310.08461).

    The divergence gives the target's logits no gradient. An exit or a prophet that is not detached still reaches the
    target through the hidden states it reads, as its other loss does.

    Attributes:
      weight: of the forward KL divergence from the target in the draft's loss; 0 is none.
      own_samples: distil on the target's own continuations of the text, not on the text.
      prompt_length: bytes of text that such a sample starts with; they count too.
    """

    weight: float = 0.0
    own_samples: bool = False
    prompt_length: int = 64

    def __post_init__(self) -> None:
        at_least(0, self, "weight", prefix="distillation.")
        at_least(1, self, "prompt_length", prefix="distillation.")
        if self.own_samples and not self.weight:
            raise ValueError("distillation.own_samples must come with a distillation.weight above 0, got 0")

    def check(self, sequence_length: int) -> None:
        """Raises ValueError where a row has no room for a sample behind its prompt."""
        if self.own_samples and self.prompt_length > sequence_length:
            raise ValueError(
                f"distillation.prompt_length must be at most sequence_length = {sequence_length}, "
                f"got {self.prompt_length}"
            )


def key_of(tokens_bt: jax.Array, seed: int) -> jax.Array:
    """A random key that is a function of the batch: a loss stays a pure function of models and tokens."""
    weight_t = jnp.arange(1, tokens_bt.shape[1] + 1, dtype=jnp.uint32)
    return jax.random.fold_in(jax.random.key(seed), (tokens_bt.astype(jnp.uint32) * weight_t[None, :]).sum())


def own_samples(config: DistillationConfig, target: Any, tokens_bt: jax.Array, seed: int) -> jax.Array:
    """(B, T) tokens: the first `prompt_length` of each row, then the target's own continuation at temperature 1.

    Traced: it is part of the training step. No gradient goes through it.
    """
    batch, width = tokens_bt.shape
    prompt_length, new = config.prompt_length, width - config.prompt_length
    request = loop.Request.of_batch(
        batch, key=key_of(tokens_bt, seed), max_new_tokens=new, verification=spec_jax.Verification.COUPLED
    )
    prompt_bp = tokens_bt[:, :prompt_length]
    result = loop.decode(
        jax.lax.stop_gradient(target),
        Plain(),
        prompt_bp,
        jnp.full((batch,), prompt_length, jnp.int32),
        request,
        size=checks.checked_size(None, width=prompt_length, max_new_tokens=new, gamma=0),
        width=new,
    )
    return jnp.concatenate((prompt_bp, result.tokens), axis=1)
