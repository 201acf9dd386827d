"""The prophet: training windows and decoding windows are the same, and losses and gradients are what they say."""

from __future__ import annotations

import dataclasses
import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from spec_jax import ModelWithProphet, Prophet, ProphetModel, speculative_decoding
from spec_jax.drafters.base import Sequence
from spec_jax.losses import next_token_loss, prophet_distillation_loss, prophet_losses
from tests.spec.strategies import drafting_what_is_there, random_pair
from tests.spec.transformers import CONFIG, cached, transformer, uncached

TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (3, 14)).astype(np.int32)


@partial(jax.jit, static_argnames="gamma")
def drafted_logits(pair: ModelWithProphet, length_b: jax.Array, *, gamma: int) -> jax.Array:
    """(B, J, V) logits that one decoding round sees behind the first tokens of each row, drafting the true ones."""
    prefill = pair.target(jnp.asarray(TOKENS[:, :12]))
    sequence = Sequence(jnp.asarray(TOKENS), length_b)
    drafter = Prophet(pair, gamma=gamma)
    choose = drafting_what_is_there(sequence)
    state = drafter.start(pair.target, sequence, prefill, 32)
    return drafter.propose(pair.target, sequence, None, state, choose).draft.log_probs_bjv


@jax.jit
def read(pair: ModelWithProphet, states_bnd: jax.Array, tokens_bt: jax.Array) -> jax.Array:
    """(B, T, V) logits of the prophet behind some of the target's states, then tokens."""
    return pair.prophet.read(pair.prophet.embed(states_bnd, tokens_bt)).logits


@pytest.mark.parametrize("starts", [1, 2, 3])
def test_training_window_equals_decoding_round(starts: int):
    """The window at i holds states i … i + n − 1 and then tokens; a round with length i + n + 1 draws from it."""
    pair = random_pair(CONFIG, num_leading_start_tokens=starts, prophet_train_length=starts + 4)
    windows = np.asarray(uncached(pair, TOKENS).prophet_logits)
    length_b = np.array([starts + 1, 8, 10])
    drafted = np.asarray(drafted_logits(pair, length_b, gamma=3))
    for row, length in enumerate(length_b):
        expected = windows[row, length - 1 - starts, starts:]
        np.testing.assert_allclose(drafted[row], expected, atol=1e-5)
    assert np.abs(drafted[1] - windows[1, 8 - starts, starts:]).max() > 0.1, "the next window is another one"


def test_a_short_row_starts_from_the_states_it_has():
    """With three start states and one, two or three known tokens: none, one or two states, then the last token."""
    pair = random_pair(CONFIG, num_leading_start_tokens=3, prophet_train_length=8)
    drafted = np.asarray(drafted_logits(pair, np.array([1, 2, 3]), gamma=2))
    hidden = np.asarray(uncached(pair.target, TOKENS[:, :12]).hidden)
    for row, states in enumerate((0, 1, 2)):
        logits = read(pair, hidden[row : row + 1, :states], TOKENS[row : row + 1, states:][:, :2])
        expected = np.asarray(logits)[0, states:]
        np.testing.assert_allclose(drafted[row], expected, atol=1e-5)


def test_start_states_follow_each_rows_own_position():
    """After a round the states are those of one forward over all that is then known."""
    pair = random_pair(CONFIG)
    drafter, length_b, emitted_b = Prophet(pair, gamma=3), jnp.array([2, 5, 7]), jnp.array([1, 4, 2])
    whole = uncached(pair.target, TOKENS)
    sequence = Sequence(jnp.asarray(TOKENS), length_b)
    state = drafter.start(pair.target, sequence, whole, 32)
    cache = cached(pair.target, TOKENS, pair.target.init_cache(3, 20)).cache
    scored = cached(pair.target, sequence.window(length_b - 1, 4), cache.with_length(length_b - 1))
    after = drafter.update(state, scored, emitted_b)
    expected = drafter.start(pair.target, Sequence(jnp.asarray(TOKENS), length_b + emitted_b), whole, 32)
    np.testing.assert_allclose(after[1:], expected[1:], atol=1e-5)
    np.testing.assert_allclose(after[0, 1:], expected[0, 1:], atol=1e-5)


def test_the_drafter_holds_no_second_target():
    pair = random_pair(CONFIG)
    weights = sum(leaf.size for leaf in jax.tree.leaves(Prophet(pair)))
    assert weights == sum(leaf.size for leaf in jax.tree.leaves(pair.prophet))
    assert weights < 0.5 * sum(leaf.size for leaf in jax.tree.leaves(pair))


