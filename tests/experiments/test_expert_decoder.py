"""A decoder with mixtures of experts decodes speculatively what it decodes plainly, whatever else is in the batch."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.expert_decoder import (
    DenseFeedForward,
    ExpertsConfig,
    equal_hidden,
    forward,
    make_decoder,
    num_parameters,
    routing_reports,
)
from moe_jax import TopN
from spec_jax import Decoder, DecodeResult, SmallModel, base_decoding, speculative_decoding
from tests.experiments.experts import CONFIG, EXPERTS, dense_draft, random_tokens, sparse_decoder
from tests.spec.test_equality import BATCH, EOS, LENGTHS, PROMPTS, SAMPLINGS, arguments, check
from tests.spec.transformers import Comparison, compare, transformer

DRAFTS = {"related": dense_draft(), "unrelated": transformer(5)}
# Evaluation with a capacity, as a layer has it by itself: of the whole batch, or of the positions read at once.
CAPACITY: dict[str, Any] = {"dispatch_eval": "index", "capacity_factor_eval": 1.0, "min_capacity": 1}
logits_of = jax.jit(lambda decoder, tokens_bt: decoder(tokens_bt).logits)


@functools.cache
def plainly(sampling: str, eos_id: int | None, seed: int) -> DecodeResult:
    return base_decoding(sparse_decoder(), PROMPTS, **arguments(sampling, eos_id, seed))


def compared(rule: str, draft: str, gamma: int, sampling: str, eos_id: int | None, seed: int) -> Comparison:
    common, target = arguments(sampling, eos_id, seed), sparse_decoder()
    plain = plainly(sampling, eos_id, seed)
    result = speculative_decoding(target, SmallModel(DRAFTS[draft], gamma=gamma), PROMPTS, verification=rule, **common)
    assert 0.01 < float(result.acceptance_rate) < 0.95, "a draft that is never or always right tests little"
    return compare(target, PROMPTS, LENGTHS, common["sampling"], common["key"], result, plain)


@pytest.mark.slow
@pytest.mark.parametrize(("draft", "gamma"), [("related", 1), ("related", 8), ("unrelated", 3)])
def test_coupled_equals_plain(draft: str, gamma: int, record_property):
    """3 × 6 decodings of 64 ragged rows: 1,152 rows."""
    total = Comparison()
    for seed, sampling in enumerate(SAMPLINGS):
        for eos_id in (None, EOS):
            total += compared("coupled", draft, gamma, sampling, eos_id, seed)
    check(total, 6 * BATCH, record_property)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["rejection", "block"])
def test_greedy_equals_plain(rule: str, record_property):
    """2 × 4 decodings of 64 ragged rows: 512 rows."""
    total = Comparison()
    for seed in (0, 1):
        for eos_id in (None, EOS):
            total += compared(rule, "related", 5, "greedy", eos_id, seed)
    check(total, 4 * BATCH, record_property)


@pytest.mark.slow
@pytest.mark.parametrize("group_size", ["batch", "sequence"])
def test_routing_with_a_capacity_fails(group_size: str, record_property):
    """The same weights, routed with a capacity: what a token gets depends on what is read beside it, and the two
    decodings part in most rows."""
    broken = sparse_decoder(group_size=group_size, **CAPACITY)
    plain = base_decoding(broken, PROMPTS, **arguments())
    drafter = SmallModel(DRAFTS["related"], gamma=4)
    result = speculative_decoding(broken, drafter, PROMPTS, verification="coupled", **arguments())
    different = int((result.tokens != plain.tokens).any(1).sum())
    record_property("different", different)
    assert different > BATCH / 2


def decoded_alone(target: Decoder, row: int) -> DecodeResult:
    common = arguments() | {"prompt_length": LENGTHS[row : row + 1], "row_ids": np.array([row])}
    return base_decoding(target, PROMPTS[row : row + 1], **common)


@pytest.mark.slow
def test_rows_decoded_alone():
    """Eight rows one by one, against 64 together; with a capacity over the batch, not so those served last."""
    rows = range(0, BATCH, 8)
    for target, fewest, most in ((sparse_decoder(), 0, 0), (sparse_decoder(group_size="batch", **CAPACITY), 2, 8)):
        together = base_decoding(target, PROMPTS, **arguments())
        different = sum(bool((decoded_alone(target, row).tokens[0] != together.tokens[row]).any()) for row in rows)
        assert fewest <= different <= most


def test_a_token_gets_nothing_of_others():
    """Not of other rows and not of later positions, in the logits; with a capacity it does: slots go to the rows in
    their order, so that the last one gets what is left."""
    tokens = random_tokens(6, 20)
    # Rows that say what the last one does fill its experts, and leave room in the others.
    changed = tokens.at[:-1].set(tokens[-1]).at[-1, 12:].set(random_tokens(8, seed=5))
    for target, equal in ((sparse_decoder(), True), (sparse_decoder(group_size="batch", **CAPACITY), False)):
        first, second = (logits_of(target, x)[-1, :12] for x in (tokens, changed))
        assert np.allclose(first, second, atol=1e-4) is equal


def test_forward_in_evaluation_is_the_decoder():
    target, tokens = sparse_decoder(), random_tokens(3, 20)
    logits, outputs = jax.jit(lambda target: forward(target, tokens, train=False))(target)
    np.testing.assert_allclose(logits, logits_of(target, tokens), atol=1e-4)
    assert list(outputs) == [1]
    assert float(outputs[1].total_aux_loss) == 0
    np.testing.assert_array_equal(outputs[1].metrics.dropped_a, 0)
    # Some second candidates are below the threshold, so that the policy is put to the test.
    assert 0.2 < float(outputs[1].metrics.wanted_a[1]) < 0.95


def test_forward_in_training():
    """Drops, draws by the key it is given, and reports each layer's routing."""
    target, tokens = sparse_decoder(), random_tokens(3, 20)
    run = jax.jit(lambda target, key: forward(target, tokens, train=True, key=key))
    logits, outputs = run(target, jax.random.key(0))
    np.testing.assert_array_equal(run(target, jax.random.key(0))[0], logits)
    assert abs(run(target, jax.random.key(1))[0] - logits).max() > 0.01
    reports = routing_reports(outputs)
    assert all(value.shape == () for value in reports.values())
    assert sum(float(reports[f"load/layer1/expert{e:02}"]) for e in range(4)) == pytest.approx(1)
    assert float(reports["dropped/layer1/rank1"]) > 0
    for name in ("wanted", "dropped"):
        ranks = [float(reports[f"{name}/layer1/rank{rank}"]) for rank in (1, 2)]
        np.testing.assert_array_equal(ranks, getattr(outputs[1].metrics, f"{name}_a"))
    aux = float(reports["aux/balance"] + reports["aux/router_z"])
    assert aux == pytest.approx(float(outputs[1].total_aux_loss))
    assert not any(name.endswith("loss") for name in reports)
    for name, coefficient in (("balance", EXPERTS.balance_coef), ("router_z", EXPERTS.router_z_coef)):
        assert float(reports[f"aux/{name}"]) == pytest.approx(coefficient * float(reports[f"{name}/layer1"]))
        assert float(reports[f"{name}/layer1"]) == float(getattr(outputs[1], f"{name}_loss")) > 0
    for name in ("router_entropy", "top_gate", "capacity_used", "nonfinite_logits"):
        assert float(reports[f"{name}/layer1"]) == float(getattr(outputs[1].metrics, name))


