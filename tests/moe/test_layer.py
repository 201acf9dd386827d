"""The layer as a whole: causality, losses, metrics, residuals, transforms, compilation."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax import CoordinateDescent, MoE, MoEOutput, RouterBias, SparseMoEBlock, TopN
from moe_jax.dispatch import DISPATCHES
from moe_jax.layer import router_inputs
from moe_jax.noise import draw_noise
from tests.moe.support import (
    apply,
    assert_trees_close,
    config,
    hidden_states,
    initial_layer,
    layer,
    outputs_and_gradients,
)


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_batched_by_vmap(dispatch: str):
    """Gradients of each sequence, with one layer; and of each of several layers."""
    moe = layer(dispatch=dispatch, router=TopN(policy_train="threshold"), capacity_factor_train=1.0, min_capacity=1)
    x = hidden_states(3, 7, 8)

    def gradients(moe: MoE, x: jax.Array) -> MoE:
        return jax.grad(lambda moe: jnp.sum(moe(x, train=True).outputs ** 2))(moe)

    alone = jax.jit(gradients)
    for_each_sequence = jax.jit(jax.vmap(gradients, in_axes=(None, 0)))(moe, x)
    assert_trees_close(for_each_sequence, stacked([alone(moe, row) for row in x]), relative=1e-5)
    layers = [initial_layer(moe.config, seed) for seed in range(3)]
    for_each_layer = jax.jit(jax.vmap(gradients, in_axes=(0, None)))(stacked(layers), x)
    assert_trees_close(for_each_layer, stacked([alone(moe, x) for moe in layers]), relative=1e-5)


def stacked(trees: list[MoE]) -> MoE:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def changed_later(x: jax.Array, at: int) -> jax.Array:
    """The same sequences up to `at`, others after."""
    return x.at[:, at:].set(hidden_states(*x.shape, seed=9)[:, at:])


@pytest.mark.parametrize(
    ("dispatch", "group_size", "options"),
    [
        ("index", "sequence", {}),
        ("index", 8, {}),
        ("ragged", "sequence", {}),
        ("dense", "batch", {}),
        ("index", "sequence", {"router": TopN(n=3, threshold_train=0.6), "gumbel_noise": 0.5, "input_jitter": 0.1}),
    ],
)
def test_token_order_is_causal_to_the_bit(dispatch: str, group_size: int | str, options: dict[str, Any]):
    moe = layer(capacity_factor_train=1.0, min_capacity=1, group_size=group_size, dispatch=dispatch, **options)
    # One row, where the whole batch is a group: the end of a row comes before the start of the next.
    x = hidden_states(1 if group_size == "batch" else 2, 24, 8)
    key = jax.random.key(0)
    before = apply(moe, x, key=key)
    for at in (1, 7, 13, 23):
        after = apply(moe, changed_later(x, at), key=key)
        np.testing.assert_array_equal(after.outputs[:, :at], before.outputs[:, :at])
        assert at == 23 or (after.outputs[:, at:] != before.outputs[:, at:]).any()
    if dispatch != "ragged":
        assert float(before.metrics.dropped_a.max()) > 0


@pytest.mark.parametrize("order", ["choice", "priority"])
def test_other_orders_see_the_future(order: str):
    moe = layer(capacity_factor_train=1.0, min_capacity=1, slot_order=order)
    x = hidden_states(2, 24, 8)
    assert (apply(moe, changed_later(x, 12)).outputs[:, :12] != apply(moe, x).outputs[:, :12]).any()


@pytest.mark.parametrize(("favourites", "expected"), [([0, 1, 2, 3], 1.0), ([2, 2, 2, 2], 4.0)])
def test_balance_loss_of_uniform_and_collapsed_routers(favourites: list[int], expected: float):
    """Capacity 1 of 4 tokens cuts the collapsed load to a quarter; the loss must not look any better for it."""
    moe = layer(capacity_factor_train=1.0, min_capacity=0, router=TopN(policy_train="none"))
    moe.router_de[...] = jnp.eye(8, 4) * 30
    out = apply(moe, jnp.eye(8)[jnp.asarray(favourites)])
    np.testing.assert_allclose(out.balance_loss, expected, rtol=1e-5)
    np.testing.assert_allclose(out.metrics.dropped_a[0], 0 if expected == 1 else 0.75)


def test_balance_loss_grows_with_imbalance():
    """The original scores half of the tokens on one expert below a uniform router."""
    moe = layer(capacity_factor_train=1.0, min_capacity=0)
    moe.router_de[...] = jnp.eye(8, 4) * 30
    losses = [
        float(apply(moe, jnp.eye(8)[jnp.asarray(favourites)]).balance_loss)
        for favourites in ([0, 1, 2, 3, 0, 1, 2, 3], [0, 0, 0, 0, 0, 1, 2, 3], [0] * 8)
    ]
    np.testing.assert_allclose(losses, [1, 4 * (25 + 3) / 64, 4], rtol=1e-5)


def test_losses_and_metrics_by_hand():
    moe = layer(dim=4, capacity_factor_train=2.0, min_capacity=0, balance_coef=0.5, router_z_coef=0.25)
    moe.router_de[...] = jnp.eye(4)
    probs = jnp.asarray([[0.4, 0.3, 0.2, 0.1], [0.5, 0.1, 0.3, 0.1], [0.6, 0.25, 0.1, 0.05], [0.1, 0.2, 0.1, 0.6]])
    shift = 0.7  # adds 0.7 to every logsumexp, which is 0 otherwise
    out = apply(moe, jnp.log(probs) + shift)
    # Favourites 0, 0, 0, 3; mean probabilities 0.4, 0.2125, 0.175, 0.2125.
    balance = 4 * (0.75 * 0.4 + 0.25 * 0.2125)
    np.testing.assert_allclose(out.balance_loss, balance, rtol=1e-5)
    np.testing.assert_allclose(out.router_z_loss, 0.49, rtol=1e-5)
    np.testing.assert_allclose(out.total_aux_loss, 0.5 * balance + 0.25 * 0.49, rtol=1e-5)
    np.testing.assert_allclose(out.weighted_balance_loss, 0.5 * balance, rtol=1e-5)
    np.testing.assert_allclose(out.weighted_router_z_loss, 0.25 * 0.49, rtol=1e-5)
    metrics = out.metrics
    # Pairs 01, 02, 01, 31 with two slots each: token 2 finds experts 0 and 1 as follows. Expert 0 has 0 and 1, so it
    # is full; expert 1 has token 0, so token 2 gets in and token 3 does not.
    np.testing.assert_allclose(metrics.load_e, [3 / 8, 3 / 8, 1 / 8, 1 / 8])
    np.testing.assert_allclose(metrics.wanted_a, [1, 1])
    np.testing.assert_allclose(metrics.dropped_a, [0.25, 0.25])
    np.testing.assert_allclose(metrics.capacity_used, 6 / 8)
    np.testing.assert_allclose(metrics.router_entropy, -(probs * jnp.log(probs)).sum() / 4, rtol=1e-5)
    np.testing.assert_allclose(metrics.top_gate, (0.4 / 0.7 + 0.5 / 0.8 + 0.6 / 0.85 + 0.6 / 0.8) / 4, rtol=1e-5)
    assert metrics.nonfinite_logits == 0
    evaluated = apply(moe, jnp.log(probs) + shift, train=False)
    np.testing.assert_allclose(evaluated.router_z_loss, 0.49, rtol=1e-5)
    assert evaluated.total_aux_loss == 0


def test_evaluation_has_its_own_dispatch():
    """Without a capacity by "ragged" alone; and by "dense" alone does one token's NaN reach all."""
    options = {"capacity_factor_train": 1.0, "capacity_factor_eval": 1.0, "min_capacity": 0}
    x = jnp.ones((1, 8, 8)).at[0, 7].set(jnp.nan)
    for dispatch, dispatch_eval in (("dense", "ragged"), ("ragged", "dense")):
        moe = layer(dispatch=dispatch, dispatch_eval=dispatch_eval, **options)
        for train, here in ((True, dispatch), (False, dispatch_eval)):
            out = apply(moe, x, train=train)
            assert (out.metrics.dropped_a[0] > 0) == (here == "dense")
            assert jnp.isnan(out.outputs[0, :7]).all() == (here == "dense")


