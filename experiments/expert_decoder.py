"""A decoder with mixtures of experts, put together from both libraries: neither knows of the other.

`forward` trains it: capacity, random second experts, auxiliary losses. Called as it is, as decoding does, the decoder
routes in evaluation and drops nothing: what the experts make of a token then depends on no other token, of its own row
or another. Exact speculative decoding stands on that: a row that is scored five tokens at a time, beside whatever rows
are there, must get what it gets alone and token by token.
(Up to float rounding, which could swap two experts, or cross a threshold, that are as close as about 1e-6.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from experiments.checks import at_least
from experiments.train_state import num_parameters
from moe_jax import FeedForward, MoE, MoEConfig, MoEOutput, RMSNorm, SparseMoEBlock, TopN, param_shardings
from moe_jax.checks import positive, renamed
from spec_jax import Decoder, DecoderConfig
from spec_jax.layers import FeedForward as DecoderFeedForward
from spec_jax.layers import rotary_angles
from spec_jax.sharding import decoder_shardings

Kind = Literal["sparse", "equal_flops", "equal_parameters"]
# What fields of a mixture are called here.
OUR_NAMES = {
    "n": "top_n",
    "threshold_train": "threshold",
    "threshold_eval": "threshold",
    "capacity_factor_train": "capacity_factor",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """The mixtures of a decoder, or the dense layers in their place.

    Attributes:
      every: a mixture is the feed-forward of every so many-th layer: layers every - 1, 2 · every - 1, ...
      kind: "sparse"; or, to compare with, dense GEGLU feed-forwards of the width at which they compute as much in
        training, or weigh as much, as the mixtures and all that belongs to them.
      num_experts: E.
      top_n: candidates of each token.
      hidden: F, of an expert and of the feed-forwards before and after; None is int(dim · 4 · 2 / 3).
      threshold: a candidate after the first is taken with probability min(1, gate / threshold) in training, and where
        gate >= threshold in evaluation.
      capacity_factor: in training, per sequence; evaluation drops nothing.
      balance_coef: weight of the balance loss.
      router_z_coef: weight of the router z-loss.
      add_ff_before: whether a dense feed-forward comes before each mixture.
      add_ff_after: whether one comes after it.
    """

    every: int = 2
    kind: Kind = "sparse"
    num_experts: int = 8
    top_n: int = 2
    hidden: int | None = None
    threshold: float = 0.2
    capacity_factor: float = 1.25
    balance_coef: float = 1e-2
    router_z_coef: float = 1e-3
    add_ff_before: bool = False
    add_ff_after: bool = True

    def __post_init__(self) -> None:
        at_least(1, self, "every", prefix="experts.")
        if self.kind not in get_args(Kind):
            raise ValueError(f"experts.kind must be one of {', '.join(get_args(Kind))}, got {self.kind!r}")
        try:
            positive("capacity_factor", self.capacity_factor)
            self.layer(dim=2)
        except ValueError as error:
            raise renamed(error, OUR_NAMES, prefix="experts.") from error

    def check(self, config: DecoderConfig) -> None:
        """Raises ValueError where a decoder of this size cannot have these mixtures."""
        if self.every > config.depth:
            raise ValueError(f"experts.every must be at most target.depth = {config.depth}, got {self.every}")
        if config.early_exit_layer is not None:
            raise ValueError(f"target.early_exit_layer must be None, got {config.early_exit_layer}")

    def layer(self, dim: int) -> MoEConfig:
        """Configuration of each mixture."""
        return MoEConfig(
            dim=dim,
            num_experts=self.num_experts,
            router=TopN(n=self.top_n, threshold_train=self.threshold, threshold_eval=self.threshold),
            capacity_factor_train=self.capacity_factor,
            capacity_factor_eval=None,
            dispatch="index",
            dispatch_eval="ragged",
            balance_coef=self.balance_coef,
            router_z_coef=self.router_z_coef,
            hidden=self.hidden,
        )

    def is_replaced(self, layer: int) -> bool:
        """Whether this layer's feed-forward is a mixture, or what `kind` puts in its place."""
        return layer % self.every == self.every - 1


