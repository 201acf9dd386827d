"""The three dispatches give one answer, in outputs and in every gradient."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import moe_jax.experts
from moe_jax import Experts, Routing, grouped, mixture, token_groups
from moe_jax.blocks import Blocks, blocks_of_equal_groups, blocks_of_groups
from moe_jax.dispatch import Dispatch, dispatch_weight, layout, sorted_rows
from moe_jax.experts import GEGLU, HiddenWeights, OutputWeights, gelu
from moe_jax.grouped import OneGroup, Operands, Weights, by_group
from tests.moe.meshes import mesh_of
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


def test_tails_full_of_nan_reach_nothing(monkeypatch: pytest.MonkeyPatch):
    """Rows beyond the last group are NaN when the experts get them, and NaN come back from there both ways."""

    @jax.custom_vjp
    def poison(rows_sd: jax.Array, sizes_e: jax.Array) -> jax.Array:
        return jnp.where((jnp.arange(len(rows_sd)) < sizes_e.sum())[:, None], rows_sd, jnp.nan)

    poison.defvjp(
        lambda rows_sd, sizes_e: (poison(rows_sd, sizes_e), sizes_e),
        lambda sizes_e, bar_sd: (poison(bar_sd, sizes_e), None),
    )

    def poisoned(layers: GEGLU, weights: Any, rows: jax.Array, sizes_e: jax.Array, *, recompute: bool) -> jax.Array:
        return poison(by_group(layers, weights, poison(rows, sizes_e), sizes_e, recompute=recompute), sizes_e)

    wanted = dense_value_and_gradients(2.0)
    monkeypatch.setattr(moe_jax.experts, "by_group", poisoned)
    assert_trees_close(value_and_gradients("ragged", 2.0), wanted, relative=1e-5)
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


LAYERS = GEGLU(gelu)


def weights() -> Weights:
    """Of four experts."""
    shapes = {"w_in": (4, 5, 6), "b_in": (4, 6), "mult_bias": (4, 3), "w_out": (4, 3, 5), "b_out": (4, 5)}
    made = {name: hidden_states(*shape, seed=seed) for seed, (name, shape) in enumerate(shapes.items())}
    output = OutputWeights(made["mult_bias"], made["w_out"], made["b_out"])
    return Weights(HiddenWeights(made["w_in"], made["b_in"]), output)


def row_by_row(weights: Any, rows_sd: jax.Array, group_s: jax.Array) -> jax.Array:
    def row(weights: Any, row_d: jax.Array) -> jax.Array:
        hidden_1f = LAYERS.hidden(OneGroup(), weights.hidden, row_d[None])
        return LAYERS.output(OneGroup(), weights.output, hidden_1f)[0]

    return jax.vmap(row)(jax.tree.map(lambda weight: weight[group_s], weights), rows_sd)


def answers(call: Callable[[Any, jax.Array], jax.Array], rows: jax.Array, bar: jax.Array) -> tuple[Any, ...]:
    """Outputs, and the gradients of weights and rows."""
    outputs, pull = jax.vjp(call, weights(), rows)
    return outputs, *pull(bar)


@jax.jit
def in_blocks_and_by_rows(rows_sd: jax.Array, bar_sd: jax.Array, sizes_e: jax.Array) -> tuple[Any, Any]:
    """The same twice, the first time with NaN beyond the last group: answers, and outputs without a gradient."""
    used_s1 = (jnp.arange(len(rows_sd)) < sizes_e.sum())[:, None]
    group_s = jnp.repeat(jnp.arange(4), sizes_e, total_repeat_length=len(rows_sd))

    def answers_and_outputs(call: Callable[[Any, jax.Array], jax.Array], beyond: float) -> Any:
        rows, bar = (jnp.where(used_s1, x_sd, beyond) for x_sd in (rows_sd, bar_sd))
        outputs, weights_bar, rows_bar = answers(call, rows, bar)
        of_rows = (jnp.where(used_s1, x_sd, 0) for x_sd in (outputs, rows_bar, call(weights(), rows)))
        return weights_bar, *of_rows

    blocks = partial(by_group, LAYERS)
    return (
        answers_and_outputs(lambda weights, rows_sd: blocks(weights, rows_sd, sizes_e), jnp.nan),
        answers_and_outputs(partial(row_by_row, group_s=group_s), 0),
    )


def assert_close(got: Any, wanted: Any) -> None:
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other.reshape(one.shape), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("rows", "sizes"),
    [
        (300, [5, 0, 31, 33]),
        (300, [0, 0, 0, 0]),
        (300, [0, 0, 300, 0]),
        (300, [160, 1, 139, 0]),
        (300, [0, 139, 0, 161]),
        (3, [2, 0, 0, 1]),
    ],
)
def test_groups_in_blocks(rows: int, sizes: list[int]):
    """Sizes around the longest block, empty groups, no row at all, tails."""
    assert blocks_of_groups(4, 300).lengths[-1] == 160
    assert_close(*in_blocks_and_by_rows(hidden_states(rows, 5), hidden_states(rows, 5, seed=3), jnp.asarray(sizes)))


@pytest.mark.parametrize("size", [3, 641, 642])
def test_groups_of_one_size(size: int):
    """In one block each, in two that do not divide them, and in two that do."""
    assert blocks_of_equal_groups(4, size) == Blocks(4 * size, (3,) if size == 3 else (321,), exact=size != 641)
    rows_sd, bar_sd = hidden_states(4 * size, 5), hidden_states(4 * size, 5, seed=3)

    def equal(weights: Any, rows_sd: jax.Array) -> jax.Array:
        return jnp.reshape(by_group(LAYERS, weights, rows_sd.reshape(4, size, 5), None), (-1, 5))

    group_s = jnp.repeat(jnp.arange(4), size)
    got, wanted = (
        jax.jit(partial(answers, call))(rows_sd, bar_sd) for call in (equal, partial(row_by_row, group_s=group_s))
    )
    assert_close(got, wanted)
    assert_close(equal(weights(), rows_sd), wanted[0])


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("sizes", [[7, 0, 20, 11], None], ids=["sorted", "equal"])
def test_what_accelerators_compute(sizes: list[int] | None, recompute: bool):
    """All groups at once, which a CPU can do too, only slowly; tails of NaN there as well."""
    used = 40 if sizes is None else sum(sizes)
    group_s = jnp.repeat(jnp.arange(4), jnp.asarray(sizes or [10] * 4))
    rows_sd, bar_sd = (hidden_states(40, 5, seed=seed).at[used:].set(jnp.nan) for seed in (0, 3))
    sizes_e = None if sizes is None else jnp.asarray(sizes)
    rows, bar = (x_sd if sizes else x_sd.reshape(4, 10, 5) for x_sd in (rows_sd, bar_sd))

    @jax.jit
    def at_once(rows: jax.Array, bar: jax.Array) -> Any:
        operands = Operands(weights(), rows, sizes_e)
        hidden, outputs = grouped.both_at_once(LAYERS, operands)
        return outputs, *grouped.gradients_at_once(LAYERS, operands, None if recompute else hidden, bar)

    outputs, weights_bar, rows_bar = at_once(rows, bar)
    got = outputs.reshape(-1, 5)[:used], weights_bar, rows_bar.reshape(-1, 5)[:used]
    assert_close(got, answers(partial(row_by_row, group_s=group_s), rows_sd[:used], bar_sd[:used]))


@pytest.mark.parametrize("sizes", [[0, 160, 1, 139], None], ids=["sorted", "equal"])
def test_hidden_states_computed_again_give_the_same_gradients(sizes: list[int] | None):
    rows, bar = (hidden_states(*((300, 5) if sizes else (4, 75, 5)), seed=seed) for seed in (0, 3))
    sizes_e = None if sizes is None else jnp.asarray(sizes)

    def of(recompute: bool) -> Callable[[Any, jax.Array], jax.Array]:
        return lambda weights, rows: by_group(LAYERS, weights, rows, sizes_e, recompute=recompute)

    programs = [jax.jit(partial(answers, of(recompute))).lower(rows, bar).compile() for recompute in (False, True)]
    kept, again = (program(rows, bar) for program in programs)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6), again, kept)
    # Of 300 rows, 6 numbers of 4 bytes.
    assert scratch_bytes(programs[0]) - scratch_bytes(programs[1]) > 0.9 * 300 * 6 * 4


def scratch_bytes(program: Any) -> int:
    memory = program.memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes


def test_no_rows_at_all():
    def total(weights: Any, rows: jax.Array, sizes_e: jax.Array | None) -> jax.Array:
        return jnp.sum(by_group(LAYERS, weights, rows, sizes_e))

    for rows, sizes_e in ((jnp.zeros((4, 0, 5)), None), (jnp.zeros((0, 5)), jnp.zeros(4, jnp.int32))):
        value, gradient = jax.value_and_grad(total)(weights(), rows, sizes_e)
        assert value == 0
        assert not any(leaf.any() for leaf in jax.tree.leaves(gradient))


def test_weights_that_devices_share_in_a_shard_map_of_ones_own():
    """Devices with groups of different sizes, which the weights' gradient is summed over, once."""
    mesh = mesh_of(2, 1)
    rows_sd, sizes_e = hidden_states(40, 5), jnp.asarray([20, 0, 0, 0, 1, 2, 3, 4])

    def loss(weights: Any, rows_sd: jax.Array, sizes_e: jax.Array) -> jax.Array:
        used_s1 = (jnp.arange(len(rows_sd)) < sizes_e.sum())[:, None]
        return jnp.sum(jnp.where(used_s1, by_group(LAYERS, weights, rows_sd, sizes_e), 0) ** 2)

    @partial(jax.shard_map, mesh=mesh, in_specs=(jax.P(), jax.P("data"), jax.P("data")), out_specs=jax.P())
    def over_devices(weights: Any, rows_sd: jax.Array, sizes_e: jax.Array) -> jax.Array:
        return jax.lax.psum(loss(weights, rows_sd, sizes_e), "data")

    def one_by_one(weights: Any, rows_sd: jax.Array, sizes_e: jax.Array) -> jax.Array:
        return loss(weights, rows_sd[:20], sizes_e[:4]) + loss(weights, rows_sd[20:], sizes_e[4:])

    got, wanted = (jax.jit(jax.grad(f))(weights(), rows_sd, sizes_e) for f in (over_devices, one_by_one))
    assert_close(got, wanted)


@pytest.mark.parametrize("rows", [4096, 16384])
def test_memory_of_a_forward_is_that_of_few_blocks_of_hidden_states(rows: int):
    """However many experts and rows there are: weights of one expert, rows, and less than two blocks."""
    dim, hidden = 16, 64

    def scratch(num_experts: int) -> int:
        of_hidden = HiddenWeights(jnp.ones((num_experts, dim, 2 * hidden)), None)
        stacked = Weights(of_hidden, OutputWeights(None, jnp.ones((num_experts, hidden, dim)), None))
        sizes_e = jnp.full(num_experts, rows // num_experts)
        compiled = jax.jit(partial(by_group, LAYERS)).lower(stacked, jnp.ones((rows, dim)), sizes_e).compile()
        return scratch_bytes(compiled)

    all_rows, hidden_states_of_all = rows * dim * 4, rows * 2 * hidden * 4
    for num_experts in (2, 64):
        block = blocks_of_groups(num_experts, rows).lengths[-1] * (3 * hidden + 2 * dim) * 4
        expert = 3 * dim * hidden * 4
        assert scratch(num_experts) < all_rows + 2 * block + expert < all_rows + hidden_states_of_all
