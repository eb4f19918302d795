"""Times, ceilings and accuracy of calls on one device."""

from __future__ import annotations

import ctypes
import gc
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from opensora.device_memory import peak_memory, reset_peak_memory
from opensora_kernels.cases import Maker
from tests.ops.accuracy import NUM_ULP, assert_accurate

MIN_RUNS, MAX_RUNS, SECONDS = 10, 200, 0.5
QUICK_RUNS = 5  # at least, where seconds are ordered: p20 and p80 are the second and the fourth
# Written before each call. An H200 has 60 MB of cache, most CPUs up to 64 MB a socket; some servers have more.
FLUSHED_BYTES = {"cuda": 1 << 28, "cpu": 1 << 27}
# Large enough that a longer copy or a larger product is no faster, small enough to end within a second or two.
COPIED_BYTES = {"cuda": 1 << 31, "cpu": 1 << 28}
MATRIX_SIDE = {"cuda": 8192, "cpu": 1024}

# glibc's M_TRIM_THRESHOLD and M_MMAP_THRESHOLD, and where it puts them by itself once large tensors were freed.
_MAPPING, _GROWN = {-1: 1 << 16, -3: 1 << 16}, {-1: 1 << 26, -3: 1 << 25}

T = TypeVar("T")
Calls = Callable[[], Any] | Sequence[Callable[[], Any]]


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


def time_calls(calls: Calls, device: str, *, seconds: float | None = None, last: list[Any] | None = None) -> Timing:
    """Two calls to warm up, then up to 200 in about `seconds`, several calls each in its turn; None: in about SECONDS,
    at least 10. The last is a call of calls[0], whose result is added to `last`."""
    least = MIN_RUNS if seconds is None else QUICK_RUNS
    calls = [calls] if callable(calls) else list(calls)
    calls[0]()
    _synchronize(device)
    start = time.perf_counter()
    calls[-1]()
    _synchronize(device)
    once = time.perf_counter() - start
    num_runs = round((SECONDS if seconds is None else seconds) / max(once, 1e-6))
    num_runs = max(least, min(MAX_RUNS, num_runs))
    flushed = torch.empty(FLUSHED_BYTES[device], dtype=torch.int8, device=device)
    first = (1 - num_runs) % len(calls)
    results: list[Any] = [None]
    taken = _run(device, itertools.islice(itertools.cycle(calls), first, first + num_runs), flushed, results)
    if last is not None:
        last += results
    return _timing(taken)


def time_in_turn(
    calls: Sequence[Callable[[], Any]], device: str, *, seconds: float, least: int = QUICK_RUNS
) -> list[Timing]:
    """Of each call, that has run before: in turn, so that a busy moment or a slower clock falls on all alike; rounds
    that take each call about `seconds`, `least` to 200 of them."""
    flushed = torch.empty(FLUSHED_BYTES[device], dtype=torch.int8, device=device)

    def rounds(number: int) -> list[float]:
        return _run(device, itertools.chain.from_iterable(itertools.repeat(calls, number)), flushed, [None])

    taken = rounds(least)
    more = round(seconds * len(taken) / max(sum(taken), 1e-6)) - least
    taken += rounds(max(0, min(MAX_RUNS - least, more)))
    return [_timing(taken[index :: len(calls)]) for index in range(len(calls))]


def _timing(taken: Sequence[float]) -> Timing:
    taken = sorted(taken)
    at = [taken[round(share * (len(taken) - 1))] for share in (0.5, 0.2, 0.8)]
    return Timing(*at, len(taken))


@dataclass(frozen=True)
class Replay:
    """A call as a CUDA graph; `result` is where each replay writes it."""

    graph: torch.cuda.CUDAGraph
    result: Any

    def __call__(self) -> Any:
        self.graph.replay()
        return self.result


