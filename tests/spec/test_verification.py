"""One round of each rule, over all drafts: acceptance probabilities by exact enumeration, without a decoding loop.

A rule compares each uniform number with a threshold. The thresholds are found by calling the rule itself, by bisection,
so what is enumerated is the code and not a second copy of its formulas.
"""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spec_jax import verification
from spec_jax.verification import Draft
from tests.spec.law_cells import DRAFT, FILTERS, PROMPT_LENGTHS, PROMPTS, TARGET
from tests.spec.reference import filtered_probs, fit
from tests.spec.toys import next_logits

OPTIMISED = True

RULES = {
    "rejection": lambda *arguments: verification.rejection(*arguments, lenience=jnp.float32(1)),
    "block": verification.block,
}
COMPILED = {name: jax.jit(rule) for name, rule in RULES.items()}


def all_drafts(vocab_size: int, gamma: int) -> np.ndarray:
    """(V^J, J) every drafted run."""
    return np.array(list(itertools.product(range(vocab_size), repeat=gamma)), np.int32).reshape(-1, gamma)


def as_draft(tokens_bj: np.ndarray, probs_bjv: np.ndarray) -> Draft:
    with np.errstate(divide="ignore"):
        log_probs_bjv = np.log(probs_bjv)
    count_b = np.full(len(tokens_bj), tokens_bj.shape[1], np.int32)
    return Draft(jnp.asarray(tokens_bj), jnp.asarray(log_probs_bjv, jnp.float32), jnp.asarray(count_b))


def log32(probs: np.ndarray) -> jax.Array:
    with np.errstate(divide="ignore"):
        return jnp.asarray(np.log(probs), jnp.float32)


def thresholds(rule: str, tokens_bj: np.ndarray, draft_bjv: np.ndarray, target_btv: np.ndarray) -> np.ndarray:
    """(B, J) below which number u_j the rule accepts position j, the other numbers being 0 before it and 1 after."""
    batch, gamma = tokens_bj.shape
    draft, target = as_draft(tokens_bj, draft_bjv), log32(target_btv)
    gumbel_bv = jnp.zeros((batch, target_btv.shape[-1]))
    threshold_bj = np.zeros((batch, gamma))
    for position in range(gamma):
        low_b, high_b = np.zeros(batch), np.ones(batch)
        for _ in range(30):
            middle_b = (low_b + high_b) / 2
            # 2 is above every threshold, p / q of the token included where that is not larger than it.
            uniform_bj = np.where(np.arange(gamma) < position, 0.0, 2.0) * np.ones((batch, 1))
            uniform_bj[:, position] = middle_b
            verdict = COMPILED[rule](draft, target, jnp.asarray(uniform_bj, jnp.float32), gumbel_bv)
            accepts_b = np.asarray(verdict.accepted_b) > position
            low_b, high_b = np.where(accepts_b, middle_b, low_b), np.where(accepts_b, high_b, middle_b)
        threshold_bj[:, position] = (low_b + high_b) / 2
    return threshold_bj


def expected_accepted(rule: str, tokens_bj: np.ndarray, draft_bjv: np.ndarray, target_btv: np.ndarray) -> float:
    """Expected accepted length, over all drafts by their probability and over the uniform numbers."""
    accept_bj = thresholds(rule, tokens_bj, draft_bjv, target_btv)
    draft_prob_b = np.take_along_axis(draft_bjv, tokens_bj[:, :, None], axis=2)[:, :, 0].prod(1)
    if rule == "rejection":  # At least i: each of the first i passed.
        at_least_bj = np.cumprod(accept_bj, axis=1)
    else:  # At least i: one of those from i on passed.
        at_least_bj = 1 - np.cumprod((1 - accept_bj)[:, ::-1], axis=1)[:, ::-1]
    return float(draft_prob_b @ at_least_bj.sum(1))


def constant_laws(target: list[float], draft: list[float], gamma: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    tokens_bj = all_drafts(len(target), gamma)
    draft_bjv = np.broadcast_to(np.array(draft), (*tokens_bj.shape, len(draft)))
    target_btv = np.broadcast_to(np.array(target), (len(tokens_bj), gamma + 1, len(target)))
    return tokens_bj, draft_bjv, target_btv


EXAMPLE = constant_laws([1 / 3, 2 / 3], [2 / 3, 1 / 3], 2)


@pytest.mark.parametrize(("rule", "expected"), [("rejection", 10 / 9), ("block", 11 / 9)])
def test_expected_accepted_length_of_the_papers_example(rule: str, expected: float):
    """Sun 2403.10444, section 3: p = (1/3, 2/3), q = (2/3, 1/3), gamma 2; to float32 rounding."""
    assert expected_accepted(rule, *EXAMPLE) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("rule", "expected"), [("rejection", 10 / 9), ("block", 11 / 9)])
