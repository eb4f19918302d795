"""What a device computes at best, measured here: the ceiling that a model's use of it is compared with."""

from __future__ import annotations

import time
from functools import cache

import torch

# Large enough that a larger product is no faster, small enough that a CPU finishes one in some ten milliseconds.
_SIDE = {"cpu": 1024}
_SIDE_OF_ACCELERATORS = 8192
_LEAST_RUNS = 2


def ceiling_flops(dtype: torch.dtype, device: torch.device | str, *, seconds: float = 0.3) -> float:
    """Floating-point operations per second of the fastest of many square matrix products, in about `seconds`.

    dtype: that of the training. Measured once for each device and dtype of a process; with the threads that PyTorch has
    then. Errors: those of torch.matmul for a dtype that the device does not multiply.
    """
    return _measured(dtype, torch.device(device), seconds)


@cache
def _measured(dtype: torch.dtype, device: torch.device, seconds: float) -> float:
    side = _SIDE.get(device.type, _SIDE_OF_ACCELERATORS)
    # The random numbers of a training stay as they are: no generator but one of its own is asked.
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(side, side, generator=generator).to(device, dtype) for _ in range(2))
    out = a @ b  # libraries load and choose their kernels at the first call
    fastest, num_runs, start = float("inf"), 0, time.perf_counter()
    while num_runs < _LEAST_RUNS or time.perf_counter() - start < seconds:
        _synchronize(device)
        begin = time.perf_counter()
        torch.matmul(a, b, out=out)
        _synchronize(device)
        fastest = min(fastest, time.perf_counter() - begin)
        num_runs += 1
    return 2 * side**3 / fastest


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
