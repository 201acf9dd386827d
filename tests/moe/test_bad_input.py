"""Every refused argument, with what the message says."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from moe_jax import (
    Choice,
    CoordinateDescent,
    ExpertChoice,
    Experts,
    FeedForward,
    MoE,
    MoEConfig,
    RMSNorm,
    RouterInputs,
    RouterTotals,
    Routing,
    SparseMoEBlock,
    TopN,
    assign_slots,
    block_from_torch,
    capacity,
    mixture,
    moe_from_torch,
    param_shardings,
    relaxed_top_k,
    router_totals,
    token_groups,
    token_sharding,
    upcycle,
    updated_router_bias,
)
from moe_jax.experts import initial_weights
from tests.moe.meshes import mesh_of
from tests.moe.support import config, hidden_states, layer


def anything(value: Any) -> Any:
    """A value of the wrong type, which is the point."""
    return value


X = (2, 6, 8)


def totals_of(logits: tuple[int, int], mask: jax.Array) -> RouterTotals:
    """Of five tokens' choice among four experts, with logits and a mask that may be of others."""
    return router_totals(jnp.zeros(logits), chosen_at_random((5, 2)), slots_of_five_tokens(), mask)


def chosen_at_random(shape: tuple[int, int]) -> Choice:
    logits_te, mask_t = hidden_states(5, 4), jnp.ones(5, bool)
    return TopN().choose(RouterInputs(logits_te, logits_te, mask_t, uniform_ta=jnp.zeros(shape)), train=True)