def test_mean_accepted_length_of_the_papers_example(rule: str, expected: float):
    """The same by simulation of 400,000 rounds, within 4 standard errors (0.005; the rules differ by 0.111)."""
    rounds = 400_000
    keys = jax.random.split(jax.random.key(11), 3)
    tokens_bj = np.asarray(jax.random.categorical(keys[0], log32(EXAMPLE[1][0, 0]), shape=(rounds, 2)), np.int32)
    draft = as_draft(tokens_bj, np.broadcast_to(EXAMPLE[1][:1], (rounds, 2, 2)))
    target = log32(np.broadcast_to(EXAMPLE[2][:1], (rounds, 3, 2)))
    uniform_bj = jax.random.uniform(keys[1], (rounds, 2))
    accepted_b = np.asarray(
        COMPILED[rule](draft, target, uniform_bj, jax.random.gumbel(keys[2], (rounds, 2))).accepted_b
    )
    assert abs(accepted_b.mean() - expected) < 4 * accepted_b.std() / rounds**0.5


def laws_behind(prompt: tuple[int, ...], name: str, gamma: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every draft behind a prompt with the filtered laws of the law tests' two models along it."""
    target_table, draft_table = np.asarray(TARGET.table), np.asarray(DRAFT.table)
    tokens_bj = all_drafts(TARGET.vocab_size, gamma)
    rows = [[prompt + tuple(run[:offset].tolist()) for offset in range(gamma + 1)] for run in tokens_bj]
    target = [[filtered_probs(next_logits(target_table, row), FILTERS[name]) for row in rows_t] for rows_t in rows]
    draft = [[filtered_probs(next_logits(draft_table, row), FILTERS[name]) for row in rows_t[:-1]] for rows_t in rows]
    return tokens_bj, np.array(draft), np.array(target)


@pytest.mark.parametrize("name", FILTERS)
def test_block_never_accepts_less_than_rejection(name: str):
    """From each of the 16 prompts of the law tests, one round of gamma 3, exactly (to float32 rounding)."""
    gains = []
    for prompt, length in zip(PROMPTS, PROMPT_LENGTHS):
        laws = laws_behind(tuple(prompt[:length].tolist()), name, 3)
        gains.append(expected_accepted("block", *laws) - expected_accepted("rejection", *laws))
    assert min(gains) > -1e-6
    assert max(gains) > 0.01 or name == "greedy"


@pytest.mark.parametrize("rule", ["rejection", "block"])
def test_impossible_token_is_refused_at_zero(rule: str):
    """u = 0 does not let a token of target probability 0 through, and nothing behind it either."""
    tokens_bj, draft_bjv, target_btv = constant_laws([0.0, 1.0], [1.0, 0.0], 2)
    verdict = COMPILED[rule](
        as_draft(tokens_bj, draft_bjv),
        log32(target_btv),
        jnp.zeros((len(tokens_bj), 2)),
        jnp.zeros((len(tokens_bj), 2)),
    )
    refused_b = tokens_bj[:, 0] == 0
    assert np.asarray(verdict.accepted_b)[refused_b].tolist() == [0, 0]
    assert np.asarray(verdict.next_token_b)[refused_b].tolist() == [1, 1]


def test_coupling_keeps_no_leftovers_that_agree():
    """A token behind those that a row drafted is not accepted, even where the target draws it."""
    certain = np.array([[[0.0, 1.0]] * 2])
    drafted_nothing = Draft(jnp.array([[1]]), log32(certain[:, :1]), jnp.array([0]))
    verdict = verification.coupled(drafted_nothing, log32(certain), jnp.zeros((1, 2, 2)))
    assert (verdict.accepted_b.tolist(), verdict.next_token_b.tolist()) == ([0], [1])


def test_what_only_rounding_refuses_is_drawn_from_the_target():
    """Of laws that are equal but for rounding, here a large one, nothing is left over."""
    draft, target = np.array([[[0.0, 1.00001]]]), np.array([[[0.0, 0.99999], [0.5, 0.5]]])
    verdict = COMPILED["rejection"](
        as_draft(np.array([[1]]), draft), log32(target), jnp.full((1, 1), 0.999999), jnp.zeros((1, 2))
    )
    assert (verdict.accepted_b.tolist(), verdict.next_token_b.tolist()) == ([0], [1])


@pytest.mark.parametrize("rule", ["rejection", "block"])
@pytest.mark.parametrize("count", [0, 1, 2])
def test_rows_that_drafted_less(rule: str, count: int):
    """A row with `count_b` < J has the law of a draft of that length: first accepted tokens plus the next one."""
    rounds = 200_000
    target, draft = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.2, 0.6])
    keys = jax.random.split(jax.random.key(count), 3)
    tokens_bj = np.asarray(jax.random.categorical(keys[0], log32(draft), shape=(rounds, 2)), np.int32)
    full = as_draft(tokens_bj, np.broadcast_to(draft, (rounds, 2, 3)))
    shorter = full.replace(count_b=jnp.full((rounds,), count, jnp.int32))  # pyright: ignore[reportAttributeAccessIssue]
    verdict = COMPILED[rule](
        shorter,
        log32(np.broadcast_to(target, (rounds, 3, 3))),
        jax.random.uniform(keys[1], (rounds, 2)),
        jax.random.gumbel(keys[2], (rounds, 3)),
    )
    accepted_b, next_b = np.asarray(verdict.accepted_b), np.asarray(verdict.next_token_b)
    assert accepted_b.max() <= count
    first_b = np.where(accepted_b > 0, tokens_bj[:, 0], next_b)
    assert fit(np.bincount(first_b, minlength=3), target).p_value > 0.001
    if count > 0:
        second_b = np.where(accepted_b > 1, tokens_bj[:, 1], next_b)[accepted_b > 0]
        assert fit(np.bincount(second_b, minlength=3), target).p_value > 0.001


