"""Training, resuming and generation of the other strategies, on tiny models."""

import dataclasses
import io
import types
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console

import spec_jax
from experiments import (
    decoding_run,
    train_draft,
)
from experiments.generate import GenerateConfig, generate, load_run
from experiments.metrics import read_metrics
from experiments.samples import ByteText
from tests.experiments.runs import train
from tests.experiments.strategies import MODULES, OWN, draft_config


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


def test_samples_are_drafted_as_long_as_asked_for(tmp_path, monkeypatch: pytest.MonkeyPatch):
    drafted = []
    monkeypatch.setattr(
        decoding_run, "print_samples", lambda _, __, drafter, *___, **____: drafted.append(drafter.gamma)
    )
    text: Any = types.SimpleNamespace(validation=np.zeros(99, np.uint8))
    task = train_draft.task(draft_config(tmp_path, gamma=3, prompt_length=4))
    task.on_sample({"target": None, "draft": None}, text, 1, Console(quiet=True))
    assert drafted == [3]