def test_each_mixture_draws_for_itself():
    """Without weights all gates are equal, and of two layers each takes its own half of the second candidates."""
    experts = dataclasses.replace(EXPERTS, every=1, threshold=1.0)
    shapes = nnx.eval_shape(lambda: make_decoder(CONFIG, experts, rngs=nnx.Rngs(0)))
    target = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    _, outputs = jax.jit(lambda target: forward(target, random_tokens(3, 20), train=True, key=jax.random.key(0)))(
        target
    )
    wanted = [float(out.metrics.wanted_a[1]) for out in outputs.values()]
    assert len(set(wanted)) > 1
    assert all(0.2 < share < 0.8 for share in wanted)


def test_every_weight_is_trained():
    """The mixture's too, through `forward`."""
    target, tokens = sparse_decoder(experts=dataclasses.replace(EXPERTS, add_ff_before=True)), random_tokens(3, 20)

    def loss(target: Decoder) -> jax.Array:
        logits, outputs = forward(target, tokens, train=True, key=jax.random.key(0))
        return jnp.square(logits).mean() + outputs[1].total_aux_loss

    gradient = jax.jit(jax.grad(loss))(target)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert float(abs(leaf).max()) > 0, jax.tree_util.keystr(path)


@pytest.mark.parametrize(("before", "after"), [(False, True), (True, True), (False, False)])
def test_equal_parameters(before: bool, after: bool):
    sparse = ExpertsConfig(num_experts=4, hidden=24, add_ff_before=before, add_ff_after=after)
    sizes = [
        num_parameters(nnx.eval_shape(lambda kind=kind: make_decoder(CONFIG, kind, rngs=nnx.Rngs(0))))
        for kind in (sparse, dataclasses.replace(sparse, kind="equal_parameters"))
    ]
    # Half a unit of width at most, which has 3 · D + 3 weights.
    assert abs(sizes[0] - sizes[1]) <= (3 * CONFIG.dim + 3) / 2


