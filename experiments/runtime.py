"""How a script starts and ends: processes, compilation cache, errors as one line."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable

import jax
from rich.console import Console
from rich.text import Text

from experiments.config import RunConfig
from experiments.data import cache_folder
from experiments.training import NonFiniteLossError

BAD_INPUT = 2
NOT_FINITE = 3
INTERRUPTED = 130


def use_compilation_cache() -> None:
    """Keeps compiled programs between runs, in `JAX_COMPILATION_CACHE_DIR` or below the user's cache folder."""
    if not jax.config.jax_compilation_cache_dir:  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "jax"))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def start_processes(config: RunConfig) -> None:
    """Joins the other processes of the run, where there are any."""
    if config.distributed:
        jax.distributed.initialize(config.coordinator, config.processes, config.process_index)


def exit_with(main: Callable[[], int]) -> None:
    """Ends the process with what `main` returns, errors that a user can act on shown as one message.

    Exit codes: 0 done; 2 bad input; 3 the loss was not finite; 130 SIGINT and 143 SIGTERM, both after a checkpoint
    was saved (130 without one when Ctrl-C came twice, or outside training).
    """
    # Orbax tells every step of its work to absl's log.
    logging.getLogger("absl").setLevel(logging.ERROR)
    console = Console(stderr=True)
    try:
        code = main()
    except NonFiniteLossError as error:
        console.print(Text(f"error: {error}", style="red"))
        code = NOT_FINITE
    except ValueError as error:
        console.print(Text(f"error: {error}", style="red"), soft_wrap=True)
        if os.environ.get("SPEC_JAX_TRACEBACK"):
            raise
        code = BAD_INPUT
    except KeyboardInterrupt:
        code = INTERRUPTED
    sys.exit(code)
