"""Training, distillation, layer search and generation of the other strategies, on tiny models."""

import dataclasses
import io
import json
import math
import pathlib
import types
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import spec_jax
from experiments import (
    benchmark_decoding,
    compare_costs,
    compare_prophet_training,
    compare_strategies,
    decoding_run,
    train_draft,
    train_early_exit,
    train_prophet,
)
from experiments.decoding_run import shared_fields
from experiments.distillation import DistillationConfig, key_of, own_samples
from experiments.generate import GenerateConfig, generate, load_run
from experiments.metrics import read_metrics
from experiments.samples import ByteText
from spec_jax import DecoderConfig
from spec_jax.losses import distillation_loss, early_exit_logits
from tests.experiments.runs import leaves, tiny_config, train

TARGET = DecoderConfig(dim=16, depth=2, heads=1, dim_head=16, ff_mult=2)


def early_exit_config(folder, **changes) -> train_early_exit.TrainEarlyExitConfig:
    shared = shared_fields(tiny_config(folder), train_early_exit.TrainEarlyExitConfig)
    target = dataclasses.replace(TARGET, early_exit_layer=1, early_exit_extra_blocks=1, early_exit_recycling=3)
    shared["target"] = target
    return train_early_exit.TrainEarlyExitConfig(**shared | changes)


def draft_config(folder, **changes) -> train_draft.TrainDraftConfig:
    return tiny_config(folder, **{"target": TARGET, "draft": dataclasses.replace(TARGET, depth=1)} | changes)


def prophet_config(folder, **changes) -> train_prophet.TrainProphetConfig:
    shared = shared_fields(tiny_config(folder), train_prophet.TrainProphetConfig)
    shared["target"], shared["prophet"] = TARGET, dataclasses.replace(TARGET, dim=8, depth=1)
    return train_prophet.TrainProphetConfig(**shared | changes)


MODULES: dict[str, tuple[Any, Any]] = {
    "draft": (draft_config, train_draft),
    "early exit": (early_exit_config, train_early_exit),
    "prophet": (prophet_config, train_prophet),
}
OWN = DistillationConfig(weight=1.0, own_samples=True, prompt_length=4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["early exit", "prophet"])
def test_a_run_trains_generates_and_distils(kind: str, tmp_path):
    """All losses fall; what it generates greedily is the target's own text; distillation is reported."""
    make, module = MODULES[kind]
    config = make(tmp_path, steps=12, learning_rate=1e-2, sample_every=0, report=False, distillation=OWN)
    assert train(config, module.task(config))[0] == 0
    records = [record for record in read_metrics(config.output) if "validation/target_loss" in record]
    losses = [name for name in records[0] if name.endswith("_loss")]
    assert len(losses) == 2
    for name in losses:
        assert records[-1][name] < records[0][name]
    assert records[-1]["validation/distillation"] >= 0
    run = load_run(config.output)
    result = spec_jax.base_decoding(
        run.target,
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
@pytest.mark.parametrize("kind", ["early exit", "prophet"])
def test_resuming_continues_bit_for_bit(kind: str, tmp_path):
    """With recycling and own samples, whose noise must be the same after a resume."""
    make, module = MODULES[kind]
    common: dict[str, Any] = {"sample_every": 0, "report": False, "distillation": OWN, "schedule": "constant"}
    whole = make(tmp_path, steps=8, output=tmp_path / "whole", **common)
    half = make(tmp_path, steps=4, output=tmp_path / "halves", **common)
    for config in (whole, half, dataclasses.replace(half, steps=8, resume=True)):
        assert train(config, module.task(config))[0] == 0
    first, second = (load_run(config.output).models for config in (whole, half))
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_own_samples_are_the_targets():
    """The prompt, then what plain decoding gives; another batch has other noise."""
    target = train_draft.make_models(tiny_config_of())["target"]
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 12)))
    samples = jax.jit(partial(own_samples, dataclasses.replace(OWN, prompt_length=5)))(target, tokens, 0)
    np.testing.assert_array_equal(samples[:, :5], tokens[:, :5])
    plain = spec_jax.base_decoding(target, np.asarray(tokens[:, :5]), max_new_tokens=7, key=key_of(tokens, 0))
    np.testing.assert_array_equal(samples[:, 5:], plain.tokens)
    assert (key_of(tokens, 0) != key_of(tokens[:, ::-1], 0)).all()


WEIGHTS = {"target_loss": 1.0, "draft_loss": 1.0, "early_exit_loss": 0.5, "prophet_loss": 0.5, "distillation": 3.0}