def slots_of_five_tokens(*, grouped: int = 5, **changes: Any) -> Routing:
    """Of five tokens' choice among four experts, beside groups of so many tokens."""
    groups = token_groups(jnp.ones(grouped, bool), grouped, "batch")
    options: dict[str, Any] = {"num_experts": 4, "capacity_factor": None} | changes
    return assign_slots(chosen_at_random((5, 2)), groups, **options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: config(router=TopN(n=5)), r"n must be at most num_experts \(4\), got 5"),
        (lambda: TopN(n=0), "n must be at least 1, got 0"),
        (
            lambda: TopN(n=3, threshold_train=(0.2,)),
            "threshold_train must have 2 entries, one for each choice after the first, got 1",
        ),
        (
            lambda: TopN(threshold_eval=(0.2, 0.2)),
            "threshold_eval must have 1 entries, one for each choice after the first, got 2",
        ),
        (lambda: TopN(threshold_train=0.0), r"threshold_train must be in \(0, 1\], got 0.0"),
        (lambda: TopN(n=3, threshold_eval=(0.5, 1.5)), r"threshold_eval must be in \(0, 1\], got 1.5"),
        (lambda: TopN(threshold_eval=float("nan")), r"threshold_eval must be in \(0, 1\], got nan"),
        (lambda: TopN(policy_train=anything("some")), "policy_train must be one of all, none, .* got 'some'"),
        (lambda: TopN(policy_eval=anything("some")), "policy_eval must be one of"),
        (lambda: TopN(score=anything("tanh")), "score must be one of softmax, sigmoid, got 'tanh'"),
        (
            lambda: TopN(expert_groups=2, expert_groups_kept=3),
            "expert_groups_kept must be at most .* got 3 of 2",
        ),
        (lambda: config(router=TopN(expert_groups=3)), r"expert_groups must divide num_experts \(4\), got 3"),
        (
            lambda: config(router=TopN(n=3, expert_groups=2, expert_groups_kept=1)),
            "n must be at most the 2 experts of the kept groups, got 3",
        ),
        (lambda: CoordinateDescent(iterations=0), "iterations must be at least 1, got 0"),
        (lambda: CoordinateDescent(temperature=0), "temperature must be finite and positive, got 0"),
        (lambda: CoordinateDescent(ratio=0.5), "ratio must be finite and at least 1, got 0.5"),
        (lambda: config(capacity_factor_train=0), "capacity_factor_train must be finite and positive, or None, got 0"),
        (
            lambda: config(capacity_factor_train=float("nan")),
            "capacity_factor_train must be finite and positive, or None, got nan",
        ),
        (lambda: config(gumbel_noise=float("nan")), "gumbel_noise must be finite and at least 0, got nan"),
        (lambda: TopN(n=3, threshold_train=anything([0.2, 0.1])), "threshold_train must be a number or a tuple, got"),
        (
            lambda: mixture(hidden_states(2, 8), anything(None), layer().experts, dispatch=anything("sparse")),
            "dispatch must be one of dense, index, ragged, got 'sparse'",
        ),
        (
            lambda: config(capacity_factor_eval=-1.0),
            "capacity_factor_eval must be finite and positive, or None, got -1.0",
        ),
        (
            lambda: config(router=ExpertChoice(), capacity_factor_eval=None),
            "capacity_factor_eval must be a number for ExpertChoice, got None",
        ),
        (lambda: config(dim=0), "dim must be at least 1, got 0"),
        (lambda: config(num_experts=0), "num_experts must be at least 1, got 0"),
        (lambda: config(hidden=0), "hidden must be at least 1, got 0"),
        (
            lambda: MoEConfig(dim=8, hidden_mult=0.1),
            r"hidden_mult must give hidden states in \[1, 2\^31\) wide, got 0.1",
        ),
        (lambda: config(min_capacity=-1), "min_capacity must be at least 0, got -1"),
        (lambda: config(group_size=0), "group_size must be at least 1, got 0"),
        (lambda: config(group_size=12.0), "group_size must be an integer, 'batch' or 'sequence', got 12.0"),
        (lambda: config(group_size=None), "group_size must be an integer, 'batch' or 'sequence', got None"),
        (lambda: config(group_size="row"), "group_size must be one of batch, sequence, got 'row'"),
        (lambda: config(slot_order="best"), "slot_order must be one of token, choice, priority, got 'best'"),
        (lambda: config(dispatch="sparse"), "dispatch must be one of dense, index, ragged, got 'sparse'"),
        (lambda: config(init="zero"), "init must be one of paper, original, got 'zero'"),
        (lambda: config(input_jitter=1.0), "input_jitter must be below 1, got 1.0"),
        (lambda: config(gumbel_noise=-1.0), "gumbel_noise must be finite and at least 0, got -1.0"),
        (lambda: config(balance_coef=-1.0), "balance_coef must be finite and at least 0, got -1.0"),
        (
            lambda: initial_weights(jax.random.key(0), (2, 2), init=anything("zero")),
            "init must be one of paper, original, got 'zero'",
        ),
        (
            lambda: layer()(hidden_states(2, 6, 7), train=True),
            r"x must be \(B, N, 8\) or \(T, 8\) and not empty, got \(2, 6, 7\) float32",
        ),
        (lambda: layer()(hidden_states(8), train=True), r"x must be .* got \(8,\) float32"),
        (lambda: layer()(hidden_states(1, 2, 6, 8), train=True), r"x must be .* got \(1, 2, 6, 8\) float32"),
        (lambda: layer()(jnp.zeros((0, 8)), train=True), r"x must be .* not empty, got \(0, 8\) float32"),
        (lambda: layer()(jnp.zeros((2, 8), int), train=True), "x must be floating point, got int32"),
        (
            lambda: layer()(hidden_states(*X), train=True, mask=jnp.ones((2, 5), bool)),
            r"mask must be \(2, 6\) bool, got \(2, 5\) bool",
        ),
        (
            lambda: layer()(hidden_states(*X), train=True, mask=jnp.ones((2, 6))),
            r"mask must be \(2, 6\) bool, got \(2, 6\) float32",
        ),
        (
            lambda: layer(router=TopN())(hidden_states(*X), train=True),
            "key must be a PRNG key for the router, got None",
        ),
        (
            lambda: layer(gumbel_noise=1.0, input_jitter=0.1)(hidden_states(*X), train=True),
            "key must be a PRNG key for input_jitter and gumbel_noise, got None",
        ),
        (lambda: TopN(n=anything(2.0)), "n must be an integer, got 2.0"),
        (lambda: TopN(n=anything("2")), "n must be an integer, got '2'"),
        (lambda: TopN(threshold_train=anything(("a",))), r"threshold_train must be in \(0, 1\], got 'a'"),
        (lambda: CoordinateDescent(iterations=anything(2.5)), "iterations must be an integer, got 2.5"),
        (lambda: CoordinateDescent(temperature=float("nan")), "temperature must be finite and positive, got nan"),
        (lambda: CoordinateDescent(ratio=float("inf")), "ratio must be finite and at least 1, got inf"),
        (
            lambda: CoordinateDescent(n=1, expert_groups=2, expert_groups_kept=1),
            "expert_groups_kept must be expert_groups for CoordinateDescent, got 1 of 2",
        ),
        (
            lambda: config(capacity_factor_train=float("inf")),
            "capacity_factor_train must be finite and positive, or None, got inf",
        ),
        (
            lambda: config(capacity_factor_eval="2"),
            "capacity_factor_eval must be finite and positive, or None, got '2'",
        ),
        (lambda: config(dim=8.0), "dim must be an integer, got 8.0"),
        (lambda: config(hidden=10.5), "hidden must be an integer, got 10.5"),
        (lambda: config(hidden_mult=float("nan")), "hidden_mult must be finite and positive, got nan"),
        (lambda: config(num_experts=True), "num_experts must be an integer, got True"),
        (lambda: config(straight_through="no"), "straight_through must be a bool, got 'no'"),
        (lambda: config(router="top2"), "router must be a Router, got 'top2'"),
        (lambda: config(router=TopN), "router must be a Router, got <class"),
        (lambda: config(activation="gelu"), "activation must be a function, got 'gelu'"),
        (
            lambda: FeedForward(8, 10, rngs=nnx.Rngs(0), activation=nnx.PReLU()),
            "activation must be a function without weights, got a PReLU",
        ),
        (lambda: config(activation=nnx.PReLU()), "activation must be a function without weights, got a PReLU"),
        (lambda: config(param_dtype=jnp.int32), "param_dtype must be floating point, got"),
        (lambda: config(param_dtype=None), "param_dtype must be floating point, got None"),
        (lambda: config(param_dtype="floaty"), "param_dtype must be floating point, got floaty"),
        (lambda: layer()(hidden_states(*X), train=anything(2)), "train must be a bool, got 2"),
        (lambda: layer()(anything([[0.0] * 8]), train=True), "x must be an array, got a list"),
        (lambda: layer()(anything(None), train=True), "x must be an array, got a NoneType"),
        (
            lambda: layer()(hidden_states(*X), train=True, mask=anything([[True] * 6] * 2)),
            "mask must be an array, got a list",
        ),
        (lambda: SparseMoEBlock(anything(config())), "moe must be a MoE, got MoEConfig"),
        (
            lambda: upcycle(
                jax.tree.map(lambda w: jnp.stack([w, w]), FeedForward(8, 10, rngs=nnx.Rngs(0))), 4, rngs=nnx.Rngs(0)
            ),
            r"feed_forward must be one layer, use jax.vmap for stacked ones, got w_in_df \(2, 8, 20\)",
        ),
        (lambda: upcycle(anything(None), 4, rngs=nnx.Rngs(0)), "feed_forward must be a FeedForward, got None"),
        (lambda: token_groups(jnp.ones(6, bool), 6, "row"), "group_size must be one of batch, sequence, got 'row'"),
        (lambda: token_groups(jnp.ones(6, bool), 6, 0), "group_size must be at least 1, got 0"),
        (
            lambda: token_groups(jnp.ones(6, bool), anything(2.0), "sequence"),
            "sequence_length must be an integer, got 2",
        ),
        (lambda: token_groups(jnp.ones(12, bool), 5, "sequence"), "sequence_length must divide the 12 tokens, got 5"),
        (lambda: token_groups(jnp.ones((2, 6), bool), 6, 4), r"mask_t must be \(T,\) bool, got \(2, 6\) bool"),
        (lambda: token_groups(jnp.ones(6), 6, "batch"), r"mask_t must be \(T,\) bool, got \(6,\) float32"),
        (lambda: capacity(24, 4, 0.0, 0), "factor must be finite and positive, or None, got 0.0"),
        (lambda: capacity(24, 0, 1.0, 0), "num_experts must be at least 1, got 0"),
        (
            lambda: relaxed_top_k(jnp.zeros((2, 4), jnp.int32), 2, iterations=3, temperature=0.1),
            "scores_te must be floating point, got int32",
        ),
        (
            lambda: relaxed_top_k(hidden_states(2, 4), anything("2"), iterations=3, temperature=0.1),
            "size must be finite and positive, got '2'",
        ),
        (
            lambda: relaxed_top_k(hidden_states(2, 4), 6, iterations=3, temperature=0.1),
            "size must be at most the 4 scores, got 6",
        ),
        (
            lambda: relaxed_top_k(jnp.float32(1.0), 1, iterations=3, temperature=0.1),
            r"scores_te must be \(T, E\), got \(\)",
        ),
        (
            lambda: relaxed_top_k(hidden_states(2, 4), 2, iterations=3, temperature=0.0),
            "temperature must be finite and positive",
        ),
        (lambda: chosen_at_random((5, 1)), r"uniform_ta must be \(5, 2\) numbers .* got \(5, 1\)"),
        (lambda: slots_of_five_tokens(num_experts=3), "num_experts must be the choice's 4, got 3"),
        (lambda: slots_of_five_tokens(num_experts=4.0), "num_experts must be an integer, got 4.0"),
        (lambda: totals_of((5, 3), jnp.ones(5, bool)), r"logits_te must be \(5, 4\), .* got \(5, 3\)"),
        (lambda: totals_of((1, 4), jnp.ones(5, bool)), r"logits_te must be \(5, 4\), .* got \(1, 4\)"),
        (lambda: totals_of((5, 4), jnp.ones(1, bool)), r"mask_t must be \(5,\) bool, got \(1,\) bool"),
        (lambda: totals_of((5, 4), jnp.ones(5)), r"mask_t must be \(5,\) bool, got \(5,\) float32"),
        (
            lambda: mixture(hidden_states(4, 8), slots_of_five_tokens(), layer().experts),
            r"x_td must be \(T, D\) of the routing's 5 tokens, got \(4, 8\)",
        ),
        (
            lambda: mixture(hidden_states(5, 1, 8), slots_of_five_tokens(), layer().experts),
            r"x_td must be \(T, D\) of the routing's 5 tokens, got \(5, 1, 8\)",
        ),
        (
            lambda: mixture(jnp.ones((5, 8), int), slots_of_five_tokens(), layer().experts),
            "x_td must be floating point, got int32",
        ),
        (lambda: layer().experts.batched(jnp.ones((3, 2, 8))), r"x_ecd must be \(4, C, 8\), got \(3, 2, 8\)"),
        (lambda: layer().experts.batched(jnp.ones((4, 2, 7))), r"x_ecd must be \(4, C, 8\), got \(4, 2, 7\)"),
        (
            lambda: layer().experts.grouped(hidden_states(5, 8), jnp.zeros(0, jnp.int32)),
            r"sizes_e must be \(4,\) integers, got \(0,\) int32",
        ),
        (
            lambda: layer().experts.grouped(hidden_states(5, 7), jnp.ones(4, jnp.int32)),
            r"x_sd must be \(S, 8\), got \(5, 7\)",
        ),
        (
            lambda: mixture(hidden_states(5, 7), slots_of_five_tokens(), layer().experts),
            r"x_td must be \(T, 8\), got \(5, 7\)",
        ),
        (
            lambda: layer(min_capacity=0, capacity_factor_eval=0.1)(jnp.ones((2, 8), jnp.float8_e4m3fn), train=False),
            "x must have 16 bits or more, got",
        ),
        (lambda: MoEConfig(dim=8, hidden_mult=1e308), "hidden_mult must give hidden states in .* wide, got 1e.308"),
        (lambda: config(balance_coef=10**400), "balance_coef must be finite and at least 0, got 1000"),
        (lambda: config(slot_order=jnp.zeros(2)), "slot_order must be one of token, choice, priority, got Array"),
        (lambda: token_sharding(mesh_of(2, 4), anything("8")), "batch must be an integer, got '8'"),
        (lambda: token_sharding(mesh_of(2, 4), anything(8.5)), "batch must be an integer, got 8.5"),
        (
            lambda: param_shardings(layer(), mesh_of(2, 4), data_axis="expert"),
            "data_axis and expert_axis must be different names, got 'expert' twice",
        ),
        (lambda: slots_of_five_tokens(grouped=1), "groups must be of the choice's 5 tokens, got 1"),
        (lambda: slots_of_five_tokens(min_capacity=2.5), "min_capacity must be an integer, got 2.5"),
        (lambda: SparseMoEBlock(layer()), "rngs must be nnx.Rngs when a feed-forward is added, got None"),
        (lambda: SparseMoEBlock(layer(), add_ff_after=False, rngs=anything(3)), "rngs must be a Rngs, got 3"),
        (lambda: SparseMoEBlock(layer(), add_ff_after=anything("no")), "add_ff_after must be a bool, got 'no'"),
        (lambda: MoE(anything("small"), rngs=nnx.Rngs(0)), "config must be a MoEConfig, got 'small'"),
        (lambda: MoE(config(), rngs=anything(None)), "rngs must be a Rngs, got None"),
        (lambda: config(data_axis=3), "data_axis must be a str, got 3"),
        (lambda: TopN(threshold_train=True), r"threshold_train must be in \(0, 1\], got True"),
        (
            lambda: layer(gumbel_noise=1.0)(hidden_states(*X), train=True, key=anything(0)),
            "key must be one PRNG key, got a int",
        ),
        (lambda: layer()(hidden_states(*X), train=False, key=anything("0")), "key must be one PRNG key, got a str"),
        (
            lambda: SparseMoEBlock(layer(), add_ff_after=False)(hidden_states(*X), train=False, key=anything("0")),
            "key must be one PRNG key, got a str",
        ),
        (
            lambda: layer(gumbel_noise=1.0)(hidden_states(*X), train=True, key=jax.random.split(jax.random.key(0))),
            r"key must be one PRNG key, got \(2,\) key<fry>",
        ),
        (
            lambda: layer(gumbel_noise=1.0)(hidden_states(*X), train=True, key=anything(nnx.Rngs(0))),
            "key must be one PRNG key, got a Rngs",
        ),
        (
            lambda: layer(gumbel_noise=1.0)(hidden_states(*X), train=True, key=jnp.ones(4, jnp.uint32)),
            r"key must be one PRNG key, got \(4,\) uint32",
        ),
        (lambda: Experts(2, 8, -1, rngs=nnx.Rngs(0)), "hidden must be at least 1, got -1"),
        (
            lambda: FeedForward(8, 10, rngs=nnx.Rngs(0), activation=anything("gelu")),
            "activation must be a function, got 'gelu'",
        ),
        (lambda: FeedForward(8, 10, rngs=nnx.Rngs(0), bias=anything("no")), "bias must be a bool, got 'no'"),
        (lambda: FeedForward(8, 10, rngs=nnx.Rngs(0), mult_bias=anything(1)), "mult_bias must be a bool, got 1"),
        (lambda: Experts(2, 8, 10, rngs=nnx.Rngs(0), recompute=anything(1)), "recompute must be a bool, got 1"),
        (
            lambda: Experts(2, 8, 10, rngs=nnx.Rngs(0), param_dtype=anything("floaty")),
            "param_dtype must be floating point, got floaty",
        ),
        (lambda: FeedForward(8, 10, rngs=nnx.Rngs(0))(anything([0.0] * 8)), "x must be an array, got a list"),
        (lambda: Experts(1, 8, 10, rngs=nnx.Rngs(0)).batched(anything([0.0])), "x_ecd must be an array, got a list"),
        (lambda: Experts(1, 8, 10, rngs=nnx.Rngs(0)).batched(hidden_states(1, 8)), r"x_ecd must be \(1, C, 8\), got"),
        (lambda: FeedForward(0, 10, rngs=nnx.Rngs(0)), "dim must be at least 1, got 0"),
        (
            lambda: FeedForward(8, 10, rngs=nnx.Rngs(0))(hidden_states(2, 7)),
            r"x must be \(\.\.\., 8\), got \(2, 7\)",
        ),
        (
            lambda: FeedForward(8, 10, rngs=nnx.Rngs(0))(jnp.ones((2, 8), jnp.int32)),
            "x must be floating point, got int32",
        ),
        (
            lambda: Experts(2, 8, 10, rngs=nnx.Rngs(0)).batched(jnp.ones((2, 3, 8), jnp.int32)),
            "x_ecd must be floating point, got int32",
        ),
        (
            lambda: Experts(2, 8, 10, rngs=nnx.Rngs(0)).grouped(jnp.ones((2, 3, 8)), jnp.ones(2, jnp.int32)),
            r"x_sd must be \(S, 8\), got \(2, 3, 8\)",
        ),
        (
            lambda: layer()(hidden_states(2, 8).astype(jnp.float8_e4m3fn), train=False),
            "x must have 16 bits or more, got",
        ),
        (lambda: RMSNorm(8)(jnp.ones((2, 8), jnp.int32)), "x must be floating point, got int32"),
        (lambda: RMSNorm(8)(jnp.ones((2, 1))), r"x must be \(\.\.\., 8\), got \(2, 1\)"),
        (lambda: RMSNorm(8)(anything([0.0] * 8)), "x must be an array, got a list"),
        (lambda: RMSNorm(8, param_dtype=jnp.int32), "param_dtype must be floating point, got"),
        (lambda: RMSNorm(0), "dim must be at least 1, got 0"),
        (
            lambda: upcycle(FeedForward(8, 10, rngs=nnx.Rngs(0)), 4, rngs=nnx.Rngs(0), bias=False, dim=9),
            "options must leave to the dense layer what it determines, got bias, dim",
        ),
        (
            lambda: updated_router_bias(jnp.zeros(3, jnp.int32), jnp.zeros(3)),
            "bias_e must be floating point, got int32",
        ),
        (
            lambda: updated_router_bias(jnp.zeros(3), jnp.zeros(3), float("nan")),
            "rate must be finite and at least 0, got nan",
        ),
        (lambda: updated_router_bias(jnp.zeros(3), jnp.zeros((2, 3))), r"load_e must be \(3,\), .* got \(2, 3\)"),
        (lambda: updated_router_bias(anything([0.0] * 3), jnp.zeros(3)), "bias_e must be an array, got a list"),
        (lambda: updated_router_bias(jnp.zeros(3), anything(None)), "load_e must be an array, got a NoneType"),
        (lambda: param_shardings(layer(), anything(None)), "mesh must be a Mesh, got None"),
        (lambda: token_sharding(anything((2, 4)), 8), r"mesh must be a Mesh, got \(2, 4\)"),
        (
            lambda: Experts(2, 8, 10, rngs=nnx.Rngs(0)).grouped(hidden_states(5, 8), anything([2, 3])),
            "sizes_e must be an array, got a list",
        ),
        (
            lambda: Experts(2, 8, 10, rngs=nnx.Rngs(0)).grouped(hidden_states(5, 8), jnp.ones(2)),
            r"sizes_e must be \(2,\) integers, got \(2,\) f",
        ),
        (lambda: moe_from_torch(anything(None), dim=8), "state_dict must be a Mapping, got None"),
        (lambda: moe_from_torch({}, dim=8, gating_top_n=3, num_experts=2), "gating_top_n must be at most num_experts"),
        (
            lambda: moe_from_torch({}, dim=8, expert_hidden_mult=-1),
            "expert_hidden_mult must be finite and positive, got -1",
        ),
        (
            lambda: block_from_torch({}, dim=8, expert_hidden_mult=2),
            "expert_hidden_mult must be 4 in a block, got 2",
        ),
        (
            lambda: moe_from_torch({}, dim=8, balance_loss_coef=-1),
            "balance_loss_coef must be finite and at least 0, got -1",
        ),
    ],
)
def test_refused(make: Callable[[], object], message: str):
    with pytest.raises(ValueError, match=message):
        make()


def test_no_key_is_needed_where_nothing_is_random():
    # Made beforehand: layers are kept for other tests, and one made in a trace would be of it.
    evaluated, single, plain = layer(router=TopN(), gumbel_noise=1.0), layer(router=TopN(n=1)), layer()
    jax.eval_shape(lambda: evaluated(hidden_states(*X), train=False))
    jax.eval_shape(lambda: single(hidden_states(*X), train=True))
    jax.eval_shape(lambda: SparseMoEBlock(plain, add_ff_after=False)(hidden_states(*X), train=True))
