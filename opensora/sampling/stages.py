"""Seconds and peak memory of the stages of a run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from opensora.device_memory import peak_memory, reset_peak_memory


@dataclass
class StageCost:
    """What one stage took in all: wall-clock seconds, and the highest memory seen during it, in bytes."""

    seconds: float = 0.0
    peak_bytes: int = 0


class StageMeter:
    """Adds up the cost of named stages, in order of first use.

    Memory is the accelerator's allocated memory, or on a CPU the resident memory of the whole process (Linux; elsewhere
    the peak since the process began, which later stages cannot lower).
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.costs: dict[str, StageCost] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Counts the block towards `name`; waits for the device at both ends, so that its work is in the time."""
        cost = self.costs.setdefault(name, StageCost())
        self._synchronize()
        reset_peak_memory(self.device)
        start = time.perf_counter()
        try:
            yield
        finally:
            self._synchronize()
            cost.seconds += time.perf_counter() - start
            cost.peak_bytes = max(cost.peak_bytes, peak_memory(self.device))

    def _synchronize(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize()