def test_equal_flops_by_hand():
    """Slots of 1.25 tokens and feed-forwards of width 24 for each token, and a router of 32 · 4 products."""
    experts = dataclasses.replace(EXPERTS, kind="equal_flops")
    for before, after in ((False, True), (True, False), (True, True)):
        experts = dataclasses.replace(experts, add_ff_before=before, add_ff_after=after)
        assert equal_hidden(CONFIG, experts) == round((1.25 + before + after) * 24 + 32 * 4 / (3 * 32))
    # Two experts have room for every token twice, whatever the factor.
    wide = dataclasses.replace(experts, num_experts=2, capacity_factor=4.0, add_ff_before=False)
    assert equal_hidden(CONFIG, wide) == round((2 + 1) * 24 + 32 * 2 / (3 * 32))


@pytest.mark.parametrize(("before", "after"), [(True, False), (False, True)])
def test_further_feed_forwards_are_where_they_were_asked_for(before: bool, after: bool):
    experts = dataclasses.replace(EXPERTS, add_ff_before=before, add_ff_after=after)
    decoder: Any = nnx.eval_shape(lambda: make_decoder(CONFIG, experts, rngs=nnx.Rngs(0)))
    block = decoder.blocks[1].feed_forward.block
    assert (block.ff_before is not None, block.ff_after is not None) == (before, after)


def test_mixtures_are_as_asked_for():
    asked = {"num_experts": 5, "hidden": 7, "balance_coef": 0.25, "router_z_coef": 0.125}
    layer = ExpertsConfig(top_n=3, threshold=0.375, capacity_factor=1.5, **asked).layer(dim=16)
    assert layer.router == TopN(n=3, threshold_train=0.375, threshold_eval=0.375)
    assert {name: getattr(layer, name) for name in asked} == asked
    assert (layer.dim, layer.capacity_factor_train, layer.capacity_factor_eval) == (16, 1.5, None)


def test_dense_feed_forwards_norm_their_input():
    @jax.jit
    def outputs(x_btd: jax.Array) -> jax.Array:
        return DenseFeedForward(8, 5, rngs=nnx.Rngs(0))(x_btd)

    x_btd = jnp.linspace(-1, 2, 24).reshape(1, 3, 8)
    np.testing.assert_allclose(outputs(4 * x_btd), outputs(x_btd), rtol=1e-5)
    assert outputs(x_btd).any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ExpertsConfig(every=0), "experts.every must be at least 1, got 0"),
        (lambda: ExpertsConfig(kind="thin"), "experts.kind must be one of sparse, equal_flops, equal_parameters, got"),  # pyright: ignore[reportArgumentType]
        (lambda: ExpertsConfig(top_n=9), r"experts.top_n must be at most num_experts \(8\), got 9"),
        (lambda: ExpertsConfig(threshold=0.0), r"experts.threshold must be in \(0, 1\], got 0.0"),
        (lambda: ExpertsConfig(capacity_factor=-1.0), "experts.capacity_factor must be finite and positive, got"),
        (
            lambda: ExpertsConfig(capacity_factor=None),  # pyright: ignore[reportArgumentType]
            "experts.capacity_factor must be finite and positive, got None",
        ),
        (lambda: ExpertsConfig(num_experts=0), "experts.num_experts must be at least 1, got 0"),
        (lambda: make_decoder(CONFIG, ExpertsConfig(every=4), rngs=nnx.Rngs(0)), "experts.every must be at most"),
    ],
)
def test_bad_input(make: Any, message: str):
    with pytest.raises(ValueError, match=message):
        make()
