"""What a decoder is made of: blocks of attention and feed-forward, rotary positions, the output head."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from spec_jax.cache import KVCache
from spec_jax.config import DecoderConfig
from spec_jax.sharding import over_rows

FeedForwardFactory = Callable[[int, nnx.Rngs], nnx.Module]
"""Makes the feed-forward of a block from (layer index, rngs): a module called as `module(hidden_btd) -> (B, T, D)`,
with its own input norm. An exit's own blocks count on from `depth`."""


def run_blocks(
    blocks: Sequence[Block],
    hidden_btd: jax.Array,
    cache: KVCache | None,
    *,
    no_attention: Collection[int] = (),
    no_feed_forward: Collection[int] = (),
) -> tuple[jax.Array, KVCache | None]:
    """Some blocks on T positions behind the cache, which keeps its lengths; sublayers of the named ones left out."""
    if not blocks:
        return hidden_btd, cache
    batch, positions = hidden_btd.shape[:2]
    start_b = jnp.zeros((batch,), jnp.int32) if cache is None else cache.length_b
    position_bt = start_b[:, None] + jnp.arange(positions, dtype=jnp.int32)[None, :]
    rotary = rotary_angles(position_bt, blocks[0].attention.config)
    for block in blocks:
        if block.layer not in no_attention:
            hidden_btd, cache = block.attend(hidden_btd, position_bt, rotary, cache)
        if block.layer not in no_feed_forward:
            hidden_btd = block.feed(hidden_btd)
    return hidden_btd, cache


class Block(nnx.Module):
    """Residual attention, then residual feed-forward.

    Over a mesh hidden states lie over rows on both sides of either. Left to itself, the compiler would cut attention as
    a layer of experts beside it cuts its tokens, and gather the whole caches; and beside weights that are split over
    the devices of the rows it would move hidden states of all rows, not the weights.
    """

    def __init__(
        self, config: DecoderConfig, layer: int, feed_forward: FeedForwardFactory | None, *, rngs: nnx.Rngs
    ) -> None:
        self.layer = layer
        self.attention = Attention(config, rngs=rngs)
        self.feed_forward = FeedForward(config, rngs=rngs) if feed_forward is None else feed_forward(layer, rngs)

    def attend(
        self,
        hidden_btd: jax.Array,
        position_bt: jax.Array,
        rotary: tuple[jax.Array, jax.Array],
        cache: KVCache | None,
    ) -> tuple[jax.Array, KVCache | None]:
        """T positions through the attention, their keys and values appended to this layer's slots of the cache."""
        hidden_btd = over_rows(hidden_btd)
        query_btnh, key_bkth, value_bkth = self.attention.project(hidden_btd, rotary)
        if cache is not None:
            cache = cache.append(self.layer, key_bkth, value_bkth)
            key_bkth, value_bkth = cache.keys[self.layer], cache.values[self.layer]
        attended_btd = self.attention.attend(query_btnh, key_bkth, value_bkth, position_bt)
        return over_rows(hidden_btd + attended_btd), cache

    def feed(self, hidden_btd: jax.Array) -> jax.Array:
        """T positions through the feed-forward."""
        hidden_btd = over_rows(hidden_btd)
        return over_rows(hidden_btd + self.feed_forward(hidden_btd))


