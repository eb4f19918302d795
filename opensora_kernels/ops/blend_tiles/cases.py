"""Inputs of blend_tiles: small ones for tests, tilings of the releases for benches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from opensora_kernels.cases import BadCall, Case, Maker


def _make(
    leading: Sequence[int], heights: Sequence[int], widths: Sequence[int], **options: Any
) -> Callable[[Maker], dict[str, Any]]:
    def make(draw: Maker) -> dict[str, Any]:
        return {"tiles": [[draw.normal(*leading, h, w) for w in widths] for h in heights], **options}

    return make


def _flops(arguments: Mapping[str, Any]) -> int:
    """Three per pixel of each overlap: two products and a sum."""
    vertical, horizontal = arguments["overlap"]
    tiles = arguments["tiles"]
    above = sum(tile.numel() // tile.shape[-2] * vertical for row in tiles[1:] for tile in row)
    beside = sum(tile.numel() // tile.shape[-1] * horizontal for row in tiles for tile in row[1:])
    return 3 * (above + beside)


def _tiling(name: str, source: str, leading: Sequence[int], heights: Sequence[int], widths: Sequence[int]) -> Case:
    make = _make(leading, heights, widths, overlap=(64, 64), stride=(192, 192))
    return Case(name, make, is_large=True, flops=_flops, source=source)


CASES = [
    Case("small", _make((1, 2), (6, 5), (6, 4), overlap=(2, 3)), flops=_flops),
    Case("odd", _make((2, 3), (7, 7, 3), (9, 5), overlap=(3, 4)), flops=_flops),
    Case("size_one", _make((1,), (1,), (1,), overlap=(0, 0)), flops=_flops),
    Case("empty_batch", _make((0, 3), (6, 5), (6, 4), overlap=(2, 2)), flops=_flops),
    Case("no_overlap", _make((1, 2), (4, 3), (5, 2), overlap=(0, 0)), flops=_flops),
    Case("short_first_tile", _make((1, 2), (7, 1), (8, 2), overlap=(2, 2), stride=(6, 6)), flops=_flops),
    Case("tiny_last_tile", _make((1, 2), (8, 1), (8, 2), overlap=(4, 4)), flops=_flops),
    _tiling("plan_1_1_512", "Open-Sora-Plan 1.1, 65 x 512^2", (1, 3, 65), (256, 256, 128), (256, 256, 128)),
    _tiling(
        "plan_1_1_720p", "tiles of Open-Sora-Plan 1.1 at 720p", (1, 3, 65), (256,) * 3 + (144,), (256,) * 6 + (128,)
    ),
]

ERRORS = [
    BadCall("no_rows", lambda a: a | {"tiles": []}, ValueError, "tiles must be rows of one length"),
    BadCall(
        "ragged", lambda a: a | {"tiles": [a["tiles"][0], a["tiles"][1][:1]]}, ValueError,
        r"tiles must be rows of one length >= 1, got rows of \[2, 1\]",
    ),
    BadCall(
        "integer", lambda a: a | {"tiles": [[tile.int() for tile in row] for row in a["tiles"]]}, TypeError,
        "tiles must have a floating-point dtype",
    ),
    BadCall(
        "two_dtypes", lambda a: a | {"tiles": [a["tiles"][0], [tile.half() for tile in a["tiles"][1]]]}, TypeError,
        "must have the first tile's dtype",
    ),
    BadCall(
        "crooked", lambda a: a | {"tiles": [a["tiles"][0], a["tiles"][1][::-1]]}, ValueError,
        r"tiles\[1\]\[0\] must have shape",
    ),
    BadCall("negative_overlap", lambda a: a | {"overlap": (-1, 0)}, ValueError, "overlap must be at least 0"),
    BadCall("overlap_of_all", lambda a: a | {"overlap": (6, 2)}, ValueError, "stride must be at least 1"),
    BadCall("small_out", lambda a: a | {"out": a["tiles"][0][0]}, ValueError, r"out must have shape \(\.\.\., H, W\)"),
]  # fmt: skip
