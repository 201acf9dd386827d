"""Drafting with the target itself, some of its sublayers left out. Needs no training."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from flax import struct

from spec_jax.decoder import Decoder
from spec_jax.drafters.base import Choose, Drafter, LanguageModel, Proposal, Sequence, stack_draft


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
            if not set(layers) <= set(range(target.config.depth)):
                raise ValueError(f"{name} must hold layers in [0, {target.config.depth}), got {layers}")

    def propose(self, target: Any, sequence: Sequence, target_cache: Any, state: Any, choose: Choose) -> Proposal:
        """gamma tokens a row, one thinned forward each."""
        tokens_jb, log_probs_jbv = [], []
        length_b = sequence.length_b
        token_b1 = sequence.last_b1
        for offset in range(self.gamma):
            cache = target_cache.with_length(length_b - 1 + offset)
            logits_b1v, target_cache = target.without(
                token_b1, cache, attention=self.skip_attention, feed_forward=self.skip_feed_forward
            )
            token_b, log_probs_bv = choose(logits_b1v[:, 0], offset)
            tokens_jb.append(token_b)
            log_probs_jbv.append(log_probs_bv)
            token_b1 = token_b[:, None]
        draft = stack_draft(tokens_jb, log_probs_jbv, batch=length_b.shape[0], vocab_size=target.vocab_size)
        return Proposal(draft, target_cache.with_length(length_b - 1), state)
