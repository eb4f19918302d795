"""What a run tells while it runs: losses.csv, TensorBoard and lines (or a bar) on the terminal."""

from __future__ import annotations

import csv
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

COLUMNS = ("step", "loss", "grad_norm", "lr", "seconds")


class Records:
    """Writes one row per step to `folder`/losses.csv, scalars to `folder`/tensorboard and progress to stderr.

    On resume the rows after `first_step` are dropped: those steps run again.
    """

    def __init__(self, folder: Path, *, first_step: int, num_steps: int, log_every: int, tensorboard: bool) -> None:
        self._num_steps = num_steps
        self._log_every = log_every
        self._start = time.perf_counter()
        self._first_step = first_step
        self._stack = ExitStack()
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "losses.csv"
        rows = [row for row in read_losses(folder) if int(row["step"]) <= first_step]
        self._file = self._stack.enter_context(self._path.open("w", newline=""))
        self._columns = tuple(rows[0]) if rows else ()
        self._writer = csv.writer(self._file)
        if rows:
            self._writer.writerow(self._columns)
            self._writer.writerows([list(row.values()) for row in rows])
        self._board = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # 1 s to import: only when asked for

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)
            self._stack.callback(self._board.close)
        self._bar = _TerminalBar(num_steps, first_step, self._stack) if sys.stderr.isatty() else None

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Records the finished 1-based `step`; the names in `values` are those of the first step."""
        if not self._columns:
            self._columns = ("step", *values)
            self._writer.writerow(self._columns)
        self._writer.writerow([step, *(repr(values[name]) if name in values else "" for name in self._columns[1:])])
        if step % self._log_every and step != self._num_steps:
            return
        self.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        text = "  ".join(f"{name} {values[name]:.4g}" for name in values if name != "seconds")
        if self._bar is not None:
            self._bar.update(step, text)
            return
        rate = (time.perf_counter() - self._start) / (step - self._first_step)
        self.note(
            f"step {step}/{self._num_steps}  {text}  {rate:.2f} s/step, {_clock(rate * (self._num_steps - step))} left"
        )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Records values that do not come every step, on TensorBoard and the terminal."""
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        self.note(
            f"step {step}/{self._num_steps}  " + "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        )

    def note(self, text: str) -> None:
        if self._bar is not None:
            self._bar.note(text)
        else:
            print(text, file=sys.stderr, flush=True)

    def flush(self) -> None:
        self._file.flush()
        if self._board is not None:
            self._board.flush()

    def __enter__(self) -> Records:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()


def read_losses(folder: str | Path) -> Sequence[dict[str, str]]:
    """The rows of `folder`/losses.csv, as text so that they compare bit for bit; empty when there is none."""
    path = Path(folder) / "losses.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    # A killed process may leave half a last line.
    return [row for row in rows if all(value is not None for value in row.values())]


class _TerminalBar:
    """A progress bar with time left, for people."""

    def __init__(self, num_steps: int, first_step: int, stack: ExitStack) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (MofNCompleteColumn(), BarColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
        from rich.console import Console

        self._progress = stack.enter_context(Progress(*columns, console=Console(stderr=True)))
        self._task = self._progress.add_task("", total=num_steps, completed=first_step)

    def update(self, step: int, text: str) -> None:
        self._progress.update(self._task, completed=step, description=text)

    def note(self, text: str) -> None:
        self._progress.console.print(text, highlight=False, markup=False)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
