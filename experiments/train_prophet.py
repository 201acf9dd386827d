"""Trains a target together with its prophet, then shows what drafting with the prophet gains.

    python -m experiments.train_prophet cpu
    python -m experiments.train_prophet enwik8 --output runs/prophet

Every field can be set: `--prophet.depth 2`, `--prophet-train-length 10`; `cpu --help` lists them all.
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
from experiments.distillation import DistillationConfig, own_samples
from experiments.runtime import exit_with
from experiments.session import Task, run
from experiments.train_state import LossFn, Models
from spec_jax.losses import prophet_distillation_loss, prophet_losses
from spec_jax.prophet import ProphetModel

KIND = "train_prophet"
STRATEGY = Strategy(
    label="prophet",
    drafter=lambda models, gamma: spec_jax.Prophet(models["prophet"], gamma=gamma),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainProphetConfig(DecodingRunConfig):
    """A target and its prophet.

    Attributes:
      prophet: the small decoder.
      prophet_train_length: tokens of a training window.
      num_leading_start_tokens: hidden states of the target that a window starts with.
      detach_target_hiddens: whether the prophet's gradient stops at the target.
      prophet_loss_weight: of the prophet's loss beside the target's; 0 trains the target alone.
      distillation: what the prophet learns from the target.
    """

    prophet: spec_jax.DecoderConfig = spec_jax.DecoderConfig(depth=2)  # noqa: RUF009 - immutable
    prophet_train_length: int = 7
    num_leading_start_tokens: int = 2
    detach_target_hiddens: bool = False
    prophet_loss_weight: float = 1.0
    distillation: DistillationConfig = DistillationConfig()  # noqa: RUF009 - immutable

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_drafting("prophet")
        at_least(0, self, "prophet_loss_weight")
        at_least(1, self, "num_leading_start_tokens")
        if not self.num_leading_start_tokens < self.prophet_train_length <= self.sequence_length + 1:
            raise ValueError(
                "prophet_train_length must be above num_leading_start_tokens and at most sequence_length + 1, got "
                f"{self.prophet_train_length} with {self.num_leading_start_tokens} and {self.sequence_length}"
            )
        self.distillation.check(self.sequence_length)


def _preset(name: str, *, output: str, prophet_train_length: int) -> TrainProphetConfig:
    """The run of the same name of `train_draft`, with a prophet of the draft's size."""
    draft = train_draft.PRESETS[name][1]
    changed = {
        "prophet": draft.draft,
        "output": pathlib.Path(output),
        "prophet_train_length": prophet_train_length,
        "num_leading_start_tokens": 2,
    }
    return TrainProphetConfig(**shared_fields(draft, TrainProphetConfig) | changed)


PRESETS: dict[str, tuple[str, TrainProphetConfig]] = {
    "cpu": (
        "The target of `train_draft cpu` with a prophet of its draft's size.",
        _preset("cpu", output="runs/prophet_cpu", prophet_train_length=11),
    ),
    "enwik8": (
        "The original's run: depth 2 for depth 10 at width 512, windows of gamma + 2 tokens, two start tokens.",
        _preset("enwik8", output="runs/prophet", prophet_train_length=7),
    ),
}


def make_models(config: TrainProphetConfig) -> dict[str, Any]:
    """Target and prophet with fresh weights, two models to the optimiser: neither's clipping depends on the other."""
    target_seed, prophet_seed = jax.random.split(jax.random.key(config.seed))
    rngs = nnx.Rngs(prophet_seed)
    prophet = ProphetModel(
        spec_jax.Decoder(config.prophet, rngs=rngs),
        target_dim=config.target.dim,
        num_leading_start_tokens=config.num_leading_start_tokens,
        rngs=rngs,
    )
    return {"target": spec_jax.Decoder(config.target, rngs=nnx.Rngs(target_seed)), "prophet": prophet}


def models_of(configuration: Mapping[str, Any]) -> dict[str, Any]:
    """The pair that a checkpoint's configuration describes, with fresh weights."""
    names = ("prophet_train_length", "num_leading_start_tokens", "detach_target_hiddens", "sequence_length")
    target, prophet = (spec_jax.DecoderConfig(**configuration[name]) for name in ("target", "prophet"))
    values = {name: configuration[name] for name in names}
    return make_models(TrainProphetConfig(target=target, prophet=prophet, **values))


def make_loss_fn(config: TrainProphetConfig) -> LossFn:
    """The target's loss and the weighted loss of the prophet over all windows."""
    distillation = config.distillation

    def loss_fn(models: Models, tokens_bt: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        pair = spec_jax.ModelWithProphet(
            models["target"],
            models["prophet"],
            prophet_train_length=config.prophet_train_length,
            detach_target_hiddens=config.detach_target_hiddens,
        )
        output = pair(tokens_bt)
        target_loss, prophet_loss = prophet_losses(pair, output, tokens_bt)
        losses = {"target_loss": target_loss, "prophet_loss": prophet_loss}
        total = target_loss + config.prophet_loss_weight * prophet_loss
        if distillation.weight:
            if distillation.own_samples:
                output = pair(own_samples(distillation, pair.target, tokens_bt, config.seed))
            losses["distillation"] = prophet_distillation_loss(pair, output)
            total = total + distillation.weight * losses["distillation"]
        return total, losses

    return loss_fn


def task(config: TrainProphetConfig) -> Task:
    """What `session.run` needs to train this pair."""
    return decoding_task(
        config, STRATEGY, kind=KIND, make_models=lambda: make_models(config), loss_fn=make_loss_fn(config)
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Reads the command line and runs."""
    config = chosen_config("train_prophet", PRESETS, arguments, __doc__)
    return run(config, task(config))


if __name__ == "__main__":
    exit_with(main)
