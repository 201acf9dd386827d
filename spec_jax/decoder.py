"""The decoder: one forward for training, prefill, one-token decoding and scoring a draft."""

from __future__ import annotations

from collections.abc import Collection

import jax
import jax.numpy as jnp
from flax import nnx, struct

from spec_jax.cache import KVCache
from spec_jax.config import DecoderConfig
from spec_jax.layers import Block, FeedForwardFactory, Head, rms_norm, run_blocks


@struct.dataclass
class DecoderOutput:
    """What one forward gives.

    Attributes:
      logits: (B, T, V) float32, the next token's unnormalised log-probabilities after each position.
      hidden: (B, T, D), the residual stream after the last block, before the head's norm.
      cache: the cache with these T positions appended, or None when none was passed.
      early_hidden: (B, T, D), the residual stream where the early exit branches off: after `early_exit_layer` blocks,
        or after none in a decoder without an exit.
    """

    logits: jax.Array
    hidden: jax.Array
    cache: KVCache | None
    early_hidden: jax.Array


class Decoder(nnx.Module):
    """Embedding, blocks of causal attention and feed-forward, normed output head.

    Holds weights only; the cache goes in and comes out of the call.

    Args:
      config: its sizes.
      rngs: for the initial weights; not kept.
      feed_forward: makes the feed-forward of each block (see `FeedForwardFactory`); None is the usual one.
    """

    def __init__(
        self, config: DecoderConfig, *, rngs: nnx.Rngs, feed_forward: FeedForwardFactory | None = None
    ) -> None:
        self.config = config
        self.embed = nnx.Embed(config.vocab_size, config.dim, dtype=jnp.dtype(config.dtype), rngs=rngs)
        self.blocks = nnx.List([Block(config, layer, feed_forward, rngs=rngs) for layer in range(config.depth)])
        self.head = Head(config, rngs=rngs)
        self.early_exit = None if config.early_exit_layer is None else EarlyExitBranch(config, feed_forward, rngs=rngs)

    def __call__(self, tokens_bt: jax.Array, cache: KVCache | None = None) -> DecoderOutput:
        """Reads T tokens a row, behind what the cache holds of that row.

        Args:
          tokens_bt: (B, T) integers in [0, vocab_size). Without a cache they sit at positions 0…T−1; with one, at
            `cache.length_b + t`.
          cache: what each row has read so far, or None.

        Returns:
          Logits, hidden states, and the cache T positions longer.

        Raises:
          ValueError: no tokens, tokens of another rank or dtype, or more of them than the cache has slots; a cache of
            another batch or model.
        """
        self._check(tokens_bt, cache)
        early_btd, cache = self.early(tokens_bt, cache)
        return self.late(early_btd, cache)

    def early(self, tokens_bt: jax.Array, cache: KVCache | None = None) -> tuple[jax.Array, KVCache | None]:
        """Embedding and the blocks before the early exit: the first half of a forward.

        Returns:
          (B, T, D) hidden states, and the cache with those blocks' slots written; its lengths stay.
        """
        return self.run_blocks(self.embed(tokens_bt), cache, last=self.config.early_exit_layer or 0)

    def late(self, early_btd: jax.Array, cache: KVCache | None = None) -> DecoderOutput:
        """The blocks behind the early exit, and the head: the second half of a forward.

        Args:
          early_btd: (B, T, D) hidden states from `early`, at once or position by position.
          cache: the cache into which `early` has written these T positions, at the length from before them.

        Returns:
          What one forward gives.
        """
        hidden_btd, cache = self.run_blocks(early_btd, cache, first=self.config.early_exit_layer or 0)
        if cache is not None:
            cache = cache.with_length(cache.length_b + early_btd.shape[1])
        return DecoderOutput(logits=self.head(hidden_btd), hidden=hidden_btd, cache=cache, early_hidden=early_btd)

    def run_blocks(
        self, hidden_btd: jax.Array, cache: KVCache | None, *, first: int = 0, last: int | None = None
    ) -> tuple[jax.Array, KVCache | None]:
        """Blocks [first, last) on T positions behind the cache, which keeps its lengths."""
        return run_blocks(self.blocks[first : self.config.depth if last is None else last], hidden_btd, cache)

    def without(
        self,
        tokens_bt: jax.Array,
        cache: KVCache | None,
        *,
        attention: Collection[int] = (),
        feed_forward: Collection[int] = (),
    ) -> tuple[jax.Array, KVCache | None]:
        """A forward that leaves sublayers out: the residual stream passes them by.

        Args:
          tokens_bt: (B, T) integers.
          cache: what each row has read so far, or None.
          attention: layers whose attention is left out; their slots of the cache stay unwritten.
          feed_forward: layers whose feed-forward is left out.

        Returns:
          (B, T, V) logits, and the cache with the other layers' slots written; its lengths stay.
        """
        hidden_btd, cache = run_blocks(
            self.blocks, self.embed(tokens_bt), cache, no_attention=attention, no_feed_forward=feed_forward
        )
        return self.head(hidden_btd), cache

    def init_cache(self, batch: int, size: int, *, layers: int | None = None) -> KVCache:
        """An empty cache of `size` slots a row, in the compute dtype; for all `depth` layers by default."""
        config = self.config
        return KVCache.create(
            batch=batch,
            size=size,
            layers=config.depth if layers is None else layers,
            kv_heads=config.num_kv_heads,
            dim_head=config.dim_head,
            dtype=config.dtype,
        )

    def init_exit_cache(self, batch: int, size: int) -> KVCache | None:
        """An empty cache for the exit's own blocks, or None when it has none."""
        config = self.config
        if not config.early_exit_extra_blocks:
            return None
        return self.init_cache(batch, size, layers=config.early_exit_extra_blocks)

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return self.config.vocab_size

    def _check(self, tokens_bt: jax.Array, cache: KVCache | None) -> None:
        """Raises ValueError where `__call__` does."""
        if not hasattr(tokens_bt, "dtype"):
            raise ValueError(f"tokens must be an array, got a {type(tokens_bt).__name__}")
        if tokens_bt.ndim != 2 or 0 in tokens_bt.shape or not jnp.issubdtype(tokens_bt.dtype, jnp.integer):
            raise ValueError(f"tokens must be (B, T) integers and not empty, got {tokens_bt.shape} {tokens_bt.dtype}")
        if cache is None:
            return
        if not isinstance(cache, KVCache):
            raise ValueError(f"cache must be a KVCache, got a {type(cache).__name__}")
        config, (batch, positions) = self.config, tokens_bt.shape
        if positions > cache.size:
            raise ValueError(f"tokens must fit the cache's {cache.size} slots, got {positions} a row")
        shape = (batch, config.num_kv_heads, cache.size, config.dim_head)
        expected = config.depth * [f"{shape} {config.dtype}"]
        keys, values = ([f"{x.shape} {x.dtype}" for x in arrays] for arrays in (cache.keys, cache.values))
        if keys != expected or values != expected or cache.length_b.shape != (batch,):
            raise ValueError(
                f"cache must be as init_cache({batch}, {cache.size}) gives it, {config.depth} layers of {expected[0]} "
                f"and lengths ({batch},), got {len(keys)} of keys {keys[0]} and values {values[0]} and lengths "
                f"{cache.length_b.shape}"
            )


