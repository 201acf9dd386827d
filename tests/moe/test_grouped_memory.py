"""What feed-forwards on groups of rows keep for the gradient, where, and how much memory they take."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import grouped
from moe_jax.blocks import blocks_of_groups
from moe_jax.experts import HiddenWeights, OutputWeights
from moe_jax.grouped import by_group
from moe_jax.halves import Operands, Rows, Weights
from moe_jax.layout import Sent, layout
from tests.moe.groups import LAYERS, answers, weights
from tests.moe.support import hidden_states


def scratch_bytes(program: Any) -> int:
    memory = program.memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes


@pytest.mark.parametrize("sizes", [[0, 160, 1, 139], None], ids=["sorted", "equal"])
def test_hidden_states_computed_again_give_the_same_gradients(sizes: list[int] | None):
    rows, bar = (hidden_states(300, 5, seed=seed) for seed in (0, 3))
    sizes_e = None if sizes is None else jnp.asarray(sizes)

    def of(recompute: bool) -> Callable[[Any, jax.Array], jax.Array]:
        return lambda weights, rows: by_group(LAYERS, weights, rows, sizes_e, recompute=recompute)

    programs = [jax.jit(partial(answers, of(recompute))).lower(rows, bar).compile() for recompute in (False, True)]
    kept, again = (program(rows, bar) for program in programs)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6), again, kept)
    # Of 300 rows, 6 numbers of 4 bytes.
    assert scratch_bytes(programs[0]) - scratch_bytes(programs[1]) > 0.9 * 300 * 6 * 4


@pytest.mark.parametrize(("size", "in_place"), [(15, False), (16, True), (32, True), (33, False)])
def test_hidden_states_are_kept_where_a_gradient_will_be(size: int, in_place: bool):
    """If they fit there and take half: a group's gradient is (32, 128), its hidden states are (size, 128)."""
    in_place = in_place and jax.default_backend() == "cpu"
    stacked, rows_sd = weights(32, 64), hidden_states(4 * size, 32)
    kept = grouped.kept_for_gradients(LAYERS, Operands(stacked, Rows(rows_sd, None, None), None, None))
    assert kept.shape == ((4, 32, 128) if in_place else (4 * size, 128))

    def scratch(recompute: bool) -> int:
        def total(weights: Any, rows_sd: jax.Array) -> jax.Array:
            return jnp.sum(by_group(LAYERS, weights, rows_sd, None, recompute=recompute))

        return scratch_bytes(jax.jit(jax.grad(total, argnums=(0, 1))).lower(stacked, rows_sd).compile())

    more, hidden_bytes = scratch(False) - scratch(True), 4 * size * 128 * 4
    assert more < 0.1 * hidden_bytes if in_place else more > 0.9 * hidden_bytes


@pytest.mark.parametrize(("rows", "sizes"), [(2 * 322, None), (40, [7, 33])], ids=["two blocks", "sorted"])
def test_hidden_states_of_groups_of_several_blocks_are_kept_elsewhere(rows: int, sizes: list[int] | None):
    """Where those of a group in one block would have been in the place of a gradient."""
    dim = rows // 2
    stacked = jax.tree.map(lambda weight: weight[:2], weights(dim, 1))
    sizes_e = None if sizes is None else jnp.asarray(sizes)
    operands = Operands(stacked, Rows(hidden_states(rows, dim), None, None), sizes_e, None)
    assert grouped.kept_for_gradients(LAYERS, operands).shape == (rows, 2)


@pytest.mark.parametrize("rows", [4096, 16384])
def test_memory_of_a_forward_is_that_of_few_blocks_of_hidden_states(rows: int):
    """However many experts and rows there are: weights of one expert and a block; no number of each row."""
    dim, hidden = 16, 64
    tokens = rows // 2

    def scratch(num_experts: int) -> int:
        of_hidden = HiddenWeights(jnp.ones((num_experts, dim, 2 * hidden)), None)
        stacked = Weights(of_hidden, OutputWeights(None, jnp.ones((num_experts, hidden, dim)), None))
        sizes_e = jnp.full(num_experts, rows // num_experts)
        where = layout(jnp.arange(rows).reshape(tokens, 2), jnp.ones((tokens, 2), bool), rows)
        moved = Sent(where, jnp.ones(rows), None)

        def forward(weights: Weights, x_td: jax.Array, moved: Sent) -> jax.Array:
            return by_group(LAYERS, weights, x_td, sizes_e, sent=moved)

        return scratch_bytes(jax.jit(forward).lower(stacked, jnp.ones((tokens, dim)), moved).compile())

    for num_experts in (2, 64):
        block = blocks_of_groups(num_experts, rows).lengths[-1] * (3 * hidden + 2 * dim) * 4
        expert = 3 * dim * hidden * 4
        assert scratch(num_experts) < block + expert
