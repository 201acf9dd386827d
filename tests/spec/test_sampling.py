"""The filters against a plain NumPy reference in Hugging Face's order, and where numbers get extreme."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from spec_jax import Sampling, SmallModel, loop, noise, speculative_decoding
from spec_jax import decoding as decoding_module
from spec_jax.noise import Purpose, position_gumbel, round_noise
from spec_jax.sampling import draw, filtered_log_probs
from tests.spec.reference import Filters, filtered_probs, softmax
from tests.spec.toys import random_toy

VOCAB = 6
compiled = jax.jit(lambda logits, sampling: filtered_log_probs(logits, sampling))


def probs_of(logits, **sampling) -> np.ndarray:
    return np.exp(np.asarray(compiled(jnp.asarray(logits, jnp.float32), Sampling(**sampling).checked()), np.float64))


logits_of_tokens = st.lists(
    # On a grid: differences are exact in float32, and what ties there ties in the reference's float64 too.
    st.one_of(st.integers(-2048, 2048).map(lambda x: x / 256), st.just(-np.inf), st.sampled_from([0.0, 1.0, 2.0])),
    min_size=VOCAB,
    max_size=VOCAB,
).filter(lambda logits: max(logits) > -np.inf)


def near_a_boundary(logits: np.ndarray, filters: Filters) -> bool:
    """Whether float32 could decide otherwise than float64: a mass or ratio within 1e-5 of what it is compared with.

    Exact ties of scores are no boundary: both must treat them alike.
    """
    scores = (logits - logits.max()) / filters.temperature
    if filters.top_k is not None:
        scores = np.where(scores < np.sort(scores)[-filters.top_k], -np.inf, scores)
    mass = np.cumsum(np.sort(softmax(scores))[::-1])
    nucleus = filtered_probs(logits, Filters(filters.temperature, filters.top_k, filters.top_p))
    ratio = nucleus / nucleus.max()
    return bool((abs(mass - filters.top_p) < 1e-5).any() or (abs(ratio - filters.min_p) < 1e-5).any())


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    logits=logits_of_tokens.map(lambda x: np.array(x, np.float64)),
    temperature=st.floats(0.25, 4.0),
    top_k=st.sampled_from([None, 1, 3]),
    top_p=st.one_of(st.just(1.0), st.floats(0.05, 0.99)),
    min_p=st.one_of(st.just(0.0), st.floats(0.01, 1.0)),
)
def test_filters_equal_the_reference(logits: np.ndarray, temperature: float, top_k: int | None, top_p, min_p):
    """Which tokens stay, exactly, and their probabilities to 1e-5; ties with the last one kept included."""
    filters = Filters(temperature, top_k, top_p, min_p)
    assume(not near_a_boundary(logits, filters) or (top_p == 1 and min_p == 0))
    expected = filtered_probs(logits, filters)
    got = probs_of(logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    np.testing.assert_array_equal(got > 0, expected > 0)
    np.testing.assert_allclose(got, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        # Of probabilities 0.4 0.3 0.2 0.1; at temperature 0.5 they are 16 9 4 1 thirtieths.
        ({"temperature": 0.5}, [16 / 30, 9 / 30, 4 / 30, 1 / 30]),
        # Temperature first: 16/30 alone reaches 0.5. Were top-p first, 0.4 would not.
        ({"temperature": 0.5, "top_p": 0.5}, [1, 0, 0, 0]),
        ({"top_p": 0.5}, [4 / 7, 3 / 7, 0, 0]),
        # top-k before top-p: of 4/7 and 3/7 the first reaches 0.55. Were top-p first, two tokens would stay.
        ({"top_k": 2, "top_p": 0.55}, [1, 0, 0, 0]),
        # Temperature before min-p: 0.3 / 0.4 is more than 0.6, 9 / 16 is less.
        ({"min_p": 0.6}, [4 / 7, 3 / 7, 0, 0]),
        ({"temperature": 0.5, "min_p": 0.6}, [1, 0, 0, 0]),
        # top-p before min-p: three tokens reach 0.75 and min-p drops the third. Were min-p first, 4/7 + 3/7.
        ({"top_p": 0.75, "min_p": 0.6}, [4 / 7, 3 / 7, 0, 0]),
        # By fraction: the ⌈(1 − 0.6)·4⌉ = 2 largest.
        ({"top_k": 0.6}, [4 / 7, 3 / 7, 0, 0]),
        ({"top_k": 0.0}, [0.4, 0.3, 0.2, 0.1]),
        ({"top_k": 99}, [0.4, 0.3, 0.2, 0.1]),
        ({"min_p": 1.0}, [1, 0, 0, 0]),
    ],
)
def test_hand_worked_in_order(sampling: dict, expected: list[float]):
    np.testing.assert_allclose(probs_of(np.log([0.4, 0.3, 0.2, 0.1]), **sampling), expected, atol=1e-6)


def test_top_p_sees_min_p_last():
    """0.36 0.34 0.15 0.15 with top-p 0.8 keeps three of 0.85 and the tie, and min-p 0.5 then drops both.

    Were min-p first, 0.36 and 0.34 of 0.70 would stay and top-p keep both: the same. With top-p 0.5, min-p first would
    leave 0.514 alone; in order, 0.36 does not reach 0.5 and both stay.
    """
    logits = np.log([0.36, 0.34, 0.15, 0.15])
    np.testing.assert_allclose(probs_of(logits, top_p=0.8, min_p=0.5), [36 / 70, 34 / 70, 0, 0], atol=1e-6)
    np.testing.assert_allclose(probs_of(logits, top_p=0.5, min_p=0.5), [36 / 70, 34 / 70, 0, 0], atol=1e-6)


def test_ties_with_the_last_one_kept_are_kept():
    for sampling in ({"top_k": 2}, {"top_p": 0.6}):
        np.testing.assert_allclose(probs_of([3.0, 2.0, 2.0, 2.0, 1.0], **sampling)[4], 0)
        assert (probs_of([3.0, 2.0, 2.0, 2.0, 1.0], **sampling)[:4] > 0).all()
    # Greedy takes the first.
    assert probs_of([1.0, 2.0, 2.0, 0.0], temperature=0.0).tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize("temperature", [0.0, 1e-45, 1e-40, 1e-38, 1e-30, 1e-3])
def test_cold_is_greedy_and_finite(temperature: float):
    logits = np.array([[1e4, 9.9e3, -np.inf, -1e4], [-np.inf, -5.0, -4.0, -np.inf], [-1e4, -2e4, -1.5e4, -3e4]])
    probs = probs_of(logits, temperature=temperature)
    np.testing.assert_array_equal(probs, np.eye(4)[[0, 2, 0]])


@pytest.mark.parametrize("temperature", [1e6, 1e30, 3e38])
def test_hot_is_uniform_over_what_is_possible(temperature: float):
    np.testing.assert_allclose(
        probs_of([30.0, -np.inf, 5.0, 0.0], temperature=temperature), [1 / 3, 0, 1 / 3, 1 / 3], atol=1e-4
    )


@pytest.mark.parametrize("sampling", [{}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.5}, {"temperature": 0.0}])
def test_extreme_logits_stay_normalised(sampling: dict):
    """1e4 apart, −inf and a single possible token: probabilities sum to 1, and the impossible stays so."""
    logits = np.array([[1e4, 0.0, -1e4, -np.inf], [-1e4, -1e4, -np.inf, -np.inf], [-np.inf, -np.inf, 0.0, -np.inf]])
    probs = probs_of(logits, **sampling)
    np.testing.assert_allclose(probs.sum(-1), 1, atol=1e-6)
    assert (probs[np.isinf(logits)] == 0).all()
    assert probs[0, 0] == probs[2, 2] == 1


@pytest.mark.parametrize("top_p", [1e-6, 1e-30, 1e-38, 1e-40, 1e-46])
def test_tiny_top_p_keeps_the_most_probable(top_p: float):
    """Every number in (0, 1] is allowed; the smallest are 0 in float32 arithmetic."""
    np.testing.assert_array_equal(probs_of([0.0, 1.0, 2.0, -3.0], top_p=top_p), [0, 0, 1, 0])


def test_bfloat16_logits_are_filtered_in_float32():
    logits = jnp.asarray([[1.0, 2.0, 3.0]], jnp.bfloat16)
    log_probs = compiled(logits, Sampling(top_p=0.95).checked())
    assert log_probs.dtype == jnp.float32
    np.testing.assert_allclose(
        np.exp(log_probs[0]), filtered_probs(np.array([1.0, 2, 3]), Filters(top_p=0.95)), atol=1e-6
    )


def test_draw_follows_the_probabilities():
    """Gumbel-max: the arg max of log-probability + noise, never an impossible token."""
    log_probs = jnp.log(jnp.asarray([0.5, 0.0, 0.3, 0.2]))
    gumbel = jax.random.gumbel(jax.random.key(0), (100_000, 4))
    share = np.bincount(draw(jnp.broadcast_to(log_probs, gumbel.shape), gumbel), minlength=4) / len(gumbel)
    assert share[1] == 0
    np.testing.assert_allclose(share, [0.5, 0, 0.3, 0.2], atol=4 * 0.5 / len(gumbel) ** 0.5)


def test_noise_tells_the_tokens_of_a_large_vocabulary_apart():
    """JAX's default takes so few values that several of the thousand largest would be equal."""

    def equal_ones(gumbel_v: jax.Array) -> int:
        return 1000 - len(np.unique(np.sort(gumbel_v)[-1000:]))

    key, size = jax.random.key(0), 2**20
    assert equal_ones(position_gumbel(key, jnp.zeros(1, jnp.uint32), jnp.zeros((1, 1), jnp.int32), size)[0, 0]) < 4
    assert equal_ones(jax.random.gumbel(key, (size,))) > 10


