import dataclasses
import itertools
import os
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import train_draft, train_early_exit, train_moe, train_prophet
from experiments.command_line import chosen_config
from experiments.config import RunConfig, as_json, differences
from experiments.train_draft import PRESETS, TrainDraftConfig
from spec_jax import DecoderConfig


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"processes": 2}, "processes must be given with distributed only, got 2 without it"),
        ({"distributed": True, "coordinator": "localhost"}, "coordinator must be host:port, got 'localhost'"),
        ({"join_timeout": 0}, "join_timeout must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"accumulation": 0}, "accumulation must be at least 1"),
        ({"sequence_length": 0}, "sequence_length must be at least 1"),
        ({"seed": -1}, r"seed must be in \[0, 2\^32\), got -1"),
        ({"seed": 2**32}, r"seed must be in \[0, 2\^32\), got 4294967296"),
        ({"temperature": 1e39}, "temperature must be a finite number >= 0, got 1e.39"),
        ({"sample_every": -1}, "sample_every must be at least 0"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be above 0, got nan"),
        ({"clip_norm": -1.0}, "clip_norm must be above 0"),
        ({"adam_b2": 1.0}, r"adam_b2 must be in \[0, 1\), got 1.0"),
        ({"schedule": "linear"}, "schedule must be 'constant' or 'cosine', got 'linear'"),
        ({"resume": True, "overwrite": True}, "resume and overwrite must not both be given"),
        ({"prompt_length": 0}, "prompt_length must be at least 1"),
        ({"gamma": -1}, "gamma must be at least 0, got -1"),
        ({"temperature": -1.0}, "temperature must be"),
        (
            {"target": DecoderConfig(vocab_size=300)},
            "draft.vocab_size must be the same, got 300 and 256",
        ),
    ],
)
def test_bad_input(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainDraftConfig(**changes)


def test_the_originals_preset():
    _, config = PRESETS["enwik8"]
    assert (config.data, config.steps, config.sequence_length) == ("enwik8", 100_000, 512)
    assert (config.batch_size, config.accumulation, config.learning_rate, config.clip_norm) == (4, 4, 1e-4, 0.5)
    assert (config.target.dim, config.target.depth, config.draft.depth) == (512, 10, 2)
    assert (config.target.vocab_size, config.target.heads, config.target.dim_head) == (256, 8, 64)
    assert (config.gamma, config.prompt_length, config.generate_length) == (5, 128, 512)
    assert (config.sample_every, config.validate_every) == (500, 100)


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
