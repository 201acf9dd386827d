"""The search for sublayers that a target can skip, on tiny models."""

import io
import itertools
import json
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rich.console import Console

import spec_jax
from experiments import search_layer_skip
from experiments.data import load_text
from experiments.expert_decoder import num_parameters
from experiments.generate import GenerateConfig, generate, load_run
from experiments.measure import leviathan_speedup
from spec_jax import DecoderConfig
from tests.experiments.experts import CONFIG, sparse_decoder
from tests.experiments.runs import tiny_config, train


def test_layer_search():
    """The whole model is always accepted; the acceptance of a set is that of the model thinned everywhere."""
    target = spec_jax.Decoder(DecoderConfig(dim=16, depth=3, heads=1, dim_head=16), rngs=nnx.Rngs(0))
    tokens = np.random.default_rng(0).integers(0, 256, (2, 10)).astype(np.int32)
    assert float(search_layer_skip.acceptance(target, tokens, np.ones((3, 2), bool))) == pytest.approx(1, abs=1e-5)
    way = search_layer_skip.search(target, [tokens], max_gamma=4, scoring_cost=1.5)
    assert [len(found.skip_attention) + len(found.skip_feed_forward) for found in way] == [1, 2, 3, 4, 5]
    for found in way:
        draft, _ = target.without(
            jnp.asarray(tokens), None, attention=found.skip_attention, feed_forward=found.skip_feed_forward
        )
        both = [jax.nn.softmax(logits) for logits in (draft, target(jnp.asarray(tokens)).logits)]
        assert found.acceptance == pytest.approx(float(jnp.minimum(*both).sum(-1).mean()), abs=1e-5)
        assert 0 < found.draft_cost < 1
    assert [found.draft_cost for found in way] == sorted((found.draft_cost for found in way), reverse=True)


def test_every_step_of_the_search_by_hand():
    """The sublayer goes whose absence costs least; what is read and the best gamma are those of what is left."""
    target = spec_jax.Decoder(DecoderConfig(vocab_size=24, dim=16, depth=2, heads=1, dim_head=16), rngs=nnx.Rngs(0))
    tokens = np.random.default_rng(0).integers(0, 24, (2, 10)).astype(np.int32)
    way = search_layer_skip.search(target, [tokens], max_gamma=2, scoring_cost=1.5)
    sublayers = list(itertools.product((0, 1), (0, 1)))
    size_of = {
        (layer, kind): num_parameters((block.attention, block.feed_forward)[kind])
        for layer, block in enumerate(target.blocks)
        for kind in (0, 1)
    }
    head = num_parameters(target.head)
    left: set[tuple[int, int]] = set(sublayers)
    for found in way:
        rates = {one: rate_of(target, tokens, left - {one}) for one in left}
        best = max(rates, key=lambda one: rates[one])
        assert len({round(rate, 4) for rate in rates.values()}) == len(rates)
        left -= {best}
        skipped = {(layer, 0) for layer in found.skip_attention} | {(layer, 1) for layer in found.skip_feed_forward}
        assert skipped == set(sublayers) - left
        assert found.acceptance == pytest.approx(rates[best])
        cost = (sum(size_of[one] for one in left) + head) / (sum(size_of.values()) + head)
        assert found.draft_cost == pytest.approx(cost)
        speedups = [leviathan_speedup(found.acceptance, gamma, draft_cost=cost, scoring_cost=1.5) for gamma in (1, 2)]
        assert found.speedup == pytest.approx(max(speedups))
        assert found.gamma == 1 + int(np.argmax(speedups))
    assert way[-1].gamma == 2


