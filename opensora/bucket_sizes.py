"""Batch sizes at which a training step of every bucket takes equally long, found by measuring.

Ranks wait for the slowest at every step, so that a bucket twice as slow as the others costs all of them its time.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from opensora.checkpoints import load_config
from opensora.config import BucketTable, STDiT2Config, STDiT3Config, TrainConfig, VAEKind, VideoVAEConfig
from opensora.data.aspect_ratios import get_resolution
from opensora.loading import MODEL_OF
from opensora.schedulers import TrainingScheduler
from opensora.vae import VideoVAE

Size = tuple[int, int, int]
# A step may be so many times as long as the target: times of equal steps differ by about as much.
TOLERANCE = 1.03


@dataclass(frozen=True)
class Cost:
    """What a step took: seconds, and the most memory in bytes (0 where it is not known)."""

    seconds: float
    num_bytes: int = 0


@dataclass(frozen=True)
class Found:
    """The batch size of a bucket, and its step as the fitted lines predict it. `limit` says what stopped it."""

    resolution: str
    num_frames: int
    size: Size
    batch_size: int
    seconds: float
    num_bytes: int
    limit: str


# Runs a step of clips of (frames, height, width) in pixels at a batch size; raises torch.OutOfMemoryError.
Measure = Callable[[Size, int], Cost]


def find_batch_sizes(
    table: BucketTable,
    measure: Measure,
    *,
    target_seconds: float | None = None,
    memory_bytes: int | None = None,
    max_batch_size: int = 512,
    report: Callable[[Found], None] | None = None,
) -> tuple[BucketTable, list[Found]]:
    """The table with other batch sizes, and what was found for each bucket that keeps clips.

    Of each (resolution, number of frames), the aspect ratio with most pixels is measured, at batches of 1, 2, 4, ...
    until the lines fitted through seconds and bytes say where the target or `memory_bytes` is reached; that size is
    measured too, and the fit repeated. `target_seconds` None: the step of the slowest bucket at batch 1.
    Errors: ValueError for an empty table and limits out of range; torch.OutOfMemoryError when a batch of one clip does
    not fit.
    """
    if max_batch_size < 1 or (target_seconds is not None and target_seconds <= 0):
        given = f"{max_batch_size} and {target_seconds}"
        raise ValueError(f"find_batch_sizes: max_batch_size and target_seconds must be above 0, got {given}")
    cells = [
        (resolution, int(num_frames), largest_size(resolution, int(num_frames)))
        for resolution, entries in table.items()
        for num_frames, entry in entries.items()
        if _keep_probability(entry) > 0
    ]
    if not cells:
        raise ValueError("find_batch_sizes: some bucket must keep clips, got none")
    curves = {size: _Curve(size, measure, memory_bytes, max_batch_size) for _, _, size in cells}
    slowest = max([curve.start() for curve in curves.values()])
    target = target_seconds or slowest
    found = []
    for resolution, num_frames, size in cells:
        curves[size].search(target)
        batch_size = curves[size].largest_within(target)
        cost = curves[size].cost(batch_size)
        limit = curves[size].limit(batch_size, target)
        found.append(Found(resolution, num_frames, size, batch_size, cost.seconds, cost.num_bytes, limit))
        if report is not None:
            report(found[-1])
    sizes = {(each.resolution, each.num_frames): each.batch_size for each in found}
    result = {
        resolution: {
            int(frames): (entry[0], sizes.get((resolution, int(frames)), entry[1])) for frames, entry in entries.items()
        }
        for resolution, entries in table.items()
    }
    return result, found


def largest_size(resolution: str, num_frames: int) -> Size:
    """The aspect ratio of a resolution that costs most."""
    return (num_frames, *max(get_resolution(resolution).sizes.values(), key=math.prod))


class _Curve:
    """Costs of one size at several batch sizes, and the lines through them."""

    def __init__(self, size: Size, measure: Measure, memory_bytes: int | None, max_batch_size: int) -> None:
        self.size, self._measure = size, measure
        self._memory_bytes, self._most = memory_bytes, max_batch_size
        self._overflowed = False
        self.costs: dict[int, Cost] = {}

    def start(self) -> float:
        """Seconds of a batch of one clip, which must fit into memory."""
        self.costs[1] = self._measure(self.size, 1)
        if self._memory_bytes is not None and self.costs[1].num_bytes > self._memory_bytes:
            raise ValueError(
                f"find_batch_sizes: memory_bytes must hold a clip of {self.size} (frames, height, width), "
                f"{self.costs[1].num_bytes}, got {self._memory_bytes}"
            )
        return self.costs[1].seconds

    def search(self, target: float) -> None:
        """Measure where the lines cross the limits, until that is a batch size measured before."""
        while (candidate := self._next(target)) not in self.costs:
            try:
                self.costs[candidate] = self._measure(self.size, candidate)
            except torch.OutOfMemoryError:
                self._most, self._overflowed = candidate - 1, True

    def largest_within(self, target: float, most: int | None = None) -> int:
        """The largest batch up to `most` that is within the limits; 1 where none is."""
        most = self._most if most is None else min(most, self._most)
        return next((size for size in range(most, 1, -1) if self._fits(size, target)), 1)

    def limit(self, batch_size: int, target: float) -> str:
        """What forbids a larger batch."""
        if batch_size == self._most:
            return "memory" if self._overflowed else "largest batch"
        return "time" if self.cost(batch_size + 1).seconds > TOLERANCE * target else "memory"

    def cost(self, batch_size: int) -> Cost:
        """As measured, or as the lines have it."""
        if batch_size in self.costs:
            return self.costs[batch_size]
        return Cost(_line(self.costs, "seconds", batch_size), round(_line(self.costs, "num_bytes", batch_size)))

    def _next(self, target: float) -> int:
        if len(self.costs) == 1:  # one point is no line
            return min(2, self._most) if self.costs[1].seconds < target else 1
        # At most twice as large: the line through two small batches says little about large ones.
        return self.largest_within(target, 2 * max(self.costs))

    def _fits(self, batch_size: int, target: float) -> bool:
        cost = self.cost(batch_size)
        is_small = self._memory_bytes is None or cost.num_bytes <= self._memory_bytes
        return is_small and cost.seconds <= TOLERANCE * target


def _line(costs: dict[int, Cost], name: str, batch_size: int) -> float:
    """Least squares, through one point proportionally."""
    values = [float(getattr(cost, name)) for cost in costs.values()]
    if len(costs) == 1:
        return values[0] * batch_size / next(iter(costs))
    slope, start = np.polyfit(list(costs), values, 1)
    return float(start + max(slope, 0.0) * batch_size)


def _keep_probability(entry: tuple) -> float:
    keep = entry[0]
    return keep[0] if isinstance(keep, (tuple, list)) else keep


@dataclass(frozen=True)
class TrainStep:
    """Forward and backward of a transformer on random latents and captions: a `Measure`.

    latent_size: of a clip of (frames, height, width) in pixels. Encoding and the optimizer's update are not in it. The
    first step of each shape, which allocates and compiles, is not timed; of the next `repeats` the median is taken.
    """

    transformer: nn.Module
    scheduler: TrainingScheduler
    latent_size: Callable[[Size], Size]
    repeats: int = 3

    def __call__(self, size: Size, batch_size: int) -> Cost:
        device = next(self.transformer.parameters()).device
        seconds = []
        if device.type != "cpu":
            torch.accelerator.empty_cache()  # of the batch before, which may have run out of memory
        try:
            batch = self._batch(size, batch_size, device)
            for number in range(1 + self.repeats):
                if number == 1 and device.type != "cpu":
                    torch.accelerator.reset_peak_memory_stats()
                start = time.perf_counter()
                self._step(*batch)
                if device.type != "cpu":
                    torch.accelerator.synchronize()
                seconds.append(time.perf_counter() - start)
        finally:
            self.transformer.zero_grad(set_to_none=True)
        # A process on a CPU does not give freed memory back, so that its size says nothing about this step.
        num_bytes = 0 if device.type == "cpu" else torch.accelerator.max_memory_allocated()
        return Cost(statistics.median(seconds[1:]), num_bytes)

    def _batch(self, size: Size, batch_size: int, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
        config = self.transformer.config
        weight = next(self.transformer.parameters())
        latents = torch.randn(batch_size, config.in_channels, *self.latent_size(size), device=device)
        length = config.model_max_length
        numbers = dict(zip(("num_frames", "height", "width"), map(float, size), strict=True)) | {
            "fps": 24.0,
            "ar": size[1] / size[2],
        }
        arguments = {name: torch.full((batch_size,), value, device=device) for name, value in numbers.items()}
        arguments["y"] = torch.randn(batch_size, 1, length, config.caption_channels, device=device, dtype=weight.dtype)
        arguments["mask"] = torch.ones(batch_size, length, dtype=torch.int64, device=device)
        return latents, arguments

    def _step(self, latents: Tensor, arguments: dict[str, Tensor]) -> None:
        self.scheduler.training_losses(self.transformer, latents, arguments).mean().backward()


def latent_size_of(vae: str, kind: VAEKind) -> Callable[[Size], Size]:
    """Sizes of latents; the VAE is not loaded, only its configuration where it is a folder, else the released one's."""
    config_file = Path(vae) / "config.json"
    if kind == "stacked":
        config = load_config(Path(vae), VideoVAEConfig) if config_file.is_file() else VideoVAEConfig()
        with torch.device("meta"):
            return VideoVAE(config).latent_size
    side = 8
    if kind == "frames" and config_file.is_file():
        side = 2 ** (len(json.loads(config_file.read_text())["block_out_channels"]) - 1)
    every = 4 if kind == "causal" else 1
    return lambda size: (1 + (size[0] - 1) // every, size[1] // side, size[2] // side)


def build_transformer(
    config: TrainConfig, *, dtype: torch.dtype, device: torch.device, grad_checkpoint: Any
) -> nn.Module:
    """The transformer of a training with random weights, frozen as far as it is there. ValueError for one of clips of
    one size."""
    if not isinstance(config.transformer, (STDiT2Config, STDiT3Config)):
        kind = type(config.transformer).__name__
        raise ValueError(f"find-batch-sizes: transformer must take clips of any size, got {kind}")
    with torch.device(device):
        transformer = MODEL_OF[type(config.transformer)](config.transformer)
    for name, parameter in transformer.named_parameters():
        if name.startswith(config.frozen):
            parameter.requires_grad_(False)
    transformer = transformer.to(device, dtype).train()
    transformer.set_gradient_checkpointing(grad_checkpoint)
    return transformer


def training_state_bytes(transformer: nn.Module, shards: int = 1) -> int:
    """Of fp32 weights, two moments and averages of what is trained, beside the weights and gradients that a step
    measures."""
    trained = (parameter for parameter in transformer.parameters() if parameter.requires_grad)
    return 16 * sum(parameter.numel() for parameter in trained) // shards
