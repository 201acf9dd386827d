"""One training run from start to end: checks, devices, resuming, training, report. What it trains is an argument."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from rich.console import Console

from experiments.checkpoints import Checkpoints, newest, open_run, run_folder
from experiments.config import RunConfig, as_json, differences
from experiments.data import Text, is_read, load_text
from experiments.metrics import Metrics, wandb_module
from experiments.output import check_no_run, prepare_output, print_with_paths, read_configuration, write_configuration
from experiments.progress import TrainingProgress
from experiments.runtime import start_processes, use_compilation_cache
from experiments.signals import StopRequest
from experiments.train_state import (
    LossFn,
    Models,
    TrainState,
    check_batch,
    connect,
    device_mesh,
    local_copy,
    num_parameters,
    replicated,
)
from experiments.training import Instruments, Job, restored_state, train
from moe_jax import param_shardings

# What continues a run that `finish` has started.
SAME_COMMAND = "the same command"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Origin:
    """Another run, from whose models this one starts.

    Attributes:
      argument: what the user calls it.
      output: its folder.
      models_of: the models that its configuration describes, with fresh weights.
      convert: this run's models from them.
    """

    argument: str
    output: pathlib.Path
    models_of: Callable[[Mapping[str, Any]], Models]
    convert: Callable[[Models], Models]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What a training script brings.

    Attributes:
      kind: its name, kept in checkpoints.
      make_models: makes the models, by name, from nothing but the configuration.
      loss_fn: what is descended, and what is reported of it.
      main_loss: the report whose bits per byte the progress bar shows.
      on_sample: called with (models, text, steps done, console) every `sample_every` steps.
      on_report: called with (models, text, console, configuration) at the end.
      validation_loss_fn: the loss on validation text, of a model that behaves otherwise in evaluation; None is
        `loss_fn`.
      origin: where the weights come from, if `make_models` gives no more than their shapes.
      check_text: raises ValueError where `on_sample` or `on_report` could not use a text.
    """

    kind: str
    make_models: Callable[[], Models]
    loss_fn: LossFn
    main_loss: str
    on_sample: Callable[[Models, Text, int, Console], None]
    on_report: Callable[[Models, Text, Console, dict[str, Any]], None]
    validation_loss_fn: LossFn | None = None
    origin: Origin | None = None
    check_text: Callable[[Text], None] | None = None


def run(config: RunConfig, task: Task, console: Console | None = None, *, go_on: str = "--resume") -> int:
    """Trains, reports, and returns the exit code: 0, or 130 or 143 when a signal ended it early.

    Args:
      config: the run's configuration.
      task: what to train.
      console: where to print; by default standard output.
      go_on: what continues the run after a signal, in words for the user.

    Returns:
      The exit code.

    Raises:
      ValueError: bad input, before anything is computed.
      NonFiniteLossError: the loss was not finite.
    """
    use_compilation_cache()
    start_processes(config)
    mesh = device_mesh(config.expert_parallel)
    if jax.process_count() > 1:
        connect(mesh)
        _wait_for_all("start")
    first_process = jax.process_index() == 0
    console = console or Console(quiet=not first_process)
    text = load_text(config.data)
    text.check(config.sequence_length)
    if task.check_text is not None:
        task.check_text(text)
    if is_read(config.data, config.output):
        raise ValueError(f"output must be outside the folder of data, {config.data}, got {config.output}")
    check_batch(config.batch_size, config.accumulation, mesh)
    if first_process and config.wandb is not None:
        wandb_module()
    configuration = _configuration(config, task, text)
    # Models and origin are refused before an old run is deleted for this one.
    template = state_template(config, task, mesh)
    if task.origin is not None and not config.resume:
        _check_origin(task.origin, config)
    with contextlib.ExitStack() as held:
        _take_folder(config, configuration, held if first_process else None)
        _wait_for_all("output")

        def on_sample(models: Models, done: int) -> None:
            copies = local_copy(models, mesh)
            if first_process:
                task.on_sample(copies, text, done, console)

        job = Job(
            config=config,
            configuration=configuration,
            text=text,
            mesh=mesh,
            loss_fn=task.loss_fn,
            main_loss=task.main_loss,
            on_sample=on_sample,
            validation_loss_fn=task.validation_loss_fn,
            validate_first=task.origin is not None,
        )
        about = f"{task.kind} on {text.description} ({len(text):,} bytes), output in {config.output}"
        print_with_paths(console, about)
        with StopRequest(console) as stop:
            state = _train(job, task, template, console, stop)
        # A signal from here on has its usual effect.
        if stop.agreed() is not None:
            console.print(f"[yellow]Stopped after step {int(state.step):,}; go on with {go_on}.")
            return stop.exit_code
        if config.report:
            copies = local_copy(state.models, mesh)
            if first_process:
                try:
                    task.on_report(copies, text, console, configuration)
                except KeyboardInterrupt:
                    console.print(f"[yellow]Stopped before the end of the report; make it with {go_on}.")
                    raise
        _wait_for_all("report")
        return 0


def _take_folder(config: RunConfig, configuration: dict[str, Any], held: contextlib.ExitStack | None) -> None:
    """Makes the output folder ready, which process 0 holds for all: `held` is None for the others.

    Raises:
      ValueError: it holds something else than this run, or what cannot be read.
    """
    # A run is read by all processes or none: Orbax lets those that open checkpoints wait for each other.
    if held is not None or config.resume:
        prepare_output(config.output, resume=config.resume, overwrite=config.overwrite, held=held)
    if config.resume:
        # Refused before the log is cut and before temporary folders of the old run are swept up.
        with open_run(config.output) as checkpoints:
            step = checkpoints.require_latest()
            checkpoints.check(step, configuration)
        _check_steps(step, config)
    elif held is not None:
        write_configuration(config.output, configuration)