probabilities = st.lists(st.floats(0.01, 1.0), min_size=4, max_size=4).map(lambda x: np.array(x) / sum(x))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(probabilities, probabilities, probabilities, st.floats(0.05, 1.0))
def test_lenient_residual_is_closest(target: np.ndarray, draft: np.ndarray, other: np.ndarray, lenience: float):
    """The docstring's claim: given the lenient test, max(p − q, 0) gives the output closest to p in total variation."""

    def distance(residual: np.ndarray) -> float:
        accepted = np.minimum(draft, target / lenience)
        total = residual.sum()
        output = accepted + (1 - accepted.sum()) * (residual / total if total > 1e-12 else target)
        return abs(output - target).sum() / 2

    ours = distance(np.maximum(target - draft, 0))
    assert ours <= distance(np.maximum(target - lenience * draft, 0)) + 1e-12
    assert ours <= distance(target) + 1e-12
    assert ours <= distance(other) + 1e-12


@pytest.mark.parametrize("lenience", [1.0, 0.5])
def test_lenient_rejection_has_the_documented_law(lenience: float):
    """min(q, p / lenience) + the rest of the mass spread as max(p − q, 0); one draft token, 400,000 rounds."""
    rounds = 400_000
    target, draft = np.array([0.5, 0.3, 0.15, 0.05]), np.array([0.2, 0.2, 0.25, 0.35])
    accepted, residual = np.minimum(draft, target / lenience), np.maximum(target - draft, 0)
    law = accepted + (1 - accepted.sum()) * residual / residual.sum()
    assert (abs(law - target).sum() > 0.1) == (lenience < 1)

    keys = jax.random.split(jax.random.key(7), 3)
    tokens_bj = np.asarray(jax.random.categorical(keys[0], log32(draft), shape=(rounds, 1)), np.int32)
    verdict = verification.rejection(
        as_draft(tokens_bj, np.broadcast_to(draft, (rounds, 1, 4))),
        log32(np.broadcast_to(target, (rounds, 2, 4))),
        jax.random.uniform(keys[1], (rounds, 1)),
        jax.random.gumbel(keys[2], (rounds, 4)),
        lenience=jnp.float32(lenience),
    )
    first_b = np.where(np.asarray(verdict.accepted_b) > 0, tokens_bj[:, 0], np.asarray(verdict.next_token_b))
    assert fit(np.bincount(first_b, minlength=4), law).p_value > 0.001


def test_block_corrects_from_what_the_prefix_reaches():
    """r_1 = 1/2, so max(r·p − q, 0) is 4 : 1 where max(p − q, 0) is 2 : 1; a noise of 1 tells the two apart."""
    target_1tv = np.array([[[0.4, 0.6, 0.0, 0.0], [0.6, 0.4, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]]])
    draft_1jv = np.array([[[0.8, 0.2, 0.0, 0.0], [0.1, 0.15, 0.75, 0.0]]])
    draft, gumbel_1v = as_draft(np.array([[0, 2]], np.int32), draft_1jv), jnp.array([[0.0, 1.0, 0.0, 0.0]])
    verdict = verification.block(draft, log32(target_1tv), jnp.array([[0.0, 1.0]]), gumbel_1v)
    assert (verdict.accepted_b.tolist(), verdict.next_token_b.tolist()) == ([1], [0])
