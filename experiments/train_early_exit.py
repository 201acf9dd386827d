"""Trains a target with an early exit, then shows what drafting with its own first layers gains.

    python -m experiments.train_early_exit cpu
    python -m experiments.train_early_exit enwik8 --output runs/early_exit

Every field can be set: `--target.early-exit-layer 2`, `--early-exit-loss-weight 0.5`; `cpu --help` lists them all.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import nnx

import spec_jax
from experiments import train_draft
from experiments.checks import at_least
from experiments.command_line import chosen_config
from experiments.decoding_run import DecodingRunConfig, Strategy, decoding_task, shared_fields
from experiments.distillation import DistillationConfig, key_of, own_samples
from experiments.runtime import exit_with
from experiments.session import Task, run
from experiments.train_state import LossFn, Models
from spec_jax.losses import distillation_loss, early_exit_logits, next_token_loss

KIND = "train_early_exit"
STRATEGY = Strategy(
    label="early exit",
    drafter=lambda models, gamma: spec_jax.EarlyExit(gamma=gamma),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainEarlyExitConfig(DecodingRunConfig):
    """A target whose first layers draft for it.

    Attributes:
      early_exit_loss_weight: of the exit's loss beside the head's.
      distillation: what the exit learns from the head.
    """

    target: spec_jax.DecoderConfig = spec_jax.DecoderConfig(depth=10, early_exit_layer=2)  # noqa: RUF009 - immutable
    early_exit_loss_weight: float = 1.0
    distillation: DistillationConfig = DistillationConfig()  # noqa: RUF009 - immutable

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target.early_exit_layer is None:
            raise ValueError("target.early_exit_layer must be a layer, got None")
        at_least(0, self, "early_exit_loss_weight")
        self.distillation.check(self.sequence_length)


def _preset(name: str, *, layer: int, output: str) -> TrainEarlyExitConfig:
    """The run of the same name of `train_draft`, with an exit after this layer and no draft."""
    draft = train_draft.PRESETS[name][1]
    target = dataclasses.replace(draft.target, early_exit_layer=layer)
    changed = {"target": target, "output": pathlib.Path(output)}
    return TrainEarlyExitConfig(**shared_fields(draft, TrainEarlyExitConfig) | changed)


PRESETS: dict[str, tuple[str, TrainEarlyExitConfig]] = {
    "cpu": (
        "The target of `train_draft cpu` with an exit after its first layer.",
        _preset("cpu", layer=1, output="runs/early_exit_cpu"),
    ),
    "enwik8": (
        "The original's run: an exit after layer 2 of 10 at width 512, weight 1.",
        _preset("enwik8", layer=2, output="runs/early_exit"),
    ),
}


def make_models(config: TrainEarlyExitConfig) -> dict[str, spec_jax.Decoder]:
    """The target with fresh weights."""
    return {"target": spec_jax.Decoder(config.target, rngs=nnx.Rngs(jax.random.key(config.seed)))}


def models_of(configuration: Mapping[str, Any]) -> dict[str, spec_jax.Decoder]:
    """The model that a checkpoint's configuration describes, with fresh weights."""
    return make_models(TrainEarlyExitConfig(target=spec_jax.DecoderConfig(**configuration["target"])))


def make_loss_fn(config: TrainEarlyExitConfig) -> LossFn:
    """The head's loss and the weighted loss of the exit."""
    distillation = config.distillation

    def loss_fn(models: Models, tokens_bt: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        def both_logits(read_bt: jax.Array) -> tuple[jax.Array, jax.Array]:
            return early_exit_logits(models["target"], read_bt, key=key_of(read_bt, config.seed))

        logits, exit_logits = both_logits(tokens_bt[:, :-1])
        losses = {
            "target_loss": next_token_loss(logits, tokens_bt[:, 1:]),
            "early_exit_loss": next_token_loss(exit_logits, tokens_bt[:, 1:]),
        }
        total = losses["target_loss"] + config.early_exit_loss_weight * losses["early_exit_loss"]
        if distillation.weight:
            if distillation.own_samples:
                samples_bt = own_samples(distillation, models["target"], tokens_bt, config.seed)
                logits, exit_logits = both_logits(samples_bt[:, :-1])
            losses["distillation"] = distillation_loss(exit_logits, logits)
            total = total + distillation.weight * losses["distillation"]
        return total, losses

    return loss_fn


def task(config: TrainEarlyExitConfig) -> Task:
    """What `session.run` needs to train this model."""
    return decoding_task(
        config, STRATEGY, kind=KIND, make_models=lambda: make_models(config), loss_fn=make_loss_fn(config)
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Reads the command line and runs."""
    config = chosen_config("train_early_exit", PRESETS, arguments, __doc__)
    return run(config, task(config))


if __name__ == "__main__":
    exit_with(main)
