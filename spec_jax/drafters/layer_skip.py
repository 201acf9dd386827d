"""Drafting with the target itself, some of its sublayers left out. Needs no training."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
from flax import struct

from spec_jax.decoder import Decoder
from spec_jax.drafters.base import Choose, Drafter, LanguageModel, Proposal, Sequence, token_by_token
from spec_jax.scalars import is_integer


@struct.dataclass
class LayerSkip(Drafter):
    """The target drafts with a chosen set of attention and feed-forward sublayers skipped (Zhang 2309.08168).

    Drafting writes into the target's own cache behind its length; scoring overwrites that, so the draft always reads
    the keys and values of the whole model for everything already accepted, and needs no cache of its own.
    `experiments.search_layer_skip` looks for a good set. The target is a `Decoder`.

    Attributes:
      skip_attention: layers whose attention is left out.
      skip_feed_forward: layers whose feed-forward is left out.
      gamma: tokens drafted a round.
    """

    skip_attention: tuple[int, ...] = struct.field(pytree_node=False)
    skip_feed_forward: tuple[int, ...] = struct.field(pytree_node=False)
    gamma: int = struct.field(pytree_node=False, default=5)

    def __post_init__(self) -> None:
        for name in ("skip_attention", "skip_feed_forward"):
            if not isinstance(layers := getattr(self, name), Iterable):
                raise ValueError(f"{name} must be a tuple of layers, got {layers!r}")
            object.__setattr__(self, name, tuple(layers))

    def check(self, target: LanguageModel) -> None:
        """Raises ValueError unless the layers are the target's."""
        if not isinstance(target, Decoder):
            raise ValueError(f"target must be a Decoder for LayerSkip, got {type(target).__name__}")
        for name in ("skip_attention", "skip_feed_forward"):
            layers = getattr(self, name)
            if not all(is_integer(layer) and 0 <= layer < target.config.depth for layer in layers):
                raise ValueError(f"{name} must hold layers in [0, {target.config.depth}), got {layers}")

    def propose(self, target: Any, sequence: Sequence, target_cache: Any, state: Any, choose: Choose) -> Proposal:
        """gamma tokens a row, one thinned forward each."""
        length_b = sequence.length_b

        def step(token_b: jax.Array, cache: Any, offset: int | jax.Array) -> tuple[jax.Array, Any]:
            cache = cache.with_length(length_b - 1 + offset)
            logits_b1v, cache = target.without(
                token_b[:, None], cache, attention=self.skip_attention, feed_forward=self.skip_feed_forward
            )
            return logits_b1v[:, 0], cache

        logits_bv, cache = step(sequence.last_b1[:, 0], target_cache, 0)
        draft, cache = token_by_token(logits_bv, cache, step, choose, self.gamma)
        return Proposal(draft, cache.with_length(length_b - 1), state)
