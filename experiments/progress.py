"""What a person sees while a run goes on: a bar in a terminal, a line now and then in a log file."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

FIELDS = " · ".join(
    (
        "loss [bold]{task.fields[loss]:.3f}[/]",
        "[bold]{task.fields[bits]:.3f}[/] bits/byte",
        "{task.fields[speed]:,.0f} tokens/s",
    )
)


class TrainingProgress:
    """Loss, bits per byte, tokens per second and time left.

    The loss is the one that is descended, in nats; bits per byte are those of the main model. A log says of which
    model and text they are; the bar, which has no room to, shows those of validation text as soon as there are any.
    """

    def __init__(self, console: Console, *, steps: int, done: int, model: str) -> None:
        self._console = console
        self._model = model
        self._steps = steps
        self._bar = Progress(
            TextColumn("training"), BarColumn(bar_width=20), MofNCompleteColumn(), TextColumn(FIELDS),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
            console=console, disable=not console.is_terminal, transient=False,
        )  # fmt: skip
        self._validated = False
        nan = float("nan")
        self._task = self._bar.add_task("training", total=steps, completed=done, loss=nan, bits=nan, speed=nan)

    def __enter__(self) -> TrainingProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def step(self, done: int) -> None:
        """So many steps have been started."""
        self._bar.update(self._task, completed=done)

    def validated(self, done: int, bits: float) -> None:
        """Bits per byte on validation text after `done` steps."""
        self._validated = True
        self._bar.update(self._task, bits=bits)
        self._log(done, f"{self._model} {bits:.3f} bits/byte (validation text)")

    def record(self, done: int, *, loss: float, bits: float, speed: float | None) -> None:
        """New numbers, known after `done` steps. The bits per byte are of training text; None is a speed not known."""
        self._bar.update(self._task, loss=loss)
        if not self._validated:
            self._bar.update(self._task, bits=bits)
        numbers = f"loss {loss:.3f} · {self._model} {bits:.3f} bits/byte (training text)"
        if speed is not None:
            self._bar.update(self._task, speed=speed)
            numbers += f" · {speed:,.0f} tokens/s"
        self._log(done, numbers)

    def _log(self, done: int, numbers: str) -> None:
        if not self._console.is_terminal:
            self._console.print(f"step {done:,} of {self._steps:,} · {numbers}", highlight=False, soft_wrap=True)
