"""Agreement with st-moe-pytorch 0.1.8 to 2e-5 wherever it is right; both numbers wherever it is not."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import (
    CoordinateDescent,
    MoE,
    MoEConfig,
    MoEOutput,
    RouterInputs,
    SparseMoEBlock,
    TopN,
    balance_loss,
    block_from_torch,
    moe_from_torch,
    router_totals,
    router_z_loss,
    token_groups,
)
from moe_jax.interop import config_from_torch
from moe_jax.noise import RouterNoise
from tests.moe.support import apply, assign_slots, parity_case, with_prefix
from tests.tensors import TensorOfBfloat16

TOLERANCE = 2e-5
CASES = [
    "moe_e4_top2_train",
    "moe_e4_top2_eval",
    "moe_e6_top3_train",
    "moe_overflow_train",
    "moe_overflow_eval",
    "moe_threshold_train",
    "moe_no_straight_through_train",
    "moe_block_e4_top2_train",
    "moe_block_e4_top2_eval",
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
    first_te = jnp.where(routing.keep_ta[:, :1], jax.nn.one_hot(routing.expert_index_ta[:, 0], experts), 0)
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


def recorded_router(name: str) -> tuple[RouterInputs, dict[str, np.ndarray]]:
    """The logits of a recorded call of the original's router, and what it gave."""
    _, arrays = parity_case(name)
    logits_te = jnp.asarray(arrays["x"][0] @ arrays["to_gates"].T)
    mask_t = jnp.ones(len(logits_te), bool)
    return RouterInputs(logits_te=logits_te, selection_logits_te=logits_te, mask_t=mask_t), arrays


def test_noised_weights_and_balance_loss_differ():
    """The original weights with noised probabilities and balances them; here noise only decides who is chosen."""
    inputs, arrays = recorded_router("gate_noised_train")
    noised = dataclasses.replace(inputs, selection_logits_te=inputs.logits_te + arrays["noise"][0])
    chosen = TopN(policy_train="all").choose(noised, train=True)
    original_te = arrays["combine"][0].sum(-1)
    original_ta = np.take_along_axis(original_te, np.asarray(chosen.expert_index_ta), axis=1)
    # The same experts, weighted otherwise.
    np.testing.assert_array_equal((original_te > 0).sum(1), 2)
    assert (original_ta > 0).all()
    np.testing.assert_allclose(original_ta[:2], [[0.50071, 0.49929], [0.82723, 0.17277]], atol=1e-5)
    np.testing.assert_allclose(chosen.gate_ta[:2], [[0.30830, 0.69170], [0.47789, 0.52211]], atol=1e-5)
    groups = token_groups(noised.mask_t, 12, "batch")
    routing = assign_slots(chosen, groups, num_experts=4, capacity_factor=None)
    totals = router_totals(noised.logits_te, chosen, routing, noised.mask_t)
    np.testing.assert_allclose(arrays["balance_loss"], 1.05351, rtol=1e-5)
    np.testing.assert_allclose(balance_loss(totals), 0.99582, rtol=1e-5)
    # The router z-loss is of un-noised logits in both.
    np.testing.assert_allclose(router_z_loss(totals), arrays["router_z_loss"], rtol=TOLERANCE)


def test_evaluation_is_deterministic_where_the_original_draws():
    """Evaluated twice at threshold 0.6, the original took the second choices of different tokens."""
    inputs, arrays = recorded_router("gate_random_eval")
    first, second = ((arrays[f"combine_{seed}"][0] > 0).sum((1, 2)) - 1 for seed in (1, 2))
    np.testing.assert_array_equal(first, [1, 0, 0, 0, 1, 0, 1, 0, 1, 0, 1, 1])
    np.testing.assert_array_equal(second, [1, 1, 0, 1, 1, 0, 0, 0, 1, 0, 1, 0])
    for threshold, taken in ((0.6, [0] * 12), (0.35, [1, 1, 0, 0, 1, 0, 0, 0, 1, 0, 1, 1])):
        chosen = TopN(threshold_eval=threshold).choose(inputs, train=False)
        np.testing.assert_array_equal(chosen.wanted_ta[:, 1], np.asarray(taken, bool))


