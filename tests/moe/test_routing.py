"""Routers on logits small enough to route by hand."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from moe_jax import (
    CoordinateDescent,
    ExpertChoice,
    Router,
    RouterInputs,
    RouterTotals,
    TopN,
    router_totals,
    token_groups,
)
from moe_jax.routing import Policy, Score, wanted_ranks, within_best_groups
from tests.moe.support import NOISED, PROBS, assign_slots, inputs_of


def test_top_two_by_hand():
    chosen = TopN(policy_train="all").choose(inputs_of(PROBS), train=True)
    np.testing.assert_array_equal(chosen.expert_index_ta, [[2, 0], [1, 3]])
    # 0.5 / 0.8, 0.3 / 0.8; 0.6 / 0.85, 0.25 / 0.85
    np.testing.assert_allclose(chosen.gate_ta, [[0.625, 0.375], [0.70588, 0.29412]], atol=1e-5)
    np.testing.assert_allclose(chosen.probs_te, PROBS, atol=1e-6)
    np.testing.assert_array_equal(chosen.first_expert_t, [2, 1])
    assert chosen.wanted_ta.all()


def test_three_candidates_have_a_threshold_each():
    # Gates of token 0: 0.5, 0.3, 0.15 over 0.95 = 0.526, 0.316, 0.158; of token 1: 0.6, 0.25, 0.1 over 0.95 =
    # 0.632, 0.263, 0.105.
    router = TopN(n=3, policy_eval="threshold", threshold_eval=(0.3, 0.1))
    chosen = router.choose(inputs_of(PROBS), train=False)
    np.testing.assert_array_equal(chosen.wanted_ta, [[True, True, True], [True, False, True]])
    router = TopN(n=3, policy_eval="threshold", threshold_eval=0.2)
    chosen = router.choose(inputs_of(PROBS), train=False)
    np.testing.assert_array_equal(chosen.wanted_ta, [[True, True, False], [True, True, False]])


def test_one_candidate_keeps_its_probability():
    chosen = TopN(n=1).choose(inputs_of(PROBS), train=True)
    np.testing.assert_array_equal(chosen.expert_index_ta, [[2], [1]])
    np.testing.assert_allclose(chosen.gate_ta, [[0.5], [0.6]], atol=1e-6)


@pytest.mark.parametrize(
    ("policy", "wanted"),
    [("all", [1, 1, 1]), ("none", [1, 0, 0]), ("threshold", [1, 1, 0]), ("random", [1, 0, 1])],
)
def test_policies(policy: Policy, wanted: list[int]):
    share_ta = jnp.asarray([[0.6, 0.3, 0.1]])
    # random: 0.7 is not below 0.3 / 0.5 = 0.6; 0.3 is below 0.1 / 0.25 = 0.4. The first is taken at any draw.
    uniform_ta = jnp.asarray([[0.999, 0.7, 0.3]])
    thresholds = (0.5, 0.25) if policy == "random" else (0.3, 0.25)
    got = wanted_ranks(share_ta, policy, thresholds, uniform_ta)
    np.testing.assert_array_equal(got, np.asarray([wanted], bool))


def random_policy_p_value(probability: float) -> float:
    """How likely the count of second choices taken at gate 0.06 and threshold 0.2 is under `probability`."""
    draws = 20_000
    share_ta = jnp.tile(jnp.asarray([[0.94, 0.06]]), (draws, 1))
    uniform_ta = jax.random.uniform(jax.random.key(3), (draws, 2))
    taken = int(wanted_ranks(share_ta, "random", (0.2,), uniform_ta)[:, 1].sum())
    return float(scipy.stats.binomtest(taken, draws, probability).pvalue)


def test_random_policy_takes_the_second_choice_with_probability_gate_over_threshold():
    assert random_policy_p_value(0.06 / 0.2) > 1e-3


@pytest.mark.parametrize("wrong", [0.06, 0.2, 0.28, 0.32])
def test_random_policy_test_notices_other_probabilities(wrong: float):
    assert random_policy_p_value(wrong) < 1e-6


def test_noise_decides_who_is_chosen_and_weights_nothing():
    noised = jnp.log(jnp.asarray([[0.1, 0.7, 0.15, 0.05], [0.6, 0.1, 0.05, 0.25]]))
    chosen = TopN(policy_train="all").choose(inputs_of(PROBS, selection_logits_te=noised), train=True)
    np.testing.assert_array_equal(chosen.expert_index_ta, [[1, 2], [0, 3]])
    # Of the un-noised probabilities 0.15, 0.5 and 0.1, 0.25.
    np.testing.assert_allclose(chosen.gate_ta, [[0.23077, 0.76923], [0.28571, 0.71429]], atol=1e-5)
    np.testing.assert_allclose(chosen.probs_te, PROBS, atol=1e-6)


def test_sigmoid_scores_with_a_bias_that_only_steers():
    logits_te = jnp.asarray([[2.0, 1.0, 0.0, -1.0]])  # sigmoids 0.8808, 0.7311, 0.5, 0.2689
    router = TopN(score="sigmoid", policy_train="all", bias=True)
    given = RouterInputs(
        logits_te=logits_te,
        selection_logits_te=logits_te,
        mask_t=jnp.ones(1, bool),
        bias_e=jnp.asarray([0.0, -0.5, 0.0, 0.5]),  # steered: 0.8808, 0.2311, 0.5, 0.7689
    )
    chosen = router.choose(given, train=True)
    np.testing.assert_array_equal(chosen.expert_index_ta, [[0, 3]])
    np.testing.assert_allclose(chosen.gate_ta, [[0.7661, 0.2339]], atol=1e-4)  # over 0.8808 + 0.2689
    np.testing.assert_allclose(chosen.probs_te, [[0.3700, 0.3071, 0.2100, 0.1129]], atol=1e-4)


SUM = partial(jnp.sum, axis=-1)


def test_grouped_routing_stays_within_the_best_groups():
    # Groups {0, 1}, {2, 3}, {4, 5} score 0.35, 0.30 and 0.35 + 0.0 (ties go to the first group).
    scores_te = jnp.asarray([[0.20, 0.15, 0.30, 0.00, 0.05, 0.25]])
    within_te = within_best_groups(scores_te, 3, 1, SUM)
    np.testing.assert_array_equal(within_te, [[True, True, False, False, False, False]])
    router = TopN(policy_train="all", expert_groups=3, expert_groups_kept=1)
    chosen = router.choose(inputs_of((scores_te + 0.01).tolist()), train=True)
    # Expert 2 has the best score of all, but its group does not.
    np.testing.assert_array_equal(chosen.expert_index_ta, [[0, 1]])


def test_groups_of_one_expert_and_all_groups():
    scores_te = jnp.asarray([[0.1, 0.4, 0.2, 0.3]])
    np.testing.assert_array_equal(within_best_groups(scores_te, 4, 2, SUM), [[False, True, False, True]])
    assert within_best_groups(scores_te, 2, 2, SUM).all()


def of_logits(logits: list[float]) -> RouterInputs:
    logits_te = jnp.asarray([logits])
    return RouterInputs(logits_te=logits_te, selection_logits_te=logits_te, mask_t=jnp.ones(1, bool))


@pytest.mark.parametrize("lowest", [-10.0, -22.0, -40.0, -1e4])
def test_gates_of_the_smallest_sigmoids_sum_to_one(lowest: float):
    chosen = TopN(score="sigmoid", policy_train="all").choose(of_logits([lowest - 1, lowest, lowest - 3]), train=True)
    np.testing.assert_array_equal(chosen.expert_index_ta, [[1, 0]])
    # Where sigmoids are exponentials, their shares are those of a softmax.
    np.testing.assert_allclose(chosen.gate_ta, [[0.73106, 0.26894]], atol=1e-4)


@pytest.mark.parametrize(
    ("score", "logits", "best"),
    [
        ("sigmoid", [20.0, 30.0, 40.0, 10.0], [2, 1]),  # the first three are 1 in float32
        ("softmax", [1000.0, 0.0, 500.0, 400.0], [0, 2]),  # all but the first are 0
        ("softmax", [0.0, 1e-8, 0.0, 0.0], [1, 0]),  # all equal
    ],
)
@pytest.mark.parametrize("groups", [1, 2])
def test_experts_are_ranked_where_their_scores_are_equal(
    score: Score, logits: list[float], best: list[int], groups: int
):
    router = TopN(score=score, policy_train="all", expert_groups=groups, expert_groups_kept=groups)
    chosen = router.choose(of_logits(logits), train=True)
    np.testing.assert_array_equal(chosen.expert_index_ta, [best])
    np.testing.assert_array_equal(chosen.first_expert_t, best[:1])


@pytest.mark.parametrize(
    ("score", "logits", "best"),
    [
        # The scores of groups {2, 3} and {4, 5} are 0 in float32.
        ("softmax", [200.0, 0.0, 1.0, 0.0, 50.0, 49.0], [0, 4, 5]),
        # 20.1, 5.4 and 3.3 to each other, though the first has the smallest sum of logits.
        ("softmax", [3.0, -10.0, 1.0, 1.0, 0.5, 0.5], [0, 2, 3]),
        # All scores are 1 in float32.
        ("sigmoid", [20.0, 19.0, 30.0, 29.0, 40.0, 39.0], [4, 5, 2]),
        # All are 0: exp(-200) times 1.21, 1 and 1.19, though the second group has the best expert.
        ("sigmoid", [-200.5, -200.5, -200.0, -400.0, -201.0, -200.2], [5, 0, 1]),
        # 1.50, 1.76 and 0.95.
        ("sigmoid", [3.0, 0.2, 2.0, 2.0, 3.0, -300.0], [0, 2, 3]),
    ],
)
def test_groups_are_ranked_where_their_scores_are_equal(score: Score, logits: list[float], best: list[int]):
    router = TopN(n=3, score=score, policy_train="all", expert_groups=3, expert_groups_kept=2)
    chosen = router.choose(of_logits(logits), train=True)
    np.testing.assert_array_equal(chosen.expert_index_ta, [best])


def test_an_expert_chooses_among_tokens_of_the_same_probability():
    logits_te = jnp.asarray([[0.0, 200.0], [0.0, 150.0], [0.0, 250.0]])
    given = RouterInputs(logits_te=logits_te, selection_logits_te=logits_te, mask_t=jnp.ones(3, bool))
    chosen = ExpertChoice().choose(given, train=True)
    np.testing.assert_array_equal(chosen.probs_te[:, 0], 0)
    np.testing.assert_array_equal(jnp.argsort(-chosen.priority_ta[:, 0]), [1, 0, 2])


@pytest.mark.parametrize("router", [TopN(policy_train="all"), ExpertChoice()])
def test_counts_do_not_depend_on_the_dtype_of_the_logits(router: Router):
    """In bfloat16, 256 + 1 is 256."""
    logits_te = jnp.asarray(np.random.default_rng(0).standard_normal((2000, 4)), jnp.bfloat16)
    mask_t = jnp.ones(2000, bool)

    @jax.jit
    def totals(logits_te: jax.Array) -> RouterTotals:
        chosen = router.choose(RouterInputs(logits_te, logits_te, mask_t), train=True)
        groups = token_groups(mask_t, 2000, "batch")
        routing = assign_slots(chosen, groups, num_experts=4, capacity_factor=1.0)
        return router_totals(logits_te, chosen, routing, mask_t)

    narrow, wide = totals(logits_te), totals(logits_te.astype(jnp.float32))
    chex.assert_trees_all_equal(narrow, wide)
    assert int(narrow.first_e.sum()) == 2000


def test_sigmoids_that_underflow_still_have_probabilities():
    logits_te = jnp.asarray([[-1000.0, -1001.0, -1002.0]])
    given = RouterInputs(logits_te, logits_te, jnp.ones(1, bool))
    probs_te = TopN(score="sigmoid", policy_train="all").choose(given, train=True).probs_te
    np.testing.assert_allclose(probs_te, jax.nn.softmax(logits_te), rtol=1e-6)


@pytest.mark.parametrize("router", [TopN(), TopN(expert_groups=4, expert_groups_kept=2), CoordinateDescent()])
def test_best_experts_are_found_without_sorting_all(router: Router):
    def choice(logits_te: jax.Array) -> tuple[jax.Array, jax.Array]:
        given = RouterInputs(logits_te, logits_te, jnp.ones(len(logits_te), bool))
        chosen = router.choose(given, train=False)
        return chosen.expert_index_ta, chosen.first_expert_t

    program = jax.jit(choice).lower(jnp.zeros((64, 16))).compile().as_text()
    assert program is not None
    assert " sort(" not in program


def test_a_bias_steers_the_noised_scores():
    noised = jnp.log(jnp.asarray([[0.25, 0.6, 0.1, 0.05]]))
    # Steered: 0.25, 0, 0.1, 0.35; without the noise 0.3, -0.45, 0.5, 0.35.
    bias_e = jnp.asarray([0.0, -0.6, 0.0, 0.3])
    router = TopN(policy_train="all", bias=True)
    chosen = router.choose(inputs_of(PROBS[:1], selection_logits_te=noised, bias_e=bias_e), train=True)
    np.testing.assert_array_equal(chosen.expert_index_ta, [[3, 0]])
    np.testing.assert_allclose(chosen.gate_ta, [[0.05 / 0.35, 0.3 / 0.35]], atol=1e-5)


def test_noise_does_not_make_a_token_surer():
    chosen = TopN(policy_train="all").choose(
        inputs_of(PROBS, selection_logits_te=jnp.log(jnp.asarray(NOISED))), train=True
    )
    np.testing.assert_allclose(jnp.exp(chosen.priority_ta), [[0.3, 0.3], [0.1, 0.1]], rtol=1e-5)


def test_noise_decides_which_groups_are_kept():
    router = TopN(policy_train="all", expert_groups=2, expert_groups_kept=1)
    chosen = router.choose(inputs_of(PROBS[:1], selection_logits_te=jnp.log(jnp.asarray(NOISED[:1]))), train=True)
    np.testing.assert_array_equal(chosen.expert_index_ta, [[0, 1]])  # without noise, {2, 3} have 0.55


def test_biased_groups_are_ranked_by_the_sum_of_scores_and_biases():
    bias_e = jnp.asarray([0.05, 0.15, 0.12, -0.03])
    # Steered: 0.35, 0.3 and 0.62, 0.02: in all 0.65 and 0.64.
    router = TopN(policy_train="all", bias=True, expert_groups=2, expert_groups_kept=1)
    chosen = router.choose(inputs_of([[0.3, 0.15, 0.5, 0.05]], bias_e=bias_e), train=True)
    np.testing.assert_array_equal(chosen.expert_index_ta, [[0, 1]])


def test_experts_of_other_groups_are_not_chosen_where_biases_make_all_scores_negative():
    bias_e = jnp.asarray([-0.4, -0.4, -0.9, -0.9])
    router = TopN(policy_train="all", bias=True, expert_groups=2, expert_groups_kept=1)
    chosen = router.choose(inputs_of([[0.3, 0.15, 0.5, 0.05]], bias_e=bias_e), train=True)
    np.testing.assert_array_equal(chosen.expert_index_ta, [[0, 1]])


def test_noise_decides_whom_an_expert_chooses_and_weights_nothing():
    chosen = ExpertChoice().choose(inputs_of(PROBS, selection_logits_te=jnp.log(jnp.asarray(NOISED))), train=True)
    np.testing.assert_allclose(jnp.exp(chosen.priority_ta), NOISED, rtol=1e-5)
    np.testing.assert_allclose(chosen.gate_ta, PROBS, rtol=1e-5)
    np.testing.assert_allclose(chosen.probs_te, PROBS, rtol=1e-5)
    np.testing.assert_array_equal(chosen.first_expert_t, [0, 0])