def test_block_is_residual_and_normed():
    moe = layer(dispatch="ragged")
    block = SparseMoEBlock(moe, add_ff_before=True, add_ff_after=True, rngs=nnx.Rngs(2))
    assert block.ff_before is not None
    assert block.ff_after is not None
    x = hidden_states(2, 12, 8) * 3

    def normal(x: jax.Array) -> jax.Array:
        return x / jnp.sqrt(jnp.square(x).mean(-1, keepdims=True))

    y = x + block.ff_before(normal(x))
    y = y + apply(moe, normal(y)).outputs
    y = y + block.ff_after(normal(y))
    np.testing.assert_allclose(apply(block, x).outputs, y, rtol=1e-4, atol=1e-5)
    # Padding keeps its own, whatever biases the feed-forwards have.
    assert block.ff_after.b_out_d is not None
    assert (block.ff_after.b_out_d[...] != 0).all()
    mask = jnp.arange(24).reshape(2, 12) % 3 != 0
    for padded in (block, SparseMoEBlock(moe, add_ff_after=False)):
        outputs = apply(padded, x, mask=mask).outputs
        np.testing.assert_array_equal((outputs != x).any(-1), mask)


def test_one_compilation_serves_every_key_mask_and_weight():
    moe = layer(router=TopN(), gumbel_noise=0.5)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def forward(moe: MoE, x: jax.Array, key: jax.Array, mask: jax.Array) -> MoEOutput:
        return moe(x, train=True, key=key, mask=mask)

    for seed in range(3):
        weights = initial_layer(moe.config, seed)
        mask = jnp.arange(24).reshape(2, 12) % (seed + 2) != 0
        out = forward(weights, hidden_states(2, 12, 8, seed=seed), jax.random.key(seed), mask)
        chex.assert_tree_all_finite(out)


