"""Training, resuming, generation and the comparison of decoders with experts, on tiny models."""

from __future__ import annotations

import dataclasses
import io
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import spec_jax
from experiments import compare_experts, train_moe
from experiments.config import as_json
from experiments.decoding_run import shared_fields
from experiments.expert_decoder import ExpertsConfig
from experiments.generate import GenerateConfig, generate, load_run
from experiments.metrics import read_metrics
from experiments.samples import ByteText
from experiments.train_state import num_parameters
from spec_jax import DecoderConfig
from spec_jax.losses import next_token_loss
from tests.experiments.runs import leaves, tiny_config, train

TARGET = DecoderConfig(dim=16, depth=2, heads=1, dim_head=16, ff_mult=2)
EXPERTS = ExpertsConfig(num_experts=4, hidden=8)
# New routers are undecided, so that every second expert passes the usual threshold: of these, half do, by chance.
BY_CHANCE = dataclasses.replace(EXPERTS, threshold=1.0)


def moe_config(folder: pathlib.Path, **changes: Any) -> train_moe.TrainMoEConfig:
    tiny = tiny_config(folder)
    shared: dict[str, Any] = shared_fields(tiny, train_moe.TrainMoEConfig)
    shared |= {"target": TARGET, "draft": tiny.draft, "experts": EXPERTS}
    return train_moe.TrainMoEConfig(**shared | changes)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[train_moe.TrainMoEConfig, str]:
    """A finished run with samples on the way, and what it printed."""
    config = moe_config(
        tmp_path_factory.mktemp("moe"), learning_rate=1e-2, sample_every=12, prompt_length=8, generate_length=16
    )
    code, printed = train(config, train_moe.task(config))
    assert code == 0
    return config, printed


def test_a_run_trains_and_reports_its_routing(run):
    config, printed = run
    records = read_metrics(config.output)
    validation = [record for record in records if "validation/target_loss" in record]
    for name in ("validation/target_loss", "validation/draft_loss"):
        assert validation[-1][name] < validation[0][name]
    training = [record for record in records if "train/loss" in record]
    for record in training:
        parts = ("target_loss", "draft_loss", "aux/balance", "aux/router_z")
        assert record["train/loss"] == pytest.approx(sum(record[f"train/{part}"] for part in parts), rel=1e-5)
        assert sum(record[f"train/load/layer1/expert{e:02}"] for e in range(4)) == pytest.approx(1, rel=1e-5)
        assert record["train/wanted/layer1/rank1"] == 1
        assert 0 < record["train/router_entropy/layer1"] < np.log(4)
    # Training drops; what is validated is what decodes, and drops nothing.
    assert any(record["train/dropped/layer1/rank1"] > 0 for record in training)
    assert all(record[f"validation/dropped/layer1/rank{rank}"] == 0 for record in validation for rank in (1, 2))
    assert "speculative decoding" in printed


def test_generation(run):
    """From the checkpoint: speculative with the dense draft, greedily, it is the target's own text."""
    config, _ = run
    target = load_run(config.output).target
    assert num_parameters(target.blocks[1].feed_forward.block.moe.experts) == 4 * (3 * 16 * 8 + 3 * 8 + 16)
    result = spec_jax.base_decoding(
        target,
        np.array([list(b"alpha")]),
        max_new_tokens=20,
        key=jax.random.key(0),
        sampling=spec_jax.Sampling(temperature=0.0),
    )
    console = Console(file=io.StringIO(), width=200)
    assert isinstance(console.file, io.StringIO)
    wanted = GenerateConfig(checkpoint=config.output, prompt="alpha", temperature=0.0, max_new_tokens=20)
    assert generate(wanted, console) == 0
    assert console.file.getvalue().startswith("alpha" + ByteText().feed(result.tokens[0].tolist(), [""] * 20).plain)