@pytest.mark.parametrize("kind", MODULES)
def test_the_loss_is_the_weighted_sum_of_its_parts(kind: str, tmp_path):
    """Distillation on own samples is that on the sampled text, and another seed samples another."""
    make, module = MODULES[kind]
    weights = {f.name: 0.5 for f in dataclasses.fields(make(tmp_path)) if f.name.endswith("_loss_weight")}
    own = DistillationConfig(weight=3.0, own_samples=True, prompt_length=4)
    config = make(tmp_path, seed=3, distillation=own, **weights)
    models, tokens = module.make_models(config), jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 33)))

    def losses_of(config, tokens) -> tuple[jax.Array, dict[str, jax.Array]]:
        return jax.jit(module.make_loss_fn(config))(models, tokens)

    total, losses = losses_of(config, tokens)
    np.testing.assert_allclose(total, sum(WEIGHTS[name] * loss for name, loss in losses.items()), rtol=1e-6)
    given = dataclasses.replace(config, distillation=dataclasses.replace(own, own_samples=False))
    samples = own_samples(own, models["target"], tokens, 3)
    on_samples = losses_of(given, samples)[1]["distillation"]
    np.testing.assert_allclose(losses["distillation"], on_samples, rtol=1e-5)
    elsewhere = losses_of(given, tokens)[1], losses_of(dataclasses.replace(config, seed=4), tokens)[1]
    assert all(abs(other["distillation"] / on_samples - 1) > 1e-4 for other in elsewhere)


def test_an_exit_learns_from_the_head(tmp_path):
    """The divergence is the exit's from the head, not the other way; what it recycles is drawn from the seed."""
    distillation = DistillationConfig(weight=1.0)
    config = early_exit_config(tmp_path, seed=3, distillation=distillation)
    # What recycles starts at zero.
    models = jax.tree.map(lambda weight: weight + 0.05, train_early_exit.make_models(config))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 33)))
    read = tokens[:, :-1]
    logits, exit_logits = early_exit_logits(models["target"], read, key=key_of(read, 3))
    losses = train_early_exit.make_loss_fn(config)(models, tokens)[1]
    np.testing.assert_allclose(losses["distillation"], distillation_loss(exit_logits, logits), rtol=1e-5)
    assert abs(distillation_loss(logits, exit_logits) / losses["distillation"] - 1) > 1e-3
    other = train_early_exit.make_loss_fn(dataclasses.replace(config, seed=4))(models, tokens)[1]
    assert other["early_exit_loss"] != losses["early_exit_loss"]


@pytest.mark.parametrize("kind", MODULES)
def test_another_seed_has_other_weights(kind: str, tmp_path):
    make, module = MODULES[kind]
    first, second = (module.make_models(make(tmp_path, seed=seed)) for seed in (0, 1))
    for name in first:
        assert any((x != y).any() for x, y in zip(leaves(first[name]), leaves(second[name]), strict=True)), name


def test_a_prophet_is_trained_as_its_configuration_says(tmp_path):
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 33)))
    config = prophet_config(tmp_path, num_leading_start_tokens=3, prophet_train_length=6, detach_target_hiddens=True)
    models = train_prophet.make_models(config)
    assert models["prophet"].num_leading_start_tokens == 3

    def gradient_and_loss(**changes: Any) -> tuple[Any, Any]:
        loss_fn = train_prophet.make_loss_fn(dataclasses.replace(config, **changes))
        gradient, losses = jax.jit(jax.grad(loss_fn, has_aux=True))(models, tokens)
        return gradient["target"], losses["prophet_loss"]

    detached, loss = gradient_and_loss()
    alone, _ = gradient_and_loss(prophet_loss_weight=0.0)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), detached, alone)
    joined, same = gradient_and_loss(detach_target_hiddens=False)
    assert same == loss
    assert max(jax.tree.leaves(jax.tree.map(lambda x, y: float(abs(x - y).max()), joined, alone))) > 1e-4
    assert gradient_and_loss(prophet_train_length=5)[1] != loss


def tiny_config_of() -> train_draft.TrainDraftConfig:
    return train_draft.TrainDraftConfig(target=TARGET, draft=dataclasses.replace(TARGET, depth=1))


