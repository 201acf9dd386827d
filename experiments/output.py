"""The output folder of a run: checked before training, and never silently mixed with another run."""

from __future__ import annotations

import contextlib
import fnmatch
import json
import pathlib
import secrets
import shutil
from collections.abc import Mapping
from functools import partial
from typing import Any

from rich.console import Console

from experiments import checkpoints, metrics
from experiments.locks import locked

REPORT = "report.json"
LOSS_FIGURE, ACCEPTANCE_FIGURE, SPEEDUP_FIGURE = "loss.png", "acceptance.png", "speedup.png"
LAYER_SKIP_FILE = "layer_skip.json"
CONFIGURATION = "configuration.json"
# Everything a run writes, so that `overwrite` removes this and nothing else.
CONTENTS = (
    checkpoints.FOLDER, metrics.TENSORBOARD, metrics.FILE, metrics.WANDB, metrics.WANDB_ID, REPORT, LOSS_FIGURE,
    ACCEPTANCE_FIGURE, SPEEDUP_FIGURE, LAYER_SKIP_FILE, CONFIGURATION,
)  # fmt: skip


def print_with_paths(console: Console, line: str) -> None:
    """Prints a line with the names of files, which may look like markup and are to be copied whole."""
    console.print(line, markup=False, soft_wrap=True)


def make_folder(output: pathlib.Path, *, argument: str = "output") -> None:
    """Makes a folder to write to.

    Args:
      output: the folder.
      argument: what the user calls it.

    Raises:
      ValueError: it cannot be made, or not be written to.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        probe = output / f".write-{secrets.token_hex(4)}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise ValueError(f"{argument} must be a folder that can be written, got {output}: {error}") from error


def make_folder_of(file: pathlib.Path) -> None:
    """Makes the folder of a file to write.

    Raises:
      ValueError: it cannot be made, or not be written to, or the file is a folder.
    """
    make_folder(file.parent)
    # Not before: what is named by way of a new folder, as "new/..", has been none until now.
    if file.is_dir():
        raise ValueError(f"output must be a file, got the folder {file}")


def prepare_output(
    output: pathlib.Path, *, resume: bool, overwrite: bool, held: contextlib.ExitStack | None = None
) -> None:
    """Makes the folder and empties it of an old run where asked to.

    Args:
      output: the folder.
      resume: whether it holds a run that is to go on.
      overwrite: whether the run that it may hold is to be deleted.
      held: keeps other processes from the folder until it is closed; None keeps nobody.

    Raises:
      ValueError: it cannot be written, or Orbax takes its path for a pattern; it holds a run and neither `resume` nor
        `overwrite` is given; there is nothing to resume, or no more than the checkpoints of a run; or another process
        holds it.
    """
    if not all(fnmatch.fnmatchcase(name, name) for name in output.absolute().parts):
        # It looks for its own files by the path as a pattern, finds none, and what it has written cannot be read.
        raise ValueError(f"output must have no [...] in its absolute path, where Orbax writes, got {output.absolute()}")
    if not resume:
        make_folder(output)
    if held is not None and output.is_dir():
        held.enter_context(locked(output, partial(_refuse, output)))
    if resume:
        # Before the folder is made: one that is not there is not left behind.
        _check_run(output)
        make_folder(output)
    else:
        _delete_run(output, overwrite=overwrite)


def _refuse(output: pathlib.Path) -> None:
    raise ValueError(f"output must be a folder that no other process writes to, got {output}, where one trains")


def _check_run(output: pathlib.Path) -> None:
    try:
        with checkpoints.open_run(output, argument="output"):
            pass
    except ValueError as error:
        if read_configuration(output) is None or checkpoints.has_checkpoint(output):
            raise
        raise ValueError(f"{error}: that run ended before its first, begin anew with --overwrite") from None
    if (folder := checkpoints.run_folder(output)) != output:
        raise ValueError(f"output must be the folder of the run, {folder}, got that of its checkpoints, {output}")


def _delete_run(output: pathlib.Path, *, overwrite: bool) -> None:
    if not overwrite:
        try:
            check_no_run(output)
        except ValueError as error:
            going_on = "add --resume to go on with that run, " if checkpoints.has_checkpoint(output) else "add "
            raise ValueError(f"{error}: {going_on}--overwrite to delete it, or choose another --output") from None
    for name in _present(output):
        _delete(output / name)


def check_no_run(output: pathlib.Path) -> None:
    """Raises ValueError where a folder holds what may be of a run, or is none."""
    if output.exists() and not output.is_dir():
        raise ValueError(f"output must be a folder, got the file {output}")
    if present := _present(output):
        raise ValueError(f"output must be a folder without a run, got {output}, which holds {', '.join(present)}")


def _present(output: pathlib.Path) -> list[str]:
    return [name for name in CONTENTS if (output / name).exists()]


def _delete(path: pathlib.Path) -> None:
    """A file, or a folder and what is in it. A link to a folder stays, and the folder is empty then."""
    if not path.is_dir():
        path.unlink()
        return
    folder = path.resolve()
    shutil.rmtree(folder)
    if path.is_symlink():
        folder.mkdir()


def write_configuration(output: pathlib.Path, configuration: Mapping[str, Any]) -> None:
    """Says, before there is a checkpoint, which run has begun in a folder."""
    write_whole(output / CONFIGURATION, json.dumps(configuration, indent=1) + "\n")


def write_whole(file: pathlib.Path, text: str) -> None:
    """Writes a file that a kill leaves as it was or whole."""
    unfinished = file.with_name(f"{file.name}.unfinished")
    unfinished.write_text(text)
    unfinished.replace(file)


def read_configuration(output: pathlib.Path) -> Any:
    """The configuration of the run that has begun in a folder, None where none has."""
    try:
        return json.loads((output / CONFIGURATION).read_text())
    except (OSError, ValueError):
        return None
