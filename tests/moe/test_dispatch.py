"""The three dispatches give one answer, in outputs and in every gradient."""

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import moe_jax.experts
from moe_jax import Experts, Routing, grouped, mixture, token_groups
from moe_jax.dispatch import Dispatch, dispatch_weight, layout, sorted_rows
from moe_jax.grouped import FEW_ROWS, REST_BLOCKS, WHOLE_BLOCKS, batched_product, group_rows, grouped_product
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


@cache
def dense_value_and_gradients(
    capacity_factor: float | None, *, straight_through: bool = False, bias: bool = True
) -> Any:
    return value_and_gradients("dense", capacity_factor, straight_through=straight_through, bias=bias)


def value_and_gradients(
    dispatch: Dispatch, capacity_factor: float | None, *, straight_through: bool = False, bias: bool = True
) -> Any:
    """Outputs, and the gradients of the experts, the input and the gates."""

    def loss(experts: Experts, x_td: jax.Array, gate_ta: jax.Array) -> tuple[jax.Array, jax.Array]:
        routing = routing_of(gate_ta, capacity_factor=capacity_factor)
        out_td = mixture(x_td, routing, experts, dispatch=dispatch, straight_through=straight_through)
        return jnp.sum(out_td**2), out_td

    gate_ta = uniform(6)
    layer = experts(bias=bias, mult_bias=bias)
    return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(layer, hidden_states(TOKENS, DIM), gate_ta)


@pytest.mark.parametrize(("capacity_factor", "straight_through"), [(1.0, False), (1.0, True), (None, True)])
@pytest.mark.parametrize("dispatch", ["index", "ragged"])
def test_equal_to_dense(dispatch: Dispatch, capacity_factor: float | None, straight_through: bool):
    dense = dense_value_and_gradients(capacity_factor, straight_through=straight_through)
    other = value_and_gradients(dispatch, capacity_factor, straight_through=straight_through)
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


def test_mixture_by_hand():
    """Experts that multiply by 1, 2, 3 and 4: the output is the input times the gated sum."""

    class Times:
        def batched(self, x_ecd: jax.Array) -> jax.Array:
            return x_ecd * jnp.arange(1.0, 5.0)[:, None, None]

        def grouped(self, x_sd: jax.Array, sizes_e: jax.Array) -> jax.Array:
            return x_sd * jnp.repeat(jnp.arange(1.0, 5.0), sizes_e, total_repeat_length=len(x_sd))[:, None]

    asked = choice([[0, 1], [3, 1], [3, 2]], gate=[[0.5, 0.5], [0.75, 0.25], [0.9, 0.1]])
    groups = token_groups(jnp.ones(3, bool), 3, "batch")
    # One slot each: token 2 finds expert 3 taken by token 1, token 1 finds expert 1 taken by token 0.
    routing = assign_slots(asked, groups, num_experts=4, capacity_factor=4 / 3, min_capacity=0)
    x_td = jnp.asarray([[1.0, 10.0], [1.0, 10.0], [1.0, 10.0]])
    expected = np.asarray([0.5 * 1 + 0.5 * 2, 0.75 * 4, 0.1 * 3])[:, None] * x_td
    dispatch: Dispatch
    for dispatch in ("dense", "index", "ragged"):
        np.testing.assert_allclose(mixture(x_td, routing, Times(), dispatch=dispatch), expected, rtol=1e-6)


def test_straight_through_is_exact_in_floating_point_and_passes_the_gradient():
    gate_ta = uniform(0) * 1e-3
    # What it replaces is not exact: (1 + g) - g.
    assert (((1 + gate_ta) - gate_ta) != 1).any()

    def weights(gate_ta: jax.Array) -> jax.Array:
        return dispatch_weight(routing_of(gate_ta, capacity_factor=1.0), True)

    np.testing.assert_array_equal(jax.jit(weights)(gate_ta), np.ones((TOKENS, 3)))
    kept_ta = routing_of(gate_ta, capacity_factor=1.0).keep_ta
    np.testing.assert_array_equal(jax.grad(lambda gate_ta: weights(gate_ta).sum())(gate_ta), kept_ta)


def test_straight_through_changes_no_output():
    plain, with_it = (dense_value_and_gradients(1.0, straight_through=on) for on in (False, True))
    np.testing.assert_array_equal(plain[1], with_it[1])
    assert float(jnp.abs(plain[0][2] - with_it[0][2]).max()) > 1e-3