@pytest.mark.parametrize("own", [False, True])
def test_distillation_teaches_the_draft_alone(own: bool):
    """Its gradient reaches the draft and leaves the target's as it was."""
    plain = tiny_config_of()
    taught = dataclasses.replace(plain, distillation=dataclasses.replace(OWN, own_samples=own, weight=3.0))
    models, tokens = train_draft.make_models(plain), jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 12)))
    losses = (train_draft.make_loss_fn(config) for config in (plain, taught))
    gradients = (jax.jit(jax.grad(lambda models, loss=loss: loss(models, tokens)[0])) for loss in losses)
    before, after = (gradient(models) for gradient in gradients)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), before["target"], after["target"])
    moved = jax.tree.leaves(jax.tree.map(lambda x, y: float(abs(x - y).max()), before["draft"], after["draft"]))
    assert min(moved) > 1e-6


@pytest.mark.slow
def test_all_strategies_are_compared(tmp_path, monkeypatch: pytest.MonkeyPatch):
    """From training to table, JSON and figure; a second start trains, searches and measures nothing again."""
    changes: dict[str, Any] = {"prompt_length": 16, "steps": 2, "checkpoint_every": 2}
    for module, config in (
        (train_draft, tiny_config(tmp_path, **changes)),
        (train_early_exit, early_exit_config(tmp_path, **changes)),
        (train_prophet, prophet_config(tmp_path, **changes)),
    ):
        monkeypatch.setitem(module.PRESETS, "cpu", ("tiny", config))
    output = tmp_path / "strategies"
    arguments = ["--output", str(output), "--gammas", "1", "2", "--batches", "2", "--repeats", "1"]
    arguments += ["--generate-length", "8", "--temperatures", "1"]
    assert compare_strategies.main(arguments) == 0
    rows = json.loads((output / "strategies.json").read_text())["rows"]
    places = {(row["strategy"], row["text"], row["batch"], row["gamma"]) for row in rows}
    names = ("small draft", "early exit", "prophet", "n-gram", "layer skip")
    assert places >= {(n, text, 2, g) for n in names for text in ("code", "prose") for g in (1, 2)}
    assert {row["text"] for row in rows} == {"code", "prose", "repetitive", "noise"}
    chosen = {row["text"]: row["temperature"] for row in rows if row["text"] in ("repetitive", "noise")}
    assert chosen == {"repetitive": 0.0, "noise": 5.0}
    assert (output / "strategies.png").read_bytes().startswith(b"\x89PNG")
    for again in ("measure_decoding", "measure_costs", "searched_layers"):
        monkeypatch.delattr(compare_strategies, again)
    (output / "strategies.png").unlink()
    trained = (output / "prophet" / "metrics.jsonl").stat().st_mtime_ns
    assert compare_strategies.main(arguments) == 0
    assert (output / "prophet" / "metrics.jsonl").stat().st_mtime_ns == trained
    assert json.loads((output / "strategies.json").read_text())["rows"] == rows
    assert (output / "strategies.png").exists()


def test_prose_and_code_are_told_apart():
    code, prose = b"x[i] = {(a+b)*c};\n#%$@ 01234_56789|==>>", b"the quick brown fox jumps over the lazy dog, and"
    split = np.frombuffer((code * 40 + prose * 40) * 20, np.uint8)
    for kind, share in (("code", 0.5), ("prose", 0.95)):
        rows = compare_strategies.prompts_of(split, kind, count=6, length=32)
        assert rows.shape == (6, 32)
        found = compare_strategies.PROSE[rows].mean(axis=1)
        assert ((found < share) if kind == "code" else (found > share)).all()


@pytest.mark.slow
def test_prophets_effect_is_compared(tmp_path, monkeypatch: pytest.MonkeyPatch):
    """A detached prophet leaves its target as it is; the other one does not.

    Up to the rounding of sums, which two compiled programs may take in two orders: 6e-8 of the loss was seen.
    test_prophet.py shows that no gradient reaches the target.
    """
    monkeypatch.setitem(train_prophet.PRESETS, "cpu", ("tiny", prophet_config(tmp_path)))
    output = tmp_path / "effect"
    arguments = ["--output", str(output), "--seeds", "2", "--steps", "4", "--dim", "64", "--depth", "1"]
    assert compare_prophet_training.main([*arguments, "--validate-every", "2"]) == 0
    curves = json.loads((output / "prophet_effect.json").read_text())["curves"]
    assert {len(runs) for runs in curves.values()} == {2}
    assert [step for step, _ in curves["prophet"][0]] == [2, 4]
    np.testing.assert_allclose(curves["prophet, detached"], curves["target alone"], rtol=1e-6)
    assert np.abs(np.subtract(curves["prophet"], curves["target alone"])[:, -1, 1]).min() > 1e-2
    assert (output / "prophet_effect.png").exists()
    # Another seed, with points at more steps than the runs that are there.
    assert compare_prophet_training.main([*arguments, "--seeds", "3", "--validate-every", "1"]) == 0
    more = json.loads((output / "prophet_effect.json").read_text())["curves"]
    assert {way: runs[:2] for way, runs in more.items()} == curves
    assert [[step for step, _ in run] for run in more["prophet"]] == [[2, 4]] * 3


