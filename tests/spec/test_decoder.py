"""The decoder: one forward, cached or not, is causal, and its options do what they say."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from spec_jax import Decoder, DecoderConfig
from spec_jax.layers import rms_norm, rotary_angles, rotate
from tests.spec.transformers import CONFIG, cached, transformer, uncached

GROUPED = dataclasses.replace(CONFIG, heads=4, dim_head=8, kv_heads=2)
LENGTH = 12
TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (3, LENGTH))


@pytest.mark.parametrize("config", [CONFIG, GROUPED], ids=["all heads", "grouped"])
def test_cached_equals_uncached_at_every_split(config: DecoderConfig):
    """Logits, hidden states and lengths, to float32 rounding of sums in another order.

    Both parts are fed 12 wide, so that one program serves all splits: the first is rolled back to the split, and
    behind the second stands what must not matter.
    """
    decoder = transformer(0, config)
    whole = uncached(decoder, TOKENS)
    for split in range(1, LENGTH):
        first = cached(decoder, TOKENS, decoder.init_cache(3, 2 * LENGTH))
        rolled_back = first.cache.with_length(jnp.full((3,), split))
        second = cached(decoder, np.roll(TOKENS, -split, axis=1), rolled_back)
        assert second.cache.length_b.tolist() == [split + LENGTH] * 3
        for name in ("logits", "hidden"):
            parts = getattr(first, name)[:, :split], getattr(second, name)[:, : LENGTH - split]
            np.testing.assert_allclose(np.concatenate(parts, 1), getattr(whole, name), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("split", [1, 5])
def test_cached_equals_uncached_in_two_parts(split: int):
    """The same with parts of their own width, and no slot to spare."""
    decoder = transformer(0)
    first = cached(decoder, TOKENS[:, :split], decoder.init_cache(3, LENGTH))
    second = cached(decoder, TOKENS[:, split:], first.cache)
    parts = np.concatenate((first.logits, second.logits), axis=1)
    np.testing.assert_allclose(parts, uncached(decoder, TOKENS).logits, atol=2e-5, rtol=1e-5)


def test_one_token_at_a_time():
    decoder = transformer(0)
    cache, logits = decoder.init_cache(3, LENGTH), []
    for position in range(LENGTH):
        output = cached(decoder, TOKENS[:, position : position + 1], cache)
        cache = output.cache
        logits.append(output.logits)
    np.testing.assert_allclose(jnp.concatenate(logits, 1), uncached(decoder, TOKENS).logits, atol=2e-5, rtol=1e-5)


def test_ragged_append_and_roll_back():
    """Rows continue from lengths of their own, over leftovers of a longer text that was rolled back."""
    decoder = transformer(0, GROUPED)
    other = np.random.default_rng(1).integers(0, CONFIG.vocab_size, (3, LENGTH))
    length_b = np.array([1, 4, 9])
    start = np.where(np.arange(LENGTH) < length_b[:, None], TOKENS, other)
    cache = cached(decoder, start, decoder.init_cache(3, LENGTH + 4)).cache.with_length(jnp.asarray(length_b))
    window = np.stack([row[length : length + 3] for row, length in zip(TOKENS, length_b)])
    output = cached(decoder, window, cache)
    assert output.cache.length_b.tolist() == [4, 7, 12]
    whole = uncached(decoder, TOKENS).logits
    for row, length in enumerate(length_b):
        np.testing.assert_allclose(output.logits[row], whole[row, length : length + 3], atol=2e-5, rtol=1e-5)


def test_gradients_do_not_reach_back():
    """d logits[t] / d embedding[s]: zero for every s > t, not zero for every s ≤ t."""
    decoder = transformer(0)

    def logits_of(hidden_btd: jax.Array) -> jax.Array:
        return decoder.head(decoder.run_blocks(hidden_btd, None)[0])[0].sum(-1)

    hidden = decoder.embed(jnp.asarray(TOKENS[:1]))
    reach_ts = np.abs(np.asarray(jax.jit(jax.jacrev(logits_of))(hidden))).sum((1, 3))
    assert (reach_ts[np.triu_indices(LENGTH, 1)] == 0).all()
    assert (reach_ts[np.tril_indices(LENGTH)] > 0).all()


def with_config(config: DecoderConfig, source: Decoder) -> Decoder:
    """A decoder of another configuration with the leaves of `source`, in the same order."""
    structure = jax.tree.structure(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
    return jax.tree.unflatten(structure, jax.tree.leaves(source))


def test_grouped_heads_repeat_keys_and_values():
    """4 query heads on 2 key-value heads are 4 on 4 whose keys and values are those 2, each twice."""

    def repeated(path: tuple, weight: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path)
        if "to_out" in name:
            return weight.reshape(4, 1, 8, -1)
        if "to_qkv" not in name:
            return weight
        query_dkgh, both_dksh = np.split(np.asarray(weight), (2,), axis=2)
        query_dn1h = query_dkgh.reshape(-1, 4, 1, 8)
        return jnp.asarray(np.concatenate((query_dn1h, np.repeat(both_dksh, 2, axis=1)), axis=2))

    grouped = transformer(0, GROUPED)
    ungrouped = dataclasses.replace(GROUPED, kv_heads=None)
    full = with_config(ungrouped, jax.tree_util.tree_map_with_path(repeated, grouped))
    np.testing.assert_allclose(uncached(full, TOKENS).logits, uncached(grouped, TOKENS).logits, atol=2e-5, rtol=1e-5)


@pytest.mark.mixed_dtypes
def test_bfloat16_computes_close_with_float32_logits_and_weights():
    """Relative to the logits' own spread of 4: bfloat16 has 8 bits, and there are two blocks."""
    decoder = with_config(dataclasses.replace(CONFIG, dtype="bfloat16"), transformer(0))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(decoder))
    output = uncached(decoder, TOKENS)
    assert output.logits.dtype == jnp.float32
    assert output.hidden.dtype == jnp.bfloat16
    exact = np.asarray(uncached(transformer(0), TOKENS).logits)
    assert exact.std() > 2
    error = np.abs(np.asarray(output.logits) - exact)
    assert error.mean() < 0.02 * exact.std()
    assert error.max() < 0.15 * exact.std()
    assert error.max() > 1e-3, "this is not bfloat16"
    step = cached(decoder, TOKENS, decoder.init_cache(3, LENGTH))
    assert step.cache.keys[0].dtype == step.cache.values[0].dtype == jnp.bfloat16
    np.testing.assert_allclose(step.logits, output.logits, atol=0.15 * exact.std())


