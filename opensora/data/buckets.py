"""Buckets: which (resolution, number of frames, aspect ratio) a clip is trained at.

A table gives each (resolution, number of frames) a probability of keeping a clip that fits and a batch size. A clip
goes to the largest resolution and the longest duration it fills, unless a draw sends it on.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from opensora.config import BucketTable
from opensora.data.aspect_ratios import closest_aspect_key, get_resolution

# A clip may have down to this part of a resolution's nominal pixels: it is enlarged by at most 1 / sqrt(0.8) = 1.12.
MIN_PIXELS_RATIO = 0.8


class BucketKey(NamedTuple):
    """One bucket; `aspect` is a key of the resolution's table, "0.56" for 9:16."""

    resolution: str
    num_frames: int
    aspect: str


class _Cell(NamedTuple):
    """A (resolution, num_frames) of the table; `number` seeds its draws."""

    number: int
    num_frames: int
    keep_probability: float
    frame_probability: float | None
    batch_size: int


class Buckets:
    """A bucket table made ready for lookups.

    Args:
        table: {resolution: {num_frames: (keep_probability, batch_size)}}; instead of keep_probability a pair
            (keep_probability, frame_probability). num_frames 1 holds images. Batch size 0 or None is allowed where
            keep_probability is 0. Keys and pairs may come from JSON: num_frames as a string, pairs as lists.

    Errors: ValueError naming the entry for unknown resolutions and values out of range.
    Source: Open-Sora v1.2.0, opensora/datasets/bucket.py.
    """

    def __init__(self, table: BucketTable) -> None:
        if not table:
            raise ValueError("buckets: must name at least one resolution, got an empty table")
        self._cells: dict[str, list[_Cell]] = {}
        number = 0
        for resolution in sorted(table, key=lambda name: get_resolution(name).num_pixels, reverse=True):
            entries = {int(frames): entry for frames, entry in table[resolution].items()}
            self._cells[resolution] = []
            for num_frames in sorted(entries, reverse=True):
                self._cells[resolution].append(_parse_cell(number, resolution, num_frames, entries[num_frames]))
                number += 1

    def __len__(self) -> int:
        """The number of buckets, all aspect ratios counted."""
        return sum(len(cells) * len(get_resolution(name).sizes) for name, cells in self._cells.items())

    def assign(
        self, num_frames: int, height: int, width: int, *, frame_interval: int = 1, seed: int = 0
    ) -> BucketKey | None:
        """The bucket of a clip, or None when no bucket takes it.

        Resolutions are tried from large to small, skipping those with more than 1.25 times the clip's pixels. Within
        one, the longest duration with num_frames > duration * frame_interval is chosen (strictly more: equality is
        too short, as in the original), after a draw against its frame_probability if it has one. A failed draw
        against its keep_probability sends the clip to the next resolution. Every draw depends on `seed` and the
        bucket alone.
        """
        for resolution, cells in self._cells.items():
            if height * width < get_resolution(resolution).num_pixels * MIN_PIXELS_RATIO:
                continue
            cell = _choose_cell(cells, num_frames, frame_interval, seed)
            if cell is not None:
                return BucketKey(resolution, cell.num_frames, closest_aspect_key(height, width, resolution))
        return None

    def size(self, key: BucketKey) -> tuple[int, int, int]:
        """(frames, height, width) in pixels of the clips in a bucket."""
        return (key.num_frames, *get_resolution(key.resolution).sizes[key.aspect])

    def has(self, resolution: str, num_frames: int) -> bool:
        """Whether the table gives clips of that size a batch."""
        return any(cell.num_frames == num_frames and cell.batch_size for cell in self._cells.get(resolution, ()))

    def batch_size(self, key: BucketKey) -> int:
        return next(cell.batch_size for cell in self._cells[key.resolution] if cell.num_frames == key.num_frames)


def _choose_cell(cells: list[_Cell], num_frames: int, frame_interval: int, seed: int) -> _Cell | None:
    for cell in cells:
        is_image_cell = cell.num_frames == 1
        if is_image_cell != (num_frames == 1):
            continue
        if not is_image_cell and num_frames <= cell.num_frames * frame_interval:
            continue
        # Each generator takes 10 us, so none is made where no draw is needed.
        frame_probability = None if is_image_cell else cell.frame_probability
        if frame_probability is None and cell.keep_probability >= 1:
            return cell
        # One generator per (clip, cell): the second draw continues the first.
        generator = np.random.default_rng(seed + cell.number)
        if frame_probability is not None and generator.random() > frame_probability:
            continue
        is_kept = cell.keep_probability >= 1 or generator.random() < cell.keep_probability
        return cell if is_kept else None
    return None


def _parse_cell(number: int, resolution: str, num_frames: int, entry: tuple) -> _Cell:
    name = f"buckets: {resolution}, {num_frames} frames"
    if num_frames < 1:
        raise ValueError(f"{name}: num_frames must be positive")
    if not isinstance(entry, (tuple, list)) or len(entry) != 2:
        raise ValueError(f"{name}: must be (keep_probability, batch_size), got {entry!r}")
    probability, batch_size = entry
    keep, frame = probability if isinstance(probability, (tuple, list)) else (probability, None)
    for value in (keep, 1.0 if frame is None else frame):
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{name}: probabilities must lie in [0, 1], got {probability!r}")
    if keep > 0 and (batch_size is None or batch_size < 1):
        raise ValueError(f"{name}: batch_size must be positive where clips are kept, got {batch_size!r}")
    return _Cell(number, num_frames, float(keep), frame, batch_size or 0)