class SparseFeedForward(nnx.Module):
    """A `SparseMoEBlock` as the feed-forward of a decoder's block.

    Args:
      config: of the mixture.
      add_ff_before: see `SparseMoEBlock`.
      add_ff_after: see `SparseMoEBlock`.
      rngs: for the initial weights; not kept.
    """

    def __init__(self, config: MoEConfig, *, add_ff_before: bool, add_ff_after: bool, rngs: nnx.Rngs) -> None:
        self.block = SparseMoEBlock(
            MoE(config, rngs=rngs), add_ff_before=add_ff_before, add_ff_after=add_ff_after, rngs=rngs
        )

    def __call__(self, hidden_btd: jax.Array) -> jax.Array:
        """(B, T, D) to (B, T, D), in evaluation, without the residual: the decoder's block adds that."""
        return self.block(hidden_btd, train=False).outputs - hidden_btd


def weights_read(sublayer: nnx.Module) -> int:
    """How many weights a token meets: of a mixture's experts, as many as it asks for."""
    if not isinstance(sublayer, SparseFeedForward):
        return num_parameters(sublayer)
    moe = sublayer.block.moe
    assert isinstance(moe.config.router, TopN)
    one_expert = num_parameters(moe.experts) // moe.config.num_experts
    return num_parameters(sublayer) - one_expert * (moe.config.num_experts - moe.config.router.n)


class DenseFeedForward(nnx.Module):
    """A normed GEGLU of any hidden width, like an expert, as the feed-forward of a decoder's block."""

    def __init__(self, dim: int, hidden: int, *, rngs: nnx.Rngs) -> None:
        self.norm = RMSNorm(dim)
        self.feed_forward = FeedForward(dim, hidden, rngs=rngs)

    def __call__(self, hidden_btd: jax.Array) -> jax.Array:
        """(B, T, D) to (B, T, D), without the residual."""
        return self.feed_forward(self.norm(hidden_btd))


def make_decoder(config: DecoderConfig, experts: ExpertsConfig, *, rngs: nnx.Rngs) -> Decoder:
    """A decoder with fresh weights; the layers between the mixtures have its usual feed-forward.

    Raises:
      ValueError: the mixtures do not fit the decoder.
    """
    experts.check(config)

    def feed_forward(layer: int, rngs: nnx.Rngs) -> nnx.Module:
        if not experts.is_replaced(layer):
            return DecoderFeedForward(config, rngs=rngs)
        if experts.kind == "sparse":
            return _sparse(config, experts, rngs)
        return DenseFeedForward(config.dim, equal_hidden(config, experts), rngs=rngs)

    return Decoder(config, rngs=rngs, feed_forward=feed_forward)


def equal_hidden(config: DecoderConfig, experts: ExpertsConfig) -> int:
    """Hidden width of the dense GEGLU that equals one mixture, its router and the feed-forwards beside it.

    With "equal_flops" in the products of the training step: a GEGLU takes 3 · D · F multiplications per token, the
    router D · E, and the experts those of `capacity_factor` tokens for each, since their slots are computed whether
    filled or not: where the slots are rounded, to whole ones and at least `min_capacity`, sequences are short for the
    number of experts and the two differ by as much. With "equal_parameters" in the number of weights.
    """
    dim, hidden = config.dim, experts.layer(config.dim).expert_hidden
    if experts.kind == "equal_flops":
        # An expert has at most one slot for each token.
        layers = min(experts.capacity_factor, experts.num_experts) + experts.add_ff_before + experts.add_ff_after
        return round(layers * hidden + experts.num_experts / 3)
    sparse = jax.eval_shape(lambda: _sparse(config, experts, nnx.Rngs(0)))
    # Both products and the three biases of the hidden layer grow with the width; an output bias and a norm do not.
    return round((num_parameters(sparse) - 2 * dim) / (3 * dim + 3))