class Doubling(nnx.Module):
    """A feed-forward that adds what it gets, times a weight of its own that depends on the layer."""

    def __init__(self, layer: int) -> None:
        self.scale = nnx.Param(jnp.float32(layer + 1))

    def __call__(self, hidden_btd: jax.Array) -> jax.Array:
        return hidden_btd * self.scale[...]


def test_feed_forward_that_is_passed_in_is_used():
    """Against attention and doubling put together by hand."""
    decoder = Decoder(CONFIG, rngs=nnx.Rngs(0), feed_forward=lambda layer, rngs: Doubling(layer))
    plain = Decoder(CONFIG, rngs=nnx.Rngs(0))
    assert len(jax.tree.leaves(decoder)) == len(jax.tree.leaves(plain)) - 5 * 2 + 2
    hidden = decoder.embed(jnp.asarray(TOKENS))
    position_bt = jnp.broadcast_to(jnp.arange(LENGTH)[None], TOKENS.shape)
    rotary = rotary_angles(position_bt, CONFIG)
    for layer in range(CONFIG.depth):
        attention = decoder.blocks[layer].attention
        hidden = hidden + attention.attend(*attention.project(hidden, rotary), position_bt)
        hidden = hidden * (layer + 2)
    output = decoder(jnp.asarray(TOKENS))
    np.testing.assert_allclose(output.hidden, hidden, rtol=1e-5, atol=1e-5)


