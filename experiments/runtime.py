"""How a script starts and ends: processes, compilation cache, errors as one line."""

from __future__ import annotations

import io
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable

import jax
from rich.console import Console
from rich.text import Text

from experiments.config import RunConfig
from experiments.data import cache_folder
from experiments.launch import BAD_INPUT, COORDINATOR, LAUNCHER, NOT_FINITE, PROCESS_INDEX, PROCESSES
from experiments.signals import ended_by_interrupt, interrupt
from experiments.training import NonFiniteLossError

FAILED = 1
INTERRUPTED = 130

# A process not heard of for so long is taken for dead, and JAX ends the others. Many deaths show earlier, as broken
# connections; this finds the others, machines that are gone and processes that are stopped.
HEARTBEAT_TIMEOUT_SECONDS = 30
# How often a process looks whether its launcher is still there.
LAUNCHER_SECONDS = 1


def use_compilation_cache() -> None:
    """Keeps compiled programs between runs, in `JAX_COMPILATION_CACHE_DIR` or below the user's cache folder."""
    if not jax.config.jax_compilation_cache_dir:  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "jax"))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def start_processes(config: RunConfig) -> None:
    """Joins the other processes of the run, where there are any and that has not been done.

    They are named by the configuration, by the environment as `experiments.launch` sets it, or, with `distributed`
    alone, by the cluster: JAX knows SLURM, Kubernetes, Open MPI and TPU pods.
    """
    if jax.distributed.is_initialized():
        return
    coordinator, processes, index = os.environ.get(COORDINATOR), _integer(PROCESSES), _integer(PROCESS_INDEX)
    if config.distributed:
        coordinator = config.coordinator or coordinator
        processes = processes if config.processes is None else config.processes
        index = index if config.process_index is None else config.process_index
    elif processes is None:
        return
    _end_with_launcher()
    # JAX would catch SIGTERM for a service of its own, before `StopRequest` and in scripts without one.
    jax.config.update("jax_enable_preemption_service", False)
    # Said before: when the time is over JAX aborts the process, with a message that does not tell what was waited for.
    where = f" at {coordinator}" if coordinator else ""
    waiting = f"waiting for all processes to join{where}: {config.join_timeout} seconds at most (join_timeout)"
    print(waiting, file=sys.stderr, flush=True)
    try:
        with ended_by_interrupt():
            jax.distributed.initialize(
                coordinator,
                processes,
                index,
                initialization_timeout=config.join_timeout,
                heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_SECONDS,
            )
    except ValueError as error:
        # JAX has other names for them.
        raise ValueError(
            "coordinator, processes and process_index must be given, each process another index below their number, "
            f"where no cluster says them, got {coordinator}, {processes} and {index}"
        ) from error


def _end_with_launcher() -> None:
    """Sends this process SIGTERM when `experiments.launch`, which started it, is gone.

    Killed, that could tell nobody, and the run would go on unseen, in the same folder as the one that is started next.
    """
    launcher = _integer(LAUNCHER)
    # What was started by a program in between has another parent; so has what was still starting when it was killed.
    if launcher is None or (launcher != os.getppid() and _exists(launcher)):
        return

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(LAUNCHER_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def _exists(process: int) -> bool:
    """Whether there is a process of this number, anybody's."""
    try:
        os.kill(process, 0)
    except OSError as error:
        return not isinstance(error, ProcessLookupError)
    return True


def _integer(variable: str) -> int | None:
    """An environment variable's value, None where it is not set.

    Raises:
      ValueError: it is not an integer.
    """
    value = os.environ.get(variable)
    if value is not None and not value.isdecimal():
        raise ValueError(f"{variable} must be an integer, got {value!r}")
    return None if value is None else int(value)


def require_one_process() -> None:
    """Raises ValueError in one of several processes: a study makes many runs, and one process writes what it finds."""
    if (_integer(PROCESSES) or 1) > 1:
        raise ValueError(f"processes must be 1 for a study of several runs, got {os.environ[PROCESSES]}")


def exit_with(main: Callable[[], int]) -> None:
    """Ends the process with what `main` returns, errors that a user can act on shown as one message.

    One of several processes ends at once after an error: if it left in order it would wait for the others, and they
    for it. They lose their connections to it and fail in turn.

    Exit codes: 0 done; 1 any other error; 2 bad input; 3 the loss was not finite; 130 SIGINT and 143 SIGTERM, both
    after a checkpoint was saved (130 without one when Ctrl-C came twice, or outside training).
    """
    # A terminal that has no letter such as "γ" shows a question mark, and what was measured is not lost.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    # Orbax tells every step of its work to absl's log.
    logging.getLogger("absl").setLevel(logging.ERROR)
    # Not before: see `start.end_at_interrupt`.
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, interrupt)
    try:
        sys.exit(main())
    except (Exception, KeyboardInterrupt) as error:
        code = _explained(error)
        # Nor does Ctrl-C wait for threads: one of JAX's lives for a minute if it came while JAX looked for devices.
        if jax.distributed.is_initialized() or isinstance(error, KeyboardInterrupt):
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        sys.exit(code)


def _explained(error: BaseException) -> int:
    """Prints what went wrong and returns the exit code."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if not isinstance(error, ValueError) or os.environ.get("SPEC_JAX_TRACEBACK"):
        traceback.print_exception(error)
        return FAILED
    Console(stderr=True).print(Text(f"error: {error}", style="red"), soft_wrap=True)
    return NOT_FINITE if isinstance(error, NonFiniteLossError) else BAD_INPUT
