"""The three dispatches give one answer, in outputs and in every gradient."""

import dataclasses
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax import Experts, RouterInputs, Routing, TopN, mixture, token_groups
from moe_jax.dispatch import DISPATCHES, Dispatch, ExpertFunctions, dispatch_weight, sorted_rows
from moe_jax.layout import collect, layout, sent, spread
from tests.moe.support import assert_trees_close, assign_slots, choice, hidden_states

TOKENS, EXPERTS, DIM = 24, 4, 6


def routing_of(gate_ta: jax.Array, *, capacity_factor: float | None, group_size: int | str = 12) -> Routing:
    """Three different experts per token, some not wanted, expert 3 overloaded."""
    token_t = np.arange(TOKENS)
    index_ta = np.stack([np.full(TOKENS, 3), token_t % 3, (token_t + 1) % 3], axis=1)
    wanted_ta = np.random.default_rng(5).random(index_ta.shape) < 0.7
    asked = choice(index_ta, wanted=wanted_ta, gate=gate_ta)
    groups = token_groups(jnp.ones(TOKENS, bool), 12, group_size)
    return assign_slots(asked, groups, num_experts=EXPERTS, capacity_factor=capacity_factor, min_capacity=1)


def uniform(seed: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).random((TOKENS, 3), np.float32))


def experts(**options: Any) -> Experts:
    return jax.jit(lambda: Experts(EXPERTS, DIM, 5, rngs=nnx.Rngs(0), init="original", **options))()


@dataclasses.dataclass(frozen=True)
class ThroughABuffer(ExpertFunctions):
    """Experts that get their rows, and give them, in a buffer: as if on another device."""

    experts: Experts

    def batched(self, x_ecd: jax.Array) -> jax.Array:
        return self.experts.batched(x_ecd)

    def grouped(self, x_sd: jax.Array, sizes_e: jax.Array) -> jax.Array:
        return self.experts.grouped(x_sd, sizes_e)


@cache
def dense_value_and_gradients(
    capacity_factor: float | None, *, straight_through: bool = False, bias: bool = True
) -> Any:
    return value_and_gradients("dense", capacity_factor, straight_through=straight_through, bias=bias)


def value_and_gradients(
    dispatch: Dispatch,
    capacity_factor: float | None,
    *,
    straight_through: bool = False,
    bias: bool = True,
    through: Callable[[Experts], ExpertFunctions] = lambda experts: experts,
) -> Any:
    """Outputs, and the gradients of the experts, the input and the gates."""

    def loss(experts: Experts, x_td: jax.Array, gate_ta: jax.Array) -> tuple[jax.Array, jax.Array]:
        routing = routing_of(gate_ta, capacity_factor=capacity_factor)
        out_td = mixture(x_td, routing, through(experts), dispatch=dispatch, straight_through=straight_through)
        return jnp.sum(out_td**2), out_td

    gate_ta = uniform(6)
    layer = experts(bias=bias, mult_bias=bias)
    return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(layer, hidden_states(TOKENS, DIM), gate_ta)


@pytest.mark.parametrize("dispatch", DISPATCHES)
@pytest.mark.parametrize("capacity_factor", [1.0, None])
def test_sums_are_of_the_tokens_precision(dispatch: Dispatch, capacity_factor: float | None):
    """Whatever that of gates from a router of one's own."""
    with jax.enable_x64(True):
        x_td, gate_ta = hidden_states(TOKENS, DIM).astype(jnp.float64), uniform(6)
        single, double = (
            mixture(
                x, routing_of(gate, capacity_factor=capacity_factor), experts(param_dtype=x.dtype), dispatch=dispatch
            )
            for x, gate in ((x_td.astype(jnp.float32), gate_ta.astype(jnp.float64)), (x_td, gate_ta))
        )
        assert (single.dtype, double.dtype) == (jnp.float32, jnp.float64)
        wanted = mixture(
            x_td,
            routing_of(gate_ta.astype(jnp.float64), capacity_factor=capacity_factor),
            experts(param_dtype=jnp.float64),
            dispatch="dense",
        )
        np.testing.assert_allclose(double, wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("capacity_factor", "straight_through"), [(1.0, False), (1.0, True), (None, True)])
@pytest.mark.parametrize("dispatch", ["index", "ragged"])
@pytest.mark.parametrize("through", [lambda experts: experts, ThroughABuffer], ids=["tokens", "buffer"])
def test_equal_to_dense(
    dispatch: Dispatch,
    capacity_factor: float | None,
    straight_through: bool,
    through: Callable[[Experts], ExpertFunctions],
):
    dense = dense_value_and_gradients(capacity_factor, straight_through=straight_through)
    other = value_and_gradients(dispatch, capacity_factor, straight_through=straight_through, through=through)
    assert float(jnp.abs(jax.tree.leaves(dense)[0]).max()) > 0.1
    assert_trees_close(other, dense, relative=1e-5)