def test_uniform_noise_is_fine_where_it_is_small():
    """JAX's default is on a grid of 2^-23, which a draft of a less likely token is accepted at 0 of."""

    def on_the_grid(uniform_n: jax.Array) -> np.ndarray:
        scaled = np.asarray(uniform_n, float) * 2.0**23
        return scaled == np.round(scaled)

    key, size = jax.random.key(0), 2**20
    uniform_n = noise.uniform(key, (size,), jnp.float32)
    low = uniform_n < 2.0**-8
    assert on_the_grid(uniform_n[low]).mean() < 0.01
    assert on_the_grid(jax.random.uniform(key, (size,))).all()
    assert uniform_n.min() >= 0
    assert uniform_n.max() < 1
    assert scipy.stats.kstest(np.asarray(uniform_n), "uniform").pvalue > 0.001
    assert scipy.stats.kstest(np.asarray(uniform_n[low]) * 2**8, "uniform").pvalue > 0.001
    assert noise.uniform(key, (2, 3), jnp.float32).shape == (2, 3)


def test_a_fraction_of_the_vocabulary_may_be_numpys():
    logits = np.log([0.4, 0.3, 0.2, 0.1])
    for fraction in (0.5, np.float32(0.5)):
        np.testing.assert_allclose(probs_of(logits, top_k=fraction), [4 / 7, 3 / 7, 0, 0], atol=1e-6)
    # In half precision 50,000 is no number.
    assert (probs_of(np.arange(100_000), top_k=np.float16(0.5), temperature=1e5) > 0).sum() == 50_000


