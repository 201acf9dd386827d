"""What a layer can be besides top-n over equal experts: other routers, noise, shared experts, upcycling, weights."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from flax import nnx

from moe_jax import ExpertChoice, Experts, FeedForward, MoE, MoEConfig, TopN, upcycle, updated_router_bias
from moe_jax.experts import gelu, initial_weights
from moe_jax.noise import draw_noise
from moe_jax.routing import Score
from tests.moe.support import apply, assert_trees_close, config, hidden_states, layer


def test_expert_choice_by_hand():
    """Each of 2 experts takes the 2 of 4 tokens that want it most."""
    moe = layer(dim=2, num_experts=2, router=ExpertChoice(), capacity_factor_train=1.0, min_capacity=0, hidden=3)
    moe.router_de[...] = jnp.eye(2)
    probs = jnp.asarray([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.95, 0.05]])
    x = jnp.log(probs)
    out = apply(moe, x)
    y_etd = moe.experts.batched(jnp.stack([x, x]))
    # Expert 0 takes tokens 3 and 0, expert 1 takes 2 and 1.
    expected = jnp.stack([0.9 * y_etd[0, 0], 0.2 * y_etd[1, 1], 0.3 * y_etd[1, 2], 0.95 * y_etd[0, 3]])
    np.testing.assert_allclose(out.outputs, expected, rtol=1e-5)
    np.testing.assert_allclose(out.metrics.capacity_used, 1)


def test_expert_choice_fills_every_slot_whatever_the_router_says():
    moe = layer(router=ExpertChoice(), capacity_factor_train=1.0)
    moe.router_de[...] = jnp.zeros((8, 4)).at[:, 0].set(50)
    for dispatch in ("dense", "index", "ragged"):
        moe.config = config(router=ExpertChoice(), capacity_factor_train=1.0, dispatch=dispatch)
        out = apply(moe, hidden_states(2, 16, 8))
        np.testing.assert_allclose(out.metrics.capacity_used, 1)
        np.testing.assert_allclose(out.metrics.dropped_a, [0.75] * 4)


def test_bias_update_balances_without_touching_gradients():
    """A router that sends everything to expert 0 spreads out by updates of the bias alone."""
    moe = layer(router=TopN(n=1, score="sigmoid", bias=True))
    moe.router_de[...] = moe.router_de[...] * 0.3 + jnp.zeros((8, 4)).at[0, 0].set(1.0)
    x = hidden_states(256, 8).at[:, 0].set(1.0)

    def load(moe: MoE) -> jax.Array:
        return apply(moe, x).metrics.load_e

    start = load(moe)
    assert moe.router_bias_e is not None
    update = jax.jit(updated_router_bias)
    for _ in range(60):
        moe.router_bias_e[...] = update(moe.router_bias_e[...], load(moe), 1e-2)
    assert float(start.max()) > 0.8
    assert float(load(moe).max()) < 0.35
    gradient = jax.grad(lambda moe: apply(moe, x).outputs.sum())(moe)
    np.testing.assert_array_equal(gradient.router_bias_e[...], 0)
    assert not isinstance(moe.router_bias_e, nnx.Param)


def test_bias_update_by_hand():
    for rate in (0.01, np.array(0.01), jnp.array(0.01)):
        updated = updated_router_bias(jnp.asarray([0.0, 0.5, -0.1]), jnp.asarray([0.5, 0.2, 0.3]), rate)
        np.testing.assert_allclose(updated, [-0.01, 0.51, -0.09], rtol=1e-6)
    np.testing.assert_allclose(updated_router_bias(jnp.zeros(4), jnp.full(4, 0.25)), jnp.zeros(4))
    # A tenth is no float, nor is the mean of ten of them what each is.
    np.testing.assert_array_equal(updated_router_bias(jnp.zeros(10), jnp.full(10, 0.1)), np.zeros(10))
    with jax.enable_x64(True):
        assert updated_router_bias(jnp.zeros(4, jnp.float32), jnp.full(4, 0.25, jnp.float64)).dtype == jnp.float32
        # Of any dtype, whatever the loads are of.
        for rate in (np.float64(0.01), np.array(0.01), jnp.bfloat16(0.01), jnp.float32(0.01)):
            for dtype in (jnp.float32, jnp.float64):
                updated = updated_router_bias(jnp.zeros(2, jnp.float32), jnp.asarray([0.4, 0.6], dtype), rate)
                np.testing.assert_allclose(updated, [0.01, -0.01], rtol=2e-3)
                assert updated.dtype == jnp.float32


def test_shared_experts_see_every_token():
    options = {"capacity_factor_train": 1.0, "min_capacity": 0}
    moe = layer(num_shared_experts=2, **options)
    assert moe.shared is not None
    assert moe.shared.w_in_df.shape == (8, 2 * 2 * 10)
    routed = layer(**options)
    routed.router_de, routed.experts = moe.router_de, moe.experts
    x = hidden_states(2, 12, 8)
    np.testing.assert_allclose(apply(moe, x).outputs, apply(routed, x).outputs + moe.shared(x), atol=1e-6)


def test_experts_by_hand_with_another_activation():
    """Values times the activation of the gates, times the multiplicative bias; and the width of an expert."""
    layer = Experts(2, 4, 3, rngs=nnx.Rngs(0), init="original", activation=jnp.tanh)
    assert layer.mult_bias_ef is not None
    assert layer.b_in_ef is not None
    assert layer.b_out_ed is not None
    layer.mult_bias_ef[...] = hidden_states(2, 3, seed=7)
    x_ecd = hidden_states(2, 5, 4)
    expected = []
    for e in range(2):
        values_cf, gates_cf = np.split(x_ecd[e] @ layer.w_in_edf[e] + layer.b_in_ef[e][None], 2, axis=1)
        hidden_cf = values_cf * np.tanh(gates_cf) * np.asarray(layer.mult_bias_ef[e])[None]
        expected.append(hidden_cf @ layer.w_out_efd[e] + layer.b_out_ed[e][None])
    np.testing.assert_allclose(layer.batched(x_ecd), np.stack(expected), atol=1e-5)
    assert [MoEConfig(dim=dim).expert_hidden for dim in (512, 32)] == [1365, 85]


@pytest.mark.parametrize(("dtype", "relative"), [(jnp.float32, 1e-6), (jnp.bfloat16, 1e-2)])
def test_gelu_is_the_exact_one(dtype: jnp.dtype, relative: float):
    """Where it is not nearly zero, in the gradient too; the one by tanh is not."""
    x = jnp.linspace(-3, 4, 999, dtype=dtype)
    for of in (lambda f: f(x), lambda f: jax.grad(lambda x: f(x).sum())(x)):
        wanted = of(lambda x: jax.nn.gelu(x.astype(jnp.float32), approximate=False))
        np.testing.assert_allclose(of(gelu), wanted, rtol=relative, atol=relative)
        assert of(gelu).dtype == dtype
    by_tanh = jax.nn.gelu(x.astype(jnp.float32))
    assert float(abs(by_tanh - jax.nn.gelu(x.astype(jnp.float32), approximate=False)).max()) > 1e-4


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dispatch", ["index", "ragged"])
def test_upcycled_layer_equals_the_dense_one(bias: bool, dispatch: str):
    dense = FeedForward(8, 10, rngs=nnx.Rngs(3), init="original", bias=bias, mult_bias=bias)
    moe = upcycle(dense, 4, rngs=nnx.Rngs(4), dispatch=dispatch, capacity_factor_eval=None)
    x = hidden_states(2, 12, 8)
    np.testing.assert_allclose(apply(moe, x, train=False).outputs, dense(x), atol=1e-6)
    moe.experts.w_in_edf[...] = moe.experts.w_in_edf[...] + 1
    assert dense.w_in_df[...].max() < 1


def test_a_single_expert_can_be_upcycled():
    dense = FeedForward(8, 10, rngs=nnx.Rngs(3), init="original")
    x = hidden_states(2, 12, 8)
    np.testing.assert_allclose(apply(upcycle(dense, 1, rngs=nnx.Rngs(4)), x, train=False).outputs, dense(x), atol=1e-6)
    with pytest.raises(ValueError, match="router must be TopN with n of at least 2"):
        upcycle(dense, 1, rngs=nnx.Rngs(4), router=TopN(n=1, score="sigmoid"))


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_upcycled_layer_equals_the_dense_one_however_sure_the_router_is(score: Score):
    dense = FeedForward(8, 10, rngs=nnx.Rngs(3), init="original")
    router = TopN(score=score, policy_train="all", policy_eval="all")
    moe = upcycle(dense, 4, rngs=nnx.Rngs(4), router=router)
    moe.router_de[...] = jnp.full((8, 4), -10.0)
    x = jnp.abs(hidden_states(2, 12, 8))  # logits of about -60
    np.testing.assert_allclose(apply(moe, x, train=False).outputs, dense(x), atol=1e-6)


def test_upcycling_refuses_gates_that_do_not_sum_to_one():
    dense = FeedForward(8, 10, rngs=nnx.Rngs(3))
    for router in (TopN(n=1), ExpertChoice()):
        with pytest.raises(ValueError, match="router must be TopN with n of at least 2"):
            upcycle(dense, 4, rngs=nnx.Rngs(4), router=router)


@pytest.mark.parametrize("noise", ["gumbel_noise", "input_jitter"])
def test_noise_acts_in_training_only(noise: str):
    moe = layer(**{noise: 0.9}, dispatch="ragged")
    x = hidden_states(2, 12, 8)
    one, two = (apply(moe, x, key=jax.random.key(seed)) for seed in (0, 1))
    assert (one.outputs != two.outputs).any()
    np.testing.assert_array_equal(one.router_z_loss, two.router_z_loss)
    plain = apply(layer(dispatch="ragged"), x, train=False)
    np.testing.assert_array_equal(apply(moe, x, train=False).outputs, plain.outputs)
    np.testing.assert_array_equal(one.router_z_loss, plain.router_z_loss)


@pytest.mark.parametrize(
    ("options", "distribution", "others"),
    [
        (
            {"input_jitter": 0.25},
            scipy.stats.uniform(0.75, 0.5),
            [scipy.stats.uniform(0.75, 0.25), scipy.stats.norm(1, 0.25)],
        ),
        ({"gumbel_noise": 1.0}, scipy.stats.gumbel_r(), [scipy.stats.norm(0.577, 1.28), scipy.stats.gumbel_l()]),
        ({"gumbel_noise": 0.5}, scipy.stats.gumbel_r(0, 0.5), [scipy.stats.gumbel_r()]),
    ],
    ids=["jitter", "gumbel", "half gumbel"],
)
def test_noise_is_distributed_as_named(options: dict[str, float], distribution: Any, others: list[Any]):
    noise = draw_noise(jax.random.key(5), config(**options), None, tokens=2000, train=True, dtype=jnp.float32)
    drawn = noise.jitter_td if "input_jitter" in options else noise.gumbel_te
    assert drawn is not None
    drawn = np.asarray(drawn)

    def p_value(distribution: Any) -> float:
        return float(scipy.stats.kstest(drawn.ravel(), distribution.cdf).pvalue)

    assert p_value(distribution) > 1e-3
    assert max(map(p_value, others)) < 1e-6
    assert abs(np.corrcoef(drawn.T) - np.eye(drawn.shape[1])).max() < 0.15


def test_the_surer_token_has_priority():
    """Two tokens, one slot, and both want expert 0: the first has it, or the surer."""
    x = jnp.zeros((2, 8)).at[:, 0].set(jnp.asarray([1.0, 2.0]))
    for order, served in (("token", [True, False]), ("priority", [False, True])):
        moe = layer(router=TopN(n=1), slot_order=order, capacity_factor_train=0.5, min_capacity=1)
        moe.router_de[...] = jnp.zeros((8, 4)).at[0, 0].set(1.0)
        outputs = apply(moe, x).outputs
        np.testing.assert_array_equal((outputs != 0).any(1), served)


def test_same_key_same_routing_whatever_the_dispatch():
    key = jax.random.key(7)
    options = {"router": TopN(threshold_train=1.0), "capacity_factor_train": None, "gumbel_noise": 1.0}
    x = hidden_states(2, 12, 8)
    dense, index, ragged = (
        apply(layer(dispatch=dispatch, **options), x, key=key) for dispatch in ("dense", "index", "ragged")
    )
    assert 0 < float(dense.metrics.wanted_a[1]) < 1
    assert_trees_close(index, dense, relative=1e-5)
    np.testing.assert_allclose(ragged.outputs, dense.outputs, atol=1e-6)
    np.testing.assert_allclose(ragged.total_aux_loss, dense.total_aux_loss, rtol=1e-6)


def test_paper_initialisation_has_variance_a_tenth_over_fan_in():
    weights = initial_weights(jax.random.key(0), (4, 200, 300), init="paper")
    np.testing.assert_allclose(weights.std(axis=(1, 2)), (0.1 / 200) ** 0.5, rtol=0.02)
    # Truncated at two standard deviations of the untruncated normal, 0.8796 of which is the standard deviation left.
    assert float(jnp.abs(weights).max()) < 2 / 0.8796 * (0.1 / 200) ** 0.5 * 1.001
    original = initial_weights(jax.random.key(0), (4, 200, 300), init="original")
    np.testing.assert_allclose(jnp.abs(original).max(), 300**-0.5, rtol=1e-3)


def test_gelu_rounds_once():
    x = jnp.linspace(-3, 4, 999, dtype=jnp.bfloat16)
    np.testing.assert_array_equal(gelu(x), gelu(x.astype(jnp.float32)).astype(jnp.bfloat16))


def test_random_policy_in_evaluation():
    moe = layer(router=TopN(policy_train="all", policy_eval="random", threshold_eval=1.0), dispatch="ragged")
    x = hidden_states(2, 12, 8)
    one, two = (apply(moe, x, train=False, key=jax.random.key(seed)) for seed in (0, 1))
    assert (one.outputs != two.outputs).any()
    with pytest.raises(ValueError, match="key must be a PRNG key for the router, got None"):
        moe(x, train=False)


def test_kinds_of_noise_are_independent():
    options = {"router": TopN(), "gumbel_noise": 1.0, "input_jitter": 0.5}
    noise = draw_noise(jax.random.key(5), config(**options), None, tokens=2000, train=True, dtype=jnp.float32)
    columns = np.concatenate(jax.tree.leaves(noise), axis=1)
    rank = scipy.stats.rankdata(columns, axis=0)
    assert abs(np.corrcoef(rank.T) - np.eye(8 + 4 + 2)).max() < 0.15


def test_bias_update_is_by_the_sign_alone():
    updated = updated_router_bias(jnp.zeros(4), jnp.asarray([0.2502, 0.2498, 0.2501, 0.2499]), 0.01)
    np.testing.assert_allclose(updated, [-0.01, 0.01, -0.01, 0.01], rtol=1e-6)


def test_upcycled_layer_equals_the_dense_one_in_training_too():
    dense = FeedForward(8, 10, rngs=nnx.Rngs(3), init="original", activation=jnp.tanh)
    assert dense.mult_bias_f is not None
    dense.mult_bias_f[...] = hidden_states(10)
    moe = upcycle(dense, 4, rngs=nnx.Rngs(4))
    x = hidden_states(2, 12, 8)
    np.testing.assert_allclose(apply(moe, x).outputs, dense(x), atol=1e-6)


def test_upcycling_refuses_shared_experts():
    dense = FeedForward(8, 10, rngs=nnx.Rngs(3))
    with pytest.raises(ValueError, match="options must leave to the dense layer what it determines, got hidden_mult"):
        upcycle(dense, 4, rngs=nnx.Rngs(4), hidden_mult=2.0)
    with pytest.raises(ValueError, match="num_shared_experts must be 0, got 1"):
        upcycle(dense, 4, rngs=nnx.Rngs(4), num_shared_experts=1)
