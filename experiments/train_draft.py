"""Trains a target and a draft on the same text, then shows what speculative decoding gains.

    python -m experiments.train_draft cpu
    python -m experiments.train_draft enwik8 --output runs/enwik8

Every field can be set: `--steps 100`, `--target.depth 4`; `--help` lists them all.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import tyro
from flax import nnx
from rich.console import Console

import spec_jax
from experiments.config import RunConfig
from experiments.data import Text, batch_at
from experiments.measure import measure_decoding
from experiments.report import print_table, write_report
from experiments.runtime import exit_with
from experiments.samples import print_samples
from experiments.session import Task, run
from experiments.train_state import Models
from spec_jax.losses import next_token_loss

KIND = "train_draft"
GAMMAS = range(1, 9)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainDraftConfig(RunConfig):
    """A target and a draft model.

    Attributes:
      target: the model whose text is wanted.
      draft: the model that drafts for it.
      gamma: tokens drafted a round, in samples.
      verification: the rule, in samples and measurements.
      temperature: of samples and measurements.
      prompt_length: bytes of a prompt.
      generate_length: bytes generated.
      report_repeats: timed repeats of every way to decode, each with a prompt of its own.
    """

    target: spec_jax.DecoderConfig = spec_jax.DecoderConfig(depth=10)  # noqa: RUF009 - immutable
    draft: spec_jax.DecoderConfig = spec_jax.DecoderConfig(depth=2)  # noqa: RUF009 - immutable
    gamma: int = 5
    verification: Literal["rejection", "block", "coupled"] = "rejection"
    temperature: float = 1.0
    prompt_length: int = 128
    generate_length: int = 512
    report_repeats: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target.vocab_size != self.draft.vocab_size or self.target.vocab_size < 256:
            raise ValueError(
                "target.vocab_size and draft.vocab_size must be the same and hold all 256 bytes, "
                f"got {self.target.vocab_size} and {self.draft.vocab_size}"
            )
        for name in ("prompt_length", "generate_length", "report_repeats"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.gamma < 0:
            raise ValueError(f"gamma must be at least 0, got {self.gamma}")
        # Not `sampling.checked()`: it makes arrays, and no array may be made before `jax.distributed` starts.
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be a finite number >= 0, got {self.temperature}")

    @property
    def sampling(self) -> spec_jax.Sampling:
        """Of samples and measurements."""
        return spec_jax.Sampling(temperature=self.temperature)


PRESETS: dict[str, tuple[str, TrainDraftConfig]] = {
    "cpu": (
        "A small pair on the standard library's source: under five minutes on two cores.",
        TrainDraftConfig(
            output=pathlib.Path("runs/cpu"),
            # A target that does not fit a CPU's last cache: decoding is then bound by reading its weights, as it is
            # at any useful size, and scoring a draft costs less than drafting by the target itself.
            target=spec_jax.DecoderConfig(dim=384, depth=6, heads=6),
            draft=spec_jax.DecoderConfig(dim=128, depth=1, heads=2),
            steps=240,
            batch_size=4,
            sequence_length=256,
            learning_rate=2e-3,
            warmup_steps=30,
            schedule="cosine",
            adam_b2=0.99,
            validate_every=80,
            validation_batches=8,
            sample_every=120,
            checkpoint_every=120,
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


def loss_fn(models: Models, tokens_bt: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The sum of both models' losses; neither sees the other's."""
    losses = {
        f"{name}_loss": next_token_loss(model(tokens_bt[:, :-1]).logits, tokens_bt[:, 1:])
        for name, model in models.items()
    }
    return losses["target_loss"] + losses["draft_loss"], losses


def task(config: TrainDraftConfig) -> Task:
    """What `session.run` needs to train this pair."""

    def prompt(split: Any, step: int) -> Any:
        # A row of `batch_at` has one token more than its sequence.
        return batch_at(split, seed=config.seed, step=step, batch_size=1, sequence_length=config.prompt_length - 1)

    def on_sample(models: Models, text: Text, done: int, console: Console) -> None:
        print_samples(
            console,
            models["target"],
            spec_jax.SmallModel(models["draft"], gamma=config.gamma),
            prompt(text.validation, done)[0].tolist(),
            title=f"step {done:,}",
            max_new_tokens=config.generate_length,
            key=jax.random.fold_in(jax.random.key(config.seed), done),
            sampling=config.sampling,
            verification=config.verification,
        )

    def on_report(models: Models, text: Text, console: Console, configuration: dict[str, Any]) -> None:
        with console.status("measuring plain and speculative decoding"):
            measurements = measure_decoding(
                models["target"],
                {f"γ = {gamma}": spec_jax.SmallModel(models["draft"], gamma=gamma) for gamma in GAMMAS},
                [prompt(text.test, repeat) for repeat in range(config.report_repeats)],
                max_new_tokens=config.generate_length,
                sampling=config.sampling,
                verification=config.verification,
                seed=config.seed,
            )
        print_table(
            console,
            measurements,
            title=f"batch 1, temperature {config.temperature:g}, {config.prompt_length}-byte prompts, "
            f"{config.generate_length} bytes generated",
        )
        write_report(config.output, measurements, configuration=configuration)
        console.print(f"figures, numbers and checkpoints are in {config.output}")

    return Task(
        kind=KIND,
        make_models=lambda: make_models(config),
        loss_fn=loss_fn,
        main_loss="target_loss",
        on_sample=on_sample,
        on_report=on_report,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Reads the command line and runs."""
    config = tyro.extras.overridable_config_cli(PRESETS, args=arguments, description=__doc__)
    return run(config, task(config))


if __name__ == "__main__":
    exit_with(main)
