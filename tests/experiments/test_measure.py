import itertools
import json

import jax
import numpy as np
import pytest
from flax import nnx

import spec_jax
from experiments import figures
from experiments.measure import alternate, leviathan_speedup, measure_decoding
from experiments.report import write_report


def model(seed, depth=1):
    return spec_jax.Decoder(spec_jax.DecoderConfig(dim=16, depth=depth, heads=1, dim_head=16), rngs=nnx.Rngs(seed))


def test_formula_equals_the_papers_closed_form():
    for alpha, gamma, cost in itertools.product((0.1, 0.6, 0.95), (1, 5), (0.02, 0.3)):
        paper = (1 - alpha ** (gamma + 1)) / ((1 - alpha) * (gamma * cost + 1))
        assert leviathan_speedup(alpha, gamma, draft_cost=cost) == pytest.approx(paper)


def test_formula_at_its_ends():
    assert leviathan_speedup(1.0, 4, draft_cost=0.0) == 5
    assert leviathan_speedup(0.0, 4, draft_cost=0.25) == 0.5
    assert leviathan_speedup(0.5, 0, draft_cost=9.0) == 1
    # Three tokens expected of two drafted, all kept; 2 · 0.25 + 1.5 plain steps.
    assert leviathan_speedup(1.0, 2, draft_cost=0.25, scoring_cost=1.5) == 1.5


def test_calls_alternate_after_a_warm_up():
    order = []
    calls = {name: lambda repeat, name=name: order.append((name, repeat)) for name in ("a", "b")}
    seconds, results = alternate(calls, repeats=2)
    assert sorted(order[:2]) == [("a", 0), ("b", 0)]
    assert order[2:] == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert {name: len(times) for name, times in seconds.items()} == {"a": 2, "b": 2}
    assert results["a"] == [None, None]
    order.clear()
    alternate(calls, repeats=1, following=True)
    assert order[2:] == [("a", 0), ("a", 0), ("b", 0), ("b", 0)]


def test_measurements_of_a_draft_that_is_the_target(tmp_path):
    target = model(0, depth=2)
    prompts = [np.random.default_rng(i).integers(0, 256, (2, 8)) for i in range(2)]
    drafters = {
        "itself": spec_jax.SmallModel(target, gamma=3),
        "other": spec_jax.SmallModel(model(1), gamma=2),
    }
    plain, itself, other = measure_decoding(
        target, drafters, prompts, max_new_tokens=16, sampling=spec_jax.Sampling(), verification="coupled"
    )
    assert (plain.gamma, plain.acceptance_rate, plain.tokens_per_round, plain.speedup) == (0, None, 1, 1)
    assert (plain.draft_cost, plain.scoring_cost, plain.predicted_speedup) == (0, 1, 1)
    assert itself.acceptance_rate == 1
    assert itself.acceptance_by_position == [1, 1, 1]
    assert itself.tokens_per_round == 4
    assert itself.batch == 2
    assert itself.draft_cost > 0
    assert itself.scoring_cost > 0
    assert itself.predicted_speedup == pytest.approx(4 / (3 * itself.draft_cost + itself.scoring_cost))
    assert 0 <= (other.acceptance_rate or 0) < 1
    assert 0 < plain.milliseconds_min <= plain.milliseconds_median
    write_report(tmp_path, [plain, itself, other], label="small draft", configuration={"seed": 0})
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["decoding"][1]["acceptance_rate"] == 1
    assert report["machine"]["jax"] == jax.__version__
    for name in ("loss.png", "acceptance.png", "speedup.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_figures_of_a_run_without_validation(tmp_path):
    figures.save_loss_curves(tmp_path / "loss.png", {"target": [(1, 2.0)]}, {"target": []})
    assert (tmp_path / "loss.png").exists()
