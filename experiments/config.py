"""What every training run is told: text, output folder, length, optimiser, and how often to do what."""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import optax

from experiments.checks import at_least, check_seed

# A run may be resumed with other values of these: they change what is kept or shown, or who computes it, not what is
# learnt. `data` is a place; that a file of the same name and bytes is there is checked by their digest.
MAY_CHANGE = frozenset(
    (
        *("data", "output", "resume", "overwrite", "wandb", "distributed", "coordinator", "processes", "process_index"),
        *("join_timeout", "expert_parallel", "fsdp"),
        *("log_every", "validate_every", "validation_batches", "sample_every", "checkpoint_every", "keep_checkpoints"),
        *("report", "report_repeats", "gamma", "verification", "temperature", "prompt_length", "generate_length"),
    )
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Fields that all training scripts share.

    Attributes:
      data: 'stdlib', 'enwik8', or the path of a file, .gz, .zip or folder.
      output: folder for checkpoints, metrics and figures.
      resume: go on from the newest checkpoint in the output folder, bit for bit as if never stopped.
      overwrite: throw away the run that the output folder holds.
      seed: of the weights and the batches.
      steps: optimiser steps in total.
      batch_size: sequences of a microbatch, over all devices of all processes.
      accumulation: microbatches of a step, whose gradients are averaged.
      sequence_length: tokens predicted a sequence.
      learning_rate: Adam's, at its highest.
      warmup_steps: steps over which the learning rate rises from 0.
      schedule: what the learning rate does then: stay, or fall along half a cosine, to reach a tenth of its
        height as many steps after the warm-up as there are in total.
      adam_b2: decay of Adam's second moment.
      clip_norm: largest global norm of a model's gradient.
      log_every: steps between records of the training loss, which is the mean over them. The last step has one, too.
      validate_every: steps between measurements on validation text; the last step is followed by one too.
      validation_batches: batches of such a measurement, where the text has so many.
      sample_every: steps between samples; 0 for none.
      checkpoint_every: steps between checkpoints.
      keep_checkpoints: how many of the last ones stay.
      report: measure decoding and draw the figures when training is done.
      wandb: send the metrics to this Weights & Biases project as well.
      distributed: start `jax.distributed`; where the cluster does not say it, give the three fields below.
      coordinator: host:port of process 0.
      processes: number of processes.
      process_index: which of them this one is.
      join_timeout: seconds that a process waits for the others when it starts.
      expert_parallel: devices that experts are spread over; the others repeat them for other rows of the batch. Each
        device has rows of its own if the batch divides among all, else these devices have the same rows.
      fsdp: whether weights and optimiser states are spread over the devices of the batch as well.
    """

    data: str = "stdlib"
    output: pathlib.Path = pathlib.Path("runs/latest")
    resume: bool = False
    overwrite: bool = False
    seed: int = 0
    steps: int = 1000
    batch_size: int = 4
    accumulation: int = 1
    sequence_length: int = 256
    learning_rate: float = 1e-4
    warmup_steps: int = 0
    schedule: Literal["constant", "cosine"] = "constant"
    adam_b2: float = 0.999
    clip_norm: float = 0.5
    log_every: int = 10
    validate_every: int = 100
    validation_batches: int = 8
    sample_every: int = 500
    checkpoint_every: int = 500
    keep_checkpoints: int = 3
    report: bool = True
    wandb: str | None = None
    distributed: bool = False
    coordinator: str | None = None
    processes: int | None = None
    process_index: int | None = None
    join_timeout: int = 120
    expert_parallel: int = 1
    fsdp: bool = False

    def __post_init__(self) -> None:
        at_least(
            1, self, "steps", "batch_size", "accumulation", "sequence_length", "log_every", "validate_every",
            "validation_batches", "checkpoint_every", "keep_checkpoints", "join_timeout", "expert_parallel",
        )  # fmt: skip
        at_least(0, self, "sample_every", "warmup_steps")
        check_seed(self.seed)
        for name in ("learning_rate", "clip_norm"):
            if not (value := getattr(self, name)) > 0:
                raise ValueError(f"{name} must be above 0, got {value}")
        if not 0 <= self.adam_b2 < 1:
            raise ValueError(f"adam_b2 must be in [0, 1), got {self.adam_b2}")
        if self.schedule not in ("constant", "cosine"):
            raise ValueError(f"schedule must be 'constant' or 'cosine', got {self.schedule!r}")
        for name in ("coordinator", "processes", "process_index"):
            if not self.distributed and (value := getattr(self, name)) is not None:
                raise ValueError(f"{name} must be given with distributed only, got {value!r} without it")
        if self.coordinator is not None and not re.fullmatch(r".+:\d+", self.coordinator):
            raise ValueError(f"coordinator must be host:port, got {self.coordinator!r}")
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite must not both be given: one keeps the run, the other deletes it")

    @property
    def tokens_per_step(self) -> int:
        """Tokens predicted in one optimiser step, over all processes."""
        return self.accumulation * self.batch_size * self.sequence_length

    def optimizer(self) -> optax.GradientTransformation:
        """Clipping by global norm, then Adam."""
        rate = self.learning_rate
        after = rate if self.schedule == "constant" else optax.cosine_decay_schedule(rate, self.steps, alpha=0.1)
        schedule: optax.ScalarOrSchedule = after
        if self.warmup_steps:
            following = after if callable(after) else optax.constant_schedule(after)
            schedule = optax.join_schedules(
                (optax.linear_schedule(0.0, rate, self.warmup_steps), following), (self.warmup_steps,)
            )
        return optax.chain(optax.clip_by_global_norm(self.clip_norm), optax.adam(schedule, b2=self.adam_b2))


def as_json(config: Any) -> dict[str, Any]:
    """A dataclass, nested ones included, as what `json.dumps` takes."""
    return dataclasses.asdict(
        config, dict_factory=lambda items: {k: str(v) if isinstance(v, pathlib.Path) else v for k, v in items}
    )


def differences(expected: Mapping[str, Any], got: Mapping[str, Any]) -> list[str]:
    """Which fields of two configurations differ, one line each, those that may change left out.

    `steps` may change while no schedule depends on it.
    """
    free = MAY_CHANGE | ({"steps"} if "cosine" not in (expected.get("schedule"), got.get("schedule")) else set())
    before, after = dict(_flat(expected)), dict(_flat(got))
    reasons = {"steps": " (schedule 'cosine' depends on it)"}
    return [
        f"{name}: expected {before.get(name, 'nothing')!r}, got {after.get(name, 'nothing')!r}{reasons.get(name, '')}"
        for name in sorted(before.keys() | after.keys())
        if name.split(".")[0] not in free and _compared(name, before.get(name)) != _compared(name, after.get(name))
    ]


def _compared(name: str, value: Any) -> Any:
    """What of a field is compared: of a text, however called, its bytes, and of an origin whether there is one."""
    if name == "text" and isinstance(value, str):
        return value.rpartition(" SHA-256 ")[2]
    return value is not None if name == "upcycle_from" else value


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