@pytest.mark.parametrize("dispatch", ["index", "ragged"])
def test_equal_to_dense_without_biases(dispatch: Dispatch):
    assert_trees_close(
        value_and_gradients(dispatch, 1.0, bias=False),
        dense_value_and_gradients(1.0, bias=False),
        relative=1e-5,
    )


def test_the_drops_in_these_tests_are_real():
    gate_ta = jnp.ones((TOKENS, 3))
    some, all_kept = (routing_of(gate_ta, capacity_factor=factor).keep_ta.sum() for factor in (1.0, None))
    assert 0 < some < all_kept < TOKENS * 3


def test_sorted_rows_are_no_more_than_slots_or_assignments():
    gate_ta = jnp.ones((TOKENS, 3))
    few, many = (routing_of(gate_ta, capacity_factor=factor) for factor in (1.0, None))
    # Four experts have three slots in each of two groups.
    assert sorted_rows(few)[2] == 24
    assert sorted_rows(many)[2] == TOKENS * 3


class Times(ExpertFunctions):
    """Experts that multiply by 1, 2, 3 and 4."""

    def batched(self, x_ecd: jax.Array) -> jax.Array:
        return x_ecd * jnp.arange(1.0, 5.0)[:, None, None]

    def grouped(self, x_sd: jax.Array, sizes_e: jax.Array) -> jax.Array:
        return x_sd * jnp.repeat(jnp.arange(1.0, 5.0), sizes_e, total_repeat_length=len(x_sd))[:, None]


def test_mixture_by_hand():
    """The output is the input times the gated sum of 1, 2, 3 and 4."""
    asked = choice([[0, 1], [3, 1], [3, 2]], gate=[[0.5, 0.5], [0.75, 0.25], [0.9, 0.1]])
    groups = token_groups(jnp.ones(3, bool), 3, "batch")
    # One slot each: token 2 finds expert 3 taken by token 1, token 1 finds expert 1 taken by token 0.
    routing = assign_slots(asked, groups, num_experts=4, capacity_factor=4 / 3, min_capacity=0)
    x_td = jnp.asarray([[1.0, 10.0], [1.0, 10.0], [1.0, 10.0]])
    expected = np.asarray([0.5 * 1 + 0.5 * 2, 0.75 * 4, 0.1 * 3])[:, None] * x_td
    dispatch: Dispatch
    for dispatch in ("dense", "index", "ragged"):
        np.testing.assert_allclose(mixture(x_td, routing, Times(), dispatch=dispatch), expected, rtol=1e-6)


