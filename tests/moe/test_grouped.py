"""Feed-forwards on groups of rows: in blocks, as a CPU computes most, and at once, as accelerators do."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import grouped
from moe_jax.blocks import Blocks, blocks_of_equal_groups, blocks_of_groups
from moe_jax.experts import GEGLU
from moe_jax.grouped import by_group
from moe_jax.grouping import OneGroup, SortedGroups
from moe_jax.halves import Operands, Rows, Weights
from moe_jax.layout import Layout, Sent, layout, sent
from tests.moe.groups import LAYERS, answers, weights
from tests.moe.meshes import mesh_of
from tests.moe.support import assert_trees_close, hidden_states


def row_by_row(weights: Any, rows_sd: jax.Array, group_s: jax.Array) -> jax.Array:
    def row(weights: Any, row_d: jax.Array) -> jax.Array:
        hidden_1f = LAYERS.hidden(OneGroup(), weights.hidden, row_d[None])
        return LAYERS.output(OneGroup(), weights.output, hidden_1f, None)[0]

    return jax.vmap(row)(jax.tree.map(lambda weight: weight[group_s], weights), rows_sd)


def at_once(layers: GEGLU, recompute: bool, operands: Operands, bar: jax.Array) -> Any:
    """What accelerators compute, and a CPU can too, only slowly: as `answers`, and the gradients of the factors."""
    kept = None if recompute else grouped.kept_for_gradients(layers, operands)
    hidden, outputs = grouped.forward_at_once(layers, kept, operands)
    return outputs, *grouped.gradients_at_once(layers, operands, hidden, bar)


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
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


# Sizes around the longest block and a shorter one, empty groups, no row at all, tails.
SIZES_OF_300 = [[5, 0, 32, 33], [0, 0, 0, 0], [0, 0, 300, 0], [160, 1, 139, 0], [0, 139, 0, 161]]


@pytest.mark.parametrize(("rows", "sizes"), [*((300, sizes) for sizes in SIZES_OF_300), (3, [2, 0, 0, 1])])
def test_groups_in_blocks(rows: int, sizes: list[int]):
    assert blocks_of_groups(4, 300).lengths[-1] == 160
    assert_close(*in_blocks_and_by_rows(hidden_states(rows, 5), hidden_states(rows, 5, seed=3), jnp.asarray(sizes)))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("sizes", [[5, 7, 0, 20], [321] * 4], ids=["of any size", "of one size"])
def test_what_is_not_finite_stays_in_its_group(sizes: list[int], recompute: bool):
    """A row of the second group, and its factors."""
    rows, bad = sum(sizes), sizes[0] + 1
    number_t1 = jnp.arange(rows)[:, None]
    where = layout(number_t1, number_t1 >= 0, rows)
    sizes_e = None if len(set(sizes)) == 1 else jnp.asarray(sizes)

    @jax.jit
    def gradients(value: float) -> Any:
        x_td, gate_t1, weight_t1 = (
            hidden_states(rows, width, seed=seed).at[bad].set(value) for seed, width in enumerate((5, 1, 1))
        )
        call = partial(by_group, LAYERS, sizes_e=sizes_e, sent=sent(where, gate_t1, weight_t1), recompute=recompute)
        weights_bar, x_bar = jax.vjp(call, weights(), x_td)[1](jnp.ones((rows, 5)))
        other = np.asarray([0, 2, 3])
        return jax.tree.map(lambda bar: bar[other], weights_bar), jnp.delete(x_bar, bad, axis=0)

    got = gradients(jnp.nan)
    assert_close(got, gradients(1.0))
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(got))


def test_of_layers_that_are_alike_only_the_first_is_traced(monkeypatch: pytest.MonkeyPatch):
    traced = []

    def counted(compute: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*args: Any) -> Any:
            traced.append(compute)
            return compute(*args)

        return counting

    for name in ("forward_in_blocks", "gradients_in_blocks"):
        monkeypatch.setattr(grouped, name, counted(getattr(grouped, name)))

    def loss(stacks: list[Weights], x_sd: jax.Array) -> jax.Array:
        for stacked in stacks:
            x_sd = by_group(LAYERS, stacked, x_sd, jnp.array([9, 0, 20, 11]))
        return jnp.sum(x_sd)

    jax.jit(jax.grad(loss)).trace([weights()] * 3, hidden_states(40, 5))
    assert len(traced) == len(set(traced)) == 2


@pytest.mark.parametrize("size", [3, 321, 322])
def test_groups_of_one_size(size: int):
    """In one block each, in two that do not divide them, and in two that do."""
    assert blocks_of_equal_groups(4, size) == Blocks(4 * size, (3,) if size == 3 else (161,), exact=size != 321)
    rows_sd, bar_sd = hidden_states(4 * size, 5), hidden_states(4 * size, 5, seed=3)

    def equal(weights: Any, rows_sd: jax.Array) -> jax.Array:
        return by_group(LAYERS, weights, rows_sd, None)

    group_s = jnp.repeat(jnp.arange(4), size)
    got, wanted = (
        jax.jit(partial(answers, call))(rows_sd, bar_sd) for call in (equal, partial(row_by_row, group_s=group_s))
    )
    assert_close(got, wanted)
    assert_close(equal(weights(), rows_sd), wanted[0])


def two_rows_a_token(used_s: np.ndarray, tokens: int) -> Layout:
    """Two assignments of each token in the rows in use, in any order, as many as there is room for."""
    generator = np.random.default_rng(7)
    row_ta = np.full(2 * tokens, len(used_s), np.int32)
    rows = np.flatnonzero(used_s)
    row_ta[generator.permutation(2 * tokens)[: len(rows)]] = generator.permutation(rows)[: 2 * tokens]
    row_ta = jnp.asarray(row_ta).reshape(tokens, 2)
    return layout(row_ta, row_ta < len(used_s), len(used_s))


def tokens_by_group(
    where: Layout, sizes_e: jax.Array | None, recompute: bool, weights: Weights, inputs: Any
) -> jax.Array:
    x_td, factors = inputs
    return by_group(LAYERS, weights, x_td, sizes_e, sent=sent(where, *factors), recompute=recompute)


def tokens_by_row(where: Layout, group_s: jax.Array, weights: Weights, inputs: Any) -> jax.Array:
    x_td, factors = inputs
    moved = sent(where, *factors)
    y_sd = row_by_row(weights, moved.spread(x_td), group_s) * moved.gate_s[:, None]
    return jnp.zeros_like(x_td).at[where.token_s].add(y_sd, mode="drop")


def tokens_at_once(
    where: Layout, sizes_e: jax.Array | None, recompute: bool, inputs: Any, bar_td: jax.Array
) -> tuple[Any, ...]:
    """What accelerators compute, as `answers`."""
    x_td, factors = inputs
    moved, pull = jax.vjp(partial(sent, where), *factors)
    operands = Operands(weights(), Rows(x_td, moved.weight_s, moved.gate_s), sizes_e, where)
    total_td, weights_bar, bars = at_once(LAYERS, recompute, operands, bar_td)
    no_layout = jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), where)
    factors_bar = pull(Sent(layout=no_layout, gate_s=bars.gate_s, weight_s=bars.weight_s))
    return total_td, weights_bar, (bars.x, factors_bar)


@jax.jit
def of_tokens(
    where: Layout, sizes_e: jax.Array | None, group_s: jax.Array, inputs: Any, bar_td: jax.Array
) -> tuple[Any, list[Any]]:
    """The answers row by row, and three times group by group: in blocks, and as accelerators have them."""
    in_blocks = answers(partial(tokens_by_group, where, sizes_e, False), inputs, bar_td)
    others = [tokens_at_once(where, sizes_e, recompute, inputs, bar_td) for recompute in (False, True)]
    return answers(partial(tokens_by_row, where, group_s), inputs, bar_td), [in_blocks, *others]


@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", ""])
@pytest.mark.parametrize("sizes", [*SIZES_OF_300, None], ids=str)
def test_groups_of_tokens(sizes: list[int] | None, weighted: bool):
    """Rows that come from tokens and go back there: outputs, and the gradients of weights, tokens and factors."""
    # Groups of one size have empty rows anywhere.
    used_s = np.random.default_rng(8).random(300) < 0.8 if sizes is None else np.arange(300) < sum(sizes)
    sizes_e = None if sizes is None else jnp.asarray(sizes)
    group_s = jnp.repeat(jnp.arange(4), jnp.asarray(sizes or [75] * 4), total_repeat_length=300)
    x_td, bar_td = hidden_states(160, 5), hidden_states(160, 5, seed=3)
    gate_ta, weight_ta = (jnp.asarray(np.random.default_rng(seed).random((160, 2), np.float32)) for seed in (1, 2))
    inputs = x_td, (gate_ta, weight_ta if weighted else None)

    wanted, others = of_tokens(two_rows_a_token(used_s, 160), sizes_e, group_s, inputs, bar_td)
    for got in others:
        assert_close(got, wanted)


def test_fewer_rows_than_tokens():
    where, sizes_e = two_rows_a_token(np.arange(30) < 25, 40), jnp.array([3, 10, 0, 12])
    inputs, bar_td = (hidden_states(40, 5), (hidden_states(40, 2, seed=2), None)), hidden_states(40, 5, seed=3)
    by_groups = partial(tokens_by_group, where, sizes_e, False)
    by_rows = partial(tokens_by_row, where, jnp.repeat(jnp.arange(4), sizes_e, total_repeat_length=30))
    assert_close(*(jax.jit(partial(answers, call))(inputs, bar_td) for call in (by_groups, by_rows)))


@pytest.mark.parametrize(
    ("dim", "size", "recompute", "short"),
    [(64, 8, False, True), (64, 8, True, True), (64, 9, False, False), (520, 64, False, True), (520, 65, False, False)],
)
def test_short_groups(dim: int, size: int, recompute: bool, short: bool):
    """Of at most 64 rows and an eighth of the width: on a CPU, in no loop, and multiplied with columns."""
    on_cpu = jax.default_backend() == "cpu"
    stacked, bar_td = weights(dim, 16), hidden_states(3 * size, dim, seed=3)
    random = np.random.default_rng(8)
    where = two_rows_a_token(random.random(4 * size) < 0.8, 3 * size)
    factor_ta = jnp.asarray(random.random((3 * size, 2), np.float32))
    inputs = hidden_states(3 * size, dim), (factor_ta, factor_ta)
    by_groups = partial(tokens_by_group, where, None, recompute)
    assert ("contracting_dims = [1] x [1]" in jax.jit(by_groups).lower(stacked, inputs).as_text()) == (short and on_cpu)
    program = jax.jit(partial(answers, by_groups)).lower(inputs, bar_td, stacked)
    assert ("while" in program.as_text()) == (not short and on_cpu)
    wanted = jax.jit(partial(answers, partial(tokens_by_row, where, jnp.repeat(jnp.arange(4), size))))
    got = program.compile()(inputs, bar_td, stacked)
    assert_trees_close(got, wanted(inputs, bar_td, stacked), relative=1e-5)


@pytest.mark.parametrize(("dtype", "relative"), [(jnp.float32, 1e-5), (jnp.bfloat16, 2 * 2.0**-7)])
def test_short_groups_batched(dtype: Any, relative: float):
    """Under `jax.vmap`, over rows and weights, each entry is as alone."""
    wide = weights(64, 16)
    two = jax.tree.map(lambda weight: jnp.stack([weight, -0.5 * weight]), wide)
    x_bsd, bar_bsd = (hidden_states(2, 32, 64, seed=seed) for seed in (0, 3))
    by_rows = jax.jit(partial(answers, partial(row_by_row, group_s=jnp.repeat(jnp.arange(4), 8))))
    wanted = [
        by_rows(x_bsd[b], bar_bsd[b], of_entry)
        for b, of_entry in enumerate((wide, jax.tree.map(lambda weight: -0.5 * weight, wide)))
    ]
    by_groups = partial(answers, partial(by_group, LAYERS, sizes_e=None))
    operands = jax.tree.map(lambda leaf: leaf.astype(dtype), (x_bsd, bar_bsd, two))
    got = jax.jit(jax.vmap(by_groups))(*operands)
    assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {jnp.dtype(dtype)}
    assert_trees_close(got, jax.tree.map(lambda *entries: jnp.stack(entries), *wanted), relative=relative)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    ("rows", "sizes"), [(40, [7, 0, 20, 11]), (40, None), (16, None)], ids=["sorted", "equal", "in place of a gradient"]
)
def test_what_accelerators_compute(rows: int, sizes: list[int] | None, recompute: bool):
    """All groups at once; tails of NaN there as well."""
    used = rows if sizes is None else sum(sizes)
    group_s = jnp.repeat(jnp.arange(4), jnp.asarray(sizes or [rows // 4] * 4))
    rows_sd, bar_sd = (hidden_states(rows, 5, seed=seed).at[used:].set(jnp.nan) for seed in (0, 3))
    sizes_e = None if sizes is None else jnp.asarray(sizes)
    operands = Operands(weights(), Rows(rows_sd, None, None), sizes_e, None)
    outputs, weights_bar, bars = jax.jit(partial(at_once, LAYERS, recompute))(operands, bar_sd)
    got = outputs[:used], weights_bar, bars.x[:used]
    by_rows = jax.jit(partial(answers, partial(row_by_row, group_s=group_s)))
    assert_close(got, by_rows(rows_sd[:used], bar_sd[:used]))


def test_what_an_accelerator_makes_of_rows_beyond_the_last_group_is_zero(monkeypatch: pytest.MonkeyPatch):
    """A `ragged_dot` that leaves NaN there, in the product and in its gradient."""

    def poisoned(rows_sd: jax.Array, sizes_e: jax.Array) -> jax.Array:
        return jnp.where((jnp.arange(len(rows_sd)) < sizes_e.sum())[:, None], rows_sd, jnp.nan)

    @jax.custom_vjp
    def ragged_dot(rows: jax.Array, weights: jax.Array, sizes_e: jax.Array) -> jax.Array:
        return poisoned(product(rows, weights, sizes_e), sizes_e)

    def backward(saved: Any, bar: jax.Array) -> Any:
        rows_bar, weights_bar = jax.vjp(lambda rows, weights: product(rows, weights, saved[2]), *saved[:2])[1](bar)
        return poisoned(rows_bar, saved[2]), weights_bar, None

    product = jax.lax.ragged_dot
    ragged_dot.defvjp(lambda *inputs: (ragged_dot(*inputs), inputs), backward)
    monkeypatch.setattr(jax.lax, "ragged_dot", ragged_dot)
    grouping = SortedGroups(jnp.array([2, 0, 3]), 8)
    outputs, pull = jax.vjp(grouping.product, hidden_states(8, 4), hidden_states(3, 4, 6))
    rows_bar, weights_bar = pull(jnp.ones((8, 6)).at[5:].set(jnp.nan))
    assert jnp.isfinite(weights_bar).all()
    for x in (outputs, rows_bar):
        np.testing.assert_array_equal((x != 0).any(1), np.arange(8) < 5)


def test_no_rows_at_all():
    def total(weights: Any, x: jax.Array, sizes_e: jax.Array | None, sent: Sent | None) -> jax.Array:
        return jnp.sum(by_group(LAYERS, weights, x, sizes_e, sent=sent))

    none, nowhere = jnp.zeros((0, 5)), sent(two_rows_a_token(np.zeros(0, bool), 3), jnp.ones((3, 2)), None)
    for x, sizes_e, moved in (
        (none, None, None),
        (none, jnp.zeros(4, jnp.int32), None),
        (jnp.ones((3, 5)), None, nowhere),
    ):
        value, gradient = jax.value_and_grad(total)(weights(), x, sizes_e, moved)
        assert value == 0
        assert not any(leaf.any() for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize(
    ("dim", "sizes"), [(5, [20, 0, 0, 0, 1, 2, 3, 4]), (64, None)], ids=["sorted", "short and equal"]
)
def test_weights_that_devices_share_in_a_shard_map_of_ones_own(dim: int, sizes: list[int] | None):
    """Devices with groups of different sizes or of one, which the weights' gradient is summed over, once."""
    mesh = mesh_of(2, 1)
    rows_sd = hidden_states(40, dim)
    sizes_e = jnp.asarray(sizes or [5] * 8)

    def loss(weights: Any, rows_sd: jax.Array, sizes_e: jax.Array) -> jax.Array:
        used_s1 = (jnp.arange(len(rows_sd)) < sizes_e.sum())[:, None]
        outputs_sd = by_group(LAYERS, weights, rows_sd, None if sizes is None else sizes_e)
        return jnp.sum(jnp.where(used_s1, outputs_sd, 0) ** 2)

    @partial(jax.shard_map, mesh=mesh, in_specs=(jax.P(), jax.P("data"), jax.P("data")), out_specs=jax.P())
    def over_devices(weights: Any, rows_sd: jax.Array, sizes_e: jax.Array) -> jax.Array:
        return jax.lax.psum(loss(weights, rows_sd, sizes_e), "data")

    def one_by_one(weights: Any, rows_sd: jax.Array, sizes_e: jax.Array) -> jax.Array:
        return loss(weights, rows_sd[:20], sizes_e[:4]) + loss(weights, rows_sd[20:], sizes_e[4:])

    got, wanted = (jax.jit(jax.grad(f))(weights(dim), rows_sd, sizes_e) for f in (over_devices, one_by_one))
    assert_close(got, wanted)
