"""Coordinate-descent top-k: what it chooses, and what its gradient is."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from moe_jax import (
    CoordinateDescent,
    Router,
    RouterInputs,
    TopN,
    relaxed_top_k,
)
from tests.moe.support import NOISED, PROBS, inputs_of


def test_relaxed_top_k_sums_to_its_size_and_sharpens():
    scores_te = jnp.asarray([[0.5, 0.3, 0.15, 0.05]])
    soft = relaxed_top_k(scores_te, 2, iterations=200, temperature=0.1)
    np.testing.assert_allclose(soft.sum(), 2, rtol=1e-3)
    assert ((soft >= 0) & (soft <= 1)).all()
    hard = relaxed_top_k(scores_te, 2, iterations=200, temperature=0.005)
    # Soft: 0.36 at the third. The dual of a nearly hard choice converges slowly, hence no exact zero.
    np.testing.assert_allclose(hard, [[1, 1, 0, 0]], atol=0.02)


@pytest.mark.parametrize("train", [True, False])
def test_coordinate_descent_keeps_confidence_and_thresholds(train: bool):
    # The original takes the relaxed choice for the gates, which leaves both near 1/2 (see test_parity).
    probs = [[0.9, 0.05, 0.03, 0.02], [0.4, 0.35, 0.15, 0.1]]
    relaxed = CoordinateDescent(policy_train="threshold").choose(inputs_of(probs), train=train)
    plain = TopN(policy_train="threshold").choose(inputs_of(probs), train=train)
    np.testing.assert_array_equal(relaxed.gate_ta, plain.gate_ta)
    np.testing.assert_allclose(relaxed.gate_ta, [[0.94737, 0.05263], [0.53333, 0.46667]], atol=1e-5)
    np.testing.assert_array_equal(relaxed.wanted_ta, [[True, False], [True, True]])


def unchosen_gradient(router: Router) -> jax.Array:
    """Gradient of the first gate with respect to the logit of an expert that was not chosen."""

    def first_gate(logits_te: jax.Array) -> jax.Array:
        given = RouterInputs(
            logits_te=logits_te, selection_logits_te=logits_te, mask_t=jnp.ones(1, bool), uniform_ta=None
        )
        return router.choose(given, train=True).gate_ta[0, 0]

    return jax.jit(jax.grad(first_gate))(jnp.log(jnp.asarray([[0.4, 0.3, 0.2, 0.1]])))[0, 2]


def test_coordinate_descent_gradient_reaches_experts_that_were_not_chosen():
    # A normalised gate of plain top-n is a ratio of two scores: nothing else enters.
    assert abs(unchosen_gradient(TopN(policy_train="all"))) < 1e-7
    assert abs(unchosen_gradient(CoordinateDescent(policy_train="all"))) > 1e-3


def test_gradient_of_relaxed_top_k_agrees_with_finite_differences():
    weight_te = jnp.asarray([[1.0, -2.0, 0.5, 3.0]])

    def value(scores_te: jax.Array) -> jax.Array:
        return (relaxed_top_k(scores_te, 1.5, iterations=30, temperature=0.3) * weight_te).sum()

    check_grads(jax.jit(value), (jnp.asarray([[0.5, 0.31, 0.15, 0.04]]),), order=1, modes=["rev"], eps=1e-2)


def test_coordinate_descent_relaxes_the_choice_that_the_bias_steers():
    logits_te, bias_e = jnp.log(jnp.asarray([[0.4, 0.3, 0.2, 0.1]])), jnp.asarray([-0.3, 0.0, 0.2, 0.0])
    router = CoordinateDescent(n=1, bias=True, iterations=50)

    def gate(logits_te: jax.Array) -> jax.Array:
        given = RouterInputs(logits_te, logits_te, jnp.ones(1, bool), bias_e=bias_e)
        return router.choose(given, train=True).gate_ta[0, 0]

    def indicator_times_score(logits_te: jax.Array, bias_e: jax.Array) -> jax.Array:
        probs_te = jax.nn.softmax(logits_te)
        chosen_te = relaxed_top_k(probs_te + bias_e[None], 9 / 8, iterations=50, temperature=0.1)
        return (probs_te * (1 + chosen_te - jax.lax.stop_gradient(chosen_te)))[0, 2]

    np.testing.assert_allclose(gate(logits_te), 0.2, atol=1e-6)
    gradient, of_steered, of_plain = (
        jax.jit(jax.grad(function))(logits_te)
        for function in (
            gate,
            lambda logits_te: indicator_times_score(logits_te, bias_e),
            lambda logits_te: indicator_times_score(logits_te, jnp.zeros(4)),
        )
    )
    np.testing.assert_allclose(gradient, of_steered, atol=1e-6)
    assert np.abs(gradient - of_plain).max() > 1e-2


def test_coordinate_descent_iterates_for_gradients_only():
    def gates(logits_te: jax.Array) -> jax.Array:
        given = RouterInputs(logits_te, logits_te, jnp.ones(5, bool))
        return CoordinateDescent(policy_train="all").choose(given, train=True).gate_ta

    logits_te = jnp.zeros((5, 4))
    assert "while" not in jax.jit(gates).lower(logits_te).as_text()
    assert "while" in jax.jit(jax.grad(lambda logits_te: gates(logits_te).max())).lower(logits_te).as_text()


def test_relaxed_top_k_after_one_update():
    """From caps of 0 - scores, every score counts alike."""
    scores_te = jnp.asarray([[0.5, 0.3, 0.15, 0.05]])
    once = relaxed_top_k(scores_te, 2, iterations=1, temperature=0.1)
    np.testing.assert_allclose(once, jnp.exp(jnp.minimum(scores_te / 0.1 + jnp.log(0.5), 0)), rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_relaxed_top_k_of_numbers_of_numpy(dtype: jnp.dtype):
    scores_te = jnp.asarray(PROBS, dtype)
    sizes: Any = np.int64(2), np.float32(2)
    for size in sizes:
        got = relaxed_top_k(scores_te, size, iterations=3, temperature=np.float64(0.1))
        np.testing.assert_array_equal(got, relaxed_top_k(scores_te, 2, iterations=3, temperature=0.1))
        assert got.dtype == dtype


def test_coordinate_descent_of_all_experts():
    """9 / 8 of as many experts as there are would be more."""

    def spread(logits_te: jax.Array) -> jax.Array:
        given = RouterInputs(logits_te, logits_te, jnp.ones(2, bool))
        return CoordinateDescent(n=4, policy_train="all").choose(given, train=True).gate_ta.max(1).sum()

    assert jnp.isfinite(jax.grad(spread)(jnp.log(jnp.asarray(PROBS)))).all()


def test_coordinate_descent_relaxes_the_noised_choice():
    logits_te, noised_te = (jnp.log(jnp.asarray(probs[:1])) for probs in (PROBS, NOISED))

    def gate(logits_te: jax.Array, noised_te: jax.Array) -> jax.Array:
        given = RouterInputs(logits_te, noised_te, jnp.ones(1, bool))
        return CoordinateDescent(n=1).choose(given, train=True).gate_ta[0, 0]

    def by_hand(logits_te: jax.Array, noised_te: jax.Array) -> jax.Array:
        chosen_te = relaxed_top_k(jax.nn.softmax(noised_te), 9 / 8, iterations=20, temperature=0.1)
        return (jax.nn.softmax(logits_te) * (1 + chosen_te - jax.lax.stop_gradient(chosen_te)))[0, 0]

    got, wanted = (jax.jit(jax.grad(f, argnums=(0, 1)))(logits_te, noised_te) for f in (gate, by_hand))
    assert float(jnp.abs(wanted[1]).max()) > 1e-2
    for one, other in zip(got, wanted):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_temperature_of_coordinate_descent():
    def gate(logits_te: jax.Array, temperature: float) -> jax.Array:
        given = RouterInputs(logits_te, logits_te, jnp.ones(1, bool))
        return CoordinateDescent(n=1, temperature=temperature).choose(given, train=True).gate_ta[0, 0]

    sharp, soft = (jax.grad(gate)(jnp.log(jnp.asarray(PROBS[:1])), t) for t in (0.1, 1.0))
    assert float(jnp.abs(sharp - soft).max()) > 1e-2
