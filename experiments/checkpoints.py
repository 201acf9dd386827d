"""Checkpoints: each appears whole or not at all, and only in a run of its own configuration is it read back."""

from __future__ import annotations

import json
import pathlib
import zlib
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import jax
import orbax.checkpoint as ocp

from experiments.config import differences

FOLDER = "checkpoints"
DESCRIPTION = "description"
DIGESTS = "digests.json"


class Checkpoints:
    """The checkpoints of one run, in `output/checkpoints/STEP`.

    Orbax writes into a temporary folder and renames it when every byte is there; whatever a kill leaves behind
    carries the temporary name, is no checkpoint, and is swept up by the next run. The oldest is deleted only after
    the newest has its name.
    """

    def __init__(self, output: pathlib.Path, *, keep: int = 3, read_only: bool = False) -> None:
        self.folder = output / FOLDER
        self._saving: int | None = None
        self._sound: set[int] = set()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None if read_only else keep,
            # Of a reader too Orbax would say that it sets this to 0.
            save_interval_steps=0 if read_only else 1,
            create=not read_only,
            read_only=read_only,
            cleanup_tmp_directories=not read_only,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._write_digests),
        )
        self._manager = ocp.CheckpointManager(self.folder.absolute(), options=options)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Waits for what is being written, and ends."""
        self._manager.close()

    @property
    def latest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def require_latest(self) -> int:
        """Step of the newest complete checkpoint.

        Raises:
          ValueError: there is none.
        """
        if (step := self.latest) is None:
            raise ValueError(f"output must hold a checkpoint to go on from, got {self.folder} without any")
        return step

    def save(
        self,
        step: int,
        parts: Mapping[str, Any],
        configuration: Mapping[str, Any],
        reports: Sequence[Mapping[str, float]] = (),
    ) -> None:
        """Starts writing a checkpoint; training may go on, and donate the arrays, while it is written.

        Args:
          step: its name.
          parts: pytrees, each of which can be restored without the others.
          configuration: JSON.
          reports: of the steps since the last record of the metrics.
        """
        leaves = {name: named_leaves(tree) for name, tree in parts.items()}
        description = {
            "configuration": dict(configuration),
            "shapes": {name: _shapes(x) for name, x in leaves.items()},
            "reports": [dict(report) for report in reports],
        }
        items: dict[str, Any] = {name: ocp.args.StandardSave(x) for name, x in leaves.items()}
        items[DESCRIPTION] = ocp.args.JsonSave(description)
        self.wait()
        self._saving = step
        self._manager.save(step, args=ocp.args.Composite(**items))

    def wait(self) -> None:
        """Returns when all checkpoints are on disk."""
        self._manager.wait_until_finished()

    def configuration(self, step: int) -> dict[str, Any]:
        """The configuration a checkpoint was written with.

        Raises:
          ValueError: it cannot be read.
        """
        return self._description(step)["configuration"]

    def reports(self, step: int) -> list[dict[str, float]]:
        """Reports that a checkpoint was written with: what a run that goes on from it has yet to record.

        Raises:
          ValueError: they cannot be read.
        """
        return self._description(step).get("reports", [])

    def check(self, step: int, configuration: Mapping[str, Any]) -> None:
        """Raises ValueError, with the fields that differ, unless the checkpoint is of this configuration."""
        if lines := differences(expected=self.configuration(step), got=configuration):
            raise ValueError(
                f"checkpoint {self.folder / str(step)} must be of this run's configuration; these fields differ "
                "(expected is the checkpoint's):\n  " + "\n  ".join(lines)
            )

    def restore(self, step: int, templates: Mapping[str, Any]) -> dict[str, Any]:
        """Parts of a checkpoint, in the structure, shapes, dtypes and shardings of the templates.

        Raises:
          ValueError: the checkpoint is incomplete or damaged, or its arrays are others than the templates'.
        """
        items = {}
        for name, tree in templates.items():
            self._check_shapes(step, name, _shapes(named_leaves(tree)))
            items[name] = ocp.args.StandardRestore(jax.tree.map(ocp.utils.to_shape_dtype_struct, named_leaves(tree)))
        restored = self._read(step, ocp.args.Composite(**items))
        return {
            name: jax.tree.unflatten(jax.tree.structure(tree), [restored[name][key] for key in named_leaves(tree)])
            for name, tree in templates.items()
        }

    def _read(self, step: int, args: ocp.args.Composite) -> Any:
        if step not in (there := sorted(self._manager.all_steps())):
            raise ValueError(f"step must be one of {', '.join(map(str, there))}, got {step}")
        try:
            self._verify_digests(step)
            return self._manager.restore(step, args=args)
        # Orbax and TensorStore raise errors of many types for missing and truncated files.
        except Exception as error:
            others = sorted(set(self._manager.all_steps()) - {step})
            hint = f"; delete that folder to fall back on step {others[-1]}" if others else ""
            raise ValueError(
                f"checkpoint must be complete and readable, got {self.folder / str(step)}: "
                f"{str(error).splitlines()[0] if str(error) else type(error).__name__}{hint}"
            ) from error

    def _description(self, step: int) -> dict[str, Any]:
        return self._read(step, ocp.args.Composite(**{DESCRIPTION: ocp.args.JsonRestore()}))[DESCRIPTION]

    def _check_shapes(self, step: int, part: str, expected: Mapping[str, list[int]]) -> None:
        """Raises ValueError unless the checkpoint's arrays are the expected ones."""
        got = self._description(step)["shapes"].get(part, {})
        if wrong := sorted(name for name in expected.keys() | got.keys() if expected.get(name) != got.get(name)):
            lines = (f"{part}.{name}: expected {expected.get(name)}, got {got.get(name)}" for name in wrong)
            raise ValueError(
                f"checkpoint {self.folder / str(step)} must hold arrays of the models' shapes; these differ:\n  "
                + "\n  ".join(lines)
            )

    def _write_digests(self) -> None:
        """Called by Orbax's thread when the parts are written, before the folder gets its name."""
        if jax.process_index():
            return
        temporary = sorted(self.folder.glob(f"{self._saving}.*tmp*"), key=lambda path: path.stat().st_mtime)
        folder = temporary[-1] if temporary else self.folder / str(self._saving)
        (folder / DIGESTS).write_text(json.dumps(_digests(folder)))

    def _verify_digests(self, step: int) -> None:
        """Raises ValueError where a file is not what was written: Orbax does not notice every changed byte."""
        path = self.folder / str(step) / DIGESTS
        if step in self._sound or not path.exists():
            return
        expected, got = json.loads(path.read_text()), _digests(path.parent)
        if damaged := sorted(name for name in expected if expected[name] != got.get(name)):
            raise ValueError(f"damaged or missing: {', '.join(damaged)}")
        self._sound.add(step)


