"""Samples and the report of a run are drawn as its configuration says, from text that it was not trained on."""

import dataclasses
import io
import json
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console

import spec_jax
from experiments import decoding_run, train_draft
from experiments.data import batch_at, load_text
from experiments.measure import measure_decoding
from experiments.samples import ByteText
from spec_jax import DecoderConfig, Sampling, SmallModel
from tests.experiments.runs import tiny_text

TARGET = DecoderConfig(dim=16, depth=1, heads=1, dim_head=16, ff_mult=2)


def config_of(folder: pathlib.Path, **changes: Any) -> train_draft.TrainDraftConfig:
    config = train_draft.TrainDraftConfig(
        output=folder,
        seed=3,
        target=TARGET,
        draft=dataclasses.replace(TARGET, dim=8),
        gamma=2,
        verification="coupled",
        temperature=1.5,
        prompt_length=8,
        generate_length=24,
        report_repeats=2,
    )
    return dataclasses.replace(config, **changes)


def test_samples_continue_validation_text(tmp_path: pathlib.Path):
    """By the coupled rule, so that both samples are what plain decoding gives with their key."""
    config, text = config_of(tmp_path), load_text(tiny_text(tmp_path))
    models, console = train_draft.make_models(config), Console(file=io.StringIO(), width=80)
    train_draft.task(config).on_sample(models, text, 7, console)
    assert isinstance(console.file, io.StringIO)
    printed = console.file.getvalue()
    prompt = batch_at(text.validation, seed=3, step=7, batch_size=1, sequence_length=7)
    key = jax.random.fold_in(jax.random.key(3), 7)
    result = spec_jax.base_decoding(
        models["target"], prompt, max_new_tokens=24, key=key, sampling=Sampling(temperature=1.5)
    )
    shown = ByteText().feed([*prompt[0].tolist(), *result.tokens[0].tolist()], [""] * 32).plain
    assert printed.count(shown) == 2


def test_the_report_measures_on_test_text(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    """With the run's rule, temperature and seed: what is accepted, and in how many rounds, depends on all of them."""
    monkeypatch.setattr(decoding_run, "GAMMAS", (2,))
    config, text = config_of(tmp_path), load_text(tiny_text(tmp_path))
    models = train_draft.make_models(config)
    train_draft.task(config).on_report(models, text, Console(file=io.StringIO(), width=80), {"kind": "tiny"})
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["configuration"] == {"kind": "tiny"}
    prompts = [
        batch_at(text.test, seed=3, step=repeat, batch_size=1, sequence_length=7).astype(np.int32) for repeat in (0, 1)
    ]
    expected = measure_decoding(
        models["target"],
        {"γ = 2": SmallModel(models["draft"], gamma=2)},
        prompts,
        max_new_tokens=24,
        sampling=Sampling(temperature=1.5),
        verification="coupled",
        seed=3,
        costs={"plain": (0.0, 1.0), "γ = 2": (0.5, 1.0)},
    )
    assert [row["name"] for row in report["decoding"]] == ["plain", "γ = 2"]
    for row, one in zip(report["decoding"], expected, strict=True):
        assert row["acceptance_by_position"] == one.acceptance_by_position
        assert row["tokens_per_round"] == one.tokens_per_round
    assert 0 < expected[1].acceptance_by_position[0] < 1