def test_a_token_reads_the_experts_it_asks_for():
    """Two of four, in the second layer, and the router beside them."""
    target = sparse_decoder()
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 10)).astype(np.int32)
    mixture: Any = target.blocks[1].feed_forward
    expert = 3 * CONFIG.dim * 24 + 3 * 24 + CONFIG.dim
    assert num_parameters(mixture.block.moe.experts) == 4 * expert
    parts = [part for block in target.blocks for part in (block.attention, block.feed_forward)]
    read = sum(map(num_parameters, (*parts, target.head))) - 2 * expert
    alone = {(1, 0): num_parameters(target.blocks[1].attention), (1, 1): num_parameters(mixture) - 2 * expert}
    for layer, kind in itertools.product((0, 2), (0, 1)):
        alone[layer, kind] = num_parameters((target.blocks[layer].attention, target.blocks[layer].feed_forward)[kind])
    for found in search_layer_skip.search(target, [tokens], max_gamma=2, scoring_cost=1.5):
        skipped = [*((i, 0) for i in found.skip_attention), *((i, 1) for i in found.skip_feed_forward)]
        assert found.draft_cost == pytest.approx(1 - sum(alone[one] for one in skipped) / read)


def rate_of(target: spec_jax.Decoder, tokens: np.ndarray, kept: set[tuple[int, int]]) -> float:
    keep_l2 = np.array([[(layer, kind) in kept for kind in (0, 1)] for layer in range(2)])
    return float(search_layer_skip.acceptance(target, tokens, keep_l2))


def test_layer_search_is_found_by_generate(tmp_path, capsys, monkeypatch: pytest.MonkeyPatch):
    """The search is on the run's text, and writes what `generate` reads."""
    searched = []
    monkeypatch.setattr(search_layer_skip, "load_text", lambda data: searched.append(data) or load_text(data))
    config = tiny_config(tmp_path, steps=4, report=False, sample_every=0)
    train(config)
    assert search_layer_skip.main(["--checkpoint", str(config.output), "--sequence-length", "16"]) == 0
    assert searched == [config.data]
    printed = capsys.readouterr().out
    written = json.loads((config.output / "layer_skip.json").read_text())
    best = written["best"]
    speedups = [found["speedup"] for found in written["way"]]
    assert best["speedup"] == max(speedups) > min(speedups)
    assert f"{best['speedup']:.2f} × ← best" in " ".join(printed.replace("│", " ").split())
    assert ("No set is predicted to be faster" in printed) == (best["speedup"] < 1)
    for gamma, folder in ((None, config.output), (3, config.output / "checkpoints")):
        drafter = load_run(folder).drafter("layer-skip", gamma)
        assert isinstance(drafter, spec_jax.LayerSkip)
        assert drafter.gamma == (gamma or best["gamma"])
    assert list(drafter.skip_feed_forward) == best["skip_feed_forward"]
    console = Console(file=io.StringIO(), width=200)
    generate(GenerateConfig(checkpoint=config.output, prompt="a", drafter="layer-skip", max_new_tokens=4), console)
    for content in ("", "[]", "{}"):
        (config.output / "layer_skip.json").write_text(content)
        with pytest.raises(
            ValueError, match=r"needs .*layer_skip.json, which is damaged: run python -m experiments.se"
        ):
            load_run(config.output).drafter("layer-skip")


def test_the_search_is_on_validation_text_as_asked_for(tmp_path, monkeypatch: pytest.MonkeyPatch):
    splits = {name: np.full(999, value, np.uint8) for value, name in enumerate(("train", "validation", "test"))}
    run = types.SimpleNamespace(folder=tmp_path, target=None, configuration={"data": "the run's"})
    asked, told = [], []
    found = search_layer_skip.Found((0,), (), 0.5, 0.5, 1, 2.0)
    text = types.SimpleNamespace(**splits, check=lambda _: None)
    monkeypatch.setattr(search_layer_skip, "load_run", lambda _: run)
    monkeypatch.setattr(search_layer_skip, "load_text", lambda data: asked.append(data) or text)
    monkeypatch.setattr(search_layer_skip, "search", lambda _, batches, **how: told.append((batches, how)) or [found])
    arguments = ["--batches", "3", "--batch-size", "2", "--sequence-length", "9", "--max-gamma", "4"]
    search_layer_skip.main(["--checkpoint", "x", "--data", "mine", *arguments, "--scoring-cost", "1.5"])
    ((batches, how),) = told
    assert asked == ["mine"]
    assert how == {"max_gamma": 4, "scoring_cost": 1.5}
    assert [(batch.shape, np.unique(batch).tolist()) for batch in batches] == [((2, 10), [1])] * 3
