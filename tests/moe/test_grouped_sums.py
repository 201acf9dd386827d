"""What is summed over blocks and over the rows of a token is summed in float32 at least."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.experts import GEGLU, HiddenWeights, OutputWeights
from moe_jax.grouped import by_group
from moe_jax.halves import Weights
from moe_jax.layout import collect, layout, sent
from tests.moe.groups import LAYERS
from tests.moe.support import hidden_states


def narrow_weights(num_groups: int, dim: int = 2, hidden: int = 2) -> Weights:
    of_hidden = HiddenWeights(hidden_states(num_groups, dim, 2 * hidden), None)
    of_output = OutputWeights(None, hidden_states(num_groups, hidden, dim), jnp.zeros((num_groups, dim)))
    return jax.tree.map(lambda weight: weight.astype(jnp.bfloat16), Weights(of_hidden, of_output))


def test_gradients_of_bfloat16_weights_over_many_blocks():
    """Of 2**18 rows, each of which adds 1 to the gradient of the output bias: a bfloat16 sum would stop at 2**17."""
    rows = 2**18
    x_sd = jnp.ones((rows, 2), jnp.bfloat16)

    @jax.jit
    def bias_bar(weights: Weights) -> jax.Array:
        _, pull = jax.vjp(lambda weights: by_group(LAYERS, weights, x_sd, None), weights)
        return pull(jnp.ones((rows, 2), jnp.bfloat16))[0].output.b_out

    found = bias_bar(narrow_weights(1))
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found.astype(jnp.float32), rows)


def test_bfloat16_rows_of_a_token_are_summed_in_float32():
    """256 of one expert and 1 of the other: 257 has nine bits, one more than a bfloat16."""
    where = layout(jnp.array([[0, 1]]), jnp.ones((1, 2), bool), 2)
    moved = sent(where, jnp.array([[256.0, 1.0]]), None)
    weights = narrow_weights(2)
    zeros, ones = jax.tree.map(jnp.zeros_like, weights), jnp.ones((2, 2), jnp.bfloat16)
    weights = zeros._replace(output=zeros.output._replace(b_out=ones))
    for sizes_e in (None, jnp.array([1, 1])):
        total_td = by_group(LAYERS, weights, jnp.ones((1, 2), jnp.bfloat16), sizes_e, sent=moved)
        assert total_td.dtype == jnp.float32
        np.testing.assert_array_equal(total_td, 257)


def test_bfloat16_rows_of_a_token_are_collected_in_float32():
    where = layout(jnp.array([[0, 1]]), jnp.ones((1, 2), bool), 2)
    np.testing.assert_array_equal(collect(where, jnp.array([[256], [1]], jnp.bfloat16)), 257)


@pytest.mark.parametrize("sizes", [None, [1, 1, 1]], ids=["equal", "sorted"])
def test_gradients_of_a_bfloat16_token_are_summed_in_float32(sizes: list[int] | None):
    """256 of one expert and 1 of two others each: 256 + 1 is 256 in bfloat16."""
    where = layout(jnp.array([[0, 1, 2]]), jnp.ones((1, 3), bool), 3)
    moved = sent(where, jnp.array([[256.0, 1.0, 1.0]]), None)
    # Experts that do nothing: a hidden state of the input's one number, and a gate of 1.
    of_hidden = HiddenWeights(
        jnp.tile(jnp.array([1, 0], jnp.bfloat16), (3, 1, 1)), jnp.tile(jnp.array([0, 1], jnp.bfloat16), (3, 1))
    )
    weights = Weights(of_hidden, OutputWeights(None, jnp.ones((3, 1, 1), jnp.bfloat16), None))
    sizes_e = None if sizes is None else jnp.asarray(sizes)

    @jax.jit
    def total(x_td: jax.Array) -> jax.Array:
        return by_group(GEGLU(identity), weights, x_td, sizes_e, sent=moved).sum()

    x_bar_td = jax.grad(total)(jnp.ones((1, 1), jnp.bfloat16))
    assert x_bar_td.dtype == jnp.bfloat16
    np.testing.assert_array_equal(x_bar_td.astype(jnp.float32), 258)


def identity(x: jax.Array) -> jax.Array:
    return x


def test_gradients_of_float64_are_summed_in_float64():
    """Over two blocks."""
    with jax.enable_x64(True):
        weights = jax.tree.map(lambda weight: weight.astype(jnp.float64), narrow_weights(1))
        _, pull = jax.vjp(lambda weights: by_group(LAYERS, weights, jnp.ones((400, 2), jnp.float64), None), weights)
        b_out_bar = pull(jnp.full((400, 2), 1 / 3))[0].output.b_out
        np.testing.assert_allclose(b_out_bar, 400 / 3, rtol=1e-12)


@pytest.mark.mixed_dtypes
@pytest.mark.parametrize("sizes_e", [None, np.array([1, 2], np.int32)], ids=["equal", "sorted"])
def test_float32_weights_give_bfloat16_rows_for_bfloat16_rows(sizes_e: np.ndarray | None):
    weights = jax.tree.map(lambda weight: weight.astype(jnp.float32), narrow_weights(2))
    outputs = jax.jit(by_group, static_argnums=0)(LAYERS, weights, jnp.ones((4, 2), jnp.bfloat16), sizes_e)
    assert outputs.dtype == jnp.bfloat16