def test_losses_are_means_over_all_windows():
    pair, tokens = random_pair(CONFIG), jnp.asarray(TOKENS)
    output = uncached(pair, tokens)
    main, prophet = prophet_losses(pair, output, tokens)
    np.testing.assert_allclose(
        main, next_token_loss(uncached(pair.target, tokens[:, :-1]).logits, tokens[:, 1:]), rtol=1e-6
    )
    surprises = []
    for row in range(3):
        for start in range(14 - 6 + 1):
            window = tokens[row : row + 1, start : start + 6]
            hidden = uncached(pair.target, tokens[row : row + 1, :-1]).hidden[:, start : start + 2]
            logits = read(pair, hidden, window[:, 2:-1])
            surprises.append(float(next_token_loss(logits, window[:, 1:])))
    np.testing.assert_allclose(prophet, np.mean(surprises), rtol=1e-5)


def test_distillation_compares_the_same_positions():
    """0 when the prophet says what the target says, at every place of every window."""
    pair, tokens = random_pair(CONFIG), jnp.asarray(TOKENS)
    output = uncached(pair, tokens)
    assert prophet_distillation_loss(pair, output) > 0.1
    perfect = dataclasses.replace(output, prophet_logits=pair.windows(output.logits) + 3.0)
    assert abs(prophet_distillation_loss(pair, perfect)) < 1e-6
    shifted = dataclasses.replace(output, prophet_logits=jnp.roll(pair.windows(output.logits), 1, axis=2))
    assert prophet_distillation_loss(pair, shifted) > 0.1


def test_losses_without_padding():
    """Of a row that ends early, what a shorter row has, whatever its padding is."""
    pair, tokens = random_pair(CONFIG), jnp.asarray(TOKENS)[:1]
    mask = jnp.arange(tokens.shape[1])[None] < 9
    padded = jnp.where(mask, tokens, 3)
    masked, short = uncached(pair, padded), uncached(pair, tokens[:, :9])
    of_target, of_prophet = prophet_losses(pair, masked, jnp.where(mask, tokens, -100), mask_bt=mask)
    np.testing.assert_allclose(of_target, prophet_losses(pair, short, tokens[:, :9])[0], rtol=1e-5)
    # Windows of 5 predictions from hidden states at 2 or more: by hand, those that end in the padding in part.
    next_tokens, counted = pair.windows(tokens[:, 1:]), np.asarray(pair.windows(mask[:, 1:]))
    log_probs = np.asarray(jax.nn.log_softmax(masked.prophet_logits))
    surprise = -np.take_along_axis(log_probs, np.asarray(next_tokens)[..., None], -1)[..., 0]
    assert 0 < counted.sum() < counted.size
    np.testing.assert_allclose(of_prophet, surprise[counted].mean(), rtol=1e-5)
    target_log_probs = np.asarray(jax.nn.log_softmax(pair.windows(masked.logits)))
    divergence = (np.exp(target_log_probs) * (target_log_probs - log_probs)).sum(-1)
    of_distillation = prophet_distillation_loss(pair, masked, mask_bt=mask)
    np.testing.assert_allclose(of_distillation, divergence[counted].mean(), rtol=1e-5)
    with pytest.raises(ValueError, match="mask must be"):
        prophet_losses(pair, masked, padded, mask_bt=mask[:, 1:])
    with pytest.raises(ValueError, match="mask must be"):
        prophet_distillation_loss(pair, masked, mask_bt=mask[:, 1:])
    for others in (tokens[0], tokens[:, 1:]):
        with pytest.raises(ValueError, match=r"tokens must be \(1, 14\), those of output, got"):
            prophet_losses(pair, masked, others)
    longer = random_pair(CONFIG, prophet_train_length=9)
    for losses in (partial(prophet_losses, tokens_bt=tokens), prophet_distillation_loss):
        with pytest.raises(ValueError, match="output must have windows of prophet_train_length = 9, got 6"):
            losses(longer, masked)


