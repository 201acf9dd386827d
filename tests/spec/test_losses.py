import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spec_jax.losses import bits_per_byte, distillation_loss, next_token_loss


def case(seed=0, batch=3, tokens=5, vocab=7):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(batch, tokens, vocab)).astype(np.float32), rng.integers(0, vocab, (batch, tokens))


def reference(logits_btv, tokens_bt):
    logits_btv = logits_btv.astype(np.float64)
    log_probs = logits_btv - np.log(np.exp(logits_btv).sum(-1, keepdims=True))
    return -np.take_along_axis(log_probs, tokens_bt[..., None], -1)[..., 0]


def test_distillation_by_hand():
    """KL((3/4, 1/4) ‖ (1/2, 1/2)) = 3/4·ln(3/2) + 1/4·ln(1/2), which is not the reverse divergence."""
    target = jnp.log(jnp.array([[[0.75, 0.25], [0.5, 0.5]]]))
    draft = jnp.zeros((1, 2, 2)) + 7.0
    forward = 0.75 * np.log(1.5) + 0.25 * np.log(0.5)
    np.testing.assert_allclose(distillation_loss(draft, target), forward / 2, rtol=1e-5)
    reverse = 0.5 * np.log(0.5 / 0.75) + 0.5 * np.log(0.5 / 0.25)
    assert abs(forward - reverse) > 0.01
    draft_gradient, target_gradient = jax.grad(distillation_loss, argnums=(0, 1))(draft, target)
    assert np.abs(draft_gradient).max() > 0.01
    assert np.abs(target_gradient).max() == 0
    with pytest.raises(ValueError, match=r"draft_logits and target_logits must be \(B, T, V\) alike"):
        distillation_loss(draft, target[:, :1])
    with pytest.raises(ValueError, match=r"draft_logits and target_logits must be \(B, T, V\) alike"):
        distillation_loss(draft[0], target[0])


@pytest.mark.parametrize("ruled_out", [-np.inf, -1e9, -200.0])
@pytest.mark.parametrize("draft", [[0.0, 0.5, -jnp.inf], [0.0, 0.5, 0.2]])
def test_distillation_of_what_the_target_rules_out(draft: list[float], ruled_out: float):
    """0 · log 0 is 0, in the value and its gradient; 0 is what a float32 takes for it, too."""
    draft_1v, target_1v = (np.array([[logits]], np.float32) for logits in (draft, [0.0, 1.0, ruled_out]))
    probs, target = (np.exp(logits[0, 0]) / np.exp(logits).sum() for logits in (draft_1v, target_1v))
    value, gradient = jax.value_and_grad(distillation_loss)(draft_1v, target_1v)
    np.testing.assert_allclose(value, (target[:2] * np.log(target[:2] / probs[:2])).sum(), rtol=1e-5)
    np.testing.assert_allclose(gradient[0, 0], probs - target, atol=1e-6)


def test_mean_cross_entropy_by_hand():
    # p = (1/4, 3/4): the surprise of token 1 is log(4/3), of token 0 log 4.
    logits = jnp.log(jnp.array([[[1.0, 3.0], [1.0, 3.0]]]))
    loss = next_token_loss(logits, jnp.array([[1, 0]]))
    assert loss == pytest.approx((math.log(4 / 3) + math.log(4)) / 2, abs=1e-6)
    assert loss.dtype == jnp.float32


def test_equals_numpy():
    logits, tokens = case()
    np.testing.assert_allclose(
        next_token_loss(jnp.array(logits), jnp.array(tokens)), reference(logits, tokens).mean(), rtol=1e-6
    )


def test_bfloat16_logits_are_summed_in_float32():
    logits, tokens = case()
    rounded = jnp.array(logits, jnp.bfloat16)
    loss = next_token_loss(rounded, jnp.array(tokens))
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, reference(np.asarray(rounded, np.float32), tokens).mean(), rtol=1e-5)


def test_padding_is_out_of_values_and_gradients():
    logits, tokens = case()
    mask = np.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]], bool)
    poisoned = np.where(mask[..., None], logits, np.nan)
    loss, gradient = jax.value_and_grad(
        lambda x: next_token_loss(x, jnp.array(np.where(mask, tokens, -1)), mask_bt=jnp.array(mask))
    )(jnp.array(poisoned))
    np.testing.assert_allclose(loss, reference(logits, tokens)[mask].mean(), rtol=1e-6)
    unmasked = jax.grad(lambda x: next_token_loss(x, jnp.array(tokens)) * float(mask.size / mask.sum()))(
        jnp.array(logits)
    )
    np.testing.assert_allclose(gradient, np.where(mask[..., None], unmasked, 0), atol=1e-6)


