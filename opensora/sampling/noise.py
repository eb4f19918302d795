"""Random numbers of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class ClipNoise:
    """Standard-normal draws from one CPU stream for each clip: the same on every device and in every batch."""

    def __init__(self, seeds: Sequence[int], device: torch.device, dtype: torch.dtype) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._device, self._dtype = device, dtype

    def of(self, b: int) -> Callable[[Tensor], Tensor]:
        """Draws for clip b alone, shaped like what is passed."""
        return lambda like: torch.randn(like.shape, generator=self._generators[b]).to(self._device, self._dtype)

    def batch(self, like: Tensor) -> Tensor:
        """Draws for all clips, shaped like `like` (B, ...)."""
        draws = [torch.randn(like.shape[1:], generator=generator) for generator in self._generators]
        return torch.stack(draws).to(self._device, self._dtype)
