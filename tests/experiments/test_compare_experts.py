"""What the comparison of mixtures makes of finished runs: numbers, a table and panels, by hand."""

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console

from experiments import compare_experts, train_moe
from experiments.compare_experts import CompareConfig, Result, panels, result_of, table_rows, training_flops
from experiments.expert_decoder import ExpertsConfig
from experiments.metrics import Metrics
from experiments.train_state import num_parameters
from spec_jax import DecoderConfig

TARGET = DecoderConfig(vocab_size=256, dim=64, depth=2, heads=1, dim_head=16, ff_mult=2)


def result(variant: str, seed: int = 0, **changes: Any) -> Result:
    fields: dict[str, Any] = {
        "parameters": 1_250_000,
        "flops_per_token": 2.5e6,
        "tokens_per_step": 400,
        "bits": [(4.0, 3.0), (8.0, 2.0)],
        "dropped": {
            "rank1": [(2.0, 0.9), (4.0, 0.8), (6.0, 0.7), (7.0, 0.2), (8.0, 0.1)],
            "rank2": [(2.0, 0.9), (7.0, 0.6), (8.0, 0.4)],
        },
        "load": {
            "layer1": {"expert00": [(2.0, 0.9), (8.0, 0.25)], "expert01": [(2.0, 0.1), (8.0, 0.75)]},
            "layer3": {"expert00": [(2.0, 0.5), (8.0, 0.5)], "expert01": [(2.0, 0.5), (8.0, 0.5)]},
        },
    }
    return Result(variant=variant, seed=seed, **fields | changes)


def test_the_table_by_hand():
    """Losses at the end, against those of the same seed; drops and loads of the last quarter; means over seeds."""
    dense: dict[str, Any] = {"dropped": {}, "load": {}}
    rows = table_rows(
        [
            result("sparse"),
            result("equal-flops", **dense),
            result("sparse", seed=1, bits=[(8.0, 2.5)], dropped={"rank1": [(8.0, 0.25)], "rank2": [(8.0, 0.0)]}),
            result("equal-flops", seed=1, bits=[(8.0, 2.75)], **dense),
        ]
    )
    assert rows == [
        ("sparse", "2.250 ± 0.250", "", "1.25 M", "2.5", "20%, 25%", "1.50 ×"),
        ("dense, equal FLOPs", "2.375 ± 0.375", "+0.125 ± 0.125", "1.25 M", "2.5", "", ""),
    ]
    alone = [("ff-none", "2.000", "", "1.25 M", "2.5", "15%, 50%", "1.50 ×")]
    assert table_rows([result("ff-none")]) == alone


def test_the_panels_by_hand():
    """Losses and drops are means of seeds, the load of the last layer is of the first; computation in TFLOP."""
    wider = {"rank1": [(8.0, 0.05)]}
    other = result("sparse", seed=1, bits=[(8.0, 2.5), (12.0, 2.0)], dropped={"rank1": [(8.0, 0.3)], "rank2": []})
    sheet = panels([result("sparse"), other, result("capacity-2", dropped=wider)])
    (steps, flops), (load, dropped) = sheet
    assert steps.lines == {"sparse": [(8, 2.25)]}
    assert flops.lines == {"sparse": [(pytest.approx(8 * 400 * 2.5e6 / 1e12), 2.25)]}
    assert (steps.title, load.title) == ("Loss against steps, 2 seeds", "Load of each expert, layer 3, first seed")
    assert (load.lines, load.level) == ({f"0{e}": [(2, 0.5), (8, 0.5)] for e in range(2)}, 0.5)
    assert list(dropped.lines) == ["1st choice, 1.25", "2nd choice, 1.25", "1st choice, 2"]
    assert dropped.lines["1st choice, 1.25"] == [(8, pytest.approx(0.2))]
    assert dropped.lines["1st choice, 2"] == [(8, 0.05)]


def test_the_panels_of_one_seed():
    (steps, flops), (load, _) = panels([result("sparse")])
    assert steps.lines == {"sparse": [(4, 3), (8, 2)]}
    assert flops.lines == {"sparse": [(pytest.approx(4 * 400 * 2.5e6 / 1e12), 3), (pytest.approx(0.008), 2)]}
    assert (steps.title, load.title) == ("Loss against steps", "Load of each expert, layer 3")


def test_a_run_is_read_from_its_metrics(tmp_path: pathlib.Path):
    config = train_moe.TrainMoEConfig(
        output=tmp_path,
        seed=3,
        target=TARGET,
        experts=ExpertsConfig(kind="equal_flops", num_experts=2, hidden=8),
        draft=dataclasses.replace(TARGET, depth=1),
        batch_size=2,
        accumulation=3,
        sequence_length=16,
    )
    with Metrics(tmp_path, first_step=0) as metrics:
        drops = {
            f"train/dropped/layer{layer}/rank{rank}": 0.1 * (2 * layer + rank) for layer in (0, 1) for rank in (1, 2)
        }
        metrics.write(2, drops | {"train/load/layer1/expert00": 0.25, "train/load/layer1/expert01": 0.75})
        metrics.write(4, {"validation/target_loss": np.log(8), "validation/dropped/layer0/rank1": 0.0})
    found = result_of("sparse", config)
    assert (found.variant, found.seed, found.tokens_per_step) == ("sparse", 3, 3 * 2 * 16)
    assert found.bits == [(4, pytest.approx(3))]
    assert found.dropped == {"rank1": [(2, pytest.approx(0.2))], "rank2": [(2, pytest.approx(0.3))]}
    assert found.load == {"layer1": {"expert00": [(2, 0.25)], "expert01": [(2, 0.75)]}}
    target = jax.eval_shape(lambda: train_moe.make_models(config))["target"]
    assert found.parameters == num_parameters(target)


def test_flops_are_those_of_a_byte():
    """Of a dense model: a multiplication and an addition for each weight, three times with the gradients."""
    experts = ExpertsConfig(kind="equal_parameters", num_experts=2, hidden=32)
    config = train_moe.TrainMoEConfig(target=TARGET, draft=TARGET, experts=experts, batch_size=3, sequence_length=16)
    target = jax.eval_shape(lambda: train_moe.make_models(config))["target"]
    weights = num_parameters(target) - num_parameters(target.embed)
    # Attention to 16 positions, norms, activations and the softmax come on top.
    assert 1 < training_flops(config) / (6 * weights) < 1.2


def test_runs_of_a_study_differ_by_variant_and_seed():
    study = CompareConfig(output=pathlib.Path("study"), seeds=2)
    runs = {(variant, seed): study.run(variant, seed) for variant in ("sparse", "ff-none") for seed in (0, 1)}
    for (variant, seed), run in runs.items():
        assert (run.seed, run.output) == (seed, pathlib.Path(f"study/{variant}_{seed}"))
        assert run.experts == train_moe.PRESETS["cpu" if variant == "sparse" else f"cpu-{variant}"][1].experts


def test_runs_are_trained_as_asked_for(monkeypatch: pytest.MonkeyPatch):
    def of(variant: str, config: Any) -> Any:
        return variant, config.seed, config.batch_size, config.steps, config.data, config.sample_every, config.report

    monkeypatch.setattr(compare_experts, "finish_each", lambda runs, _: (config for config, _ in runs))
    monkeypatch.setattr(compare_experts, "result_of", of)
    study = CompareConfig(variants=("sparse", "ff-none"), seeds=2, batch_size=3, steps=9, data="a")
    wanted = [(variant, seed, 3, 9, "a", 0, False) for seed in (0, 1) for variant in ("sparse", "ff-none")]
    assert compare_experts.run_all(study, Console(quiet=True)) == wanted