@pytest.mark.slow
def test_resuming_continues_bit_for_bit(tmp_path):
    """With random second experts, whose draws must be the same after a resume."""
    common: dict[str, Any] = {"schedule": "constant", "sample_every": 0, "experts": BY_CHANCE}
    whole = moe_config(tmp_path, steps=8, output=tmp_path / "whole", **common)
    half = moe_config(tmp_path, steps=4, output=tmp_path / "halves", **common)
    for config in (whole, half, dataclasses.replace(half, steps=8, resume=True)):
        assert train(config, train_moe.task(config))[0] == 0
    first, second = (load_run(config.output).models for config in (whole, half))
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_loss_functions():
    """Training draws by the batch, validation does not draw; the draft changes nothing in the target."""
    config = train_moe.TrainMoEConfig(target=TARGET, draft=dataclasses.replace(TARGET, depth=1), experts=BY_CHANCE)
    models = jax.jit(lambda: train_moe.make_models(config))()
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 33)), jnp.int32)
    losses = {train: jax.jit(train_moe.make_loss_fn(config, train=train)) for train in (True, False)}
    (total, reports), (validation, quiet) = (losses[train](models, tokens) for train in (True, False))
    other = jax.jit(train_moe.make_loss_fn(dataclasses.replace(config, seed=1)))(models, tokens)[1]
    parts = ("target_loss", "draft_loss", "aux/balance", "aux/router_z")
    np.testing.assert_allclose(total, sum(reports[part] for part in parts), rtol=1e-6)
    assert float(other["target_loss"]) != float(reports["target_loss"])
    assert float(quiet["aux/balance"]) == float(quiet["aux/router_z"]) == 0 < float(reports["aux/balance"])
    logits = jax.jit(lambda target: target(tokens[:, :-1]).logits)(models["target"])
    expected = next_token_loss(logits, tokens[:, 1:])
    np.testing.assert_allclose(quiet["target_loss"], expected, rtol=1e-5)
    np.testing.assert_allclose(validation, expected + quiet["draft_loss"], rtol=1e-5)
    gradient = jax.jit(jax.grad(lambda models: train_moe.make_loss_fn(config)(models, tokens)[0]))
    swapped = models | {"draft": jax.tree.map(jnp.zeros_like, models["draft"])}
    jax.tree.map(np.testing.assert_array_equal, gradient(models)["target"], gradient(swapped)["target"])


@pytest.mark.parametrize("kind", ["equal_flops", "equal_parameters"])
def test_the_dense_ones_are_equal(kind: Any):
    """Of the preset: weights by count, and FLOPs as XLA counts them, within 2 per cent; the other one is far off."""
    name = f"cpu-{kind.replace('_', '-')}"
    sparse, dense = (train_moe.PRESETS[preset][1] for preset in ("cpu", name))
    sizes, flops = [], []
    for config in (sparse, dense):
        models = jax.eval_shape(lambda config=config: train_moe.make_models(config))
        sizes.append(num_parameters(models["target"]))
        flops.append(compare_experts.training_flops(config))
    of_sizes, of_flops = sizes[1] / sizes[0], flops[1] / flops[0]
    equal, other = (of_flops, of_sizes) if kind == "equal_flops" else (of_sizes, of_flops)
    assert equal == pytest.approx(1, abs=0.02)
    assert abs(other - 1) > 0.5


def test_presets_change_one_thing():
    """Each variant is `cpu` but for its mixtures and its folder, and every checkpoint describes its models."""
    base = train_moe.PRESETS["cpu"][1]
    assert len({config.output for _, config in train_moe.PRESETS.values()}) == len(train_moe.PRESETS)
    for variant, (_, changes) in train_moe.VARIANTS.items():
        config = train_moe.PRESETS[f"cpu-{variant}"][1]
        experts = dataclasses.replace(base.experts, **changes)
        assert config == dataclasses.replace(base, output=config.output, experts=experts)
        assert experts != base.experts
        described = jax.eval_shape(lambda config=config: train_moe.models_of(json.loads(json.dumps(as_json(config)))))
        made = jax.eval_shape(lambda config=config: train_moe.make_models(config))
        assert jax.tree.structure(described) == jax.tree.structure(made)
        assert [leaf.shape for leaf in jax.tree.leaves(described)] == [leaf.shape for leaf in jax.tree.leaves(made)]


def test_what_variants_change():
    base = vars(ExpertsConfig())
    assert (base["threshold"], base["balance_coef"], base["router_z_coef"]) == (0.2, 1e-2, 1e-3)
    assert train_moe.PRESETS["enwik8"][1].experts.num_experts == 16
    changed = {
        name: {k: v for k, v in vars(train_moe.PRESETS[f"cpu-{name}"][1].experts).items() if v != base[k]}
        for name in train_moe.VARIANTS
    }
    assert changed == {
        "equal-flops": {"kind": "equal_flops"},
        "equal-parameters": {"kind": "equal_parameters"},
        "no-z-loss": {"router_z_coef": 0.0},
        "threshold-0.05": {"threshold": 0.05},
        "capacity-2": {"capacity_factor": 2.0},
        "ff-before": {"add_ff_before": True, "add_ff_after": False},
        "ff-none": {"add_ff_after": False},
    }


def test_without_a_preset_all_variants_are_compared(monkeypatch: pytest.MonkeyPatch):
    called = []
    monkeypatch.setattr(compare_experts, "main", lambda arguments: called.append(arguments) or 7)
    assert train_moe.main([]) == 7
    assert called == [[]]