class EarlyExitBranch(nnx.Module):
    """From the hidden states after `early_exit_layer` blocks to logits: blocks of its own, norm, projection."""

    def __init__(self, config: DecoderConfig, feed_forward: FeedForwardFactory | None, *, rngs: nnx.Rngs) -> None:
        self.config = config
        further = None if feed_forward is None else lambda layer, rngs: feed_forward(config.depth + layer, rngs)
        layers = range(config.early_exit_extra_blocks)
        self.blocks = nnx.List([Block(config, layer, further, rngs=rngs) for layer in layers])
        self.head = Head(config, rngs=rngs)
        # Starts at 0: an exit without recycling, until training finds a use for it.
        self.recycle = Recycle(config, rngs=rngs) if config.early_exit_recycling else None

    def __call__(
        self, early_btd: jax.Array, cache: KVCache | None = None, recycled_btd: jax.Array | None = None
    ) -> tuple[jax.Array, KVCache | None]:
        """The exit's logits.

        Args:
          early_btd: (B, T, D) hidden states from `Decoder.early`.
          cache: of the exit's own blocks, or None.
          recycled_btd: (B, T, D), for each position the trunk's last hidden state of an earlier one, 0 where there is
            none; needed when the exit recycles.

        Returns:
          (B, T, V) float32 logits, and the cache with these positions written; its lengths stay.
        """
        if self.config.detach_early_exit_hiddens:
            early_btd = jax.lax.stop_gradient(early_btd)
        if self.recycle is not None:
            if recycled_btd is None:
                raise ValueError("recycled must be given to an exit with early_exit_recycling, got None")
            early_btd = early_btd + self.recycle(jax.lax.stop_gradient(recycled_btd))
        hidden_btd, cache = run_blocks(self.blocks, early_btd, cache)
        return self.head(hidden_btd), cache


class Recycle(nnx.Module):
    """RMS norm and a projection that starts at 0."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs) -> None:
        self.norm = rms_norm(config, rngs)
        zeros = nnx.initializers.zeros_init()
        dtype = jnp.dtype(config.dtype)
        self.project = nnx.Linear(config.dim, config.dim, use_bias=False, kernel_init=zeros, dtype=dtype, rngs=rngs)

    def __call__(self, hidden_btd: jax.Array) -> jax.Array:
        """(B, T, D) to (B, T, D)."""
        return self.project(self.norm(hidden_btd))