def test_layer_changes_nothing_and_holds_only_weights():
    moe = layer(router=TopN(bias=True), gumbel_noise=0.5)
    before = jax.tree.map(jnp.copy, moe)
    # Not compiled: of a compiled call's arguments the layer could change copies only.
    moe(hidden_states(2, 12, 8), train=True, key=jax.random.key(0))
    assert_trees_close(moe, before, relative=0)
    assert hash(moe.config) == hash(config(router=TopN(bias=True), gumbel_noise=0.5))
    held = {"/".join(map(str, path)): type(variable) for path, variable in nnx.to_flat_state(nnx.state(moe))}
    weights = {f"experts/{name}" for name in ("w_in_edf", "b_in_ef", "mult_bias_ef", "w_out_efd", "b_out_ed")}
    assert held == dict.fromkeys({"router_de", *weights}, nnx.Param) | {"router_bias_e": RouterBias}


@pytest.mark.parametrize("dispatch", ["index", "ragged"])
def test_recomputing_keeps_no_hidden_states_and_changes_nothing(dispatch: str):
    """Of a hidden state there are 2F = 20 numbers; weights with as many are not of the same shape."""
    kept, again = (layer(dispatch=dispatch, recompute=on) for on in (False, True))
    x = hidden_states(3, 6, 8)
    for one, other in zip(*(jax.tree.leaves(outputs_and_gradients(moe, x)) for moe in (again, kept)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)

    def hidden_states_kept(moe: MoE) -> int:
        pull = jax.eval_shape(lambda moe, x: jax.vjp(lambda moe, x: moe(x, train=True).outputs, moe, x)[1], moe, x)
        weights = {leaf.shape for leaf in jax.tree.leaves(moe)}
        shapes = [leaf.shape for leaf in jax.tree.leaves(pull)]
        return sum(1 for shape in shapes if shape[-1:] == (20,) and shape not in weights)

    assert hidden_states_kept(kept) > 0
    assert hidden_states_kept(again) == 0


def test_selection_bias_gets_no_gradient_of_the_relaxed_choice():
    moe = layer(router=CoordinateDescent(policy_train="all", bias=True), dispatch="ragged")
    x = hidden_states(12, 8)
    gradient = jax.grad(lambda moe: (apply(moe, x).outputs ** 2).sum())(moe)
    np.testing.assert_array_equal(gradient.router_bias_e[...], 0)


def test_jitter_and_gumbel_noise_together():
    moe, x = layer(gumbel_noise=0.5, input_jitter=0.3), hidden_states(6, 8)
    noise = draw_noise(jax.random.key(0), moe.config, None, tokens=6, train=True, dtype=jnp.float32)
    assert noise.jitter_td is not None
    assert noise.gumbel_te is not None
    got = router_inputs(moe, x, jnp.ones(6, bool), noise)
    router_de = moe.router_de[...]
    np.testing.assert_allclose(got.selection_logits_te, (x * noise.jitter_td) @ router_de + noise.gumbel_te, atol=1e-5)
    np.testing.assert_allclose(got.logits_te, x @ router_de, atol=1e-5)