def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes every grouped product return NaN beyond the last group, forward and backward."""

    @jax.custom_vjp
    def poison(rows_sd: jax.Array, sizes_e: jax.Array) -> jax.Array:
        return jnp.where((jnp.arange(len(rows_sd)) < sizes_e.sum())[:, None], rows_sd, jnp.nan)

    poison.defvjp(
        lambda rows_sd, sizes_e: (poison(rows_sd, sizes_e), sizes_e),
        lambda sizes_e, bar_sd: (poison(bar_sd, sizes_e), None),
    )

    def product(rows_sd: jax.Array, weights_edf: jax.Array, sizes_e: jax.Array) -> jax.Array:
        rows_sd = poison(rows_sd, sizes_e)
        return poison(grouped_product(rows_sd, weights_edf, sizes_e), sizes_e)

    monkeypatch.setattr(moe_jax.experts, "grouped_product", product)


def test_tails_full_of_nan_reach_nothing(monkeypatch: pytest.MonkeyPatch):
    poisoned(monkeypatch)
    poisoned_values = value_and_gradients("ragged", 2.0)
    assert_trees_close(poisoned_values, dense_value_and_gradients(2.0), relative=1e-5)
    # The tails are there: more rows than assignments kept.
    row_ta, keep_ta, num_rows = sorted_rows(routing_of(jnp.ones((TOKENS, 3)), capacity_factor=2.0))
    assert int(keep_ta.sum()) < num_rows
    assert set(np.asarray(row_ta)[keep_ta].tolist()) == set(range(int(keep_ta.sum())))


def test_empty_slots_full_of_nan_reach_nothing():
    """An expert that answers NaN wherever it was given nothing."""

    class Poisoned:
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


@pytest.mark.parametrize(
    ("rows", "sizes"),
    [
        (300, [5, 0, 31, 33]),
        (300, [0, 0, 0, 0]),
        (300, [0, 0, 300, 0]),
        (300, [64, 1, 128, 107]),
        (900, [513, 257, 96, 1]),
        (3, [2, 0, 0, 1]),
    ],
)
def test_grouped_product_in_blocks(rows: int, sizes: list[int]):
    """Group sizes around the block lengths, empty ones and tails, against a product per row."""
    assert (WHOLE_BLOCKS, REST_BLOCKS[0], REST_BLOCKS[-1]) == ((512, 256), 32, 256)
    rows_sd, weights_edf = hidden_states(rows, 5), hidden_states(4, 5, 3, seed=2)
    sizes_e = jnp.asarray(sizes)
    used = sum(sizes)
    expert_s = np.repeat(np.arange(4), sizes)

    def used_rows(rows_sd: jax.Array, weights_edf: jax.Array) -> jax.Array:
        return grouped_product(rows_sd, weights_edf, sizes_e)[:used]

    def reference(rows_sd: jax.Array, weights_edf: jax.Array) -> jax.Array:
        return jnp.einsum("sd,sdf->sf", rows_sd[:used], weights_edf[expert_s])

    product, pull = jax.vjp(used_rows, rows_sd, weights_edf)
    target, reference_pull = jax.vjp(reference, rows_sd, weights_edf)
    np.testing.assert_allclose(product, target, rtol=1e-5, atol=1e-5)
    bar_sf = hidden_states(used, 3, seed=3)
    for got, wanted in zip(pull(bar_sf), reference_pull(bar_sf)):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("rows", [3, FEW_ROWS + 1])
def test_batched_product(rows: int):
    """In turn and at once, with both transposes."""
    rows_ecd, weights_edf, bar_ecf = (
        hidden_states(4, rows, 5),
        hidden_states(4, 5, 3),
        hidden_states(4, rows, 3, seed=3),
    )
    product, pull = jax.vjp(batched_product, rows_ecd, weights_edf)
    target, reference_pull = jax.vjp(lambda *operands: jnp.einsum("ecd,edf->ecf", *operands), rows_ecd, weights_edf)
    np.testing.assert_allclose(product, target, atol=1e-5)
    for got, wanted in zip(pull(bar_ecf), reference_pull(bar_ecf), strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-4)


def test_group_rows_and_their_sums():
    """Rows beyond the last group count for nothing, whatever their gradient is."""
    rows_ef, sizes_e = hidden_states(4, 3), jnp.asarray([2, 0, 40, 5])
    group_s = np.repeat(np.arange(4), sizes_e)
    repeated, pull = jax.vjp(partial(group_rows, sizes_e=sizes_e, num_rows=50), rows_ef)
    np.testing.assert_array_equal(repeated[:47], rows_ef[group_s])
    bar_sf = hidden_states(50, 3, seed=3).at[47:].set(jnp.nan)
    expected = jnp.zeros((4, 3)).at[group_s].add(bar_sf[:47])
    np.testing.assert_allclose(pull(bar_sf)[0], expected, atol=1e-5)
    np.testing.assert_allclose(grouped.sums_by_scatter(bar_sf, sizes_e), expected, atol=1e-5)


def test_blocks_equal_the_ragged_dot_of_other_backends():
    """What an accelerator runs, which a CPU computes too, only slowly: products and both transposes."""
    rows_sd, weights_edf, bar_sf = hidden_states(40, 5), hidden_states(4, 5, 3, seed=2), hidden_states(40, 3, seed=3)
    sizes_e = jnp.asarray([7, 0, 20, 13])
    np.testing.assert_allclose(
        grouped_product(rows_sd, weights_edf, sizes_e), jax.lax.ragged_dot(rows_sd, weights_edf, sizes_e), atol=1e-5
    )
    ours = jax.vjp(lambda *arrays: grouped_product(*arrays, sizes_e), rows_sd, weights_edf)[1](bar_sf)
    theirs = grouped.transpose_of_ragged_dot(rows_sd, weights_edf, sizes_e, bar_sf)
    for got, wanted in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_ragged_memory_and_work_follow_the_tokens():
    """Blocks of the rows, not experts times rows: twice the experts must not double the counted work."""

    def scratch(num_experts: int) -> int:
        rows_sd, sizes_e = hidden_states(512, 16), jnp.full(num_experts, 512 // num_experts)
        compiled = jax.jit(grouped_product).lower(rows_sd, jnp.ones((num_experts, 16, 16)), sizes_e).compile()
        memory = compiled.memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    rows = 512 * 16 * 4
    assert scratch(32) < scratch(2) + 2 * rows