@pytest.mark.parametrize("detach", [False, True])
def test_detaching_stops_the_prophets_loss_at_the_target(detach: bool):
    pair, tokens = random_pair(CONFIG, detach_target_hiddens=detach), jnp.asarray(TOKENS)
    gradients = jax.jit(jax.grad(lambda pair: prophet_losses(pair, pair(tokens), tokens)[1]))(pair)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradients.target))
    assert (largest == 0) == detach
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients.prophet):
        assert np.abs(gradient).max() > 1e-6, jax.tree_util.keystr(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_leading_start_tokens": 0}, "num_leading_start_tokens must be at least 1, got 0"),
        ({"num_leading_start_tokens": 1.5}, "num_leading_start_tokens must be an integer, got 1.5"),
        ({"prophet_train_length": 6.5}, "prophet_train_length must be an integer, got 6.5"),
        (
            {"prophet_train_length": 2},
            "prophet_train_length must be above num_leading_start_tokens = 2, got 2",
        ),
    ],
)
def test_bad_configuration(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        random_pair(CONFIG, **options)


def test_a_prophet_as_wide_as_the_target_starts_from_the_states_as_they_are():
    pair = ModelWithProphet(transformer(0), transformer(1), rngs=nnx.Rngs(0))
    states_bnd = jnp.asarray(np.random.default_rng(0).normal(size=(3, 1, CONFIG.dim)), jnp.float32)
    np.testing.assert_array_equal(pair.prophet.embed(states_bnd, jnp.asarray(TOKENS))[:, :1], states_bnd)


def test_a_sequence_as_long_as_a_window_is_one():
    pair = random_pair(CONFIG, prophet_train_length=6)
    assert pair(jnp.asarray(TOKENS[:, :6])).prophet_logits.shape == (3, 1, 5, CONFIG.vocab_size)


def test_lengths_of_numpy_are_those_of_python():
    """An int64 would be promoted by what it meets, and an int8 cannot hold where windows start."""
    results = []
    for starts, train_length in ((2, 8), (np.int64(2), np.int8(8))):
        pair = random_pair(CONFIG, num_leading_start_tokens=starts, prophet_train_length=train_length)
        tokens = jnp.zeros((1, 200), jnp.int32)
        losses = prophet_losses(pair, pair(tokens), tokens)
        with jax.enable_x64(True):
            decoded = speculative_decoding(
                pair.target, Prophet(pair, gamma=2), np.zeros((2, 3), int), max_new_tokens=4, key=jax.random.key(0)
            )
        results.append((losses, decoded.tokens))
    jax.tree.map(np.testing.assert_array_equal, *results)


def test_tokens_and_masks_of_numpy_in_a_program():
    """As `Decoder` takes them, closed over."""
    pair, mask_bt = random_pair(CONFIG), np.arange(14)[None, :] < np.array([14, 12, 9])[:, None]

    def losses(tokens_bt: Any, mask_bt: Any) -> tuple[jax.Array, ...]:
        output = pair(tokens_bt)
        return (
            *prophet_losses(pair, output, tokens_bt, mask_bt=mask_bt),
            prophet_distillation_loss(pair, output, mask_bt=mask_bt),
        )

    expected = losses(jnp.asarray(TOKENS), jnp.asarray(mask_bt))
    for got in (losses(TOKENS, mask_bt), jax.jit(lambda: losses(TOKENS, mask_bt))()):
        np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_bad_input():
    for shape in ((1, 5), (8,)):
        got = re.escape(str(shape))
        with pytest.raises(ValueError, match=f"tokens must be rows of at least prophet_train_length = 6, got {got}"):
            random_pair(CONFIG)(jnp.zeros(shape, jnp.int32))
    other = transformer(0, dataclasses.replace(CONFIG, vocab_size=25))
    with pytest.raises(ValueError, match="prophet must have the target's 24 tokens, got 25"):
        ModelWithProphet(transformer(0), other, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="target must be a Decoder, got NoneType"):
        ModelWithProphet(None, transformer(0), rngs=nnx.Rngs(0))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="decoder must be a Decoder, got NoneType"):
        ProphetModel(None, target_dim=8, rngs=nnx.Rngs(0))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="target_dim must be at least 1, got 0"):
        ProphetModel(transformer(0), target_dim=0, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="prophet must be a Decoder without an early exit"):
        ModelWithProphet(
            transformer(0), transformer(0, dataclasses.replace(CONFIG, early_exit_layer=1)), rngs=nnx.Rngs(0)
        )
    with pytest.raises(ValueError, match="rngs must be given"):
        ModelWithProphet(transformer(0), transformer(1))
    with pytest.raises(ValueError, match="prophet must be a Decoder or a ProphetModel, got NoneType"):
        ModelWithProphet(transformer(0), None, rngs=nnx.Rngs(0))  # pyright: ignore[reportArgumentType]
    wider = transformer(0, dataclasses.replace(CONFIG, dim=2 * CONFIG.dim))
    with pytest.raises(ValueError, match=f"target must have the width {CONFIG.dim} that the prophet starts from, got"):
        ModelWithProphet(wider, random_pair(CONFIG).prophet)
    pair = random_pair(CONFIG, num_leading_start_tokens=3)
    with pytest.raises(ValueError, match="prophet_train_length must be above num_leading_start_tokens = 3, got 3"):
        ModelWithProphet(pair.target, pair.prophet, prophet_train_length=3)


def test_defaults():
    pair = ModelWithProphet(transformer(0), transformer(1), rngs=nnx.Rngs(0))
    options = (pair.prophet_train_length, pair.prophet.num_leading_start_tokens, pair.detach_target_hiddens)
    assert options == (8, 1, False)


@pytest.mark.mixed_dtypes
def test_a_bfloat16_prophet_of_a_float32_target_computes_in_bfloat16():
    small = transformer(1, dataclasses.replace(CONFIG, dtype="bfloat16"))
    pair = ModelWithProphet(transformer(0), small, rngs=nnx.Rngs(0))
    inputs = pair.prophet.embed(jnp.ones((1, 1, CONFIG.dim)), jnp.zeros((1, 2), jnp.int32))
    assert inputs.dtype == jnp.bfloat16
