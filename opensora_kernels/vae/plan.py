"""Choosing how to run a model on a clip inside a memory budget."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache, cached_property
from numbers import Integral
from typing import Any

import torch

from opensora_kernels.backends import use
from opensora_kernels.checks import check_callable

from .autoencoders import as_function
from .clip import record
from .graph import Node, nodes_of
from .inference import on_paper, own_random_numbers
from .loops import REMARK, Loop, Outlook, loop_of
from .memory import Ledger, Prediction, RunOnPaper
from .recording import foreseen_for, recorded_for
from .spill import Spill, SpillOnPaper
from .strategies import Model, OwnSteps, Strategy, Streaming, Whole
from .streams import pull_chunks
from .tiled_strategy import Tiled, tilings_for

_UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "KB": 10**3, "MB": 10**6, "GB": 10**9}
# Frames of the clip at a time that are tried, from the fastest on; below one, part of what a frame becomes.
_CHUNKS = (64, 32, 16, 8, 6, 4, 3, 2, 1, Fraction(1, 2), Fraction(1, 4), Fraction(1, 8))
# The graph of a model that steps through frames by itself is as long as the clip: a prediction takes seconds for 20
# steps of a real one, so that few are made. Its layers see the frames of one step at most.
_CHUNKS_BY_LAYER = (4, 1, Fraction(1, 4))
_MOST_STEPS_RECORDED = 24
# Allocators round sizes up; code that libraries compile for a shape and keep, and pages of theirs that were not touched
# before, were measured to take 0 to 8 MiB on the CPU, 17 in a process that had not run a clip before.
_ROUNDING = Fraction(102, 100)
_LIBRARIES = 12 * 2**20
# A file is written and read at a tenth of the speed of memory, a host's memory at a quarter.
_COST_OF_SPILL = {"device": 0, "host": 8, "file": 20}


@dataclass(frozen=True)
class TilePlan:
    """How a clip of `shape` is run. `str(plan)` explains it.

    peak_bytes: most memory in use beyond clip and weights. relative_time: in units of the time that a run over the
    whole clip is expected to take. spill_bytes: written to the spill altogether. remarks: where frames wait for each
    other. passed_over: the plans that do not fit or take longer, with their peaks. dtype: of the clip.
    """

    strategy: Strategy
    shape: tuple[int, ...] = ()
    budget: int | None = None
    peak_bytes: int | None = None
    relative_time: float | None = None
    spill_bytes: int = 0
    remarks: tuple[str, ...] = ()
    passed_over: tuple[tuple[Strategy, int], ...] = ()
    dtype: torch.dtype | None = None

    def was_made_for(self, x: torch.Tensor) -> bool:
        """Whether `plan_tiles` looked at clips like x."""
        return self.peak_bytes is not None and (self.shape, self.dtype) == (tuple(x.shape), x.dtype)

    def __str__(self) -> str:
        lines = [f"{self.strategy}{'' if self.strategy.is_exact else ' (not exact)'}"]
        if self.peak_bytes is not None:
            budget = "" if self.budget is None else f" of {show_bytes(self.budget)}"
            lines.append(f"  memory: {show_bytes(self.peak_bytes)}{budget}, beyond the clip and the weights")
        if self.relative_time is not None:
            lines.append(f"  time: {self.relative_time:.2f} of a run over all frames at once")
        if self.spill_bytes:
            lines.append(f"  spill: {show_bytes(self.spill_bytes)} written altogether")
        least = {
            _kind(strategy): (strategy, peak) for strategy, peak in sorted(self.passed_over, key=lambda each: -each[1])
        }
        lines += [f"  passed over: {strategy}: {show_bytes(peak)} at least" for strategy, peak in least.values()]
        lines += [f"  {count} x {remark}" for remark, count in Counter(self.remarks).items()]
        return "\n".join(lines)


def plan_tiles(
    decoder: Model,
    shape: Sequence[int],
    budget: int | str,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    *,
    strategies: Sequence[Strategy] | None = None,
) -> TilePlan:
    """The most exact plan for a clip of `shape` that fits `budget`, the fastest among equals; nothing is computed.

    decoder: as `decode` or `encode` takes it; an autoencoder of diffusers is planned to decode, its `vae.encode` to
    encode.
    shape: (B, C, T, H, W) of what the decoder (or encoder) takes. budget: bytes on `device`, or text like "10GiB",
    beyond the clip and the weights, for the chunk that is handed out too, but not for what the caller keeps.
    strategies: those to choose from; None: whole, streaming with chunks of many sizes and each spill, and where none of
    them fits tiles, which are not exact; for a model that steps through frames by itself its own steps, which take no
    longer than a run over the whole clip, then streaming layer by layer if there are 24 steps or fewer, and tiles. One
    that has a method predict(decoder, shape, dtype, device) -> Prediction can stand beside them.
    decoder's weights may be on the meta device. Generators of random numbers stay as they are.
    Numbers: the prediction counts what the operators' plain PyTorch allocates, and the workspaces of the CPU's library.
    On a CPU glibc may keep freed blocks below a threshold that grows, and the process lie above the budget: not with
    MALLOC_MMAP_THRESHOLD_=65536 and MALLOC_TRIM_THRESHOLD_=65536 in its environment.
    Errors: ValueError for a shape that the decoder does not take, and for a budget below every plan's peak, with the
    smallest that would do; TypeError for a decoder that cannot be called or recorded, sizes that are no whole numbers,
    and a dtype that is no floating-point torch.dtype.
    Source: none; the law is that a prediction is at least the peak that a fresh process measures, and close to it.
    """
    check_callable("plan_tiles", "decoder", decoder)
    device, num_bytes, shape = torch.device(device), parse_bytes(budget), _checked(shape)
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"plan_tiles: dtype must be a floating-point torch.dtype, got {dtype!r}")
    if strategies is not None and not strategies:
        raise ValueError("plan_tiles: strategies must hold at least one, got none")
    with own_random_numbers(device), on_paper(device):
        return _plan(_Subject(as_function(decoder), shape, dtype, device), num_bytes, strategies)


def _checked(shape: Any) -> tuple[int, ...]:
    sizes = tuple(shape) if isinstance(shape, Sequence) else (shape,)
    if not all(isinstance(size, Integral) for size in sizes):
        raise TypeError(f"plan_tiles: shape must be (B, C, T, H, W) in whole numbers, got {shape!r}")
    if len(sizes) != 5 or min(sizes) < 1:
        raise ValueError(f"plan_tiles: shape must be (B, C, T, H, W) of no empty axis, got {sizes}")
    return sizes


def _plan(subject: _Subject, num_bytes: int, strategies: Sequence[Strategy] | None) -> TilePlan:
    reference = subject.reference()
    tried: list[tuple[Strategy, Prediction]] = []

    @cache
    def predicted(strategy: Strategy) -> Prediction | None:
        """None for tiles that nobody asked for and of which the model does not take every shape."""
        try:
            found = subject.predict(strategy)
        except (ValueError, RuntimeError, IndexError):
            if not isinstance(strategy, Tiled):
                raise
            return None
        tried.append((strategy, found))
        return found

    def fits(strategy: Strategy) -> bool:
        found = predicted(strategy)
        return found is not None and found.peak_bytes <= num_bytes

    if strategies is not None:
        tried += [(strategy, subject.predict(strategy)) for strategy in strategies]
    else:
        for series in _candidates(subject):
            while series and predicted(series[-1]) is None:
                series.pop()
            if series and fits(series[-1]):
                _try_larger(series, fits)
                break
    fitting = [pair for pair in tried if pair[1].peak_bytes <= num_bytes]
    if not fitting:
        least, needs = min(tried, key=lambda pair: pair[1].peak_bytes)
        raise ValueError(
            f"plan_tiles: budget must be at least {needs.peak_bytes} bytes ({show_bytes(needs.peak_bytes)}) for a clip "
            f"of {subject.shape}, which is what '{least}' takes, got {num_bytes} ({show_bytes(num_bytes)})"
        )
    chosen, found = min(fitting, key=lambda pair: (not pair[0].is_exact, pair[1].cost, pair[1].peak_bytes))
    others = tuple((strategy, other.peak_bytes) for strategy, other in tried if strategy is not chosen)
    return TilePlan(
        chosen,
        subject.shape,
        num_bytes,
        found.peak_bytes,
        found.cost / reference.cost,
        found.spill_bytes,
        subject.remarks(chosen),
        others,
        subject.dtype,
    )


@dataclass(frozen=True)
class _Subject:
    """A model and a clip, with what is recorded or predicted of them once and asked for often."""

    model: Model
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @cached_property
    def loop(self) -> Loop | None:
        return loop_of(self.model, self.shape[2])

    @cached_property
    def recorded(self) -> Node:
        return recorded_for("plan_tiles", "shape", self.model, self.shape, self.dtype, self.device)

    @cached_property
    def whole(self) -> Prediction:
        return _predict_whole(self.model, self.shape, self.dtype, self.device)

    @cached_property
    def steps(self) -> Prediction:
        """Those of the loop."""
        with _backends_of(self.device):
            found: Outlook = foreseen_for("plan_tiles", "shape", self.loop, self.shape, self.dtype, self.device)
        return Prediction(_with_margin(found.peak_bytes), 0, found.cost)

    def reference(self) -> Prediction:
        """What times are relative to: a loop's steps cost what a run over all frames costs."""
        if self.loop is not None:
            return self.steps
        _ = self.recorded  # first, for its errors
        return self.whole

    def predict(self, strategy: Any) -> Prediction:
        if isinstance(strategy, Whole):
            return self.whole
        if isinstance(strategy, Streaming):
            if strategy.loop_in(self.model, self.shape[2]) is not None:
                return self.steps
            return _predict_streaming(strategy, self.recorded, self.shape, self.dtype, self.device)
        found = strategy.predict(self.model, self.shape, self.dtype, self.device)
        return replace(found, peak_bytes=_with_margin(found.peak_bytes)) if isinstance(strategy, Tiled) else found

    def remarks(self, strategy: Strategy) -> tuple[str, ...]:
        if isinstance(strategy, (Whole, OwnSteps)):
            return ()
        if self.loop is not None and not getattr(strategy, "by_layer", False):
            return (REMARK,)
        return tuple(node.remark for node in nodes_of(self.recorded) if node.remark)

    def can_be_recorded(self) -> bool:
        """Whether a loop's model can, over all frames."""
        if len(self.loop.spans(self.shape[2])) > _MOST_STEPS_RECORDED:
            return False
        try:
            _ = self.recorded
        except (TypeError, ValueError):
            return False
        return True


