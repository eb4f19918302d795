"""Seconds and peak memory of the stages of a run."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch


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


def reset_peak_memory(device: torch.device) -> None:
    """Begin again with the memory in use now; on a CPU where the system can do that, which is Linux."""
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats()
    elif sys.platform == "linux" and os.access("/proc/self/clear_refs", os.W_OK):
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to the present use


def peak_memory(device: torch.device) -> int:
    """Bytes: the accelerator's allocated memory, or the resident memory of the process, at most since the reset."""
    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
