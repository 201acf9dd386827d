import dataclasses
import itertools
import os
import pathlib
import re
import subprocess
import sys
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import (
    assert_expert_parallel,
    check_resume,
    compare_costs,
    compare_experts,
    compare_strategies,
    decoding_run,
    launch,
    search_layer_skip,
    train_draft,
    train_early_exit,
    train_moe,
    train_prophet,
)
from experiments.command_line import chosen_config
from experiments.config import RunConfig, as_json, differences
from experiments.train_draft import PRESETS, TrainDraftConfig
from spec_jax import DecoderConfig


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"processes": 2}, "processes must be given with distributed only, got 2 without it"),
        ({"distributed": True, "coordinator": "localhost"}, "coordinator must be host:port, got 'localhost'"),
        ({"seed": -1}, r"seed must be in \[0, 2\^32\), got -1"),
        ({"seed": 2**32}, r"seed must be in \[0, 2\^32\), got 4294967296"),
        ({"temperature": 1e39}, "temperature must be a finite number >= 0, got 1e.39"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be above 0, got nan"),
        ({"clip_norm": -1.0}, "clip_norm must be above 0"),
        ({"adam_b2": 1.0}, r"adam_b2 must be in \[0, 1\), got 1.0"),
        ({"verification": "blok"}, "verification must be one of 'rejection', 'block', 'coupled', got 'blok'"),
        ({"schedule": "linear"}, "schedule must be 'constant' or 'cosine', got 'linear'"),
        ({"resume": True, "overwrite": True}, "resume and overwrite must not both be given"),
        ({"temperature": -1.0}, "temperature must be"),
        (
            dict.fromkeys(("target", "draft"), DecoderConfig(vocab_size=255)),
            "target.vocab_size must hold all 256 bytes",
        ),
        (
            {"target": DecoderConfig(vocab_size=300)},
            "draft.vocab_size must be the same, got 300 and 256",
        ),
    ],
)
def test_bad_input(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainDraftConfig(**changes)


# Of every configuration, the fields that are at least 1, and of a run's those that are at least 0.
LEAST = [
    (TrainDraftConfig, 1, "steps batch_size accumulation sequence_length log_every validate_every validation_batches"),
    (TrainDraftConfig, 1, "checkpoint_every keep_checkpoints join_timeout expert_parallel"),
    (TrainDraftConfig, 1, "prompt_length generate_length report_repeats"),
    (TrainDraftConfig, 0, "sample_every warmup_steps gamma"),
    (search_layer_skip.SearchConfig, 1, "batches batch_size sequence_length max_gamma scoring_cost"),
    (compare_costs.CostConfig, 1, "gammas prompt_length max_new_tokens repeats"),
    (compare_strategies.CompareConfig, 1, "steps gammas batches repeats generate_length"),
    (compare_experts.CompareConfig, 1, "steps batch_size seeds"),
    (assert_expert_parallel.AssertConfig, 1, "devices data expert num_experts experts_per_token batch length"),
    (check_resume.CheckConfig, 1, "runs kills steps"),
    (launch.LaunchConfig, 1, "processes devices_per_process"),
]


@pytest.mark.parametrize(("kind", "least", "names"), LEAST)
def test_numbers_below_the_least(kind: Any, least: int, names: str):
    required: dict[str, Any] = {"checkpoint": pathlib.Path()} if kind is search_layer_skip.SearchConfig else {}
    for name in names.split():
        value: Any = least - 1
        if isinstance(getattr(kind(**required), name), tuple):
            value = (value,)
        with pytest.raises(ValueError, match=f"^{name} must be at least {least}, got {re.escape(str(value))}"):
            kind(**required, **{name: value})


def test_the_originals_preset():
    _, config = PRESETS["enwik8"]
    assert (config.data, config.steps, config.sequence_length) == ("enwik8", 100_000, 512)
    assert (config.batch_size, config.accumulation, config.learning_rate, config.clip_norm) == (4, 4, 1e-4, 0.5)
    assert (config.target.dim, config.target.depth, config.draft.depth) == (512, 10, 2)
    assert (config.target.vocab_size, config.target.heads, config.target.dim_head) == (256, 8, 64)
    assert (config.gamma, config.prompt_length, config.generate_length) == (5, 128, 512)
    assert (config.sample_every, config.validate_every) == (500, 100)


def test_the_demos_preset():
    _, config = PRESETS["cpu"]
    assert (config.data, config.steps) == ("stdlib", 150)
    assert (config.target.dim, config.target.depth, config.draft.dim, config.draft.depth) == (384, 6, 128, 1)


def rates(config, steps):
    """The size of Adam's step for a gradient that never changes is the learning rate."""
    optimizer = config.optimizer()
    state, sizes = optimizer.init(jnp.zeros(())), []
    for _ in range(steps):
        updates, state = optimizer.update(jnp.float32(0.1), state)
        sizes.append(-float(jnp.asarray(updates)))
    return sizes


def test_learning_rate_schedules():
    constant = rates(RunConfig(learning_rate=0.01), 3)
    np.testing.assert_allclose(constant, 0.01, rtol=1e-3)
    cosine = rates(RunConfig(learning_rate=0.01, schedule="cosine", steps=10, warmup_steps=2), 12)
    np.testing.assert_allclose(cosine[:3], [0, 0.005, 0.01], rtol=1e-3)
    assert cosine[11] < 0.002
    assert all(a > b for a, b in itertools.pairwise(cosine[2:]))


def test_clipping_is_by_global_norm():
    # Adam's first moment after one step is a tenth of what it was given: of (3, 4) clipped from norm 5 to 0.5.
    gradients = {"a": jnp.array(3.0), "b": jnp.array(4.0)}
    optimizer = RunConfig().optimizer()
    _, state = optimizer.update(gradients, optimizer.init(gradients))
    moment = optax.tree_utils.tree_get(state, "mu")
    np.testing.assert_allclose([moment["a"], moment["b"]], [0.03, 0.04], rtol=1e-6)


def test_differences_name_what_matters():
    before = as_json(TrainDraftConfig(output=pathlib.Path("a")))
    assert before["output"] == "a"
    free = as_json(TrainDraftConfig(output=pathlib.Path("b"), wandb="project", steps=5, gamma=2))
    assert differences(before, free) == []
    other = as_json(TrainDraftConfig(target=DecoderConfig(depth=9), seed=4))
    assert differences(before, other) == ["seed: expected 0, got 4", "target.depth: expected 10, got 9"]


def test_of_a_text_its_bytes_matter_and_of_an_origin_whether_there_is_one():
    """Not what the text is called, nor how the path is written, which a resumed run does not read."""
    before = {"text": "a, SHA-256 0f", "upcycle_from": "runs/dense"}
    assert differences(before, {"text": "b, SHA-256 0f", "upcycle_from": "/elsewhere/runs/dense"}) == []
    assert differences(before, before | {"text": "a, SHA-256 1f"}) == [
        "text: expected 'a, SHA-256 0f', got 'a, SHA-256 1f'"
    ]
    assert differences(before, before | {"upcycle_from": None}) == ["upcycle_from: expected 'runs/dense', got None"]


def test_steps_matter_to_a_schedule():
    config = TrainDraftConfig(schedule="cosine", steps=10)
    longer = dataclasses.replace(config, steps=20)
    expected = ["steps: expected 10, got 20 (schedule 'cosine' depends on it)"]
    assert differences(as_json(config), as_json(longer)) == expected


def test_adams_second_moment_decays_as_asked():
    optimizer = RunConfig(adam_b2=0.5).optimizer()
    _, after = optimizer.update(jnp.float32(0.1), optimizer.init(jnp.zeros(())))
    np.testing.assert_allclose(optax.tree_utils.tree_get(after, "nu"), 0.5 * 0.1**2, rtol=1e-5)


def test_the_cosine_ends_at_a_tenth():
    cosine = rates(RunConfig(learning_rate=0.01, schedule="cosine", steps=10, warmup_steps=2), 15)
    np.testing.assert_allclose(cosine[12:], 0.001, rtol=1e-3)


def test_processes_that_cannot_find_each_other():
    """In a process that has not looked for devices yet, as JAX demands."""
    program = (
        "from experiments.config import RunConfig\nfrom experiments.runtime import start_processes\n"
        "for fields in ({}, {'processes': 2}, {'processes': 2, 'process_index': 2}):\n"
        "    where = {'coordinator': 'localhost:1'} if fields else {}\n"
        "    try: start_processes(RunConfig(distributed=True, **where, **fields))\n"
        "    except ValueError as error: print(error)\n"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    done = subprocess.run([sys.executable, "-c", program], env=environment, check=True, capture_output=True, text=True)
    expected = [
        "coordinator, processes and process_index must be given, each process another index below their number, where "
        f"no cluster says them, got {got}"
        for got in ("None, None and None", "localhost:1, 2 and None", "localhost:1, 2 and 2")
    ]
    assert done.stdout.splitlines() == expected


@pytest.mark.parametrize("script", [train_draft, train_early_exit, train_moe, train_prophet])
def test_errors_of_a_command_line_name_the_field_and_where_to_look(script, capsys: pytest.CaptureFixture[str]):
    name = script.__name__.removeprefix("experiments.")
    for arguments, message in (
        (["cpu", "--target.dim-head", "31"], "Error parsing target: dim_head must be even"),
        (["cpu", "--no-such-field", "1"], "Unrecognized options: --no-such-field"),
        (["no-such-preset"], "no-such-preset"),
    ):
        with pytest.raises(SystemExit) as ended:
            script.main(arguments)
        assert ended.value.code == 2
        shown = " ".join(capsys.readouterr().err.replace("│", "").split())
        assert message in shown
        assert f"python -m experiments.{name} {'cpu ' * (len(arguments) > 1)}--help" in shown


def test_a_preset_and_its_fields():
    command_line = ["cpu", "--steps", "7", "--target.depth", "3"]
    _, preset = PRESETS["cpu"]
    expected = dataclasses.replace(preset, steps=7, target=dataclasses.replace(preset.target, depth=3))
    assert chosen_config("train_draft", PRESETS, command_line, None) == expected


@pytest.mark.parametrize("name", ["cpu", "enwik8"])
def test_presets_of_other_strategies_are_those_of_the_draft(name: str):
    """The same text, steps and sizes, so that studies compare the strategies; a prophet is as large as the draft."""
    draft, early_exit, prophet = (module.PRESETS[name][1] for module in (train_draft, train_early_exit, train_prophet))
    assert dataclasses.replace(early_exit.target, early_exit_layer=None) == prophet.target == draft.target
    assert early_exit.target.early_exit_layer == {"cpu": 1, "enwik8": 2}[name]
    assert prophet.prophet == draft.draft
    assert (prophet.num_leading_start_tokens, prophet.prophet_train_length) == (2, {"cpu": 11, "enwik8": 7}[name])
    for field in dataclasses.fields(RunConfig):
        if field.name != "output":
            assert len({getattr(config, field.name) for config in (draft, early_exit, prophet)}) == 1, field.name


def test_a_report_measures_drafts_of_one_to_eight_tokens():
    assert list(decoding_run.GAMMAS) == list(range(1, 9))


@pytest.mark.parametrize(
    "changes",
    [
        {"learning_rate": 1.0},
        {"batch_size": 16},
        {"accumulation": 2},
        {"clip_norm": 9.0},
        {"adam_b2": 0.5},
        {"warmup_steps": 3},
        {"schedule": "cosine"},
        {"sequence_length": 9},
    ],
)
def test_what_training_is_made_of_matters(changes: dict[str, Any]):
    before = TrainDraftConfig()
    assert differences(as_json(before), as_json(dataclasses.replace(before, **changes)))


def test_a_run_goes_on_elsewhere_and_with_other_reports():
    before = TrainDraftConfig()
    where = {"distributed": True, "coordinator": "host:1", "processes": 2, "process_index": 1, "join_timeout": 9}
    mesh = {"expert_parallel": 2, "fsdp": True}
    reports = {"verification": "block", "temperature": 0.5, "prompt_length": 9, "generate_length": 9, "gamma": 2}
    often = {"log_every": 3, "validate_every": 3, "validation_batches": 3, "sample_every": 3, "checkpoint_every": 3}
    changes: dict[str, Any] = where | mesh | reports | often | {"report_repeats": 2, "keep_checkpoints": 2}
    assert differences(as_json(before), as_json(dataclasses.replace(before, **changes))) == []


def test_a_constant_rate_stays_behind_its_warm_up():
    config = RunConfig(learning_rate=0.01, warmup_steps=2)
    np.testing.assert_allclose(rates(config, 5), [0, 0.005, 0.01, 0.01, 0.01], rtol=1e-3)
