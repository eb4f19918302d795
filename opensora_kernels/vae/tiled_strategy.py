"""Tiles as a strategy: for a budget that no exact one fits, and for those who want upstream's numbers.

Axes: B batch, C channels, T frames, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cache

import torch
from torch import Tensor

from .clip import record
from .inference import inference, made_one_by_one
from .loops import foresee, loop_of
from .memory import Ledger, Prediction, RunOnPaper
from .strategies import Model, tensor_of
from .tiled import Size, Tiling, iterate_tiled

# In how many parts height and width are cut, and latent frames of a window (None: all), from the largest tile on.
_CUTS = ((1, 16), (1, 8), (2, None), (2, 16), (3, None), (3, 8), (4, 8), (6, 4), (8, 4), (12, 4), (16, 2))
_LEAST_STRIDE = 8  # latents
_LARGEST_FACTOR = 64  # between the sizes of a clip and of its latents


@dataclass(frozen=True)
class Tiled:
    """Every tile of every window run by itself and cross-faded with its neighbours, see `Tiling`.

    Not exact: a tile does not see what is around it, and a norm over the clip sees a tile alone. A model that steps
    through frames by itself does so in every tile.
    """

    tiling: Tiling
    is_exact = False

    def run(self, model: Model, x: Tensor) -> Iterator[Tensor]:
        """Chunks of the joined tiles of a window each."""
        result_of = _results(model, x.shape[:2], x.dtype, x.device)
        chunks = iterate_tiled(_run_of(model, result_of), x, self.tiling, result_size=_sizes(result_of))
        return made_one_by_one(chunks, x.device)

    def predict(self, model: Model, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Prediction:
        """The run on paper, tiles of one shape once."""
        ledger, x = Ledger(device), torch.empty(shape, dtype=dtype, device="meta")
        paper = RunOnPaper(x, Fraction(1), ledger.constant, ledger, {})
        result_of = _results(model, shape[:2], dtype, device)

        def result_size(size: Size) -> Size:
            with ledger.paused():  # what the planner looks up takes no memory of the run
                return _sizes(result_of)(size)

        def run(size: Size) -> Tensor:
            loop = loop_of(model, size[0])
            if loop is None:
                record(model, (*shape[:2], *size), dtype, device)
            result_size(size)
            result = result_of(size).empty_like("meta").zero_()  # filled
            if loop is not None:
                with ledger.paused():
                    outlook = foresee(loop, (*shape[:2], *size), dtype, device)
                ledger.peak = max(ledger.peak, ledger.live + outlook.peak_bytes)
                ledger.cost += outlook.cost
            return result

        with inference(device), ledger:
            for chunk in iterate_tiled(
                lambda part: paper.apply(run, tuple(part.shape[2:])), x, self.tiling, result_size=result_size
            ):
                del chunk
        return Prediction(ledger.peak, 0, ledger.cost)

    def __str__(self) -> str:
        (height, width), window = self.tiling.tile, self.tiling.window
        frames = "all frames" if window is None else f"{window} frames of the clip at a time"
        return f"tiled: {height} x {width} of the clip, {frames}"


def tilings_for(model: Model, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> list[Tiling]:
    """Ever smaller tiles of a clip of `shape`, a quarter of them overlapping; none if results are not in proportion."""
    num_frames, *size = shape[2:]
    result = _results(model, shape[:2], dtype, device)(tuple(shape[2:]))
    factors = [Fraction(large, small) for large, small in zip(result.shape[3:], size, strict=True)]
    if any(max(factor.as_integer_ratio()) > _LARGEST_FACTOR for factor in factors):
        return []
    windows = _windows(num_frames, result.shape[2]) if loop_of(model, num_frames) is None else lambda count: {}
    tilings = []
    for num_parts, num_latents in _CUTS:
        tile, stride = [], []
        for length, factor in zip(size, factors, strict=True):
            multiple = factor.denominator
            step = max(_LEAST_STRIDE, -(-length // (num_parts * multiple))) * multiple
            if num_parts == 1 or step >= length:
                tile.append(length)
                stride.append(length)
            else:
                tile.append(step + -(-step // (4 * multiple)) * multiple)
                stride.append(step)
        window = windows(num_latents) if num_latents else {}
        faded = [int((whole - step) * factor) for whole, step, factor in zip(tile, stride, factors, strict=True)]
        kept = [max(1, int(step * factor)) for step, factor in zip(stride, factors, strict=True)]
        tiling = Tiling(tuple(tile), tuple(stride), tuple(faded), tuple(kept), **window)
        if tiling.is_needed((num_frames, *size)) and tiling not in tilings:
            tilings.append(tiling)
    return tilings


@dataclass(frozen=True)
class _Result:
    shape: tuple[int, ...]
    dtype: torch.dtype

    def empty_like(self, device: torch.device | str) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device=device)


_ResultOf = Callable[[Size], _Result]


def _results(model: Model, front: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> _ResultOf:
    """What the model makes of (B, C) = `front` and any (T, H, W), found on tensors without data."""

    @cache
    def result_of(size: Size) -> _Result:
        shape = (*front, *size)
        loop = loop_of(model, size[0])
        if loop is None:
            recorded = record(model, shape, dtype, device)
            return _Result(recorded.shape, recorded.dtype)
        step = record(
            lambda frames: loop.step(frames, None)[0], (*front, loop.spans(size[0])[0][1], *size[1:]), dtype, device
        )
        num_frames = foresee(loop, shape, dtype, device).num_frames
        return _Result((*step.shape[:2], num_frames, *step.shape[3:]), step.dtype)

    return result_of


def _sizes(result_of: _ResultOf) -> Callable[[Size], Size]:
    return lambda size: tuple(result_of(size).shape[2:])  # type: ignore[return-value]


def _run_of(model: Model, result_of: _ResultOf) -> Callable[[Tensor], Tensor]:
    """The model on a tile, with all that its own loop makes in one tensor."""

    def run(part: Tensor) -> Tensor:
        loop = loop_of(model, part.shape[2])
        if loop is None:
            return tensor_of(model(part))
        out, start = result_of(tuple(part.shape[2:])).empty_like(part.device), 0
        for chunk in loop.chunks(part):
            out[:, :, start : start + chunk.shape[2]] = chunk
            start += chunk.shape[2]
        return out

    return run


def _windows(num_frames: int, num_results: int) -> Callable[[int], dict[str, int]]:
    """Arguments of `Tiling` for windows of so many latents, which share one with the window before; none where frames
    are not in proportion. A first frame that stands for itself is dropped from every window but the first."""
    for alone in (1, 0):
        if num_frames <= alone:
            continue
        factor = Fraction(num_results - alone, num_frames - alone)
        if factor > 0 and max(factor.as_integer_ratio()) <= _LARGEST_FACTOR:
            many, few = factor.denominator, factor.numerator
            shared, dropped = (1, 1) if alone else (many, few)

            def windows(count: int, many: int = many, shared: int = shared, dropped: int = dropped) -> dict[str, int]:
                return {"window": shared + count * many, "shared_frames": shared, "dropped_frames": dropped}

            return windows
    return lambda count: {}
