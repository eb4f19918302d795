"""Names of resolutions, aspect ratios and durations, and the sizes in pixels and frames that they stand for.

Aspect ratios are height over width, also in names: "9:16" is a landscape clip of 9 high by 16 wide. The tables are
those of Open-Sora 1.2 (the numeric resolutions come from PixArt).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from opensora.data.resolution_tables import RESOLUTION_TABLES

# Names of a table key each; the numeric resolutions write some keys differently ("1.0"), so few names fit those.
ASPECT_RATIOS = {
    "3:8": "0.38",
    "9:21": "0.43",
    "12:25": "0.48",
    "1:2": "0.50",
    "9:17": "0.53",
    "27:50": "0.54",
    "9:16": "0.56",
    "5:8": "0.62",
    "2:3": "0.67",
    "3:4": "0.75",
    "1:1": "1.00",
    "4:3": "1.33",
    "3:2": "1.50",
    "16:9": "1.78",
    "17:9": "1.89",
    "2:1": "2.00",
    "50:27": "2.08",
}
NUM_FRAMES_NAMES = {
    **{"1x": 51, "2x": 102, "4x": 204, "8x": 408, "16x": 816},
    **{"2s": 51, "4s": 102, "8s": 204, "16s": 408, "32s": 816},
}


@dataclass(frozen=True)
class Resolution:
    """A named amount of pixels and its (height, width) for each aspect key, "0.56" for 9:16."""

    num_pixels: int
    sizes: Mapping[str, tuple[int, int]]


def get_resolution(name: str) -> Resolution:
    """The table of resolution `name`, "144p" to "4k" or "256" to "2880"; ValueError lists the known names."""
    if name not in RESOLUTIONS:
        raise ValueError(f"resolution: must be one of {', '.join(RESOLUTIONS)}, got {name!r}")
    return RESOLUTIONS[name]


def get_image_size(resolution: str, aspect_ratio: str) -> tuple[int, int]:
    """The (height, width) in pixels of a resolution name and an aspect ratio, height : width.

    `aspect_ratio` is a name ("9:16") or a key of the resolution's own table ("0.56").
    Errors: ValueError for an unknown name, or for a ratio that this resolution's table lacks; both list the known ones.
    Source: Open-Sora v1.2.0, opensora/datasets/aspect.py; the table keys are our addition, since "1024" knows no "1:1".
    """
    sizes = get_resolution(resolution).sizes
    key = ASPECT_RATIOS.get(aspect_ratio, aspect_ratio)
    if key not in sizes:
        known = [name for name, its_key in ASPECT_RATIOS.items() if its_key in sizes]
        raise ValueError(
            f"aspect_ratio: {resolution} must be given one of {', '.join([*known, *sizes])}, got {aspect_ratio!r}"
        )
    return sizes[key]


def get_num_frames(num_frames: str | int) -> int:
    """The number of frames of a name ("2s" or "1x" is 51, "4s" 102, ... "32s" 816) or of a number, itself.

    Errors: ValueError for any other name, and for a number below 1.
    Source: Open-Sora v1.2.0, opensora/datasets/aspect.py.
    """
    if num_frames in NUM_FRAMES_NAMES:
        return NUM_FRAMES_NAMES[num_frames]
    rule = f"num_frames: must be a positive number or one of {', '.join(NUM_FRAMES_NAMES)}, got {num_frames!r}"
    try:
        count = int(num_frames)
    except ValueError as error:
        raise ValueError(rule) from error
    if count < 1:
        raise ValueError(rule)
    return count


def closest_aspect_key(height: float, width: float, resolution: str) -> str:
    """The key of the resolution's table nearest to height / width; the first of equally near ones."""
    ratio = height / width
    return min(get_resolution(resolution).sizes, key=lambda key: abs(float(key) - ratio))


def _parse_sizes(table: str) -> dict[str, tuple[int, int]]:
    entries = (entry.partition(":") for entry in table.split())
    return {key: (int(size.partition("x")[0]), int(size.partition("x")[2])) for key, _, size in entries}


RESOLUTIONS = {name: Resolution(pixels, _parse_sizes(table)) for name, (pixels, table) in RESOLUTION_TABLES.items()}
