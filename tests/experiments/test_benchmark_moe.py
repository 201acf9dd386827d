"""The benchmark of mixtures measures what it says, on layers small enough to be quick."""

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments import benchmark_moe, moe_programs, moe_tables
from experiments.peak_memory import peak_memory
from experiments.train_state import num_parameters
from moe_jax import MoE, MoEConfig


def tiny(folder: pathlib.Path, *sections: benchmark_moe.Section) -> benchmark_moe.Config:
    return benchmark_moe.Config(
        sections=sections,
        dim=8,
        num_experts=4,
        shape=(2, 8),
        lengths=(8, 16),
        growing_experts=(2, 4),
        growing_experts_shapes=((1, 16),),
        repeats=2,
        output=folder / "results" / "moe.json",
    )


@pytest.mark.slow
def test_sections_are_measured_and_added_to_the_file(tmp_path: pathlib.Path):
    benchmark_moe.main(tiny(tmp_path, "dense", "sequence"))
    report = benchmark_moe.main(tiny(tmp_path, "experts"))
    assert json.loads((tmp_path / "results" / "moe.json").read_text()) == json.loads(json.dumps(report))
    assert list(report) == ["dense", "sequence", "experts"]
    dense = report["dense"]["rows"]
    assert [row["mode"] for row in dense] == ["forward", "forward + backward"]
    for row in dense:
        assert set(row["milliseconds_min"]) == {"dense", "index", "ragged"}
        assert row["over_base_median"]["dense"] == row["over_base_of_minima"]["dense"] == 1
        assert 0 < row["milliseconds_min"]["index"] <= row["milliseconds_median"]["index"]
    assert {(row["dispatch"], row["mode"]) for row in report["sequence"]["rows"]} == {
        (dispatch, mode) for dispatch in ("index", "ragged") for mode in benchmark_moe.MODES
    }
    assert report["experts"]["rows"][0]["base"] == "2"
    assert report["experts"]["config"]["repeats"] == 2


