"""Where the numbers of a run go: JSON lines and TensorBoard always, Weights & Biases when asked."""

from __future__ import annotations

import importlib
import json
import pathlib
import secrets
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.summary import scalar

FILE = "metrics.jsonl"
TENSORBOARD = "tensorboard"
# The folder of the package, and the name of the run's record there, so that a resumed run goes on in it.
WANDB, WANDB_ID = "wandb", "wandb_id"


class Metrics:
    """Writes each record to all of the run's logs.

    A resumed run repeats the steps after its checkpoint, so what the logs hold of those is dropped first.
    """

    def __init__(
        self,
        output: pathlib.Path,
        *,
        first_step: int,
        wandb: str | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """Opens the logs.

        Args:
          output: the run's folder.
          first_step: steps done already; later records are dropped.
          wandb: name of a Weights & Biases project, or None.
          config: what Weights & Biases shows of the run.

        Raises:
          ValueError: Weights & Biases is asked for and not installed.
        """
        self._wandb = _start_wandb(wandb, output, config) if wandb is not None else None
        path = output / FILE
        records = [record for record in read_metrics(output) if record["step"] <= first_step]
        kept = path.with_suffix(".tmp")
        kept.write_text("".join(json.dumps(record) + "\n" for record in records))
        kept.replace(path)
        self._lines = path.open("a")
        folder = output / TENSORBOARD
        folder.mkdir(exist_ok=True)
        # Not a `SummaryWriter`: its thread writes some time later, and a kill would lose what is before a checkpoint.
        self._tensorboard = EventsWriter(str(folder / "events"))
        if first_step:
            self._to_tensorboard(first_step + 1, session_log=SessionLog(status=SessionLog.START))

    def __enter__(self) -> Metrics:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lines.close()
        self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=int(error is not None))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One record: the numbers known after `step` steps. In the files when this returns."""
        self._lines.write(json.dumps({"step": step, **values}) + "\n")
        self._lines.flush()
        for name, value in values.items():
            self._to_tensorboard(step, summary=scalar(name, value))
        self._tensorboard.flush()
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)

    def _to_tensorboard(self, step: int, **content: Any) -> None:
        self._tensorboard.write_event(Event(wall_time=time.time(), step=step, **content))


def read_metrics(output: pathlib.Path | str) -> list[dict[str, float]]:
    """The records of a run so far, up to the first line that is none: a kill may cut off the last."""
    path = pathlib.Path(output, FILE)
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break
        if not isinstance(record, dict) or "step" not in record:
            break
        records.append(record)
    return records


def wandb_module() -> Any:
    """The package.

    Raises:
      ValueError: it is not installed.
    """
    try:
        return importlib.import_module("wandb")
    except ImportError:
        raise ValueError("wandb must be installed to log to Weights & Biases: pip install -e '.[wandb]'") from None


def _start_wandb(project: str, output: pathlib.Path, config: Mapping[str, Any] | None) -> Any:
    wandb = wandb_module()
    id_file = output / WANDB_ID
    if not id_file.exists():
        id_file.write_text(secrets.token_hex(8))
    return wandb.init(
        project=project,
        id=id_file.read_text(),
        name="-".join(output.absolute().parts[-2:]),
        dir=str(output),
        config=dict(config or {}),
        resume="allow",
    )