def as_graphs(calls: Sequence[Callable[[], Any]]) -> list[Replay] | None:
    """Each call as a CUDA graph: what launch-bound calls cost without the host's part. None where one can't be
    captured, as when it reads lengths on the host. CUDA only."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # libraries allocate their workspaces at the first call, which no graph may hold
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    replays = []
    for call in calls:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                result = call()
        except RuntimeError:
            torch.cuda.synchronize()
            return None
        replays.append(Replay(graph, result))
    return replays


def peak_bytes(call: Callable[[], Any], device: str, *, is_warm: bool = False) -> int | None:
    """The most memory that a call takes beyond what is there before it: allocated on a GPU, resident on a CPU, where
    that is to be had (Linux; None elsewhere). Both leave out what a library maps once and keeps; is_warm: it ran."""
    if not is_warm:
        call()
    if device != "cuda" and not hasattr(_libc(), "malloc_trim"):
        return None
    _synchronize(device)
    gc.collect()
    if device != "cuda":
        _libc().malloc_trim(0)  # what the allocator keeps for later would hide as much of the call's own
    reset_peak_memory(torch.device(device))
    before = peak_memory(torch.device(device))
    call()
    _synchronize(device)
    return peak_memory(torch.device(device)) - before


@contextmanager
def mapping_every_tensor() -> Iterator[None]:
    """Meanwhile what is resident on a CPU is what is in use, as it is for clips whose tensors are all above 32 MiB.

    glibc gives smaller ones room in a heap, in which freed ones leave holes: for the same decode of tensors of 4 MiB,
    220 to 320 MB. To be entered before a heap has grown, whose holes it would fill first."""
    _set_malloc(_MAPPING)
    try:
        yield
    finally:
        _set_malloc(_GROWN)


def with_a_heap(call: Callable[[], T]) -> T:
    """The result of `call`, run while `mapping_every_tensor` as elsewhere: in a thread, which has a heap of its own,
    so that its holes are not filled by what is measured later. Mapping small tensors takes a third more time."""
    _set_malloc(_GROWN)
    try:
        with ThreadPoolExecutor(1) as apart:
            return apart.submit(call).result()
    finally:
        _set_malloc(_MAPPING)


def _set_malloc(options: Mapping[int, int]) -> None:
    mallopt = getattr(_libc(), "mallopt", lambda option, value: 0)  # nothing to be set elsewhere
    for option, value in options.items():
        mallopt(option, value)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def measure_ceilings(device: str, dtype: torch.dtype) -> Ceilings:
    """A large copy and a large matrix product in `dtype`, at their p20: a ceiling is no place for a busy moment."""
    source = torch.zeros(COPIED_BYTES[device], dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    copying = time_calls(lambda: target.copy_(source), device).p20
    side = MATRIX_SIDE[device]
    draw = Maker(dtype, device)
    left, right = draw.normal(side, side), draw.normal(side, side)
    multiplying = time_calls(lambda: left @ right, device).p20
    return Ceilings(2 * source.numel() / copying, 2 * side**3 / multiplying)


def why_wrong(
    actual: Any,
    plain: Any,
    truth: Any,
    dtype: torch.dtype,
    *,
    is_reference: bool = False,
    is_chain: bool = False,
    leniency: float = 1.0,
) -> str | None:
    """The accuracy rule of the tests, as a sentence or None. `plain` is the reference's result in `dtype`. `is_chain`:
    of a whole model. `leniency`: how many times as much error is allowed."""
    others = [type(leaf).__name__ for leaf in tensors(actual) if type(leaf) is not Tensor]
    if others:
        return f"it returns a {others[0]}, which may put the work off, instead of a Tensor"
    if is_reference:
        return _why_reference_is_wrong(tensors(actual), tensors(truth), dtype)
    try:
        assert_accurate(actual, plain, truth, "result", is_chain=is_chain, leniency=leniency)
    except AssertionError as error:
        return str(error).splitlines()[0]
    except ValueError:
        return "it does not return as many tensors as the reference"
    return None


def _why_reference_is_wrong(actual: list[Tensor], truth: list[Tensor], dtype: torch.dtype) -> str | None:
    """RMS error within NUM_ULP of the truth's scale, its largest value as for kernels: where many values are averaged
    the RMS of their means is far smaller, and rounding errors are not."""
    for index, (have, true) in enumerate(zip(actual, truth, strict=True)):
        if not have.numel() or not have.is_floating_point():
            continue
        eps = max(torch.finfo(have.dtype).eps, torch.finfo(dtype).eps)
        error = (have.double() - true).square().mean().sqrt().item()
        allowed = NUM_ULP * eps * true.abs().max().item()
        if not error <= allowed:  # NaN is not
            return f"result[{index}]: rms error {error:.3g}, allowed {allowed:.3g}"
    return None


def tensors(*trees: Any) -> list[Tensor]:
    """Those in any nesting of lists and dicts, in order."""
    return [leaf for leaf in pytree.tree_leaves(trees) if isinstance(leaf, Tensor)]


def _run(device: str, calls: Iterable[Callable[[], Any]], flushed: Tensor, last: list[Any]) -> list[float]:
    """Seconds of each; the last result is put into `last`."""
    return (_run_on_cuda if device == "cuda" else _run_on_cpu)(calls, flushed, last)


def _run_on_cuda(calls: Iterable[Callable[[], Any]], flushed: Tensor, last: list[Any]) -> list[float]:
    timed = []
    for call in calls:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flushed.zero_()  # also keeps the device busy while the host queues the call
        last[0] = None  # not to be held beside the next
        start.record()
        last[0] = call()
        end.record()
        timed.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in timed]


def _run_on_cpu(calls: Iterable[Callable[[], Any]], flushed: Tensor, last: list[Any]) -> list[float]:
    seconds = []
    for call in calls:
        flushed.zero_()
        last[0] = None
        start = time.perf_counter()
        last[0] = call()
        seconds.append(time.perf_counter() - start)
    return seconds


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