def test_coordinate_descent_keeps_the_routers_gates_where_the_originals_lean_to_one_half():
    inputs, arrays = recorded_router("gate_coordinate_descent_eval")
    chosen = CoordinateDescent(threshold_eval=0.3).choose(inputs, train=False)
    original_te = arrays["combine"][0].sum(-1)
    original_ta = np.take_along_axis(original_te, np.asarray(chosen.expert_index_ta), axis=1)
    # The same experts.
    np.testing.assert_array_equal(original_ta.sum(1), original_te.sum(1))
    np.testing.assert_allclose(original_ta[[1, 4, 10]], [[0.664, 0.336], [0.5, 0.5], [0.642, 0.358]], atol=1e-3)
    np.testing.assert_allclose(
        chosen.gate_ta[jnp.array([1, 4, 10])], [[0.718, 0.282], [0.576, 0.424], [0.888, 0.112]], atol=1e-3
    )
    # Of the second gates that the original took none is below 0.3, which four of the router's here are.
    assert original_ta[original_ta[:, 1] > 0, 1].min() > 0.3
    np.testing.assert_array_equal(np.flatnonzero(~np.asarray(chosen.wanted_ta[:, 1])), [1, 3, 9, 10])


def test_one_token_has_a_slot_at_each_expert_where_the_original_makes_four():
    inputs, arrays = recorded_router("gate_one_token_eval")
    chosen = TopN(threshold_eval=1e-6).choose(inputs, train=False)
    groups = token_groups(inputs.mask_t, 1, "sequence")
    routing = assign_slots(chosen, groups, num_experts=4, capacity_factor=2.0, min_capacity=4)
    assert (arrays["combine"].shape[-1], routing.capacity) == (4, 1)
    # What they give the token is the same.
    gates_e = np.zeros(4)
    gates_e[np.asarray(chosen.expert_index_ta[0])] = np.where(routing.keep_ta[0], routing.gate_ta[0], 0)
    np.testing.assert_allclose(gates_e, arrays["combine"][0, 0].sum(-1), atol=TOLERANCE)


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
    for name in ("surplus", "a.threshold_train", "experts.gate.threshold_eval", 3):
        more: dict[Any, np.ndarray] = weights | {name: np.zeros(3)}
        with pytest.raises(ValueError, match=f"left over: {name}"):
            moe_from_torch(more, **description["args"])
    for dtype in (bool, np.int32, np.complex64, str, object):
        other = weights["gate.to_gates.weight"].astype(dtype)
        with pytest.raises(ValueError, match=r"gate\.to_gates\.weight must be floating point, got "):
            moe_from_torch(weights | {"gate.to_gates.weight": other}, **description["args"])
    with pytest.raises(ValueError, match=r"gate\.to_gates\.weight must be a CPU tensor .* ScalarType BFloat16"):
        moe_from_torch(weights | {"gate.to_gates.weight": TensorOfBfloat16()}, **description["args"])
    with pytest.raises(ValueError, match=r"gate\.to_gates\.weight must be a CPU tensor .* inhomogeneous"):
        moe_from_torch(weights | {"gate.to_gates.weight": [[1.0], [2.0, 3.0]]}, **description["args"])
    with pytest.raises(ValueError, match=r"must have 'gate\.to_gates\.weight'"):
        moe_from_torch({k: v for k, v in weights.items() if "to_gates" not in k}, **description["args"])
    for name, wanted in (("gate.to_gates.weight", (4, 32)), ("experts.experts.1.net.0.bias", (170,))):
        with pytest.raises(ValueError, match=rf"{re.escape(name)} must be {re.escape(str(wanted))}, got \(3, 31\)"):
            moe_from_torch(weights | {name: np.zeros((3, 31))}, **description["args"])


def test_every_argument_of_the_original_has_its_place():
    theirs = MoEConfig(dim=8, slot_order="choice", straight_through=True, init="original")
    assert config_from_torch(dim=8) == theirs
    given = config_from_torch(
        dim=8,
        num_experts=6,
        expert_hidden_mult=2,
        threshold_train=(0.3, 0.35),
        threshold_eval=(0.4, 0.45),
        capacity_factor_train=1.5,
        capacity_factor_eval=2.5,
        gating_top_n=3,
        balance_loss_coef=0.5,
        router_z_loss_coef=0.25,
        straight_through_dispatch_tensor=False,
        differentiable_topk=True,
        slot_order="token",
        dispatch="ragged",
        recompute=True,
    )
    assert given == MoEConfig(
        dim=8,
        num_experts=6,
        hidden_mult=2,
        router=CoordinateDescent(n=3, threshold_train=(0.3, 0.35), threshold_eval=(0.4, 0.45)),
        capacity_factor_train=1.5,
        capacity_factor_eval=2.5,
        balance_coef=0.5,
        router_z_coef=0.25,
        straight_through=False,
        slot_order="token",
        dispatch="ragged",
        recompute=True,
        init="original",
    )
