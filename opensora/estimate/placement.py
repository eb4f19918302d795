"""Where a run is placed: GPUs, their memory, and how the tokens of a clip are cut among them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from opensora.estimate.denoisers import Denoiser, LatentClip

RESERVED = 3 * 10**9
"""Bytes of a GPU that no tensor gets: CUDA's context, communicators, workspaces of libraries, fragments."""


@dataclass(frozen=True)
class Hardware:
    """`num_gpus` of `memory` bytes each, `flops` operations per second at best, of which a run reaches `mfu`.

    The defaults of `flops` and `mfu` are an H100's in bf16, and what a good run reaches.
    """

    num_gpus: int = 1
    memory: int = 80 * 10**9
    reserved: int = RESERVED
    flops: float = 989e12
    mfu: float = 0.35

    @property
    def usable(self) -> int:
        return self.memory - self.reserved

    def seconds(self, flops: float, num_gpus: int) -> float:
        """Of so many operations shared evenly by so many GPUs."""
        return flops / (num_gpus * self.flops * self.mfu)


@dataclass(frozen=True)
class SequenceDegree:
    """How many ranks share a clip: `ulysses` by heads inside attention, `ring` by passing keys and values round."""

    ulysses: int = 1
    ring: int = 1

    @property
    def ranks(self) -> int:
        return self.ulysses * self.ring

    def __str__(self) -> str:
        return f"{self.ulysses} x {self.ring}"


def sequence_degree(num_ranks: int, num_heads: int) -> SequenceDegree:
    """Ulysses over as many of the ranks as divide the heads, since it sends less, and a ring over the rest."""
    ulysses = math.gcd(num_ranks, num_heads)
    return SequenceDegree(ulysses, num_ranks // ulysses)


def shard_of(denoiser: Denoiser, clip: LatentClip, degree: SequenceDegree) -> LatentClip:
    """What one rank computes: all frames of a share of the sites, as a clip of one row of patches."""
    if degree.ranks == 1:
        return clip
    num_frames, num_sites = denoiser.grid(clip)
    shard = denoiser.clip_of(clip.batch, (num_frames, -(-num_sites // degree.ranks)), clip.num_text_tokens)
    return replace(shard, pixels=clip.pixels, has_frame_mask=clip.has_frame_mask)


def exchange_bytes(denoiser: Denoiser, clip: LatentClip, degree: SequenceDegree) -> int:
    """Buffers of one attention: q, k, v as they are sent and received, and keys and values on their way round."""
    shard = shard_of(denoiser, clip, degree)
    activation = denoiser.num_tokens(shard) * denoiser.hidden_size * denoiser.dtype.itemsize
    return activation * ((6 if degree.ulysses > 1 else 0) + (4 if degree.ring > 1 else 0))


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number up to `most` for which `fits(number)`, which holds below any for which it holds; else 0."""
    low, high = 0, 1
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