def test_draft_and_target_are_filtered_by_one_function(monkeypatch: pytest.MonkeyPatch):
    """All of a round's gamma draft steps and its scoring go through the one name that `loop` has for it."""
    shapes = []

    def spy(logits: jax.Array, sampling: Sampling) -> jax.Array:
        shapes.append(logits.shape)
        return filtered_log_probs(logits, sampling)

    monkeypatch.setattr(loop, "filtered_log_probs", spy)
    program = jax.jit(
        lambda *arguments, size, width: loop.decode(*arguments, size=size, width=width),
        static_argnames=("size", "width"),
    )
    monkeypatch.setattr(decoding_module, "compiled_decode", program)
    drafter = SmallModel(random_toy(1, 4), gamma=2)
    speculative_decoding(random_toy(0, 4), drafter, np.ones((1, 1), int), max_new_tokens=3, key=jax.random.key(0))
    assert sorted(set(shapes)) == [(1, 3, 4), (1, 4)]
    assert shapes.count((1, 4)) == 2 * shapes.count((1, 3, 4))
    assert "filtered_log_probs" not in inspect.getsource(SmallModel)


def test_drafts_and_corrections_take_the_noise_of_large_vocabularies(monkeypatch: pytest.MonkeyPatch):
    samplers = {}

    def spy(key: jax.Array, purpose: Purpose, *others: Any) -> jax.Array:
        samplers[purpose] = others[-1]
        return round_noise(key, purpose, *others)

    monkeypatch.setattr(loop, "round_noise", spy)
    target, drafter = random_toy(0, 4), SmallModel(random_toy(1, 4), gamma=2)
    prepared = decoding_module._prepare(
        target, drafter, [[1]], None, 3, jax.random.key(0), Sampling(), None, 0, "rejection", 1.0, None, None
    )
    program = functools.partial(loop.decode, size=prepared.size, width=64)
    jax.eval_shape(program, target, drafter, prepared.prompt_bp, prepared.prompt_length_b, prepared.request)
    gumbel = noise.gumbel
    assert samplers == {
        Purpose.DRAFT: gumbel,
        Purpose.RESIDUAL: gumbel,
        Purpose.ACCEPTANCE: noise.uniform,
    }


