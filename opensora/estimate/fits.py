"""A few runs on paper that tell memory and operations of clips of every size.

Memory grows with batch and tokens, operations with tokens, text and pairs of tokens that attend to each other; so a few
clips determine the coefficients. Each fit is of one regime: which kernel serves attention, and so what it keeps,
depends on whether a sequence is short.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from opensora.config import LatteT2VConfig
from opensora.estimate.denoisers import Checkpointing, Denoiser, LatentClip
from opensora.estimate.paper import StepMemory

_LONGEST_SHORT = 128  # of sequences whose attention is one kernel with its norms


@dataclass(frozen=True)
class _Fit:
    """sum of coefficients times terms(B, T, S)."""

    terms: Callable[[int, int, int], Sequence[float]]
    coefficients: Sequence[float]

    @classmethod
    def through(
        cls,
        terms: Callable[[int, int, int], Sequence[float]],
        points: Sequence[tuple[int, int, int]],
        values: Sequence[int],
    ) -> _Fit:
        matrix = np.array([terms(*point) for point in points], dtype=np.float64)
        scale = np.abs(matrix).max(0)  # terms differ by many orders of magnitude
        return cls(terms, tuple(np.linalg.solve(matrix / scale, np.array(values, dtype=np.float64)) / scale))

    def __call__(self, batch: int, num_frames: int, num_sites: int) -> int:
        terms = self.terms(batch, num_frames, num_sites)
        return round(sum(c * term for c, term in zip(self.coefficients, terms, strict=True)))


def training_memory(denoiser: Denoiser, clip: LatentClip, checkpointing: Checkpointing) -> StepMemory:
    """`Denoiser.training_memory`, from a fit."""
    grid = denoiser.grid(clip)
    regime = tuple(length <= _LONGEST_SHORT for length in grid)
    kept, peak = _memory_fits(
        denoiser, regime, _is_image(denoiser, grid), clip.num_text_tokens, clip.has_frame_mask, checkpointing
    )
    return StepMemory(kept(clip.batch, *grid), peak(clip.batch, *grid))


def forward_flops(denoiser: Denoiser, clip: LatentClip) -> int:
    """`Denoiser.flops`, from a fit."""
    grid = denoiser.grid(clip)
    return clip.batch * _flops_fit(denoiser, _is_image(denoiser, grid), clip.num_text_tokens)(1, *grid)


def _is_image(denoiser: Denoiser, grid: tuple[int, int]) -> bool:
    """Whether a clip skips attention among frames, as single frames do in LatteT2V."""
    return grid[0] == 1 and isinstance(denoiser.config, LatteT2VConfig)


@cache
def _memory_fits(
    denoiser: Denoiser,
    regime: tuple[bool, ...],
    is_image: bool,
    num_text_tokens: int,
    has_frame_mask: bool,
    checkpointing: Checkpointing,
) -> tuple[_Fit, _Fit]:
    # So many tokens that activations, not single gradients of weights, are the most; on paper all sizes cost the same.
    num_frames = 1 if is_image else 16 if regime[0] else 160
    sites, batches = ((64, 96), (256, 512)) if regime[1] else ((4096, 8192), (8, 16))
    points = [(batch, num_frames, num_sites) for batch in batches for num_sites in sites]

    def measured(batch: int, *grid: int) -> StepMemory:
        clip = denoiser.clip_of(batch, grid, num_text_tokens, has_frame_mask=has_frame_mask)
        return denoiser.training_memory(clip, checkpointing)

    found = [measured(*point) for point in points]
    terms = lambda b, t, s: (1, b, b * t * s, s)  # noqa: E731
    kept, peak = ([getattr(each, name) for each in found] for name in ("kept", "peak"))
    return _Fit.through(terms, points, kept), _Fit.through(terms, points, peak)


@cache
def _flops_fit(denoiser: Denoiser, is_image: bool, num_text_tokens: int) -> _Fit:
    if is_image:
        points, terms = [(1, 1, sites) for sites in (16, 64, 144)], lambda b, t, s: (1, s, s * s)
    else:
        points = [(1, 8, 16), (1, 8, 64), (1, 16, 64), (1, 16, 144), (1, 40, 64)]
        terms = lambda b, t, s: (1, t, t * s, t * s * s, t * t * s)  # noqa: E731
    values = [denoiser.flops(denoiser.clip_of(batch, grid, num_text_tokens)) for batch, *grid in points]
    return _Fit.through(terms, points, values)