def _shapes(leaves: Mapping[str, Any]) -> dict[str, list[int]]:
    return {name: list(leaf.shape) for name, leaf in leaves.items()}


def _digests(folder: pathlib.Path) -> dict[str, int]:
    """CRC-32 of every file of a checkpoint's parts; Orbax adds to its own files beside them until the end."""
    files = (path for path in sorted(folder.glob("*/**/*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): zlib.crc32(path.read_bytes()) for path in files}


def run_folder(run: pathlib.Path) -> pathlib.Path:
    """A run's output folder, given it or the folder of checkpoints in it."""
    return run.parent if run.name == FOLDER and not (run / FOLDER).is_dir() else run


def open_run(run: pathlib.Path, *, argument: str = "checkpoint") -> Checkpoints:
    """The checkpoints of a finished or running run, to read.

    Args:
      run: a run's output folder, or the folder of checkpoints in it.
      argument: what the user calls it.

    Raises:
      ValueError: there is none.
    """
    output = run_folder(run)
    if (output / FOLDER).is_dir():
        checkpoints = Checkpoints(output, read_only=True)
        if checkpoints.latest is not None:
            return checkpoints
        checkpoints.close()
    raise ValueError(f"{argument} must be the output folder of a training run with a checkpoint, got {run}")


def has_checkpoint(output: pathlib.Path) -> bool:
    """Whether a run has a complete checkpoint. One of several processes may ask alone, which may not open them."""
    return any(path.name.isdecimal() for path in (output / FOLDER).glob("*"))


def newest(output: pathlib.Path) -> tuple[int, dict[str, Any]] | None:
    """Step and configuration of a run's newest checkpoint, or None where there is none yet."""
    if not (output / FOLDER).is_dir():
        return None
    with Checkpoints(output, read_only=True) as checkpoints:
        step = checkpoints.latest
        return None if step is None else (step, checkpoints.configuration(step))


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree by their path: what is written does not depend on the classes that hold them."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