def parse_bytes(text: int | str) -> int:
    """1500 or "1.5 GiB" in bytes."""
    if isinstance(text, int) and not isinstance(text, bool):
        number = text
    else:
        digits, unit = re.fullmatch(r"\s*([\d.]*)\s*(.*?)\s*", str(text)).groups()
        try:
            number = int(float(digits) * _UNITS[unit or "B"])
        except (ValueError, KeyError):
            raise ValueError(
                f"memory budget must be bytes or text like '10GiB', in {', '.join(_UNITS)}, got {text!r}"
            ) from None
    if number <= 0:
        raise ValueError(f"memory budget must be above 0, got {text!r}")
    return number


def show_bytes(number: int) -> str:
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.4g} {unit}"
        number /= 1024
    return f"{number:.4g} GiB"


def _kind(strategy: Strategy) -> tuple[str, ...]:
    return type(strategy).__name__, getattr(strategy, "spill", ""), str(getattr(strategy, "by_layer", ""))


def _candidates(subject: _Subject) -> Iterator[list[Strategy]]:
    """Series, each from the fastest and largest to the slowest and smallest; the exact and the fast ones first."""
    is_loop = subject.loop is not None
    yield [OwnSteps()] if is_loop else [Whole()]
    if not is_loop or subject.can_be_recorded():
        chunks = [chunk for chunk in (_CHUNKS_BY_LAYER if is_loop else _CHUNKS) if chunk < subject.shape[2]]
        for spill in ("device", "file") if subject.device.type == "cpu" else ("device", "host", "file"):
            yield [Streaming(chunk, spill, by_layer=is_loop) for chunk in chunks]
    if tilings := tilings_for(subject.model, subject.shape, subject.dtype, subject.device):
        yield [Tiled(tiling) for tiling in tilings]