def test_rotary_is_relative():
    """The product of a query and a key depends on their distance and not on where they stand."""
    features = np.random.default_rng(2).normal(size=(2, 1, 1, 1, 16)).astype(np.float32)

    def score(query_position: int, key_position: int) -> float:
        turned = [
            rotate(jnp.asarray(x), rotary_angles(jnp.full((1, 1), position), CONFIG))
            for x, position in zip(features, (query_position, key_position))
        ]
        return float((turned[0] * turned[1]).sum())

    assert score(9, 4) == pytest.approx(score(105, 100), abs=1e-4)
    assert abs(score(9, 4) - score(9, 5)) > 1e-2


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (np.zeros((3,), np.int32), r"tokens must be \(B, T\) integers and not empty, got \(3,\) int32"),
        (np.zeros((2, 3), np.float32), r"tokens must be \(B, T\) integers and not empty, got \(2, 3\) float32"),
        (np.zeros((3, 0), np.int32), r"tokens must be \(B, T\) integers and not empty, got \(3, 0\) int32"),
        ([[1, 2]], "tokens must be an array, got a list"),
        (np.zeros((3, 9), np.int32), r"tokens must fit the cache's 8 slots, got 9 a row"),
    ],
)
def test_bad_tokens(tokens: Any, message: str):
    decoder = transformer(0)
    with pytest.raises(ValueError, match=message):
        decoder(tokens, decoder.init_cache(3, 8))


@pytest.mark.parametrize(
    ("changed", "batch"), [({"depth": 1}, 3), ({"depth": 3}, 3), ({"heads": 4}, 3), ({"dim_head": 8}, 3), ({}, 1)]
)
def test_a_cache_of_another_model_or_batch(changed: dict, batch: int):
    """One of more layers would pass unnoticed, and the others fail far from the cause."""
    decoder, other = transformer(0), transformer(0, dataclasses.replace(CONFIG, **changed))
    with pytest.raises(ValueError, match=r"cache must be as init_cache\(3, 8\) gives it, 2 layers of .*, got "):
        decoder(jnp.zeros((3, 2), jnp.int32), other.init_cache(batch, 8))