def finish(config: RunConfig, task: Task, console: Console) -> int:
    """`run`, from the last checkpoint on where the output folder holds one, and not at all where that is the end.

    Raises:
      ValueError: the folder holds a run of another configuration or of another text, or of more steps, or what may not
        be of a run.
    """
    step, begun = _progress(config, task)
    if step is None:
        # It begins anew if it ended before its first checkpoint. What else may be there is not to be deleted.
        return run(dataclasses.replace(config, overwrite=begun), task, console, go_on=SAME_COMMAND)
    if step == config.steps:
        print_with_paths(console, f"{task.kind} in {config.output}: trained already")
        return 0
    return run(dataclasses.replace(config, resume=True), task, console, go_on=SAME_COMMAND)


def finish_each(runs: Sequence[tuple[RunConfig, Task]], console: Console) -> Iterator[RunConfig]:
    """`finish` for the runs of a study, one after the other; each is yielded when it is done.

    Raises:
      ValueError: as `finish`, whichever of them it is, before the first is trained.
      SystemExit: a signal ended one.
    """
    for config, task in runs:
        _progress(config, task)
    for config, task in runs:
        if code := finish(config, task, console):
            raise SystemExit(code)
        yield config


def _progress(config: RunConfig, task: Task) -> tuple[int | None, bool]:
    """The steps of the last checkpoint in a run's output folder, None without one; and whether the run has begun there.

    Raises:
      ValueError: as `finish`.
    """
    step, found = newest(config.output) or (None, read_configuration(config.output))
    wanted = _configuration(config, task, load_text(config.data))
    if found is not None and (different := differences(wanted, found)):
        raise ValueError(f"output must hold this run or none, got {config.output} with {'; '.join(different)}")
    if found is None:
        check_no_run(config.output)
    if step is not None:
        _check_steps(step, config)
    return step, found is not None


def _configuration(config: RunConfig, task: Task, text: Text) -> dict[str, Any]:
    """What a run is, as its checkpoints keep it."""
    return {"kind": task.kind, "text": f"{text.name}, SHA-256 {text.fingerprint()}", **as_json(config)}


def _check_steps(trained: int, config: RunConfig) -> None:
    """Raises ValueError where a run has more steps than it is to have: it would pass for a shorter one."""
    if trained > config.steps:
        raise ValueError(f"steps must be at least the {trained} that {config.output} has trained, got {config.steps}")


def state_template(config: RunConfig, task: Task, mesh: Mesh) -> TrainState:
    """Shape, dtype and place on the mesh of every array of the state."""
    shapes = jax.eval_shape(lambda: TrainState.create(task.make_models(), config.optimizer()))
    shardings = param_shardings(shapes, mesh, fsdp=config.fsdp)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes, shardings
    )


def first_state(config: RunConfig, task: Task, template: TrainState, mesh: Mesh) -> TrainState:
    """The state before the first step.

    Raises:
      ValueError: the run that it starts from has no models that fit.
    """
    shardings = jax.tree.map(lambda x: x.sharding, template)
    if task.origin is None:
        return jax.jit(lambda: TrainState.create(task.make_models(), config.optimizer()), out_shardings=shardings)()
    models = _models_of_origin(task.origin, mesh)
    convert = task.origin.convert
    return jax.jit(lambda models: TrainState.create(convert(models), config.optimizer()), out_shardings=shardings)(
        models
    )


def _check_origin(origin: Origin, config: RunConfig) -> None:
    """Raises ValueError where the run that this one starts from is no other, is none, or does not fit."""
    if run_folder(origin.output).resolve() == config.output.resolve():
        raise ValueError(f"{origin.argument} must be another folder than output, got {origin.output} for both")
    with open_run(origin.output, argument=origin.argument) as checkpoints:
        shapes = _shapes_of_origin(origin, checkpoints)
    jax.eval_shape(origin.convert, shapes)


def _shapes_of_origin(origin: Origin, checkpoints: Checkpoints) -> Models:
    configuration = checkpoints.configuration(checkpoints.require_latest())
    return jax.eval_shape(lambda: origin.models_of(configuration))


def _models_of_origin(origin: Origin, mesh: Mesh) -> Models:
    with open_run(origin.output) as checkpoints:
        shapes = _shapes_of_origin(origin, checkpoints)
        template = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh)), shapes)
        return checkpoints.restore(checkpoints.require_latest(), {"models": template})["models"]


def _train(job: Job, task: Task, template: TrainState, console: Console, stop: StopRequest) -> TrainState:
    config, mesh = job.config, job.mesh
    with Checkpoints(config.output, keep=config.keep_checkpoints) as checkpoints:
        if config.resume:
            state = restored_state(checkpoints, checkpoints.require_latest(), template)
        else:
            state = first_state(config, task, template, mesh)
        done = int(state.step)
        sizes = ", ".join(f"{name} {num_parameters(model):,}" for name, model in state.models.items())
        console.print(f"parameters: {sizes}; {mesh.size} device(s); from step {done:,} to {config.steps:,}")
        main_model = job.main_loss.removesuffix("_loss")
        if jax.process_index():
            with TrainingProgress(console, steps=config.steps, done=done, model=main_model) as progress:
                return train(job, state, Instruments(checkpoints, None, progress, stop))
        with (
            Metrics(config.output, first_step=done, wandb=config.wandb, config=job.configuration) as metrics,
            TrainingProgress(console, steps=config.steps, done=done, model=main_model) as progress,
        ):
            return train(job, state, Instruments(checkpoints, metrics, progress, stop))


def _wait_for_all(place: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(place)