def test_the_target_does_not_depend_on_the_prophet():
    first = train_prophet.make_models(train_prophet.TrainProphetConfig(target=TARGET, prophet=TARGET))
    other = dataclasses.replace(TARGET, depth=1, dim=8)
    second = train_prophet.make_models(train_prophet.TrainProphetConfig(target=TARGET, prophet=other))
    jax.tree.map(np.testing.assert_array_equal, first["target"], second["target"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: train_early_exit.TrainEarlyExitConfig(target=TARGET), "target.early_exit_layer must be a layer, got"),
        (
            lambda: train_draft.TrainDraftConfig(draft=dataclasses.replace(TARGET, early_exit_layer=1)),
            "draft.early_exit_layer must be None, got 1: only train_early_exit trains exits",
        ),
        (lambda: train_early_exit.TrainEarlyExitConfig(early_exit_loss_weight=-1.0), "early_exit_loss_weight must be"),
        (lambda: train_prophet.TrainProphetConfig(prophet_train_length=2), "prophet_train_length must be above num_l"),
        (
            lambda: train_prophet.TrainProphetConfig(num_leading_start_tokens=0),
            "num_leading_start_tokens must be at least 1, got 0",
        ),
        (lambda: train_prophet.TrainProphetConfig(prophet_loss_weight=float("nan")), "prophet_loss_weight must be at"),
        (
            lambda: train_prophet.TrainProphetConfig(prophet=dataclasses.replace(TARGET, vocab_size=300)),
            "target.vocab_size and prophet.vocab_size must be the same, got 256 and 300",
        ),
        (lambda: DistillationConfig(weight=-0.1), "distillation.weight must be at least 0, got -0.1"),
        (lambda: DistillationConfig(own_samples=True), "distillation.own_samples must come with a distillation.weight"),
        (
            lambda: train_draft.TrainDraftConfig(distillation=dataclasses.replace(OWN, prompt_length=300)),
            "distillation.prompt_length must be at most sequence_length = 256, got 300",
        ),
        (lambda: compare_strategies.CompareConfig(gammas=(0, 1)), "gammas must be at least 1, got"),
        (lambda: compare_strategies.CompareConfig(gammas=(2, 3, 2)), "gammas must be different ones, got 2 3 2"),
        (lambda: compare_strategies.CompareConfig(batches=(1, 1)), "batches must be different ones, got 1 1"),
        (lambda: compare_strategies.CompareConfig(temperatures=(1, 1.0)), "temperatures must be different ones, got"),
        (lambda: compare_costs.CostConfig(gammas=(2, 2)), "gammas must be different ones, got 2 2"),
        (lambda: benchmark_decoding.Config(batches=(1, 1)), "batches must be different ones, got 1 1"),
        (lambda: compare_strategies.CompareConfig(temperatures=(math.nan,)), "temperatures must be at least 0, got"),
        (lambda: compare_strategies.CompareConfig(temperatures=(1.0, math.inf)), "temperatures must be finite, got"),
        (lambda: compare_strategies.main(["--batches", "5000"]), "repeats · batches must be at most .*, got 15000"),
        (lambda: compare_costs.CostConfig(draft_depth=6), "draft_depth must be in .1, depth = 6., got 6"),
        (lambda: DistillationConfig(prompt_length=0), "distillation.prompt_length must be at least 1, got 0"),
        (lambda: compare_strategies.CompareConfig(preset="gpu"), "preset must be one of cpu, enwik8, got 'gpu'"),
        (lambda: compare_strategies.CompareConfig(gammas=()), "gammas must have at least one value"),
        (lambda: compare_prophet_training.CompareConfig(seeds=1), "seeds must be at least 2, got 1"),
        (lambda: compare_prophet_training.CompareConfig(dim=48), "dim must be at least 64, .* got 48"),
        (lambda: benchmark_decoding.Config(batches=(1, 0)), "batches must be at least 1, got .1, 0."),
        (lambda: benchmark_decoding.Config(dtype="bfloat16", with_torch=True), "dtype must be float32 to compare with"),
        (
            lambda: compare_costs.main(["--output", str(pathlib.Path(__file__).parent)]),
            "output must be a file, got the folder",
        ),
    ],
)  # fmt: skip
def test_bad_input(make: Any, message: str):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_prophets_effect_by_hand(tmp_path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """The last validation of each run, and its difference from the target alone: mean, standard error, runs better."""
    bits = {"target alone": (3.0, 3.5), "prophet, detached": (3.0, 3.5), "prophet": (2.9, 3.2)}
    curves = {way: [[(2, last + 1 + run), (4, last)] for run, last in enumerate(runs)] for way, runs in bits.items()}
    drawn = []
    monkeypatch.setattr(compare_prophet_training, "curves_of", lambda *_: curves)
    monkeypatch.setattr(compare_prophet_training, "save_panels", lambda _, grid: drawn.extend(grid[0]))
    monkeypatch.setenv("COLUMNS", "200")
    assert compare_prophet_training.main(["--seeds", "2", "--output", str(tmp_path)]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("│ prophet  "))
    cells = [cell.strip() for cell in line.split("│")[1:-1]]
    assert cells == ["prophet", "3.0500 ± 0.1500", "-0.2000 ± 0.1000", "2"]
    mean, difference = drawn
    np.testing.assert_allclose(mean.lines["prophet"], [(2, 4.55), (4, 3.05)])
    np.testing.assert_allclose(difference.lines["prophet"], [(2, -0.2), (4, -0.2)], atol=1e-9)


def test_costs_are_of_the_models_asked_for(
    tmp_path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """And a round's cost is its draft's, token for token, and its scoring."""
    told = []

    def spy(target: Any, drafters: Any, prompt: Any, *, repeats: int, **_: Any) -> dict[str, tuple[float, float]]:
        told.append((target, drafters, repeats))
        return dict.fromkeys(drafters, (0.25, 1.5))

    monkeypatch.setattr(compare_costs, "measure_costs", spy)
    arguments = ["--dim", "64", "--depth", "4", "--draft-depth", "2", "--gammas", "3", "--repeats", "7"]
    assert compare_costs.main([*arguments, "--output", str(tmp_path / "costs.json")]) == 0
    ((target, drafters, repeats),) = told
    assert (target.config.depth, target.config.early_exit_layer, repeats) == (4, 2, 7)
    assert drafters["small draft"].draft.config.depth == 2
    assert "2.25 (0.25, 1.50)" in capsys.readouterr().out


def test_samples_are_drafted_as_long_as_asked_for(tmp_path, monkeypatch: pytest.MonkeyPatch):
    drafted = []
    monkeypatch.setattr(
        decoding_run, "print_samples", lambda _, __, drafter, *___, **____: drafted.append(drafter.gamma)
    )
    text: Any = types.SimpleNamespace(validation=np.zeros(99, np.uint8))
    task = train_draft.task(draft_config(tmp_path, gamma=3, prompt_length=4))
    task.on_sample({"target": None, "draft": None}, text, 1, Console(quiet=True))
    assert drafted == [3]


def test_a_file_may_not_be_a_new_folder(tmp_path):
    with pytest.raises(ValueError, match="output must be a file, got the folder"):
        compare_costs.main(["--output", str(tmp_path / "new" / "..")])


def test_costs_are_compared(tmp_path):
    output = tmp_path / "costs.json"
    arguments = ["--dim", "32", "--depth", "2", "--gammas", "1", "2", "--repeats", "1", "--max-new-tokens", "8"]
    assert compare_costs.main([*arguments, "--output", str(output)]) == 0
    rows = json.loads(output.read_text())["rows"]
    assert [(row["strategy"], row["gamma"]) for row in rows] == [
        (name, gamma) for gamma in (1, 2) for name in ("small draft", "early exit", "prophet", "n-gram")
    ]
    assert all(row["draft_cost"] > 0 and row["scoring_cost"] > 0 for row in rows)


def test_own_samples_have_the_noise_of_the_seed():
    tokens_bt = jnp.ones((2, 5), jnp.int32)
    assert key_of(tokens_bt, 0) != key_of(tokens_bt, 1)


def test_a_prompt_may_be_as_long_as_the_sequence():
    """The sample is then the one token behind it that a row also has."""
    DistillationConfig(weight=1.0, own_samples=True, prompt_length=8).check(8)
