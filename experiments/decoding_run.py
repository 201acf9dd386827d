"""What the runs that train a target and something that drafts for it have in common: prompts, samples, the report."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import numpy as np
from rich.console import Console

import spec_jax
from experiments.checks import at_least
from experiments.config import RunConfig
from experiments.data import Text, batch_at
from experiments.measure import measure_decoding
from experiments.output import print_with_paths
from experiments.report import print_table, write_report
from experiments.samples import print_samples
from experiments.session import Origin, Task
from experiments.train_state import LossFn, Models
from spec_jax.checks import checked_rule

GAMMAS = range(1, 9)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodingRunConfig(RunConfig):
    """A target and how text is drawn from it in samples and measurements.

    Attributes:
      target: the model whose text is wanted.
      gamma: tokens drafted a round, in samples.
      verification: the rule that accepts drafted tokens, in samples and measurements.
      temperature: of samples and measurements.
      prompt_length: bytes of a prompt.
      generate_length: bytes generated.
      report_repeats: timed repeats of every way to decode, each with a prompt of its own.
    """

    target: spec_jax.DecoderConfig = spec_jax.DecoderConfig(depth=10)  # noqa: RUF009 - immutable
    gamma: int = 5
    verification: Literal["rejection", "block", "coupled"] = "rejection"
    temperature: float = 1.0
    prompt_length: int = 128
    generate_length: int = 512
    report_repeats: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target.vocab_size < 256:
            raise ValueError(f"target.vocab_size must hold all 256 bytes, got {self.target.vocab_size}")
        at_least(1, self, "prompt_length", "generate_length", "report_repeats")
        at_least(0, self, "gamma")
        self.sampling.check()
        checked_rule(self.verification)

    def check_drafting(self, name: str) -> None:
        """Checks the field `name`, a decoder that drafts for the target.

        Raises:
          ValueError: the two have different numbers of tokens, or one an early exit, which would not be trained.
        """
        drafting = getattr(self, name)
        ours, theirs = self.target.vocab_size, drafting.vocab_size
        if ours != theirs:
            raise ValueError(f"target.vocab_size and {name}.vocab_size must be the same, got {ours} and {theirs}")
        for model, layer in (("target", self.target.early_exit_layer), (name, drafting.early_exit_layer)):
            if layer is not None:
                raise ValueError(
                    f"{model}.early_exit_layer must be None, got {layer}: only train_early_exit trains exits"
                )

    @property
    def sampling(self) -> spec_jax.Sampling:
        """Of samples and measurements."""
        return spec_jax.Sampling(temperature=self.temperature)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Strategy:
    """How a kind of run decodes with its models. The one named "target" is the target.

    Attributes:
      label: its name in figures.
      drafter: (models, gamma) → what drafts for it.
    """

    label: str
    drafter: Callable[[Models, int], spec_jax.Drafter]


def shared_fields(config: DecodingRunConfig, other: type[DecodingRunConfig]) -> dict[str, Any]:
    """The values of the fields that another kind of run has too: its preset is the same run with another drafter."""
    ours = {field.name for field in dataclasses.fields(other)}
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config) if field.name in ours}


def prompt(split: np.ndarray, config: DecodingRunConfig, step: int) -> np.ndarray:
    """(1, prompt_length) bytes, another piece for each step."""
    # A row of `batch_at` has one token more than its sequence, and a sequence at least one.
    length = max(config.prompt_length - 1, 1)
    rows = batch_at(split, seed=config.seed, step=step, batch_size=1, sequence_length=length)
    return rows[:, : config.prompt_length]


def decoding_task(
    config: DecodingRunConfig,
    strategy: Strategy,
    *,
    kind: str,
    make_models: Callable[[], Models],
    loss_fn: LossFn,
    validation_loss_fn: LossFn | None = None,
    origin: Origin | None = None,
) -> Task:
    """What `session.run` needs: coloured samples on the way, and the measured speed-up for gamma 1 to 8 at the end.

    Args:
      config: the run's.
      strategy: how to decode.
      kind: the run's name, kept in checkpoints.
      make_models: makes the models, by name.
      loss_fn: reports `target_loss` among others.
      validation_loss_fn: the same on validation text, where that is another function.
      origin: where the weights come from, if not from `make_models`.
    """

    def check_text(text: Text) -> None:
        for name, split, used in (
            ("validation", text.validation, config.sample_every > 0),
            ("test", text.test, config.report),
        ):
            if used and len(split) < max(config.prompt_length, 2):
                most = f"the {len(split)} bytes of {name} text"
                raise ValueError(f"prompt_length must be at most {most}, got {config.prompt_length}")

    def on_sample(models: Models, text: Text, done: int, console: Console) -> None:
        print_samples(
            console,
            models["target"],
            strategy.drafter(models, config.gamma),
            prompt(text.validation, config, done)[0].tolist(),
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
                {f"γ = {gamma}": strategy.drafter(models, gamma) for gamma in GAMMAS},
                [prompt(text.test, config, repeat) for repeat in range(config.report_repeats)],
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
        write_report(config.output, measurements, label=strategy.label, configuration=configuration)
        print_with_paths(console, f"figures, numbers and checkpoints are in {config.output}")

    return Task(
        kind=kind,
        make_models=make_models,
        loss_fn=loss_fn,
        main_loss="target_loss",
        on_sample=on_sample,
        on_report=on_report,
        validation_loss_fn=validation_loss_fn,
        origin=origin,
        check_text=check_text,
    )