def test_a_mass_that_top_p_equals_is_reached():
    np.testing.assert_allclose(probs_of(np.log([0.5, 0.25, 0.25]), top_p=0.5), [1, 0, 0], atol=1e-6)


@pytest.mark.parametrize("x64", [False, True])
def test_scalars_of_numpys_float64(x64: bool):
    """Unchecked, too, the distribution is computed in float32."""
    logits = np.array([0.0, -1.0, -2.0, -3.0, -4.0], np.float32)
    for filters in ({}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.05}):
        expected = filtered_log_probs(jnp.asarray(logits), Sampling(temperature=0.7, **filters).checked())
        wide = {name: value if name == "top_k" else np.float64(value) for name, value in filters.items()}
        with jax.enable_x64(x64):
            got = filtered_log_probs(jnp.asarray(logits), Sampling(temperature=np.float64(0.7), **wide))
        assert got.dtype == jnp.float32
        np.testing.assert_array_equal(got, expected)


def test_top_k_as_an_integer_of_numpy():
    top_k: Any = np.int64(2)
    np.testing.assert_allclose(probs_of(np.log([0.4, 0.3, 0.2, 0.1]), top_k=top_k), [4 / 7, 3 / 7, 0, 0], atol=1e-6)


def test_a_fraction_of_tokens_is_taken_as_it_is():
    """1 − 0.7 is a little more than 0.3 in floating point: of 10 tokens 4 stay, as in the original."""
    assert np.isfinite(filtered_log_probs(jnp.arange(10.0), Sampling(top_k=0.7).checked())).sum() == 4


@pytest.mark.parametrize("logit", [-np.inf, np.nan, np.inf])
def test_greedy_takes_the_first_of_logits_that_are_no_numbers(logit: float):
    log_probs = filtered_log_probs(jnp.full(3, logit), Sampling(temperature=0.0).checked())
    assert log_probs.tolist() == [0, -np.inf, -np.inf]
