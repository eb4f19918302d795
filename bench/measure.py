"""Times, ceilings and accuracy of calls on one device."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from opensora_kernels.cases import Case, Maker, bytes_moved
from tests.ops.accuracy import assert_accurate, assert_near_truth

MIN_RUNS, MAX_RUNS, SECONDS = 10, 200, 0.5
# Beyond the last cache of the device: an H200 has 60 MB, CPUs seldom more than 64 MB a socket.
FLUSHED_BYTES = {"cuda": 1 << 28, "cpu": 1 << 27}
# Large enough that a longer copy or a larger product is no faster, small enough to end within a second or two.
COPIED_BYTES = {"cuda": 1 << 31, "cpu": 1 << 28}
MATRIX_SIDE = {"cuda": 8192, "cpu": 1024}


@dataclass(frozen=True)
class Timing:
    """Seconds of one call, over many calls, each on a cold cache."""

    median: float
    p20: float
    p80: float
    num_runs: int


@dataclass(frozen=True)
class Ceilings:
    """What this device does at best, measured here: bytes per second, read and written, and operations per second."""

    bandwidth: float
    rate: float


def time_calls(function: Callable[[], Any], device: str) -> Timing:
    """Two calls to warm up, then 10 to 200 in about half a second."""
    function()
    _synchronize(device)
    start = time.perf_counter()
    function()
    _synchronize(device)
    once = time.perf_counter() - start
    num_runs = max(MIN_RUNS, min(MAX_RUNS, round(SECONDS / max(once, 1e-6))))
    flushed = torch.empty(FLUSHED_BYTES[device], dtype=torch.int8, device=device)
    run = _run_on_cuda if device == "cuda" else _run_on_cpu
    seconds = sorted(run(function, flushed, num_runs))
    at = [seconds[round(share * (num_runs - 1))] for share in (0.5, 0.2, 0.8)]
    return Timing(*at, num_runs)


def measure_ceilings(device: str, dtype: torch.dtype) -> Ceilings:
    """A large copy and a large matrix product in `dtype`."""
    source = torch.zeros(COPIED_BYTES[device], dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    copying = time_calls(lambda: target.copy_(source), device).median
    side = MATRIX_SIDE[device]
    draw = Maker(dtype, device)
    left, right = draw.normal(side, side), draw.normal(side, side)
    multiplying = time_calls(lambda: left @ right, device).median
    return Ceilings(2 * source.numel() / copying, 2 * side**3 / multiplying)


def floor_seconds(case: Case, arguments: Mapping[str, Any], outputs: Any, ceilings: Ceilings) -> float:
    """No implementation can be faster: every input read once, every output written once, every operation done."""
    traffic = bytes_moved(arguments, outputs) / ceilings.bandwidth
    return max(traffic, case.flops(arguments) / ceilings.rate)


def why_wrong(actual: Any, plain: Any, truth: Any, dtype: torch.dtype, is_reference: bool) -> str | None:
    """The accuracy rule of the tests, as a sentence or None. `plain` is the reference's result in `dtype`."""
    actual, plain, truth = (pytree.tree_map(_to_cpu, tree) for tree in (actual, plain, truth))
    try:
        if is_reference:
            assert_near_truth(actual, truth, dtype, "result")
        else:
            assert_accurate(actual, plain, truth, "result")
    except AssertionError as error:
        return str(error).splitlines()[0]
    return None


def _run_on_cuda(function: Callable[[], Any], flushed: Tensor, num_runs: int) -> list[float]:
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(num_runs)]
    for start, end in events:
        flushed.zero_()  # also keeps the device busy while the host queues the call
        start.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in events]


def _run_on_cpu(function: Callable[[], Any], flushed: Tensor, num_runs: int) -> list[float]:
    seconds = []
    for _ in range(num_runs):
        flushed.zero_()
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return seconds


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _to_cpu(leaf: Any) -> Any:
    return leaf.cpu() if isinstance(leaf, Tensor) else leaf
