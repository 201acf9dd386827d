"""What a layer reports of its routing, by hand."""

import chex
import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import ExpertChoice, RouterTotals, metrics, router_totals, token_groups
from tests.moe.support import apply, assign_slots, choice, hidden_states, layer


def test_shares_of_what_was_asked_for():
    """Four tokens want expert 0, two of them expert 1 as well; each has one slot."""
    asked = choice([[0, 1]] * 4, wanted=[[True, True], [True, True], [True, False], [True, False]])
    mask_t = jnp.ones(4, bool)
    routing = assign_slots(asked, token_groups(mask_t, 4, "batch"), num_experts=4, capacity_factor=1.0, min_capacity=0)
    got = metrics(router_totals(jnp.zeros((4, 4)), asked, routing, mask_t))
    np.testing.assert_allclose(got.wanted_a, [1, 0.5])
    np.testing.assert_allclose(got.dropped_a, [0.75, 0.5])
    np.testing.assert_allclose(got.load_e, [4 / 6, 2 / 6, 0, 0], rtol=1e-6)


def test_metrics_and_balance_loss_of_expert_choice():
    moe = layer(dim=2, num_experts=2, router=ExpertChoice(), hidden=3)
    moe.router_de[...] = jnp.eye(2)
    out = apply(moe, jnp.log(jnp.asarray([[0.9, 0.1], [0.2, 0.8], [0.3, 0.7], [0.05, 0.95]])))
    # Favourites 0, 1, 1, 1; mean probabilities 0.3625, 0.6375.
    np.testing.assert_allclose(out.balance_loss, 2 * (0.25 * 0.3625 + 0.75 * 0.6375), rtol=1e-5)
    np.testing.assert_allclose(out.metrics.top_gate, (0.9 + 0.8 + 0.7 + 0.95) / 4, rtol=1e-5)


def test_nan_checks_find_nothing_in_a_padded_batch():
    """Padding has probabilities of 0, and so has a token that is sure."""
    moe, mask_t = layer(), jnp.asarray([True, False, True])
    with jax.debug_nans(True):
        # One operation after the other, so that each is checked.
        out = moe(hidden_states(3, 8) * 1e4, train=True, mask=mask_t)
    np.testing.assert_allclose(out.metrics.router_entropy, 0, atol=1e-6)


def test_padding_of_any_logits_counts_for_nothing():
    """A layer has logits of 0 there; `router_totals` takes what it is given."""
    mask_t, asked = jnp.asarray([True, False]), choice([[0, 1], [2, 3]], wanted=[[False, True], [False, False]])
    routing = assign_slots(asked, token_groups(mask_t, 2, "batch"), num_experts=4, capacity_factor=None)

    def z_squared(logits_te: jax.Array) -> tuple[jax.Array, RouterTotals]:
        totals = router_totals(logits_te, asked, routing, mask_t)
        return totals.z_squared, totals

    differentiated = jax.grad(z_squared, has_aux=True)
    bar_te, totals = differentiated(jnp.zeros((2, 4)).at[1].set(jnp.inf))
    expected_te, expected = differentiated(jnp.zeros((2, 4)))
    chex.assert_trees_all_equal(totals, expected)
    np.testing.assert_array_equal(bar_te, expected_te)
    np.testing.assert_array_equal(totals.first_e, [1, 0, 0, 0])


def test_one_logit_that_is_not_finite_is_counted():
    moe = layer()
    moe.router_de[...] = moe.router_de[...].at[0, 2].set(jnp.inf)
    x = hidden_states(4, 8)
    np.testing.assert_allclose(apply(moe, x).metrics.nonfinite_logits, 1)
