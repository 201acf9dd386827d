"""Agreement with st-moe-pytorch 0.1.8 to 2e-5 wherever it is right; both numbers wherever it is not."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import (
    MoE,
    MoEOutput,
    RouterInputs,
    SparseMoEBlock,
    TopN,
    block_from_torch,
    moe_from_torch,
)
from moe_jax.noise import RouterNoise
from tests.moe.support import apply, parity_case, with_prefix

TOLERANCE = 2e-5
CASES = [
    "moe_e4_top2_train",
    "moe_e4_top2_eval",
    "moe_e6_top3_train",
    "moe_overflow_train",
    "moe_threshold_train",
    "moe_no_straight_through_train",
    "moe_block_e4_top2_train",
]


def build(description: dict[str, Any], weights: dict[str, np.ndarray]) -> MoE | SparseMoEBlock:
    """The layer of a case. Gradients map like weights, so `weights` may hold either."""
    arguments = description["args"]
    if description["block"] is None:
        return moe_from_torch(weights, **arguments)
    return block_from_torch(weights, **description["block"], **arguments)


def original_balance_loss(moe: MoE, x: jax.Array) -> jax.Array:
    """The original's formula: first choices that capacity left over, multiplied per sequence, then averaged."""
    x_td = x.reshape(-1, x.shape[-1])
    logits_te = x_td @ moe.router_de[...]
    mask_t = jnp.ones(len(x_td), bool)
    uniform_ta = jnp.zeros((len(x_td), moe.config.router.num_choices(moe.config.num_experts)))
    inputs = RouterInputs(logits_te=logits_te, selection_logits_te=logits_te, mask_t=mask_t, uniform_ta=uniform_ta)
    choice, routing = moe.route(inputs, sequence_length=x.shape[1], train=True)
    experts = moe.config.num_experts
    first_te = jax.nn.one_hot(routing.expert_index_ta[:, 0], experts) * routing.keep_ta[:, :1]
    density_be = first_te.reshape(*x.shape[:2], experts).mean(1)
    proxy_be = choice.probs_te.reshape(*x.shape[:2], experts).mean(1)
    return (density_be * proxy_be).mean() * experts**2


def block_moe_input(layer: MoE | SparseMoEBlock, x: jax.Array) -> tuple[MoE, jax.Array]:
    """The mixture and what it gets to see."""
    if isinstance(layer, MoE):
        return layer, x
    if layer.norm_before is not None and layer.ff_before is not None:
        x = x + layer.ff_before(layer.norm_before(x))
    return layer.moe, layer.norm_moe(x)


def use_uniform_numbers(monkeypatch: pytest.MonkeyPatch, uniform_abn: np.ndarray) -> None:
    """Lets the policy "random" compare with the numbers that the original drew."""
    noise = RouterNoise(uniform_ta=jnp.asarray(uniform_abn.reshape(len(uniform_abn), -1).T))
    monkeypatch.setattr("moe_jax.layer.draw_noise", lambda *_, **__: noise)


@pytest.mark.parametrize("case", CASES)
def test_outputs_losses_and_every_gradient(case: str, monkeypatch: pytest.MonkeyPatch):
    description, arrays = parity_case(case)
    layer = build(description, with_prefix(arrays, "param/"))
    train = description["mode"] == "train"
    use_uniform_numbers(monkeypatch, arrays["route_uniform"])

    def loss(layer: MoE | SparseMoEBlock, x: jax.Array) -> tuple[jax.Array, tuple[MoEOutput, jax.Array]]:
        out = layer(x, train=train, key=jax.random.key(0))
        moe, moe_input = block_moe_input(layer, x)
        # Our balance loss differs on purpose: put the original's in its place, and all the rest must agree.
        balance = original_balance_loss(moe, moe_input) if train else jnp.zeros(())
        total = moe.config.balance_coef * balance + out.weighted_router_z_loss
        return jnp.sum(out.outputs**2) + total, (out, balance)

    gradients, (out, balance) = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(layer, jnp.asarray(arrays["x"]))
    np.testing.assert_allclose(out.outputs, arrays["out"], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(balance, arrays["balance_loss"].item(), rtol=TOLERANCE)
    if train:
        np.testing.assert_allclose(out.router_z_loss, arrays["router_z_loss"], rtol=TOLERANCE)
    else:
        # The original reports zeros in evaluation. We report the losses and add neither to the total.
        assert arrays["router_z_loss"].item() == 0
        assert out.router_z_loss > 1
    assert_gradients(gradients[0], build(description, with_prefix(arrays, "grad/")))
    assert_gradients(gradients[1], arrays["grad_x"])


def assert_gradients(got: Any, wanted: Any) -> None:
    """Each leaf to 2e-5 of its largest entry, or absolutely where that is below 1."""
    for (path, leaf), target in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(wanted), strict=True):
        scale = max(1.0, float(np.abs(target).max()))
        np.testing.assert_allclose(leaf, target, rtol=0, atol=TOLERANCE * scale, err_msg=jax.tree_util.keystr(path))


