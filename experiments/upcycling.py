"""Starts training with mixtures of experts from a dense run: sparse upcycling, Komatsuzaki et al. 2212.05055.

    python -m experiments.train_moe cpu-equal-flops --output runs/dense
    python -m experiments.train_moe cpu --upcycle-from runs/dense --output runs/upcycled \\
        --experts.hidden 770 --experts.threshold 1e-6 --experts.no-add-ff-after

Every expert starts as a copy of the feed-forward in whose place it stands, so that the validation loss before the first
step, which is measured, is the dense run's. Only the routers are new.
"""

from __future__ import annotations

from typing import Any

from flax import nnx

from experiments.expert_decoder import DenseFeedForward, ExpertsConfig, SparseFeedForward, make_decoder
from moe_jax import upcycle
from spec_jax import Decoder


def check_upcycling(experts: ExpertsConfig) -> None:
    """Raises ValueError where the mixtures cannot start as what a dense layer computes."""
    if experts.kind != "sparse":
        raise ValueError(f"experts.kind must be 'sparse' to upcycle, got {experts.kind!r}")
    if experts.add_ff_before or experts.add_ff_after:
        raise ValueError(
            "experts.add_ff_before and experts.add_ff_after must be False to upcycle, for a dense run has no such "
            f"layers, got {experts.add_ff_before} and {experts.add_ff_after}"
        )
    if experts.top_n < 2:
        raise ValueError(f"experts.top_n must be at least 2 to upcycle (gates that sum to 1), got {experts.top_n}")


def upcycled(dense: Decoder, experts: ExpertsConfig, *, rngs: nnx.Rngs) -> Decoder:
    """A decoder with mixtures whose experts are copies of a dense decoder's feed-forwards; all else is that decoder's.

    With a threshold close to 0 it computes in evaluation what the dense decoder does.

    Args:
      dense: a decoder of another `kind` with the same `every`.
      experts: the mixtures.
      rngs: for the routers' weights; not kept.

    Raises:
      ValueError: the dense feed-forwards are of another kind or width, or at other layers.
    """
    decoder = make_decoder(dense.config, experts, rngs=rngs)
    decoder.embed, decoder.head = dense.embed, dense.head
    for layer, (block, source) in enumerate(zip(decoder.blocks, dense.blocks, strict=True)):
        block.attention = source.attention
        if isinstance(block.feed_forward, SparseFeedForward):
            _copy(block.feed_forward, source.feed_forward, layer)
        elif isinstance(source.feed_forward, DenseFeedForward):
            raise ValueError(
                "experts.every must be that of the dense run, which has a feed-forward to upcycle in layer "
                f"{layer} too, got {experts.every}"
            )
        else:
            block.feed_forward = source.feed_forward
    return decoder


def _copy(sparse: SparseFeedForward, dense: Any, layer: int) -> None:
    if not isinstance(dense, DenseFeedForward):
        raise ValueError(
            f"layer {layer} of the dense run must have a feed-forward of experts.kind 'equal_flops' or "
            f"'equal_parameters', and experts.every be that run's, got {type(dense).__name__}"
        )
    config = sparse.block.moe.config
    if config.expert_hidden != (hidden := dense.feed_forward.w_out_fd.shape[0]):
        raise ValueError(f"experts.hidden must be the dense run's {hidden}, got {config.expert_hidden}")
    copies = upcycle(dense.feed_forward, config.num_experts, rngs=nnx.Rngs(0), router=config.router)
    sparse.block.moe.experts, sparse.block.norm_moe = copies.experts, dense.norm