def test_meshes_are_read_from_their_programs(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]):
    report = benchmark_moe.main(dataclasses.replace(tiny(tmp_path, "dense"), mesh=("1x1", "1x2", "2x2"), shape=(1, 32)))
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["measuring mesh", "mesh: mesh 1x1, experts 4, forward done"]
    assert list(report) == ["mesh"]
    alone, rows = report["mesh"]["rows"][:2], report["mesh"]["rows"][2:]
    assert [row["all_to_alls"] for row in alone] == [0, 0]
    layer = nnx.eval_shape(lambda: MoE(MoEConfig(dim=8, num_experts=4), rngs=nnx.Rngs(0)))
    assert [row["argument_bytes"] for row in alone] == [4 * (num_parameters(layer) + 32 * 8)] * 2
    assert [(row["mesh"], row["all_to_alls"]) for row in rows] == [("1x2", 2), ("1x2", 4), ("2x2", 2), ("2x2", 4)]
    for row in rows:
        # floor(32 · 1.25 / 4) slots for each of 4 experts, of which half stay.
        assert row["buffer_bytes"] == 4 * 10 * 8 * 4 / 2
        assert row["all_to_all_bytes"] == row["all_to_alls"] * row["buffer_bytes"]
        assert row["other_kinds"] == ["all-reduce"]
        # Of one device, which has a sequence of its own on every mesh.
        assert row["flops"] == pytest.approx(alone[row["mode"] != "forward"]["flops"], rel=0.05)


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (("2by2",), "mesh must be DATAxEXPERT, such as 2x4, got '2by2'"),
        (("0x2",), "mesh must be DATAxEXPERT, such as 2x4, got '0x2'"),
        (("4x4",), "mesh must fit the 8 devices, got 4x4"),
    ],
)
def test_meshes_refused(tmp_path: pathlib.Path, mesh: tuple[str, ...], message: str):
    with pytest.raises(ValueError, match=message):
        benchmark_moe.main(dataclasses.replace(tiny(tmp_path, "dense"), mesh=mesh))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"repeats": 0}, "repeats must be at least 1, got 0"),
        ({"shapes": ((4, 0),)}, r"shapes must be at least 1, got \(\(4, 0\),\)"),
        ({"growing_experts": ()}, r"growing_experts must have at least one value, got \(\)"),
        ({"num_experts": 1}, "num_experts must be at least 2, got 1"),
        ({"sections": ()}, "sections must name at least one, got none"),
        ({"lengths": (16, 16)}, "lengths must be two different ones at least"),
        ({"lengths": (16, 16, 32)}, "lengths must be different ones, got 16 16 32"),
        ({"sections": ("dense", "dense")}, "sections must be different ones, got dense dense"),
        ({"growing_experts_shapes": ((1, 8), (1, 8))}, "growing_experts_shapes must be different ones, got"),
    ],
)
def test_sizes_refused(tmp_path: pathlib.Path, changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(tiny(tmp_path, "dense"), **changes)


@pytest.mark.parametrize("content", ["[]", "", "no JSON"])
def test_a_file_with_something_else_is_refused(tmp_path: pathlib.Path, content: str):
    config = dataclasses.replace(tiny(tmp_path, "dense"), output=tmp_path / "other.json")
    config.output.write_text(content)
    with pytest.raises(ValueError, match="output must hold a report of this benchmark or not exist, got "):
        benchmark_moe.main(config)
    assert config.output.read_text() == content


def test_what_is_not_installed_is_said_first(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="sections original and mixtral need torch"):
        benchmark_moe.main(tiny(tmp_path, "dense", "mixtral"))


def test_layers_that_differ_are_not_compared():
    ours = jnp.ones((2, 1000, 3))
    theirs = np.full(ours.shape, 1 + 1e-5)
    alike = {"largest_difference": pytest.approx(1e-5, rel=0.01)}
    assert benchmark_moe._agreement(ours, theirs) == alike | {"tokens_routed_apart": 0}
    # Of two tokens in two thousand it can be that their scores were equal but for rounding. Not of three.
    theirs[0, 10, 1] = theirs[1, 20] = 1.01
    assert benchmark_moe._agreement(ours, theirs) == alike | {"tokens_routed_apart": 2}
    for token, other in (((1, 999), 1.01), ((1, 20), np.nan)):
        wrong = theirs.copy()
        wrong[token] = other
        with pytest.raises(RuntimeError, match="outputs must agree for their times to be compared"):
            benchmark_moe._agreement(ours, wrong)


def test_layers_that_keep_other_assignments_are_not_compared():
    benchmark_moe._check_kept({"ours": 100, "theirs": 99}, apart=1)
    with pytest.raises(RuntimeError, match=r"as many assignments must be kept .* got {'ours': 100, 'theirs': 98}"):
        benchmark_moe._check_kept({"ours": 100, "theirs": 98}, apart=1)


def test_a_layer_with_the_weights_of_mixtral():
    """Against its definition in NumPy: softmax, two experts, gates that sum to 1, SiLU of the first half of rows."""
    random = np.random.default_rng(0)
    dim, hidden, num_experts = 6, 5, 4
    weights = {
        "gate.weight": random.standard_normal((num_experts, dim)),
        "experts.gate_up_proj": random.standard_normal((num_experts, 2 * hidden, dim)),
        "experts.down_proj": random.standard_normal((num_experts, dim, hidden)),
    }
    x = random.standard_normal((1, 9, dim))
    expected = np.zeros_like(x[0])
    for t, token in enumerate(x[0]):
        score_e = np.exp(weights["gate.weight"] @ token)
        best = np.argsort(-score_e)[:2]
        for e in best:
            gates, values = np.split(weights["experts.gate_up_proj"][e] @ token, 2)
            hidden_f = gates / (1 + np.exp(-gates)) * values
            expected[t] += score_e[e] / score_e[best].sum() * (weights["experts.down_proj"][e] @ hidden_f)
    moe = moe_programs.like_mixtral({name: weight.astype(np.float32) for name, weight in weights.items()})
    out = moe_programs.routed(moe, jnp.asarray(x, jnp.float32), train=True)
    np.testing.assert_allclose(out.outputs[0], expected, rtol=1e-4, atol=1e-4)


def test_exponents():
    assert benchmark_moe._exponent({"1": 3.0, "10": 30.0, "100": 300.0}) == pytest.approx(1)
    assert benchmark_moe._exponent({"1": 1.0, "2": 4.0, "4": 16.0}) == pytest.approx(2)


def test_times_are_milliseconds_and_ratios_of_one_repeat_each(monkeypatch: pytest.MonkeyPatch):
    asked = []

    def scripted(calls: Any, **options: Any) -> tuple[dict[str, list[float]], dict[str, Any]]:
        asked.append(options)
        return {"base": [0.1, 0.1, 0.3], "other": [0.2, 0.4, 0.3]}, {}

    monkeypatch.setattr(benchmark_moe, "alternate", scripted)
    row = benchmark_moe._timed({}, 3, base="base", following=True, mode="forward")
    assert asked == [{"repeats": 3, "following": True}]
    assert row == {
        "mode": "forward",
        "base": "base",
        "milliseconds_min": {"base": pytest.approx(100), "other": pytest.approx(200)},
        "milliseconds_median": {"base": pytest.approx(100), "other": pytest.approx(300)},
        "over_base_median": {"base": 1, "other": pytest.approx(2)},
        "over_base_of_minima": {"base": 1, "other": pytest.approx(2)},
    }


def test_tables_have_the_units_that_they_name(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("COLUMNS", "200")
    moe_tables.print_meshes(
        [
            {
                "mesh": "1x2",
                "mode": "forward",
                "all_to_alls": 2,
                "all_to_all_bytes": 3e6,
                "buffer_bytes": 1.5e6,
                "other_bytes": 4e3,
                "flops": 5e9,
                "argument_bytes": 6e6,
            }
        ]
    )
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "1x2" in line)
    assert line.replace("│", "").split() == ["1x2", "forward", "2", "3.00", "2.00", "0.004", "5.00", "6.00"]
    times = {"milliseconds_min": {"a": 12.34}, "milliseconds_median": {"a": 150.2}, "over_base_median": {"a": 1.5}}
    moe_tables.print_section("dense", [{"base": "a", "mode": "forward", **times}])
    shown = capsys.readouterr().out
    assert "12.3 (150)" in shown
    assert "1.50 ×" in shown


def test_a_gigabyte_of_gradients_is_there_before_it_is_timed(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    asked = []
    monkeypatch.setattr(moe_programs, "timed_call", lambda layer, x, **options: layer)
    monkeypatch.setattr(benchmark_moe, "_timed", lambda calls, repeats, **options: asked.append((calls, options)))
    list(benchmark_moe.over_experts(tiny(tmp_path, "experts")))
    assert [list(calls) for calls, _ in asked] == [["2", "4"]] * 4
    assert all(options["following"] and options["base"] == "2" for _, options in asked)


def test_what_is_compared_has_the_same_work(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    """The dense layer two experts' weights, which every token meets; experts as many slots as assignments."""
    config = tiny(tmp_path, "dense")
    monkeypatch.setattr(moe_programs, "timed_call", lambda layer, x, **options: layer)
    monkeypatch.setattr(benchmark_moe, "_timed", lambda calls, repeats, **options: calls)
    for calls in benchmark_moe.against_dense(config):
        dense, experts = jax.tree.leaves(calls["dense"]), jax.tree.leaves(calls["index"])
        of_dense = sum(leaf.size for leaf in dense if leaf.ndim == 2)
        assert 2 * sum(leaf.size for leaf in experts if leaf.ndim == 3) == of_dense * config.num_experts
        for train in (False, True):
            x = jnp.broadcast_to(jnp.arange(1.0, config.dim + 1), (1, 16, config.dim))
            # All to the same two experts.
            assert benchmark_moe._kept(moe_programs.routed(calls["index"], x, train=train).metrics, x) == 2 * 8
            assert benchmark_moe._kept(moe_programs.routed(calls["ragged"], x, train=train).metrics, x) == 2 * 16


def test_programs_are_of_evaluation_forward_and_of_training_backward():
    config = dataclasses.replace(moe_programs.roomy_config(8, 4, "index"), capacity_factor_train=0.5)
    moe, x = moe_programs.initial_layer(config), moe_programs.hidden_states((1, 16), 8)
    assert (moe_programs.routed(moe, x, train=True).outputs != moe_programs.routed(moe, x, train=False).outputs).any()
    key = jax.random.key(0)
    outputs = moe_programs.compiled(moe, x, backward=False)(moe, x, key)
    np.testing.assert_allclose(outputs, moe_programs.routed(moe, x, train=False).outputs, atol=1e-6)
    moe_bar, x_bar = moe_programs.compiled(moe, x, backward=True)(moe, x, key)

    def loss(moe: Any, x: jax.Array) -> jax.Array:
        out = moe(x, train=True, key=key)
        return jnp.sum(out.outputs**2) + out.total_aux_loss

    wanted = jax.jit(jax.grad(loss, argnums=(0, 1)))(moe, x)
    jax.tree.map(lambda got, want: np.testing.assert_allclose(got, want, atol=1e-5), (moe_bar, x_bar), wanted)


def test_memory_is_the_median_of_calls_in_turn(monkeypatch: pytest.MonkeyPatch):
    asked = []

    def added(name: str, *args: int) -> int:
        asked.append((name, args))
        return len(asked) * {"ours": 1, "theirs": 10}[name]

    monkeypatch.setattr(benchmark_moe, "OURS", "ours")
    monkeypatch.setattr(benchmark_moe, "peak_memory", added)
    makers: dict[str, Any] = {"ours": "ours", "theirs": "theirs"}
    row = benchmark_moe._memory(makers, 3, 100, 7)
    assert asked == [("ours", (7,)), ("theirs", (7,))] * 3
    assert row == {
        "peak_bytes_min": {"ours": 101, "theirs": 120},
        "peak_bytes_median": {"ours": 103, "theirs": 140},
        "memory_over_ours": {"ours": 1, "theirs": 140 / 103},
    }


def touches(megabytes: int) -> Callable[[int], np.integer]:
    return lambda repeat: np.ones(megabytes * 2**20, np.uint8).sum()


@pytest.mark.slow
def test_peak_memory_is_what_the_call_touches():
    """Memory that is freed before the call returns counts too; a call that needs none adds next to none.

    The kernel adds up a process's pages in batches per core, so what it says may be some hundred KiB off.
    """
    assert peak_memory(touches, 1) < 10 * 2**20
    assert 63 * 2**20 <= peak_memory(touches, 64) < 80 * 2**20