def test_another_seed_has_other_weights(tmp_path):
    first, second = (train_moe.make_models(moe_config(tmp_path, seed=seed)) for seed in (0, 1))
    for name in first:
        assert any((x != y).any() for x, y in zip(leaves(first[name]), leaves(second[name]), strict=True)), name


@pytest.mark.slow
def test_variants_are_compared(tmp_path, monkeypatch: pytest.MonkeyPatch):
    """From training to table, JSON and figure; a second start trains nothing again."""
    names = ("sparse", "equal-flops", "capacity-2")
    for variant in names:
        changes = train_moe.VARIANTS[variant][1] if variant in train_moe.VARIANTS else {}
        experts = dataclasses.replace(EXPERTS, **changes)
        config = moe_config(tmp_path, experts=experts, accumulation=1, validate_every=3)
        preset = "cpu" if variant == "sparse" else f"cpu-{variant}"
        monkeypatch.setitem(train_moe.PRESETS, preset, ("tiny", config))
    output = tmp_path / "experts"
    arguments = ["--output", str(output), "--variants", *names, "--steps", "4", "--data", str(tmp_path / "text.txt")]
    assert compare_experts.main(arguments) == 0
    runs = {run["variant"]: run for run in json.loads((output / "experts.json").read_text())["runs"]}
    assert list(runs) == list(names)
    # The last step is validated too, for the table is of it.
    assert [step for step, _ in runs["sparse"]["bits"]] == [3, 4]
    assert list(runs["sparse"]["load"]["layer1"]) == [f"expert{e:02}" for e in range(4)]
    assert runs["equal-flops"]["load"] == {}
    assert (output / "experts.png").read_bytes().startswith(b"\x89PNG")
    table = (output / "experts.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in table[2:]] == ["| sparse", "| dense, equal FLOPs", "| capacity-2"]
    study = compare_experts.CompareConfig(output=output, steps=4, data=str(tmp_path / "text.txt"))
    alone = compare_experts.result_of("capacity-2", study.run("capacity-2", 0))
    assert [list(panel.lines) for panel in compare_experts.panels([alone])[0]] == [["capacity-2"]] * 2
    trained = (output / "sparse_0" / "metrics.jsonl").stat().st_mtime_ns
    assert compare_experts.main(arguments) == 0
    assert (output / "sparse_0" / "metrics.jsonl").stat().st_mtime_ns == trained
    (tmp_path / "other.txt").write_bytes((tmp_path / "text.txt").read_bytes()[::-1])
    with pytest.raises(ValueError, match=r"output must hold this run or none, .* text: expected 'other.txt, SHA"):
        compare_experts.main([*arguments, "--data", str(tmp_path / "other.txt")])


def test_a_study_of_too_short_a_text_leaves_no_folder(tmp_path: pathlib.Path):
    (tmp_path / "text.txt").write_bytes(b"short")
    arguments = ["--output", str(tmp_path / "experts"), "--data", str(tmp_path / "text.txt")]
    with pytest.raises(ValueError, match="data must have at least sequence_length"):
        compare_experts.main(arguments)
    assert not (tmp_path / "experts").exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: train_moe.TrainMoEConfig(draft=dataclasses.replace(TARGET, vocab_size=300)),
            "target.vocab_size and draft.vocab_size must be the same, got 256 and 300",
        ),
        (
            lambda: train_moe.TrainMoEConfig(experts=ExpertsConfig(every=11)),
            "experts.every must be at most target.depth = 10, got 11",
        ),
        (
            lambda: train_moe.TrainMoEConfig(target=dataclasses.replace(TARGET, early_exit_layer=1)),
            "target.early_exit_layer must be None, got 1",
        ),
        (lambda: compare_experts.CompareConfig(variants=()), "variants must have at least one name"),
        (lambda: compare_experts.CompareConfig(variants=("thin",)), "variants must be of sparse, .*, got 'thin'"),
        (
            lambda: compare_experts.CompareConfig(variants=("no-z-loss", "no-z-loss")),
            "variants must be different ones, got no-z-loss no-z-loss",
        ),
        (lambda: compare_experts.CompareConfig(steps=0), "steps must be at least 1, got 0"),
        (lambda: compare_experts.CompareConfig(seeds=0), "seeds must be at least 1, got 0"),
        (lambda: compare_experts.CompareConfig(batch_size=0), "batch_size must be at least 1, got 0"),
        (
            lambda: compare_experts.main(["--output", str(pathlib.Path(__file__))]),
            "output must be a folder that can be written, got",
        ),
    ],
)
def test_bad_input(make: Any, message: str):
    with pytest.raises(ValueError, match=message):
        make()