def forward(
    decoder: Decoder, tokens_bt: jax.Array, *, train: bool, key: jax.Array | None = None
) -> tuple[jax.Array, dict[int, MoEOutput]]:
    """The logits after each position, and what the mixtures did on the way.

    Args:
      decoder: with or without mixtures.
      tokens_bt: (B, T) integers.
      train: whether training capacity and policies apply. In evaluation the logits are the decoder's own.
      key: for the training policies.

    Returns:
      (B, T, V) logits, and the output of each mixture by layer.
    """
    position_bt = jnp.broadcast_to(jnp.arange(tokens_bt.shape[1])[None, :], tokens_bt.shape)
    rotary = rotary_angles(position_bt, decoder.config)
    keys = [None] * decoder.config.depth if key is None else jax.random.split(key, decoder.config.depth)
    hidden_btd, outputs = decoder.embed(tokens_bt), {}
    for layer, (block, layer_key) in enumerate(zip(decoder.blocks, keys, strict=True)):
        hidden_btd, _ = block.attend(hidden_btd, position_bt, rotary, None)
        if isinstance(block.feed_forward, SparseFeedForward):
            outputs[layer] = block.feed_forward.block(hidden_btd, train=train, key=layer_key)
            hidden_btd = outputs[layer].outputs
        else:
            hidden_btd = block.feed(hidden_btd)
    return decoder.head(hidden_btd), outputs


def routing_reports(outputs: Mapping[int, MoEOutput]) -> dict[str, jax.Array]:
    """Scalars by name: the auxiliary losses of all layers, and what each router did.

    Of several microbatches, the mean of a report is the mean of their shares. No name ends in "loss": those are
    cross-entropies, which are shown in bits per byte.

    Args:
      outputs: of each mixture, by layer; for a decoder without any there is nothing to report.
    """
    if not outputs:
        return {}
    reports = {
        "aux/balance": sum_of(out.weighted_balance_loss for out in outputs.values()),
        "aux/router_z": sum_of(out.weighted_router_z_loss for out in outputs.values()),
    }
    for layer, out in outputs.items():
        reports |= {
            f"balance/layer{layer}": out.balance_loss,
            f"router_z/layer{layer}": out.router_z_loss,
            f"router_entropy/layer{layer}": out.metrics.router_entropy,
            f"top_gate/layer{layer}": out.metrics.top_gate,
            f"capacity_used/layer{layer}": out.metrics.capacity_used,
            f"nonfinite_logits/layer{layer}": out.metrics.nonfinite_logits,
        }
        ranks = zip(out.metrics.wanted_a, out.metrics.dropped_a, strict=True)
        for rank, (wanted, dropped) in enumerate(ranks, start=1):
            reports |= {f"wanted/layer{layer}/rank{rank}": wanted, f"dropped/layer{layer}/rank{rank}": dropped}
        for expert, load in enumerate(out.metrics.load_e):
            reports[f"load/layer{layer}/expert{expert:02}"] = load
    return reports


def decoder_places(decoder: Any, mesh: Mesh) -> Any:
    """Where each weight of a decoder lies on a mesh: experts along `expert`, heads and hidden units along `model`.

    Args:
      decoder: with or without mixtures.
      mesh: with any of these axes.

    Returns:
      A pytree of `NamedSharding` like the decoder, for `jax.device_put`.
    """

    def chosen(of_experts: NamedSharding, of_others: NamedSharding) -> NamedSharding:
        return of_others if of_experts.is_fully_replicated else of_experts

    return jax.tree.map(chosen, param_shardings(decoder, mesh), decoder_shardings(decoder, mesh))


def sum_of(values: Any) -> jax.Array:
    """() float32, the sum; 0 of nothing."""
    return sum(values, start=jnp.zeros(()))


def _sparse(config: DecoderConfig, experts: ExpertsConfig, rngs: nnx.Rngs) -> SparseFeedForward:
    return SparseFeedForward(
        experts.layer(config.dim), add_ff_before=experts.add_ff_before, add_ff_after=experts.add_ff_after, rngs=rngs
    )