def test_distillation_without_padding():
    """That of the counted positions alone, in values and gradients, whatever stands at the others."""
    (draft, _), (target, _) = case(0), case(1)
    mask = np.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]], bool)
    poisoned = [jnp.array(np.where(mask[..., None], logits, np.nan)) for logits in (draft, target)]
    of_counted = partial(distillation_loss, mask_bt=jnp.array(mask))
    loss, gradient = jax.value_and_grad(of_counted)(*poisoned)
    alone, gradient_alone = jax.value_and_grad(distillation_loss)(draft[mask][None], target[mask][None])
    np.testing.assert_allclose(loss, alone, rtol=1e-6)
    np.testing.assert_allclose(gradient[mask], gradient_alone[0], atol=1e-7)
    assert (gradient[~mask] == 0).all()


def test_nothing_counted_is_zero():
    logits, tokens = case()
    nothing = jnp.zeros(tokens.shape, bool)
    assert next_token_loss(jnp.array(logits), jnp.array(tokens), mask_bt=nothing) == 0
    assert distillation_loss(jnp.array(logits), jnp.array(logits) + 1, mask_bt=nothing) == 0
    assert next_token_loss(jnp.zeros((2, 0, 3)), jnp.zeros((2, 0), int)) == 0
    assert distillation_loss(jnp.zeros((0, 2, 3)), jnp.zeros((0, 2, 3))) == 0


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.int32])
@pytest.mark.parametrize("token", [-100, -1, 300])
def test_a_token_that_there_is_not_has_no_loss(token: int, dtype: type):
    """Of 256 tokens: -1 is not the last one."""
    logits, tokens = case(vocab=256)
    tokens = tokens % 100
    known = next_token_loss(jnp.array(logits), jnp.array(tokens, dtype))
    np.testing.assert_allclose(known, reference(logits, tokens).mean(), rtol=1e-5)
    if token <= jnp.iinfo(dtype).max:
        tokens[0, 0] = token
        assert jnp.isnan(next_token_loss(jnp.array(logits), jnp.array(tokens, dtype)))


@pytest.mark.parametrize("token", [2**32 - 1, 2**32, 2**32 + 3])
def test_a_token_beyond_int32_has_no_loss(token: int):
    """Cut to 32 bits they would be -1, 0 and 3."""
    logits, tokens = case(vocab=256)
    with jax.enable_x64(True):
        for dtype in (jnp.uint32, jnp.int64, jnp.uint64):
            if token <= jnp.iinfo(dtype).max:
                wide = jnp.asarray(tokens, dtype).at[0, 0].set(token)
                assert jnp.isnan(next_token_loss(jnp.array(logits), wide))


def test_bits_per_byte():
    assert bits_per_byte(math.log(256)) == pytest.approx(8)


@pytest.mark.parametrize(
    ("logits", "tokens", "mask", "message"),
    [
        ((3, 7), (3,), None, r"logits must be \(B, T, V\), got \(3, 7\)"),
        ((3, 5, 7), (3, 4), None, r"next_tokens must be \(3, 5\) integers, got \(3, 4\)"),
        ((3, 5, 7), (3, 5), (3, 4), r"mask must be \(3, 5\) booleans, got \(3, 4\)"),
    ],
)
def test_bad_input(logits, tokens, mask, message):
    with pytest.raises(ValueError, match=message):
        next_token_loss(
            jnp.zeros(logits), jnp.zeros(tokens, int), mask_bt=None if mask is None else jnp.zeros(mask, bool)
        )


def test_float_tokens_are_refused():
    with pytest.raises(ValueError, match="integers, got \\(3, 5\\) float32"):
        next_token_loss(jnp.zeros((3, 5, 7)), jnp.zeros((3, 5)))


def test_distillation_of_bfloat16_logits_is_float32():
    rng = np.random.default_rng(0)
    rounded = [jnp.asarray(rng.normal(size=(3, 5, 7)), jnp.bfloat16) for _ in range(2)]
    loss = distillation_loss(*rounded)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, distillation_loss(*(x.astype(jnp.float32) for x in rounded)), rtol=1e-6)


def test_more_positions_than_a_byte_counts():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(3, 100, 7)), jnp.float32)
    tokens = jnp.zeros((3, 100), jnp.int32)
    masked = next_token_loss(logits, tokens, mask_bt=jnp.ones((3, 100), bool))
    np.testing.assert_allclose(masked, next_token_loss(logits, tokens), rtol=1e-5)


def test_a_mask_of_integers():
    tokens = jnp.zeros((3, 5), jnp.int32)
    with pytest.raises(ValueError, match=r"mask must be \(3, 5\) booleans, got \(3, 5\) int32"):
        next_token_loss(jnp.zeros((3, 5, 7)), tokens, mask_bt=tokens)
