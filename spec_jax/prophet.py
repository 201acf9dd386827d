"""A target and its prophet: a small decoder that starts from the target's hidden states and goes on token by token."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx, struct

from spec_jax.cache import KVCache
from spec_jax.decoder import Decoder, DecoderOutput
from spec_jax.scalars import check_integer


class ProphetModel(nnx.Module):
    """What drafts: a small decoder, and the projection of the target's hidden states to its width.

    A window holds the target's hidden states at `num_leading_start_tokens` consecutive positions, then the tokens
    behind them:

        position       0      1      2        3        …
        input          h_i    h_i+1  x_i+2    x_i+3    …     (two start states)
        predicts       x_i+1  x_i+2  x_i+3    x_i+4    …

    Training and drafting use the same layout. Positions are counted from the start of the window.
    """

    def __init__(self, decoder: Decoder, *, target_dim: int, num_leading_start_tokens: int = 1, rngs: nnx.Rngs) -> None:
        if not isinstance(decoder, Decoder):
            raise ValueError(f"decoder must be a Decoder, got {type(decoder).__name__}")
        check_integer("target_dim", target_dim, 1)
        check_integer("num_leading_start_tokens", num_leading_start_tokens, 1)
        if decoder.early_exit is not None:
            raise ValueError("prophet must be a Decoder without an early exit, got one with it")
        self.decoder = decoder
        # NumPy's integers promote what they meet, and narrow ones overflow.
        self.num_leading_start_tokens = int(num_leading_start_tokens)
        dim, dtype = decoder.config.dim, jnp.dtype(decoder.config.dtype)
        self.project = (
            None if dim == target_dim else nnx.Linear(target_dim, dim, use_bias=False, dtype=dtype, rngs=rngs)
        )

    def check_target(self, target: Decoder) -> None:
        """Raises ValueError unless the target's hidden states are as wide as it starts from."""
        expected = self.decoder.config.dim if self.project is None else self.project.in_features
        if (dim := target.config.dim) != expected:
            raise ValueError(f"target must have the width {expected} that the prophet starts from, got {dim}")

    def embed(self, states_bnd: jax.Array, tokens_bt: jax.Array) -> jax.Array:
        """(B, N + T, D) inputs: the target's hidden states (B, N, target's width), then the tokens' embeddings."""
        embedded_btd = self.decoder.embed(tokens_bt)
        projected_bnd = states_bnd if self.project is None else self.project(states_bnd)
        return jnp.concatenate((projected_bnd.astype(embedded_btd.dtype), embedded_btd), axis=1)

    def read(self, inputs_btd: jax.Array, cache: KVCache | None = None) -> DecoderOutput:
        """A forward over inputs from `embed`."""
        return self.decoder.late(inputs_btd, cache)


@struct.dataclass
class PairOutput:
    """What one training forward of target and prophet gives.

    Attributes:
      logits: (B, T, V) float32, the target's.
      prophet_logits: (B, W, P − 1, V) float32, the prophet's in every window: W = T + 2 − P of them.
    """

    logits: jax.Array
    prophet_logits: jax.Array


class ModelWithProphet(nnx.Module):
    """A target and its prophet, trained together.

    Made from a target and a small decoder, or, for an optimiser that keeps the two apart, from a target and a
    `ProphetModel`, whose `num_leading_start_tokens` then counts.

    Attributes:
      target: the model.
      prophet: what drafts for it.
      prophet_train_length: P, tokens of a training window, the last one only predicted. A draft of gamma tokens is
        as long as a window of num_leading_start_tokens + gamma + 1.
      detach_target_hiddens: whether the prophet's gradient stops at the target's hidden states.
    """

    def __init__(
        self,
        target: Decoder,
        prophet: Decoder | ProphetModel,
        *,
        prophet_train_length: int = 8,
        num_leading_start_tokens: int = 1,
        detach_target_hiddens: bool = False,
        rngs: nnx.Rngs | None = None,
    ) -> None:
        if not isinstance(target, Decoder):
            raise ValueError(f"target must be a Decoder, got {type(target).__name__}")
        if not isinstance(prophet, Decoder | ProphetModel):
            raise ValueError(f"prophet must be a Decoder or a ProphetModel, got {type(prophet).__name__}")
        check_integer("prophet_train_length", prophet_train_length, 2)
        if isinstance(prophet, Decoder):
            if rngs is None:
                raise ValueError("rngs must be given with a Decoder as prophet, got None")
            starts = num_leading_start_tokens
            prophet = ProphetModel(prophet, target_dim=target.config.dim, num_leading_start_tokens=starts, rngs=rngs)
        num_leading_start_tokens, vocab_size = prophet.num_leading_start_tokens, prophet.decoder.vocab_size
        if vocab_size != target.vocab_size:
            raise ValueError(f"prophet must have the target's {target.vocab_size} tokens, got {vocab_size}")
        prophet.check_target(target)
        if prophet_train_length <= num_leading_start_tokens:
            raise ValueError(
                f"prophet_train_length must be above num_leading_start_tokens = {num_leading_start_tokens}, "
                f"got {prophet_train_length}"
            )
        self.target = target
        self.prophet = prophet
        self.prophet_train_length = int(prophet_train_length)
        self.detach_target_hiddens = detach_target_hiddens

    def __call__(self, tokens_bt: jax.Array) -> PairOutput:
        """Target on the sequences, prophet on every window of each, in one batched call.

        Args:
          tokens_bt: (B, T + 1) integers, T + 1 ≥ P; the last one is only predicted.

        Returns:
          Both logits.

        Raises:
          ValueError: no sequences, or shorter than a window.
        """
        if tokens_bt.ndim != 2 or tokens_bt.shape[1] < self.prophet_train_length:
            raise ValueError(
                f"tokens must be rows of at least prophet_train_length = {self.prophet_train_length}, "
                f"got {tokens_bt.shape}"
            )
        output = self.target(tokens_bt[:, :-1])
        hidden_btd = jax.lax.stop_gradient(output.hidden) if self.detach_target_hiddens else output.hidden
        starts = self.prophet.num_leading_start_tokens
        states_bwnd = self.windows(hidden_btd)[:, :, :starts]
        following_bwt = self.windows(tokens_bt[:, :-1])[:, :, starts:]
        batch, count = following_bwt.shape[:2]
        inputs = self.prophet.embed(
            states_bwnd.reshape(batch * count, starts, -1), following_bwt.reshape(batch * count, -1)
        )
        prophet_logits = self.prophet.read(inputs).logits
        return PairOutput(output.logits, prophet_logits.reshape(batch, count, *prophet_logits.shape[1:]))

    def windows(self, values_bt: jax.Array) -> jax.Array:
        """(B, T, …) cut into (B, W, P − 1, …): window i starts at position i."""
        width = self.prophet_train_length - 1
        count = values_bt.shape[1] - width + 1
        # A NumPy array has no traced indices.
        values_bt = jnp.asarray(values_bt)
        return values_bt[:, jnp.arange(count, dtype=jnp.int32)[:, None] + jnp.arange(width, dtype=jnp.int32)[None, :]]