@pytest.mark.parametrize("dispatch", DISPATCHES)
@pytest.mark.parametrize("group_size", ["batch", "sequence", 3])
def test_no_tokens(dispatch: Dispatch, group_size: int | str):
    """Of experts with functions of their own and of ours."""
    none = jnp.zeros((0, EXPERTS))
    inputs = RouterInputs(none, none, jnp.ones(0, bool), uniform_ta=None)
    groups = token_groups(jnp.ones(0, bool), 4, group_size)
    routing = assign_slots(TopN(n=2).choose(inputs, train=False), groups, num_experts=EXPERTS, capacity_factor=None)
    for functions in (Times(), experts()):
        assert mixture(jnp.zeros((0, DIM)), routing, functions, dispatch=dispatch).shape == (0, DIM)


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_a_routing_of_other_tokens_or_experts_is_refused(dispatch: Dispatch):
    routing = routing_of(uniform(2), capacity_factor=1.0)
    with pytest.raises(ValueError, match=r"x_td must be \(T, D\) of the routing's 24 tokens, got \(23, 6\)"):
        mixture(hidden_states(TOKENS - 1, DIM), routing, experts(), dispatch=dispatch)
    fewer = Experts(EXPERTS // 2, DIM, 5, rngs=nnx.Rngs(0))
    refusal = (
        r"x_ecd must be \(2, C, 6\), got \(4," if dispatch == "dense" else "experts must be the 4 of the routing, got 2"
    )
    with pytest.raises(ValueError, match=refusal):
        mixture(hidden_states(TOKENS, DIM), routing, fewer, dispatch=dispatch)


def test_straight_through_is_exact_in_floating_point_and_passes_the_gradient():
    gate_ta = uniform(0) * 1e-3
    # What it replaces is not exact: (1 + g) - g.
    assert (((1 + gate_ta) - gate_ta) != 1).any()

    np.testing.assert_array_equal(jax.jit(dispatch_weight)(gate_ta), np.ones((TOKENS, 3)))
    gradient_ta = jax.grad(lambda gate_ta: dispatch_weight(gate_ta).sum())(gate_ta)
    np.testing.assert_array_equal(gradient_ta, np.ones((TOKENS, 3)))


def test_straight_through_changes_no_output():
    plain, with_it = (dense_value_and_gradients(1.0, straight_through=on) for on in (False, True))
    np.testing.assert_array_equal(plain[1], with_it[1])
    assert float(jnp.abs(plain[0][2] - with_it[0][2]).max()) > 1e-3


def test_tails_full_of_nan_reach_nothing():
    """Rows beyond the last group are NaN when the experts get them, and NaN come back from there both ways."""

    @jax.custom_vjp
    def poison(rows_sd: jax.Array, sizes_e: jax.Array) -> jax.Array:
        return jnp.where((jnp.arange(len(rows_sd)) < sizes_e.sum())[:, None], rows_sd, jnp.nan)

    poison.defvjp(
        lambda rows_sd, sizes_e: (poison(rows_sd, sizes_e), sizes_e),
        lambda sizes_e, bar_sd: (poison(bar_sd, sizes_e), None),
    )

    class Poisoned(ThroughABuffer):
        def grouped(self, x_sd: jax.Array, sizes_e: jax.Array) -> jax.Array:
            return poison(super().grouped(poison(x_sd, sizes_e), sizes_e), sizes_e)

    poisoned = value_and_gradients("ragged", 2.0, through=Poisoned)
    assert_trees_close(poisoned, dense_value_and_gradients(2.0), relative=1e-5)
    # The tails are there: more rows than assignments kept.
    row_ta, keep_ta, num_rows = sorted_rows(routing_of(jnp.ones((TOKENS, 3)), capacity_factor=2.0))
    assert int(keep_ta.sum()) < num_rows
    assert set(np.asarray(row_ta)[keep_ta].tolist()) == set(range(int(keep_ta.sum())))


def test_empty_slots_full_of_nan_reach_nothing():
    """An expert that answers NaN wherever it was given nothing."""

    class Poisoned(ExpertFunctions):
        def batched(self, x_ecd: jax.Array) -> jax.Array:
            return jnp.where((x_ecd == 0).all(-1, keepdims=True), jnp.nan, x_ecd)

        def grouped(self, x_sd: jax.Array, sizes_e: jax.Array) -> jax.Array:
            return jnp.where((jnp.arange(len(x_sd)) < sizes_e.sum())[:, None], x_sd, jnp.nan)

    routing = routing_of(jnp.ones((TOKENS, 3)), capacity_factor=1.0)

    def total(x_td: jax.Array, dispatch: Dispatch) -> jax.Array:
        return mixture(x_td, routing, Poisoned(), dispatch=dispatch).sum()

    for dispatch in ("index", "ragged"):
        value, gradient = jax.value_and_grad(total)(hidden_states(TOKENS, DIM), dispatch)
        assert jnp.isfinite(value)
        assert jnp.isfinite(gradient).all()


def test_layout_is_its_own_inverse():
    routing = routing_of(jnp.ones((TOKENS, 3)), capacity_factor=1.0)
    where = layout(*sorted_rows(routing))
    for t, a in np.argwhere(routing.keep_ta):
        assert int(where.assignment_s[where.row_ta[t, a]]) == t * 3 + a
    assert (np.asarray(where.row_ta)[~np.asarray(routing.keep_ta)] == len(where.assignment_s)).all()


def test_spreading_and_collecting_are_each_others_transpose():
    row_ta = np.asarray([[3, 0], [6, 4], [1, 6]])
    where = layout(jnp.asarray(row_ta), jnp.asarray(row_ta < 6), 6)
    x_td, y_sd = hidden_states(3, 5), hidden_states(6, 5, seed=2)
    np.testing.assert_array_equal(
        spread(where, x_td), jnp.stack([x_td[0], x_td[2], 0 * x_td[0], x_td[0], x_td[1], 0 * x_td[0]])
    )
    np.testing.assert_array_equal(collect(where, y_sd), jnp.stack([y_sd[3] + y_sd[0], y_sd[4], y_sd[1]]))
    np.testing.assert_array_equal(jax.vjp(partial(spread, where), x_td)[1](y_sd)[0], collect(where, y_sd))
    np.testing.assert_array_equal(jax.vjp(partial(collect, where), y_sd)[1](x_td)[0], spread(where, x_td))


def test_factors_of_empty_rows_are_zero_and_a_gradient_of_nan_there_reaches_nothing():
    """With the last assignment of all kept."""
    where = layout(jnp.asarray([[3, 0], [1, 4]]), jnp.ones((2, 2), bool), 6)
    gate_s, pull = jax.vjp(lambda gate_ta: sent(where, gate_ta, None).gate_s, jnp.asarray([[1.0, 2.0], [3.0, 4.0]]))
    np.testing.assert_array_equal(gate_s, [2, 3, 0, 1, 4, 0])
    (gradient_ta,) = pull(jnp.asarray([20, 30, jnp.nan, 10, 40, jnp.nan]))
    np.testing.assert_array_equal(gradient_ta, [[10, 20], [30, 40]])


def test_gradients_of_bfloat16_rows_and_tokens_are_bfloat16():
    where = layout(jnp.asarray([[0, 1]]), jnp.ones((1, 2), bool), 2)
    for move, rows in ((spread, 1), (collect, 2)):
        moved, pull = jax.vjp(partial(move, where), jnp.ones((rows, 3), jnp.bfloat16))
        assert pull(moved)[0].dtype == jnp.bfloat16