class Attention(nnx.Module):
    """RMS-normed causal attention with rotary positions and, optionally, fewer key-value heads than query heads.

    Weights: `to_qkv` (D, K, C, H), where C are the G = N / K query heads of a key-value head, its key and its value;
    `to_out` (K, G, H, D). A mesh cuts both between key-value heads: what a device computes is what it attends with.
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        kv_heads, group, dim_head = config.num_kv_heads, config.heads // config.num_kv_heads, config.dim_head
        options: dict[str, Any] = {"use_bias": False, "dtype": jnp.dtype(config.dtype), "rngs": rngs}
        self.norm = rms_norm(config, rngs)
        self.to_qkv = nnx.LinearGeneral(config.dim, (kv_heads, group + 2, dim_head), **options)
        self.to_out = nnx.LinearGeneral((kv_heads, group, dim_head), config.dim, axis=(-3, -2, -1), **options)

    def project(
        self, hidden_btd: jax.Array, rotary: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Rotated queries (B, T, N, H), rotated keys and plain values (B, K, T, H)."""
        qkv_btkch = self.to_qkv(self.norm(hidden_btd))
        query_btnh = rotate(rearrange(qkv_btkch[..., :-2, :], "b t k c h -> b t (k c) h"), rotary)
        key_bkth = rearrange(rotate(qkv_btkch[..., -2, :], rotary), "b t k h -> b k t h")
        value_bkth = rearrange(qkv_btkch[..., -1, :], "b t k h -> b k t h")
        return query_btnh, key_bkth, value_bkth

    def attend(
        self, query_btnh: jax.Array, keys_bksh: jax.Array, values_bksh: jax.Array, position_bt: jax.Array
    ) -> jax.Array:
        """Each position attends to the slots up to its own; returns (B, T, D).

        The keys stand on the left of the first product because the contracted axis is then the last one on both
        sides: otherwise XLA transposes the whole key cache at every step on a CPU (8.9 ms a step, not 7.6).
        """
        config = self.config
        query_bkth = rearrange(query_btnh, "b t (k g) h -> b k (g t) h", k=config.num_kv_heads)
        query_bkth = query_bkth * config.dim_head**-0.5
        scores_bkst = jnp.einsum("bksh,bkth->bkst", keys_bksh, query_bkth, preferred_element_type=jnp.float32)
        visible_bts = jnp.arange(keys_bksh.shape[2], dtype=jnp.int32)[None, None, :] <= position_bt[:, :, None]
        visible_b1ts = jnp.tile(visible_bts, (1, config.heads // config.num_kv_heads, 1))[:, None]
        scores_bkts = jnp.where(visible_b1ts, scores_bkst.transpose(0, 1, 3, 2), jnp.finfo(jnp.float32).min)
        weights_bkts = jax.nn.softmax(scores_bkts, axis=-1).astype(values_bksh.dtype)
        mixed_bkth = jnp.einsum("bkts,bksh->bkth", weights_bkts, values_bksh)
        return self.to_out(rearrange(mixed_bkth, "b k (g t) h -> b t k g h", t=query_btnh.shape[1]))


class FeedForward(nnx.Module):
    """RMS norm, linear, GELU, linear."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs) -> None:
        self.norm = rms_norm(config, rngs)
        self.up = linear(config, config.dim, config.dim * config.ff_mult, rngs, use_bias=True)
        self.down = linear(config, config.dim * config.ff_mult, config.dim, rngs, use_bias=True)

    def __call__(self, hidden_btd: jax.Array) -> jax.Array:
        """(B, T, D) to (B, T, D), without the residual."""
        return self.down(jax.nn.gelu(self.up(self.norm(hidden_btd)), approximate=False))


class Head(nnx.Module):
    """RMS norm and projection to float32 logits."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs) -> None:
        self.norm = rms_norm(config, rngs)
        self.to_logits = linear(config, config.dim, config.vocab_size, rngs)

    def __call__(self, hidden_btd: jax.Array) -> jax.Array:
        """(B, T, D) to (B, T, V) float32."""
        return self.to_logits(self.norm(hidden_btd)).astype(jnp.float32)


def linear(
    config: DecoderConfig, in_features: int, out_features: int, rngs: nnx.Rngs, *, use_bias: bool = False
) -> nnx.Linear:
    """A float32 linear layer that computes in the configured dtype."""
    return nnx.Linear(in_features, out_features, use_bias=use_bias, dtype=jnp.dtype(config.dtype), rngs=rngs)


def rms_norm(config: DecoderConfig, rngs: nnx.Rngs) -> nnx.RMSNorm:
    """An RMS norm with float32 statistics and scale."""
    return nnx.RMSNorm(config.dim, epsilon=config.norm_epsilon, dtype=jnp.dtype(config.dtype), rngs=rngs)


def rotary_angles(position_bt: jax.Array, config: DecoderConfig) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine (B, T, 1, H/2) of each position's angles, float32 (RoFormer, 2104.09864, eq. 15)."""
    exponent_h = jnp.arange(0, config.dim_head, 2, dtype=jnp.float32) / config.dim_head
    angle_bth = position_bt[:, :, None].astype(jnp.float32) * config.rotary_base ** -exponent_h[None, None, :]
    return jnp.cos(angle_bth)[:, :, None], jnp.sin(angle_bth)[:, :, None]


def rotate(features_btnh: jax.Array, rotary: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turns feature i of the first half against feature i of the second half by the position's i-th angle."""
    cosine, sine = rotary
    first, second = jnp.split(features_btnh.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate((first * cosine - second * sine, second * cosine + first * sine), axis=-1)
    return turned.astype(features_btnh.dtype)