def test_gates_and_slots_are_the_originals():
    description, arrays = parity_case("moe_e6_top3_train")
    moe = moe_from_torch(with_prefix(arrays, "param/"), **description["args"])
    logits_te = jnp.asarray(arrays["x"].reshape(-1, 32) @ np.asarray(moe.router_de[...]))
    inputs = RouterInputs(
        logits_te=logits_te,
        selection_logits_te=logits_te,
        mask_t=jnp.ones(len(logits_te), bool),
        uniform_ta=jnp.zeros((len(logits_te), 3)),
    )
    _, routing = jax.jit(lambda inputs: moe.route(inputs, sequence_length=24, train=True))(inputs)
    routing = jax.tree.map(np.asarray, routing)
    combine_bnec = np.zeros_like(arrays["combine"])
    for t, a in np.argwhere(routing.keep_ta):
        slot = int(routing.slot_ta[t, a]) % routing.capacity
        combine_bnec[t // 24, t % 24, routing.expert_index_ta[t, a], slot] = routing.gate_ta[t, a]
    np.testing.assert_allclose(combine_bnec, arrays["combine"], atol=TOLERANCE)


@pytest.mark.parametrize(
    ("case", "original", "ours"),
    [
        ("moe_e4_top2_train", 0.96848, 1.01219),
        ("moe_e6_top3_train", 0.92773, 1.02845),
        ("moe_overflow_train", 0.77366, 2.83748),
    ],
)
def test_balance_loss_differs_once_capacity_cut_it(case: str, original: float, ours: float):
    description, arrays = parity_case(case)
    moe = moe_from_torch(with_prefix(arrays, "param/"), **description["args"])
    out = apply(moe, jnp.asarray(arrays["x"]), key=jax.random.key(0))
    np.testing.assert_allclose(arrays["balance_loss"], original, rtol=1e-4)
    np.testing.assert_allclose(out.balance_loss, ours, rtol=1e-4)


def test_noised_weights_differ():
    """The original weights outputs with noised probabilities; here noise only decides who is chosen."""
    probs, noised = jnp.asarray([[0.6, 0.3, 0.1]]), jnp.asarray([[0.3, 0.5, 0.2]])
    chosen = TopN(policy_train="all").choose(
        RouterInputs(logits_te=jnp.log(probs), selection_logits_te=jnp.log(noised), mask_t=jnp.ones(1, bool)),
        train=True,
    )
    np.testing.assert_array_equal(chosen.expert_index_ta, [[1, 0]])
    original = noised[0, :2][::-1] / 0.8
    np.testing.assert_allclose(original, [0.625, 0.375], rtol=1e-6)
    np.testing.assert_allclose(chosen.gate_ta, [[1 / 3, 2 / 3]], rtol=1e-6)


def test_evaluation_is_deterministic_where_the_original_draws():
    """At gate 0.3 and threshold 0.6 the original keeps the second choice half of the time, evaluation or not."""
    share = jnp.log(jnp.asarray([[0.7, 0.3]]))
    inputs = RouterInputs(logits_te=share, selection_logits_te=share, mask_t=jnp.ones(1, bool))
    original = float(jnp.mean(jax.random.uniform(jax.random.key(0), (4000,)) < 0.3 / 0.6))
    assert 0.45 < original < 0.55
    for threshold, taken in ((0.6, False), (0.25, True)):
        chosen = TopN(threshold_eval=threshold).choose(inputs, train=False)
        assert bool(chosen.wanted_ta[0, 1]) is taken


def test_thresholds_in_the_state_dict_are_not_read():
    description, arrays = parity_case("moe_threshold_train")
    weights = with_prefix(arrays, "param/")
    np.testing.assert_allclose(weights["gate.threshold_train"][1:], 0.6)
    moe = moe_from_torch(weights, **(description["args"] | {"threshold_train": 0.3}))
    assert isinstance(moe.config.router, TopN)
    assert moe.config.router.threshold_train == 0.3
    assert not any("threshold" in jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(moe))


def test_a_state_dict_that_does_not_fit_is_refused():
    description, arrays = parity_case("moe_e4_top2_train")
    weights = with_prefix(arrays, "param/")
    with pytest.raises(ValueError, match="left over"):
        moe_from_torch(weights | {"surplus": np.zeros(3)}, **description["args"])
    with pytest.raises(ValueError, match=r"must have 'gate\.to_gates\.weight'"):
        moe_from_torch({k: v for k, v in weights.items() if "to_gates" not in k}, **description["args"])
    with pytest.raises(ValueError, match="must make up"):
        moe_from_torch(weights | {"gate.to_gates.weight": np.zeros((4, 31))}, **description["args"])
