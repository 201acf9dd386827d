"""Tiny runs of every way to draft."""

import dataclasses
from typing import Any

from experiments import (
    train_draft,
    train_early_exit,
    train_prophet,
)
from experiments.decoding_run import shared_fields
from experiments.distillation import DistillationConfig
from spec_jax import DecoderConfig
from tests.experiments.runs import tiny_config

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
