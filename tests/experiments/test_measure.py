import itertools
import json
import os
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import spec_jax
from experiments import figures, measure
from experiments.measure import alternate, leviathan_speedup, measure_costs, measure_decoding
from experiments.report import write_report
from spec_jax import DecodeResult, Sampling, SmallModel
from spec_jax.result import DecodeStats


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


def test_what_has_not_begun_does_not_delay_an_interrupt():
    begun, number = [], 8 * (os.cpu_count() or 1)

    def first(repeat: int):
        raise KeyboardInterrupt

    def further(repeat: int):
        begun.append(repeat)
        time.sleep(0.1)

    with pytest.raises(KeyboardInterrupt):
        alternate({"first": first} | dict.fromkeys(map(str, range(number)), further), repeats=1)
    assert len(begun) < number // 2


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


def decoded(**stats: Any) -> DecodeResult:
    counts = DecodeStats(**{name: jnp.array(value) for name, value in stats.items()})
    return DecodeResult(tokens=jnp.zeros((2, 8), jnp.int32), lengths=jnp.array([8, 8]), stats=counts)


def test_of_given_seconds_and_counts():
    """Milliseconds are of one row's token, whatever the batch; a row that drafts at all in a round drafts in it."""
    result = decoded(rounds_b=[4, 4], refused_b=[1, 1], drafted_bj=[[2, 2], [1, 0]], accepted_bj=[[2, 1], [0, 0]])
    drafter, cost = SmallModel(None, gamma=2), (0.25, 1.5)
    found = measure._measurement("a", drafter, [2.0, 4.0, 6.0], [6.0, 4.0, 18.0], [result], cost)
    assert (found.milliseconds_min, found.milliseconds_median) == (250, 500)
    assert (found.speedup, found.speedup_of_minima) == (3, 2)
    assert (found.drafting_rate, found.batch, found.gamma) == (3 / 8, 2, 2)
    expected = leviathan_speedup(3 / 5, 2, draft_cost=0.25, scoring_cost=1.5, drafting_rate=3 / 8, batch=2)
    assert found.predicted_speedup == pytest.approx(expected)


def test_each_repeat_has_its_own_prompts_and_key(monkeypatch: pytest.MonkeyPatch):
    """The same for plain decoding and for every drafter, whose times are compared within a repeat; and the rule."""
    seen, rules = [], []

    def spy(
        target: Any, *drafter_and_prompt: Any, key: jax.Array, verification: str = "plain", **_: Any
    ) -> DecodeResult:
        seen.append((drafter_and_prompt[-1].tolist(), jax.random.key_data(key).tolist()))
        rules.append(verification)
        return decoded(rounds_b=[8, 8], refused_b=[0, 0], drafted_bj=[[8], [8]], accepted_bj=[[0], [0]])

    for name in ("base_decoding", "speculative_decoding"):
        monkeypatch.setattr(measure.spec_jax, name, spy)
    prompts, costs = [np.full((2, 3), repeat) for repeat in range(3)], {"plain": (0.0, 1.0), "a": (0.5, 1.0)}
    drafters = {"a": SmallModel(None, gamma=1)}
    measure_decoding(None, drafters, prompts, max_new_tokens=8, sampling=Sampling(), verification="block", costs=costs)
    # The first two compile, side by side.
    assert sorted(rules[:2]) == ["block", "plain"]
    assert rules[2:] == ["plain", "block"] * 3
    assert seen[2::2] == seen[3::2]
    assert [rows[0][0] for rows, _ in seen[2::2]] == [0, 1, 2]
    assert len({tuple(key) for _, key in seen[2:]}) == 3


def test_nothing_drafted_has_no_acceptance():
    result = decoded(rounds_b=[8, 8], refused_b=[0, 0], drafted_bj=[[0, 0]] * 2, accepted_bj=[[0, 0]] * 2)
    found = measure._measurement("a", SmallModel(None, gamma=2), [1.0], [1.0], [result], (0.0, 1.0))
    assert (found.acceptance_rate, found.acceptance_by_position) == (None, [])


def test_formula_where_rows_draft_now_and_then():
    """Half of the rounds: (3 + 1) / 2 tokens; of two rows one or both draft in 3 of 4 rounds, which cost 1.5."""
    got = leviathan_speedup(1.0, 2, draft_cost=0.0, scoring_cost=1.5, drafting_rate=0.5, batch=2)
    assert got == pytest.approx(2 / (0.75 * 1.5 + 0.25))


def test_costs_are_of_one_drafted_token_and_one_scored_window(monkeypatch: pytest.MonkeyPatch):
    seconds = {"score plain": [2.0, 4.0], "score a": [5.0, 3.0], "draft a": [8.0, 6.0]}
    monkeypatch.setattr(measure, "alternate", lambda calls, repeats: (seconds, {}))
    monkeypatch.setattr(measure.StageLoops, "create", lambda *_, **__: None)
    drafters = {"a": SmallModel(None, gamma=2)}
    costs = measure_costs(None, drafters, np.ones((1, 1), int), max_new_tokens=4, sampling=Sampling())
    assert costs == {"plain": (0, 1), "a": (6 / 2 / 2, 3 / 2)}
