"""Clips too large for one run: windows of frames, each cut into tiles that are cross-faded where they overlap.

Axes: B batch, C channels, T frames, H height, W width. x is what is cut: pixels to encode, or latents to decode.
Source: Open-Sora-Plan v1.1.0, opensora/models/ae/videobase/causal_vae/modeling_causalvae.py (tiled encode and decode).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from opensora_kernels.norms import memory_format
from opensora_kernels.ops.blend_tiles import blend_tiles

Size = tuple[int, int, int]
"""(T, H, W)"""


@dataclass(frozen=True)
class Tiling:
    """How x is cut, and how the results are joined.

    tile, stride: rows and columns of x in a tile, and from the start of one tile to the start of the next.
    overlap, keep: rows and columns of the result over which a tile is faded in over its neighbour, and of which it
    gives its first to the joined picture. As upstream, the last tile starts at the last multiple of the stride in x,
    even if the tile before it reached the border already.
    window: frames of x that are run at once, None for all. A window begins with the last `shared_frames` of the one
    before, and the first `dropped_frames` of its result are left out. A tile of x that gives no frame, row or column
    is not run.
    Errors: ValueError for sizes below 1, a stride beyond the tile, or a window that shares all of its frames.
    """

    tile: tuple[int, int]
    stride: tuple[int, int]
    overlap: tuple[int, int]
    keep: tuple[int, int]
    window: int | None = None
    shared_frames: int = 1
    dropped_frames: int = 1

    def __post_init__(self) -> None:
        for name in ("tile", "stride", "keep"):
            if min(getattr(self, name)) < 1:
                raise ValueError(f"Tiling: {name} must be at least 1, got {getattr(self, name)}")
        if any(step > size for step, size in zip(self.stride, self.tile, strict=True)):
            raise ValueError(f"Tiling: stride must be at most the tile {self.tile}, got {self.stride}")
        if min(*self.overlap, self.shared_frames, self.dropped_frames) < 0:
            raise ValueError(
                "Tiling: overlap, shared_frames and dropped_frames must be at least 0, "
                f"got {self.overlap}, {self.shared_frames} and {self.dropped_frames}"
            )
        if self.window is not None and self.window <= self.shared_frames:
            raise ValueError(f"Tiling: window must be above {self.shared_frames} shared frames, got {self.window}")

    def is_needed(self, size: Size) -> bool:
        """Whether x of `size` (T, H, W) is larger than a window or a tile. A clip that is, is cut along all axes."""
        num_frames, height, width = size
        is_long = self.window is not None and num_frames > self.window
        return is_long or height > self.tile[0] or width > self.tile[1]

    def windows(self, num_frames: int) -> list[tuple[int, int]]:
        """(start, stop) of each window in frames of x."""
        if self.window is None:
            return [(0, num_frames)]
        windows = []
        for start in range(0, num_frames, self.window - self.shared_frames):
            windows.append((start, min(start + self.window, num_frames)))
            if windows[-1][1] == num_frames:
                break  # a start that is left lies in the frames that this window shares
        return windows


def run_tiled(
    run: Callable[[Tensor], Tensor],
    x: Tensor,
    tiling: Tiling | None,
    *,
    result_size: Callable[[Size], Size],
    out: Tensor | None = None,
    device: torch.device | str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """run(x), tile by tile: every tile of every window is run by itself, and blended in one pass into its place.

    Shapes: x (B, C, T, H, W); returns (B, C', T', H', W'), sizes the sums of what the tiles keep. An x that `tiling`
    does not cut is run whole, as is any x without a tiling. `run` gets views of x and returns its result anywhere.
    `result_size` takes (T, H, W) of an x to (T, H, W) of its result, axis by axis: so the joined size is known early.
    `out` receives the result, whatever device it is on; without it, memory is allocated once on `device` (None: where
    run's results are). Tiles move there one by one, so that the device that runs holds only one. Gradients flow to x
    and to what `run` reads, unless `out` is given.
    `progress` is called with the number of runs done and of all runs, after each.
    Numbers: those of `blend_tiles`. A frame, row or column of x reaches the result only through the tiles it is in.
    Errors: ValueError for an x that is not 5-D or gives no result, an `out` of another shape, and results of another
    size than `result_size` says.
    """
    plan = _plan(x, tiling, result_size)
    if out is not None and (out.shape[0], *out.shape[2:]) != (x.shape[0], *plan.joined_size):
        expected = ", ".join(map(str, (x.shape[0], "C", *plan.joined_size)))
        raise ValueError(f"run_tiled: out must have shape ({expected}), got {tuple(out.shape)}")
    parts: list[Tensor] = []
    start = 0
    for tiles in _run_windows(run, x, plan, device if out is None else out.device, progress):
        first = tiles[0][0]
        if out is None and (len(plan.windows) == 1 or (first.requires_grad and torch.is_grad_enabled())):
            parts.append(_join(tiles, tiling, plan))
            continue
        if out is None:
            shape = (*first.shape[:2], *plan.joined_size)
            out = torch.empty(shape, dtype=first.dtype, device=first.device, memory_format=memory_format(first))
        stop = start + first.shape[2]
        _join(tiles, tiling, plan, out[:, :, start:stop])
        start = stop
        del first, tiles  # not to be held while the next window runs
    if out is not None:
        return out
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def iterate_tiled(
    run: Callable[[Tensor], Tensor],
    x: Tensor,
    tiling: Tiling | None,
    *,
    result_size: Callable[[Size], Size],
    device: torch.device | str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Tensor]:
    """The frames of `run_tiled`, one window at a time, so that a clip can be written while it is run."""
    plan = _plan(x, tiling, result_size)
    for tiles in _run_windows(run, x, plan, device, progress):
        joined = _join(tiles, tiling, plan)
        del tiles
        yield joined
        del joined


class _Cut(NamedTuple):
    """A stretch of one axis of x, what it gives, how much of that is left out in front, and how much is kept."""

    start: int
    stop: int
    result: int
    dropped: int
    kept: int


class _Plan(NamedTuple):
    windows: list[_Cut]
    rows: list[_Cut]
    columns: list[_Cut]

    @property
    def joined_size(self) -> Size:
        return tuple(sum(cut.kept for cut in cuts) for cuts in self)  # type: ignore[return-value]


def _plan(x: Tensor, tiling: Tiling | None, result_size: Callable[[Size], Size]) -> _Plan:
    if x.dim() != 5:
        raise ValueError(f"run_tiled: x must have shape (B, C, T, H, W), got {tuple(x.shape)}")
    size: Size = tuple(x.shape[2:])  # type: ignore[assignment]

    def result(axis: int, length: int) -> int:
        part = [*size[:axis], length, *size[axis + 1 :]]
        return result_size(tuple(part))[axis]  # type: ignore[arg-type]

    def whole(axis: int) -> list[_Cut]:
        length = result(axis, size[axis])
        return [_Cut(0, size[axis], length, 0, length)]

    def tiles(axis: int) -> list[_Cut]:
        tile, stride, keep = tiling.tile[axis - 1], tiling.stride[axis - 1], tiling.keep[axis - 1]
        ends = [(start, min(start + tile, size[axis])) for start in range(0, size[axis], stride)]
        lengths = [result(axis, stop - start) for start, stop in ends]
        return [_Cut(*end, length, 0, min(length, keep)) for end, length in zip(ends, lengths, strict=True)]

    def windows() -> list[_Cut]:
        cuts = []
        for start, stop in tiling.windows(size[0]):
            length, dropped = result(0, stop - start), tiling.dropped_frames if start else 0
            cuts.append(_Cut(start, stop, length, dropped, max(0, length - dropped)))
        return cuts

    is_cut = tiling is not None and tiling.is_needed(size)
    axes = (windows(), tiles(1), tiles(2)) if is_cut else (whole(0), whole(1), whole(2))
    plan = _Plan(*([cut for cut in cuts if cut.kept > 0] for cuts in axes))
    if not all(plan):
        raise ValueError(f"run_tiled: x must be large enough for a frame, a row and a column, got {tuple(x.shape)}")
    return plan


def _run_windows(
    run: Callable[[Tensor], Tensor],
    x: Tensor,
    plan: _Plan,
    device: torch.device | str | None,
    progress: Callable[[int, int], None] | None,
) -> Iterator[list[list[Tensor]]]:
    """The rows of tiles of each window, without its dropped frames."""
    num_runs = len(plan.windows) * len(plan.rows) * len(plan.columns)
    num_done = 0
    for window in plan.windows:
        tiles: list[list[Tensor]] = []
        for row in plan.rows:
            tiles.append([])
            for column in plan.columns:
                part = x[:, :, window.start : window.stop, row.start : row.stop, column.start : column.stop]
                tile = run(part)
                expected = (window.result, row.result, column.result)
                if tile.shape[2:] != expected:
                    raise ValueError(
                        f"run_tiled: result_size must give what run returns for (T, H, W) = {tuple(part.shape[2:])}, "
                        f"got {expected} for {tuple(tile.shape[2:])}"
                    )
                tiles[-1].append(tile[:, :, window.dropped :].to(tile.device if device is None else device))
                num_done += 1
                if progress is not None:
                    progress(num_done, num_runs)
        yield tiles


def _join(tiles: list[list[Tensor]], tiling: Tiling | None, plan: _Plan, out: Tensor | None = None) -> Tensor:
    if len(tiles) == len(tiles[0]) == 1:  # also the clip that is not cut, of which all is kept
        kept = tiles[0][0][..., : plan.rows[0].kept, : plan.columns[0].kept]
        return kept if out is None else out.copy_(kept)
    return blend_tiles(tiles, overlap=tiling.overlap, stride=tiling.keep, out=out)
