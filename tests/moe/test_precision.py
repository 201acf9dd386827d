"""What is computed in which precision, and numbers at its ends."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax import CoordinateDescent, Experts, FeedForward, MoE, RMSNorm, SparseMoEBlock, TopN
from moe_jax.layout import scaled
from tests.moe.support import ROUTERS, apply, config, hidden_states, layer, outputs_and_gradients


@pytest.mark.parametrize("router", ROUTERS)
def test_logits_of_ten_thousand_in_bfloat16(router: str):
    moe = layer(router=ROUTERS[router])
    moe.router_de[...] = jnp.eye(8, 4) * 1e4
    x = hidden_states(2, 12, 8).astype(jnp.bfloat16)
    out, gradient, x_bar = outputs_and_gradients(moe, x)
    assert out.outputs.dtype == x_bar.dtype == jnp.bfloat16
    assert out.router_z_loss.dtype == jnp.float32
    assert float(out.router_z_loss) > 1e7
    chex.assert_tree_all_finite((out, gradient, x_bar))
    assert out.metrics.nonfinite_logits == 0


@pytest.mark.parametrize("router", ["top_n", "sigmoid"])
def test_no_output_vanishes_where_all_logits_are_minus_ten_thousand(router: str):
    moe = layer(router=ROUTERS[router], dispatch="ragged")
    moe.router_de[...] = jnp.full((8, 4), -1e4)
    out, *gradients = outputs_and_gradients(moe, jnp.abs(hidden_states(2, 12, 8)).astype(jnp.bfloat16))
    chex.assert_tree_all_finite((out, gradients))
    assert (out.outputs != 0).any(-1).all()


def test_bfloat16_routes_in_float32():
    """A bfloat16 router cannot tell 1.000 from 1.003; this one must."""
    moe = layer(dim=4, router=TopN(n=1))
    moe.router_de[...] = jnp.diag(jnp.asarray([1.0, 1.003, 1.0, 1.0]))
    out = apply(moe, jnp.ones((1, 4), jnp.bfloat16))
    np.testing.assert_array_equal(out.metrics.load_e, [0, 1, 0, 0])


def test_bfloat16_is_close_to_float32():
    moe = layer(dispatch="ragged")
    x = hidden_states(2, 12, 8).astype(jnp.bfloat16)
    wide, narrow = apply(moe, x.astype(jnp.float32)), apply(moe, x)
    # Three roundings to 8 bits of numbers around 1.
    np.testing.assert_allclose(narrow.outputs.astype(jnp.float32), wide.outputs, atol=0.03)


def test_nonfinite_logits_are_counted_and_stay_where_they_are():
    x = hidden_states(4, 8).at[1, 2].set(jnp.inf)
    for dispatch in ("index", "ragged"):
        out = apply(layer(dispatch=dispatch), x)
        np.testing.assert_allclose(out.metrics.nonfinite_logits, 0.25)
        assert jnp.isfinite(out.outputs[jnp.asarray([0, 2, 3])]).all()
        assert not jnp.isfinite(out.total_aux_loss)
        assert float(apply(layer(dispatch=dispatch), x, train=False).total_aux_loss) == 0
    assert float(apply(layer(balance_coef=0.0, router_z_coef=0.0), x).total_aux_loss) == 0


@pytest.mark.parametrize("spelled", [jnp.float32, np.float32, np.dtype(np.float32), "float32"])
def test_configurations_of_the_same_dtype_are_the_same(spelled: Any):
    """In hash too: `jax.jit` with a static configuration compiles once."""
    assert len({config(), config(param_dtype=spelled)}) == 1


def test_selection_bias_is_float32():
    with jax.enable_x64(True):
        moe = MoE(config(router=TopN(bias=True)), rngs=nnx.Rngs(0))
        assert moe.router_bias_e is not None
        assert moe.router_bias_e.dtype == jnp.float32


def test_float64_stays_float64():
    with jax.enable_x64(True):
        moe = MoE(config(param_dtype=jnp.float64, dispatch="ragged"), rngs=nnx.Rngs(0))
        out = apply(moe, jnp.ones((4, 8), jnp.float64))
        assert out.outputs.dtype == out.balance_loss.dtype == jnp.float64


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float64])
@pytest.mark.parametrize(
    "options",
    [
        {"num_shared_experts": 1},
        {"router": TopN(score="sigmoid", bias=True)},
        {"router": TopN(expert_groups=2, expert_groups_kept=1)},
    ],
    ids=["shared", "bias", "groups"],
)
def test_other_dtypes_are_mixed_by_nothing(options: dict[str, Any], dtype: jnp.dtype):
    """Promotion is strict here."""
    with jax.enable_x64(dtype == jnp.float64):
        moe = MoE(config(param_dtype=dtype, **options), rngs=nnx.Rngs(0))
        out, moe_bar, x_bar = jax.eval_shape(
            outputs_and_gradients, moe, jnp.ones((2, 4, 8), dtype), key=jax.random.key(0)
        )
    assert out.outputs.dtype == moe_bar.experts.w_in_edf.dtype == x_bar.dtype == dtype


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_a_norm_of_another_dtype_is_mixed_by_nothing(dtype: jnp.dtype, x64: bool):
    """Promotion is strict here."""
    with jax.enable_x64(x64):
        norm = RMSNorm(8, param_dtype=jnp.float64 if x64 else jnp.bfloat16)
        x = hidden_states(3, 8).astype(dtype)
        assert norm(x).dtype == dtype
        np.testing.assert_array_equal(norm(x), RMSNorm(8)(x))


@pytest.mark.parametrize("x64", [False, True])
def test_sizes_of_any_integer_dtype(x64: bool):
    """Promotion is strict here."""
    with jax.enable_x64(x64):
        experts = Experts(3, 8, 5, rngs=nnx.Rngs(0))
        x = hidden_states(9, 8).astype(jnp.float32)
        expected = experts.grouped(x, jnp.asarray([4, 0, 3], jnp.int32))[:7]
        for dtype in (jnp.uint8, jnp.uint32, *(jnp.int64, jnp.uint64) * x64):
            np.testing.assert_array_equal(experts.grouped(x, jnp.asarray([4, 0, 3], dtype))[:7], expected)


def test_numpy_arrays_of_float64_are_taken_as_jax_takes_them():
    """Without a warning, too: here warnings are errors."""
    # Made beforehand: layers are kept for other tests, and one made in a trace would be of it.
    moe = layer()
    x: Any = np.ones((2, 4, 8))

    @jax.jit
    def outputs() -> list[jax.Array]:
        # No arguments: JAX would have taken those before we do.
        return [
            moe(x, train=True).outputs,
            SparseMoEBlock(moe, add_ff_before=True, rngs=nnx.Rngs(0))(x, train=True).outputs,
            FeedForward(8, 10, rngs=nnx.Rngs(0))(x),
            RMSNorm(8)(x),
            moe.experts.batched(x[0].reshape(4, 1, 8)),
            moe.experts.grouped(x[0], jnp.ones(4, jnp.int32)),
        ]

    assert {out.dtype for out in outputs()} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("scale", [1e-15, 1e-11, 1e-6, 1.0, 1e15])
def test_the_norm_is_the_originals_for_small_and_large_inputs(scale: float):
    """x · √D over its norm, or over 1e-12 where the norm is less (torch.nn.functional.normalize)."""
    x = scale * hidden_states(3, 64).astype(jnp.float32)
    exact = np.asarray(x, np.float64)
    norm = np.sqrt(np.square(exact).sum(-1, keepdims=True))
    np.testing.assert_allclose(RMSNorm(64)(x), exact * 8 / np.maximum(norm, 1e-12), rtol=1e-5)


def test_bfloat16_is_normed_in_float32():
    x, norm = hidden_states(50, 64).astype(jnp.bfloat16), RMSNorm(64)
    norm.scale_d[...] = hidden_states(64, seed=2)
    np.testing.assert_array_equal(norm(x), norm(x.astype(jnp.float32)).astype(jnp.bfloat16))


def test_noise_does_not_depend_on_the_dtype_of_the_hidden_states():
    moe = layer(router=TopN(threshold_train=1.0), gumbel_noise=1.0, input_jitter=0.3, dispatch="ragged")
    x = hidden_states(40, 8).astype(jnp.bfloat16)
    narrow, wide = (apply(moe, x, key=jax.random.key(0)).metrics for x in (x, x.astype(jnp.float32)))
    for one, other in zip(jax.tree.leaves(narrow), jax.tree.leaves(wide)):
        np.testing.assert_array_equal(one, other)


def test_scaled_rounds_once():
    x, factor = hidden_states(50, 8).astype(jnp.bfloat16), hidden_states(50)
    np.testing.assert_array_equal(scaled(x, factor), (x.astype(jnp.float32) * factor[:, None]).astype(jnp.bfloat16))


def test_numbers_of_numpy_promote_nothing():
    """Of a configuration, as a sweep gives them: with x64 NumPy's float64 would make float32 wide, or be refused."""
    kinds: Any = (np.int64, np.float64), (int, float)
    given, same = (
        config(
            num_experts=integer(4),
            router=CoordinateDescent(n=integer(2), iterations=3, temperature=number(0.1), ratio=number(1.125)),
            balance_coef=number(0.01),
            router_z_coef=number(0.001),
            gumbel_noise=number(0.5),
        )
        for integer, number in kinds
    )
    assert given == same
    assert hash(given) == hash(same)

    @jax.jit
    def loss_and_gradient(moe: MoE, x: jax.Array) -> tuple[jax.Array, MoE]:
        def loss(moe: MoE) -> jax.Array:
            out = moe(x, train=True, key=jax.random.key(1))
            return out.outputs.sum() + out.total_aux_loss

        return jax.value_and_grad(loss)(moe)

    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        x = hidden_states(3, 8).astype(jnp.float32)
        results = [loss_and_gradient(MoE(of, rngs=nnx.Rngs(0)), x) for of in (given, same)]
    for got, expected in zip(*map(jax.tree.leaves, results), strict=True):
        assert got.dtype == jnp.float32
        np.testing.assert_array_equal(got, expected)
