"""Padding changes nothing: a padded batch gives what its tokens alone give, in values and gradients."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax import SparseMoEBlock, TopN
from tests.moe.support import ROUTERS, apply, assert_trees_close, hidden_states, layer, outputs_and_gradients


@pytest.mark.parametrize(("router", "dispatch"), [*((router, "index") for router in ROUTERS), ("top_n", "ragged")])
def test_padded_equals_compacted(router: str, dispatch: str):
    """Padding scattered through the batch, full of NaN, against the same tokens in a row, with drops."""
    moe = layer(
        router=ROUTERS[router],
        dispatch=dispatch,
        capacity_factor_train=1.0,
        group_size="batch",
        min_capacity=1,
        num_shared_experts=1,
    )
    mask = jnp.asarray([[1, 1, 0, 1, 1, 1, 0, 0], [0, 1, 1, 1, 0, 1, 1, 1]], bool)
    x = hidden_states(2, 8, 8)
    padded = outputs_and_gradients(moe, jnp.where(mask[..., None], x, jnp.nan), mask)
    compacted = outputs_and_gradients(moe, x[mask])
    np.testing.assert_array_equal(np.asarray(padded[0].outputs)[~mask], 0)
    np.testing.assert_array_equal(np.asarray(padded[2])[~mask], 0)
    assert_trees_close(dataclasses.replace(padded[0], outputs=padded[0].outputs[mask]), compacted[0], relative=1e-5)
    assert_trees_close(padded[1:], (compacted[1], jnp.zeros_like(x).at[mask].set(compacted[2])), relative=1e-5)
    if dispatch == "index":
        assert float(compacted[0].metrics.dropped_a.max()) > 0


@pytest.mark.parametrize(
    "options", [{"router": TopN(threshold_train=1.0)}, {"gumbel_noise": 1.0}, {"input_jitter": 0.9}], ids=str
)
def test_padded_equals_compacted_in_what_is_drawn(options: dict[str, Any]):
    moe = layer(dispatch="ragged", **options)
    mask = jnp.asarray([[1, 1, 0, 1, 1, 1, 0, 0], [0, 1, 1, 1, 0, 1, 1, 1]], bool)
    x = hidden_states(2, 8, 8)
    one, other = jax.random.key(0), jax.random.key(1)
    padded = outputs_and_gradients(moe, x, mask, key=one)
    compacted = outputs_and_gradients(moe, x[mask], key=one)
    assert_trees_close(dataclasses.replace(padded[0], outputs=padded[0].outputs[mask]), compacted[0], relative=1e-5)
    assert_trees_close(padded[1], compacted[1], relative=1e-5)
    assert (apply(moe, x[mask], key=other).outputs != compacted[0].outputs).any()


@pytest.mark.parametrize("implementation", ["rbg", "unsafe_rbg"])
def test_padded_equals_compacted_in_what_keys_of_other_generators_draw(implementation: str):
    """Under `vmap` these generators draw for all tokens from the first one's key. It must not come to that."""
    moe = layer(dispatch="ragged", gumbel_noise=1.0)
    mask = jnp.asarray([[0, 1, 0, 1, 1, 1, 0, 0], [0, 1, 1, 1, 0, 1, 1, 1]], bool)
    x, key = hidden_states(2, 8, 8), jax.random.key(0, impl=implementation)
    padded, compacted = apply(moe, x, mask=mask, key=key), apply(moe, x[mask], key=key)
    np.testing.assert_allclose(padded.outputs[mask], compacted.outputs, rtol=0, atol=1e-5)

    # Nor where the caller does it.
    def outputs(key: jax.Array) -> jax.Array:
        return apply(moe, x, key=key).outputs

    keys = jax.random.split(key, 3)
    at_once = jax.vmap(outputs)(keys)
    np.testing.assert_allclose(at_once, jnp.stack([outputs(key) for key in keys]), rtol=0, atol=1e-5)
    assert (at_once[1] != at_once[2]).any()


@pytest.mark.parametrize("group_size", ["sequence", 5])
def test_padded_equals_compacted_in_every_kind_of_group(group_size: int | str):
    options = {"capacity_factor_train": 1.0, "group_size": group_size, "min_capacity": 1}
    mask = jnp.asarray([[1, 1, 0, 1, 1, 1, 0, 0], [0, 1, 1, 1, 0, 1, 1, 1]], bool)
    x = hidden_states(2, 8, 8)
    padded = apply(layer(**options), x, mask=mask)
    if group_size == "sequence":
        rows = [apply(layer(**options), row[keep]).outputs for row, keep in zip(x, mask)]
        compacted = jnp.concatenate(rows)
    else:
        compacted = apply(layer(**options), x[mask]).outputs
    np.testing.assert_allclose(padded.outputs[mask], compacted, atol=1e-6)
    assert float(padded.metrics.dropped_a.max()) > 0


def test_padding_full_of_nan_reaches_no_gradient_of_a_block():
    mask = jnp.asarray([[1, 1, 0, 1], [0, 1, 1, 1]], bool)
    block = SparseMoEBlock(layer(), add_ff_before=True, rngs=nnx.Rngs(0))

    @jax.jit
    @jax.grad
    def gradients(block: SparseMoEBlock, filler: jax.Array) -> jax.Array:
        x = jnp.where(mask[..., None], hidden_states(2, 4, 8), filler)
        return jnp.sum(jnp.where(mask[..., None], block(x, train=True, mask=mask).outputs, 0) ** 2)

    filled, plain = (gradients(block, jnp.full((1, 1, 1), value)) for value in (jnp.nan, 0.0))
    assert_trees_close(filled, plain, relative=1e-6)


def test_all_padding_is_all_zero_and_finite():
    out, gradient, x_bar = outputs_and_gradients(layer(), hidden_states(2, 6, 8), jnp.zeros((2, 6), bool))
    for leaf in jax.tree.leaves((out, gradient, x_bar)):
        np.testing.assert_array_equal(leaf, jnp.zeros_like(leaf))