@pytest.mark.parametrize("part", ["dtype", "values", "lengths", "kind"])
def test_a_cache_of_which_a_part_is_anothers(part: str):
    """What would pass unnoticed, or fail in the words of an operation within."""
    decoder = transformer(0)
    cache: Any = decoder.init_cache(3, 8)
    other = transformer(0, dataclasses.replace(CONFIG, dtype="bfloat16")).init_cache(3, 8)
    message = r"cache must be as init_cache\(3, 8\) gives it, 2 layers of .* float32 and lengths \(3,\), got 2 of keys "
    if part == "dtype":
        cache, message = other, message + r".* bfloat16 and values .* bfloat16 and lengths \(3,\)"
    elif part == "values":
        cache, message = dataclasses.replace(cache, values=other.values), message + ".* float32 and values .* bfloat16"
    elif part == "lengths":
        cache, message = cache.with_length(jnp.zeros(2, jnp.int32)), message + r".* float32 and lengths \(2,\)"
    else:
        cache, message = cache.keys, "cache must be a KVCache, got a tuple"
    with pytest.raises(ValueError, match=message):
        decoder(jnp.zeros((3, 2), jnp.int32), cache)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 0}, "dim must be at least 1, got 0"),
        ({"dim": 32.5}, "dim must be an integer, got 32.5"),
        ({"rotary_base": 0.0}, "rotary_base must be a finite number above 0, got 0.0"),
        ({"norm_epsilon": 0.0}, "norm_epsilon must be a finite number above 0, got 0.0"),
        ({"norm_epsilon": -1.0}, "norm_epsilon must be a finite number above 0, got -1.0"),
        ({"vocab_size": -1}, "vocab_size must be at least 1, got -1"),
        ({"depth": 0}, "depth must be at least 1, got 0"),
        ({"kv_heads": 0}, "kv_heads must be at least 1, got 0"),
        ({"rotary_base": float("inf")}, "rotary_base must be a finite number above 0, got inf"),
        ({"norm_epsilon": float("inf")}, "norm_epsilon must be a finite number above 0, got inf"),
        ({"ff_mult": 0}, "^ff_mult must be at least 1, got 0"),
        ({"heads": 0}, "^heads must be at least 1, got 0"),
        ({"dim_head": 0}, "^dim_head must be at least 1, got 0"),
        ({"detach_early_exit_hiddens": True}, "detach_early_exit_hiddens must not be set without"),
        ({"dim_head": 7}, "dim_head must be even for rotary embeddings, got 7"),
        ({"heads": 8, "kv_heads": 3}, "kv_heads must divide heads = 8, got 3"),
        ({"dtype": "float16"}, "dtype must be 'float32' or 'bfloat16', got 'float16'"),
        ({"rotary_base": "10000"}, "rotary_base must be a finite number above 0, got '10000'"),
        ({"rotary_base": 10**400}, "rotary_base must be a finite number above 0, got 1000"),
        (
            {"early_exit_layer": 1, "detach_early_exit_hiddens": "no"},
            "detach_early_exit_hiddens must be a bool, got 'no'",
        ),
        ({"norm_epsilon": None}, "norm_epsilon must be a finite number above 0, got None"),
        *(
            (
                {"early_exit_layer": layer},
                rf"early_exit_layer must be an integer in \[1, depth = 10\) .*, got {layer!r}",
            )
            for layer in (10, 1.5, True, "2")
        ),
    ],
)
def test_bad_configuration(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        DecoderConfig(**arguments)


@pytest.mark.parametrize("x64", [False, True])
def test_numbers_that_jax_would_not_take(x64: bool):
    """An integer beyond int32, and NumPy's float64, which promotes float32."""
    given = DecoderConfig(vocab_size=5, dim=8, depth=1, rotary_base=10**10, norm_epsilon=np.float64(1e-5))
    tokens = jnp.zeros((1, 2), jnp.int32)
    with jax.enable_x64(x64), jax.numpy_dtype_promotion("strict"):
        logits = Decoder(given, rngs=nnx.Rngs(0))(tokens).logits
        expected = Decoder(dataclasses.replace(given, rotary_base=1e10), rngs=nnx.Rngs(0))(tokens).logits
    np.testing.assert_array_equal(logits, expected)
    assert logits.dtype == jnp.float32


def test_scores_are_float32_under_bfloat16():
    """256 and 257 are one number in bfloat16, and the softmax tells them apart."""
    config = DecoderConfig(vocab_size=2, dim=4, depth=1, heads=1, dim_head=4, dtype="bfloat16")
    attention = Decoder(config, rngs=nnx.Rngs(0)).blocks[0].attention
    attention.to_out.kernel[...] = jnp.eye(4)
    query_btnh = jnp.array([[[[32, 2, 0, 0]]]], jnp.bfloat16)
    keys_bksh = jnp.array([[[[16, 0, 0, 0], [16, 1, 0, 0]]]], jnp.bfloat16)
    values_bksh = jnp.eye(2, 4, dtype=jnp.bfloat16)[None, None]
    mixed_btd = attention.attend(query_btnh, keys_bksh, values_bksh, jnp.array([[1]]))
    np.testing.assert_allclose(mixed_btd[0, 0].astype(jnp.float32), [0.269, 0.731, 0, 0], atol=5e-3)


def test_norm_epsilon_is_added_to_the_mean_square():
    features_btd = np.random.default_rng(0).normal(size=(1, 3, CONFIG.dim)).astype(np.float32)
    norm = rms_norm(dataclasses.replace(CONFIG, norm_epsilon=3.0), nnx.Rngs(0))
    expected = features_btd / np.sqrt((features_btd**2).mean(-1, keepdims=True) + 3.0)
    np.testing.assert_allclose(norm(jnp.asarray(features_btd)), expected, rtol=1e-5)


def test_rotary_base():
    cosine, sine = rotary_angles(jnp.array([[3]]), dataclasses.replace(CONFIG, rotary_base=100.0))
    angle_h = 3 * 100.0 ** -(np.arange(8) / 8)
    np.testing.assert_allclose(cosine.ravel(), np.cos(angle_h), atol=1e-6)
    np.testing.assert_allclose(sine.ravel(), np.sin(angle_h), atol=1e-6)


def test_defaults_are_the_originals():
    config = DecoderConfig()
    sizes = (config.vocab_size, config.dim, config.depth, config.heads, config.dim_head, config.ff_mult)
    assert sizes == (256, 512, 10, 8, 64, 4)


def test_rotary_angles_of_far_positions():
    """Beyond what bfloat16 counts to."""
    _, sine = rotary_angles(jnp.array([[1001]]), CONFIG)
    np.testing.assert_allclose(sine.ravel(), np.sin(1001 * 10_000.0 ** -(np.arange(8) / 8)), atol=1e-3)


def test_bfloat16_is_rotated_in_float32():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 1, 2, 16)), jnp.bfloat16)
    rotary = rotary_angles(jnp.full((1, 1), 1000), CONFIG)
    np.testing.assert_array_equal(rotate(x, rotary), rotate(x.astype(jnp.float32), rotary).astype(jnp.bfloat16))
