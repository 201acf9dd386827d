"""The training loop: what it trains is an argument.

Axis letters: A microbatches, B sequences of a microbatch, T tokens.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from experiments.checkpoints import Checkpoints
from experiments.config import RunConfig
from experiments.data import Text, batch_at, validation_batches
from experiments.metrics import Metrics
from experiments.progress import TrainingProgress
from experiments.signals import StopRequest
from experiments.train_state import LossFn, Models, TrainState, make_train_step, shard_rows
from spec_jax.losses import bits_per_byte

# Losses are looked at this many steps late, so that the device never waits for the host.
LAG = 3
# Steps after which processes ask each other for signals, if not before: it costs them a wait.
MOST_STEPS_UNASKED = 10


class NonFiniteLossError(ValueError):
    """The loss became NaN or infinite; the message says at which step, and what is left."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One run.

    Attributes:
      config: its configuration.
      configuration: the same and what else identifies the run, as JSON; written with every checkpoint.
      text: what it reads.
      mesh: all devices, along `data` and `expert`. Layers with experts find it as the mesh of `jax.set_mesh`.
      loss_fn: what it descends.
      main_loss: the report whose bits per byte the progress bar shows.
      on_sample: called with the models every `sample_every` steps.
      validation_loss_fn: what is reported of validation text, where that is not `loss_fn`.
      validate_first: whether validation text is measured before the first step, too.
    """

    config: RunConfig
    configuration: Mapping[str, Any]
    text: Text
    mesh: Mesh
    loss_fn: LossFn
    main_loss: str
    on_sample: Callable[[Models, int], None]
    validation_loss_fn: LossFn | None = None
    validate_first: bool = False


@dataclasses.dataclass(frozen=True)
class Instruments:
    """What a run writes to and listens to. Metrics are None in all processes but the first."""

    checkpoints: Checkpoints
    metrics: Metrics | None
    progress: TrainingProgress
    stop: StopRequest


def train(job: Job, state: TrainState, instruments: Instruments) -> TrainState:
    """Trains from `state.step` to `config.steps`, or until asked to stop, and leaves a checkpoint of the end.

    The batch of step i is a function of (seed, i), and all else that matters is in the state, so a run that goes on
    from a checkpoint computes what one without a break would have.

    Args:
      job: what to do.
      state: where to start, before the first step or at a checkpoint; its buffers are reused.
      instruments: what to write to.

    Returns:
      The state at the end.

    Raises:
      NonFiniteLossError: the loss, or that of a state about to be saved, was NaN or infinite.
    """
    return _Loop(job, instruments, jax.tree.map(lambda x: x.sharding, state)).run(state)


class _Loop:
    def __init__(self, job: Job, instruments: Instruments, shardings: TrainState) -> None:
        self.job, self.config, self.to = job, job.config, instruments
        self.step_fn = self.on_mesh(make_train_step(job.loss_fn, job.config.optimizer(), shardings))
        self.evaluate_fn = self.on_mesh(jax.jit(job.validation_loss_fn or job.loss_fn))
        self.pending: collections.deque[tuple[int, dict[str, jax.Array]]] = collections.deque()
        self.window: list[dict[str, float]] = []
        self.clock = _Clock()
        self.first = self.timed_steps = 0
        self.saved: int | None = None

    def run(self, state: TrainState) -> TrainState:
        config = self.config
        self.first = done = int(state.step)
        if done:
            self.saved, self.window = done, self.to.checkpoints.reports(done)
        elif self.job.validate_first:
            self.validate(state, done)
        for step in range(done, config.steps):
            state, report = self.step_fn(state, self.batch(step))
            self.pending.append((step, report))
            done = step + 1
            self.look(keep=LAG)
            self.to.progress.step(done)
            if done == self.first + 1:
                # It compiled, so throughput is of the steps after it.
                self.look(keep=0)
                self.clock.lap()
            if done % config.validate_every == 0 or done == config.steps:
                self.validate(state, done)
            if done % config.checkpoint_every == 0:
                self.save(state, done)
            if config.sample_every and done % config.sample_every == 0:
                self.sample(state, done)
            if self.asked_to_stop(done):
                break
        self.look(keep=0)
        if self.saved != done:
            self.save(state, done)
        with self.clock.paused():
            self.to.checkpoints.wait()
        return state

    def on_mesh(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with the mesh set while it is traced."""

        def called(*arguments: Any) -> Any:
            with jax.set_mesh(self.job.mesh):
                return function(*arguments)

        return called

    def batch(self, step: int) -> jax.Array:
        """(A, B, T + 1) tokens of a step, shared by the devices."""
        config = self.config
        # Drawn as one batch of A·B rows, so that no two microbatches are the same.
        rows = batch_at(
            self.job.text.train,
            seed=config.seed,
            step=step,
            batch_size=config.accumulation * config.batch_size,
            sequence_length=config.sequence_length,
        )
        return shard_rows(rows.reshape(config.accumulation, -1, rows.shape[1]), self.job.mesh, axis=1)

    def look(self, *, keep: int) -> None:
        """Reads the reports of all but the last `keep` steps."""
        while len(self.pending) > keep:
            step, report = self.pending.popleft()
            values = {name: float(value) for name, value in jax.device_get(report).items()}
            self.require_finite(values["loss"], f"the loss of step {step + 1}")
            self.window.append(values)
            self.timed_steps += step > self.first
            done = step + 1
            if done % self.config.log_every == 0 or done == self.config.steps:
                self.log(done)

    def log(self, done: int) -> None:
        means = {name: float(np.mean([values[name] for values in self.window])) for name in self.window[0]}
        speed = self.timed_steps * self.config.tokens_per_step / self.clock.lap() if self.timed_steps else None
        self.timed_steps = 0
        self.window.clear()
        bits = bits_per_byte(means[self.job.main_loss])
        self.to.progress.record(done, loss=means["loss"], bits=bits, speed=speed)
        if self.to.metrics is not None:
            train = {f"train/{name}": value for name, value in means.items()}
            self.to.metrics.write(done, train if speed is None else {**train, "tokens_per_second": speed})

    def validate(self, state: TrainState, done: int) -> None:
        self.look(keep=0)
        with self.clock.paused():
            reports = [self.evaluate_fn(state.models, tokens)[1] for tokens in self.validation_batches()]
            means = {name: float(np.mean([report[name] for report in reports])) for name in reports[0]}
        for name, value in means.items():
            if name.endswith("loss"):
                self.require_finite(value, f"the {name.replace('_', ' ')} on validation text after step {done}")
        self.to.progress.validated(done, bits_per_byte(means[self.job.main_loss]))
        if self.to.metrics is not None:
            losses = {f"validation/{name}": value for name, value in means.items()}
            bits = {
                f"validation/{name.removesuffix('loss')}bits_per_byte": bits_per_byte(value)
                for name, value in means.items()
                if name.endswith("loss")
            }
            self.to.metrics.write(done, losses | bits)

    def validation_batches(self, most: int | None = None) -> Iterator[jax.Array]:
        batches = validation_batches(
            self.job.text.validation,
            batch_size=self.config.batch_size,
            sequence_length=self.config.sequence_length,
            max_batches=most or self.config.validation_batches,
        )
        return (shard_rows(tokens_bt, self.job.mesh, axis=0) for tokens_bt in batches)

    def save(self, state: TrainState, done: int) -> None:
        """Writes a checkpoint, unless the state it would hold is broken.

        Every loss so far may be finite and the last update still have ruined the weights: their own loss decides.
        """
        self.look(keep=0)
        with self.clock.paused():
            tokens_bt = next(iter(self.validation_batches(1)))
            loss = float(self.evaluate_fn(state.models, tokens_bt)[0])
            self.require_finite(loss, f"the validation loss after step {done}")
            self.to.checkpoints.save(done, state_parts(state), self.job.configuration, self.window)
        self.saved = done

    def sample(self, state: TrainState, done: int) -> None:
        self.look(keep=0)
        with self.clock.paused():
            self.job.on_sample(state.models, done)

    def require_finite(self, loss: float, what: str) -> None:
        if math.isfinite(loss):
            return
        self.to.checkpoints.wait()
        kept = "there is no checkpoint yet" if self.saved is None else f"the checkpoint of step {self.saved} is good"
        raise NonFiniteLossError(
            f"{what} is {loss}, training stopped; {kept} ({self.config.output}); start again with a lower learning "
            "rate: a resumed run goes on with the same one"
        )

    def asked_to_stop(self, done: int) -> bool:
        """Whether to stop now. All processes must agree, and asking the others costs a wait."""
        if jax.process_count() > 1 and done % min(self.config.log_every, MOST_STEPS_UNASKED):
            return False
        return self.to.stop.agreed() is not None


def state_parts(state: TrainState) -> dict[str, Any]:
    """The parts of a checkpoint: the models can be read back without the rest."""
    return {"models": state.models, "optimizer": {"step": state.step, "states": state.optimizer_states}}


def restored_state(checkpoints: Checkpoints, step: int, template: TrainState) -> TrainState:
    """The state of a checkpoint, on the devices of the template.

    Raises:
      ValueError: the checkpoint is damaged or of other sizes.
    """
    parts = checkpoints.restore(step, state_parts(template))
    optimizer = parts["optimizer"]
    return TrainState(optimizer["step"], parts["models"], optimizer["states"])


class _Clock:
    """Seconds spent on training steps, pauses left out."""

    def __init__(self) -> None:
        self._mark = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap."""
        now = time.perf_counter()
        seconds, self._mark = now - self._mark, now
        return seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What runs inside does not count."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._mark += time.perf_counter() - began