def _try_larger(series: list[Strategy], fits: Callable[[Strategy], bool]) -> None:
    """Try the largest that fits, found by halves; the last one is known to."""
    low, high = 0, len(series) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(series[middle]) else (middle + 1, high)


def _predict_whole(model: Model, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Prediction:
    """What Python keeps alive while the model runs: the same variables hold the recorded clips."""
    ledger = Ledger(device)
    with ledger, _backends_of(device):
        record(model, shape, dtype, device)
    return Prediction(_with_margin(ledger.peak), 0, ledger.cost)


def _predict_streaming(
    strategy: Streaming, recorded: Node, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Prediction:
    clip = torch.empty(shape, dtype=dtype, device="meta")
    stays = strategy.spill == "device" or (strategy.spill == "host" and device.type == "cpu")
    spill = Spill() if stays else SpillOnPaper()
    ledger = Ledger(device)
    share = strategy.share(shape[2])
    with ledger, _backends_of(device):
        for chunk in pull_chunks(recorded, RunOnPaper(clip, share, ledger.constant, ledger, {}), spill):
            del chunk
    cost = ledger.cost + _COST_OF_SPILL[strategy.spill] * spill.num_bytes_written
    return Prediction(_with_margin(ledger.peak), spill.num_bytes_written, cost)


def _backends_of(device: torch.device) -> AbstractContextManager[Any]:
    """Meta tensors choose as CPU tensors do; for other devices plain PyTorch is an upper bound."""
    return nullcontext() if device.type == "cpu" else use("reference")


def _with_margin(peak: int) -> int:
    return int(peak * _ROUNDING) + _LIBRARIES
