"""What a run tells while it runs: losses.csv, log.txt, TensorBoard, Weights & Biases, and lines or a bar for people.

`write_run_record` says how the run was started.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from opensora.device_memory import peak_memory
from opensora.training.boards import Board, TensorBoard, WandB
from opensora.training.losses import LossTable, read_losses
from opensora.training.resuming import plain
from opensora.training.run_record import write_run_record
from opensora.training.throughput import COUNTED, Throughput, show_rates

__all__ = ["Records", "read_losses", "write_run_record"]

_MEMORY = "peak_memory_gib"


class Records:
    """Writes one row per step to `folder`/losses.csv, lines to log.txt and stderr, scalars to the boards.

    Values that a step may have beside its losses are `seconds`, of which `data_seconds` waited for data, and, of all
    ranks together, `num_samples`, `num_tokens` and `flops` of the model. Shown with them, as means since the line
    before: samples and tokens per second, model FLOP utilisation (of `ceiling_flops`, asked once for what all devices
    do at best, see `opensora.training.ceiling`), the share of the time that waited for data, and the peak memory of
    `device` so far.

    On resume the rows after `first_step` are dropped: those steps run again. Only the main rank writes and prints; on
    the others nothing happens. What the package warns of meanwhile, such as skipped files, becomes a note. A Weights &
    Biases that was asked for and is not installed is said in a note.
    """

    def __init__(
        self,
        folder: Path,
        *,
        first_step: int,
        num_steps: int,
        log_every: int,
        tensorboard: bool,
        wandb_project: str = "",
        config: Any = None,
        is_main: bool = True,
        device: torch.device | str = "cpu",
        ceiling_flops: Callable[[], float] | None = None,
    ) -> None:
        self._num_steps, self._log_every, self._first_step = num_steps, log_every, first_step
        self._device = torch.device(device)
        self._start = time.perf_counter()
        self._throughput = Throughput(ceiling_flops)
        self._stack = ExitStack()
        self._boards: list[Board] = []
        self._is_main = is_main
        if not is_main:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._losses = LossTable(folder, first_step=first_step)
        self._stack.callback(self._losses.close)
        self._log = self._stack.enter_context((folder / "log.txt").open("a"))
        self._bar = _TerminalBar(num_steps, first_step, self._stack) if sys.stderr.isatty() else None
        warnings, package = _Warnings(self.note), logging.getLogger("opensora")
        package.addHandler(warnings)
        self._stack.callback(package.removeHandler, warnings)
        if tensorboard:
            self._add_board(TensorBoard(folder, first_step=first_step))
        if wandb_project:
            try:
                self._add_board(WandB(folder, project=wandb_project, config=plain(config)))
            except ImportError as error:
                self.note(f"Weights & Biases: nothing is sent to {wandb_project!r}: {error}; pip install wandb")

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Records the finished 1-based `step`; every name gets a column of losses.csv."""
        if not self._is_main:
            return
        self._losses.add(step, values)
        self._throughput.add(values)
        if step % self._log_every and step != self._num_steps:
            return
        self.flush()
        rates = self._throughput.rates()
        memory = peak_memory(self._device) / 2**30
        self._draw(step, {**values, **rates, _MEMORY: memory})
        losses = "  ".join(f"{name} {value:.4g}" for name, value in values.items() if name not in COUNTED)
        speed = ", ".join(filter(None, (show_rates(rates), f"peak {memory:.3g} GiB")))
        per_step = (time.perf_counter() - self._start) / max(1, step - self._first_step)
        left = f"{_seconds(per_step)} s/step, {_clock(per_step * (self._num_steps - step))} left"
        line = f"step {step}/{self._num_steps}  {losses}  {left}, {speed}"
        if self._bar is None:
            self.note(line)
        else:
            self._bar.update(step, f"{losses}  {speed}")
            self._write_log(line)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Records values that do not come every step, on the boards, the terminal and in log.txt."""
        if not self._is_main:
            return
        self._draw(step, values)
        self.note(
            f"step {step}/{self._num_steps}  " + "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        )

    def note(self, text: str) -> None:
        """Shows a line, and keeps it in log.txt with the time."""
        if not self._is_main:
            return
        if self._bar is not None:
            self._bar.note(text)
        else:
            print(text, file=sys.stderr, flush=True)
        self._write_log(text)

    def flush(self) -> None:
        if not self._is_main:
            return
        self._losses.flush()
        for board in self._boards:
            board.flush()

    def __enter__(self) -> Records:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and self._is_main:
            self._write_log(f"ended by {type(error).__name__}: {error}")
        self._stack.close()

    def _add_board(self, board: Board) -> None:
        self._boards.append(board)
        self._stack.callback(board.close)

    def _draw(self, step: int, values: Mapping[str, float]) -> None:
        for board in self._boards:
            board.add(step, values)

    def _write_log(self, text: str) -> None:
        self._log.write(f"{datetime.now(timezone.utc).isoformat(timespec='seconds')}  {text}\n")
        self._log.flush()  # for who follows it


class _Warnings(logging.Handler):
    """Hands on what is logged."""

    def __init__(self, note: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._note = note

    def emit(self, record: logging.LogRecord) -> None:
        self._note(self.format(record))


class _TerminalBar:
    """A progress bar with time left, for people."""

    def __init__(self, num_steps: int, first_step: int, stack: ExitStack) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (MofNCompleteColumn(), BarColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
        self._progress = stack.enter_context(Progress(*columns, console=Console(stderr=True)))
        self._task = self._progress.add_task("", total=num_steps, completed=first_step)

    def update(self, step: int, text: str) -> None:
        self._progress.update(self._task, completed=step, description=text)

    def note(self, text: str) -> None:
        self._progress.console.print(text, highlight=False, markup=False)


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f}" if seconds >= 0.1 else f"{seconds:.2g}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
