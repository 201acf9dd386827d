"""Trains a target and a draft on the same text, then shows what speculative decoding gains.

    python -m experiments.train_draft cpu
    python -m experiments.train_draft enwik8 --output runs/enwik8

Every field can be set: `--steps 100`, `--target.depth 4`; `cpu --help` lists them all.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import nnx

import spec_jax
from experiments.command_line import chosen_config
from experiments.decoding_run import DecodingRunConfig, Strategy, decoding_task
from experiments.distillation import DistillationConfig, own_samples
from experiments.runtime import exit_with
from experiments.session import Task, run
from experiments.train_state import LossFn, Models
from spec_jax.losses import distillation_loss, next_token_loss

KIND = "train_draft"
STRATEGY = Strategy(
    label="small draft",
    drafter=lambda models, gamma: spec_jax.SmallModel(models["draft"], gamma=gamma),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainDraftConfig(DecodingRunConfig):
    """A target and a draft model.

    Attributes:
      draft: the model that drafts for the target.
      distillation: what the draft learns from the target.
    """

    draft: spec_jax.DecoderConfig = spec_jax.DecoderConfig(depth=2)  # noqa: RUF009 - immutable
    distillation: DistillationConfig = DistillationConfig()  # noqa: RUF009 - immutable

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_drafting("draft")
        self.distillation.check(self.sequence_length)


PRESETS: dict[str, tuple[str, TrainDraftConfig]] = {
    "cpu": (
        "A small pair on the standard library's source: two to eight minutes on two cores.",
        TrainDraftConfig(
            output=pathlib.Path("runs/cpu"),
            # A target that does not fit a CPU's last cache: decoding is then bound by reading its weights, as it is
            # at any useful size, and scoring a draft costs less than drafting by the target itself.
            target=spec_jax.DecoderConfig(dim=384, depth=6, heads=6),
            draft=spec_jax.DecoderConfig(dim=128, depth=1, heads=2),
            steps=150,
            batch_size=4,
            sequence_length=256,
            learning_rate=2e-3,
            warmup_steps=30,
            schedule="cosine",
            adam_b2=0.99,
            validate_every=50,
            validation_batches=8,
            sample_every=75,
            checkpoint_every=75,
            prompt_length=64,
            generate_length=192,
        ),
    ),
    "enwik8": (
        "The original's run: depth 10 against depth 2 at width 512, on 90 MB of Wikipedia.",
        TrainDraftConfig(
            data="enwik8",
            output=pathlib.Path("runs/enwik8"),
            steps=100_000,
            batch_size=4,
            accumulation=4,
            sequence_length=512,
            learning_rate=1e-4,
            validate_every=100,
            validation_batches=1,
            sample_every=500,
            checkpoint_every=1000,
        ),
    ),
}


def make_models(config: TrainDraftConfig) -> dict[str, spec_jax.Decoder]:
    """Target and draft with fresh weights."""
    target_seed, draft_seed = jax.random.split(jax.random.key(config.seed))
    return {
        "target": spec_jax.Decoder(config.target, rngs=nnx.Rngs(target_seed)),
        "draft": spec_jax.Decoder(config.draft, rngs=nnx.Rngs(draft_seed)),
    }


def models_of(configuration: Mapping[str, Any]) -> dict[str, spec_jax.Decoder]:
    """The models that a checkpoint's configuration describes, with fresh weights."""
    target, draft = (spec_jax.DecoderConfig(**configuration[name]) for name in ("target", "draft"))
    return make_models(TrainDraftConfig(target=target, draft=draft))


def make_loss_fn(config: TrainDraftConfig) -> LossFn:
    """The sum of both models' losses. The target never sees the draft's; the draft may learn from the target."""
    distillation = config.distillation

    def loss_fn(models: Models, tokens_bt: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        logits = {name: model(tokens_bt[:, :-1]).logits for name, model in models.items()}
        losses = {f"{name}_loss": next_token_loss(logits[name], tokens_bt[:, 1:]) for name in models}
        total = losses["target_loss"] + losses["draft_loss"]
        if distillation.weight:
            if distillation.own_samples:
                samples_bt = own_samples(distillation, models["target"], tokens_bt, config.seed)
                logits = {name: model(samples_bt[:, :-1]).logits for name, model in models.items()}
            losses["distillation"] = distillation_loss(logits["draft"], logits["target"])
            total = total + distillation.weight * losses["distillation"]
        return total, losses

    return loss_fn


def task(config: TrainDraftConfig) -> Task:
    """What `session.run` needs to train this pair."""
    return decoding_task(
        config, STRATEGY, kind=KIND, make_models=lambda: make_models(config), loss_fn=make_loss_fn(config)
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Reads the command line and runs."""
    config = chosen_config("train_draft", PRESETS, arguments, __doc__)
    return run(config, task(config))


if __name__ == "__main__":
    exit_with(main)
