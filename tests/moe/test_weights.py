"""How the weights of layers are made: distributions, dtypes and options."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax import FeedForward, MoE, MoEConfig, SparseMoEBlock, upcycle
from tests.moe.support import layer


def test_every_weight_of_a_block_has_the_dtype_of_the_layer():
    moe = layer(param_dtype=jnp.bfloat16, num_shared_experts=1)
    block = SparseMoEBlock(moe, add_ff_before=True, rngs=nnx.Rngs(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(block)} == {jnp.dtype(jnp.bfloat16)}


def test_feed_forwards_of_a_layer_have_its_options():
    moe = layer(activation=jnp.tanh, mult_bias=False, num_shared_experts=1)
    block = SparseMoEBlock(moe, rngs=nnx.Rngs(0))
    for feed_forward in (moe.experts, moe.shared, block.ff_after):
        assert feed_forward is not None
        assert feed_forward.activation is jnp.tanh
        names = {jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(feed_forward)}
        assert not any("mult_bias" in name for name in names)


def test_initial_router():
    paper, original = (
        MoE(MoEConfig(dim=256, num_experts=64, hidden=8, init=init), rngs=nnx.Rngs(0)).router_de[...]
        for init in ("paper", "original")
    )
    np.testing.assert_allclose(paper.std(), (0.1 / 256) ** 0.5, rtol=0.02)
    np.testing.assert_allclose(jnp.abs(original).max(), 256**-0.5, rtol=1e-2)


def test_initial_weights_are_drawn_for_each_array():
    experts = MoE(MoEConfig(dim=8, num_experts=4, hidden=4, init="original"), rngs=nnx.Rngs(0)).experts
    drawn = [experts.w_in_edf, experts.w_out_efd, experts.b_in_ef, experts.b_out_ed]
    first = [np.asarray(w[...]).ravel()[:32] * w.shape[-1] ** 0.5 for w in drawn]
    # Uniform in +-1, and of no two arrays the same.
    assert all(x.min() < -0.3 and x.max() > 0.3 for x in first)
    assert abs(np.corrcoef(first) - np.eye(4)).max() < 0.7


def test_upcycled_layer_has_the_dtype_of_the_dense_one():
    moe = upcycle(FeedForward(8, 10, rngs=nnx.Rngs(3), param_dtype=jnp.bfloat16), 4, rngs=nnx.Rngs(4))
    assert {leaf.dtype for leaf in jax.tree.leaves(moe)} == {jnp.dtype(jnp.bfloat16)}
