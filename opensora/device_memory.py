"""The highest memory in use: the accelerator's allocated memory or, on a CPU, the resident memory of the process."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch


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
