"""What an estimate is asked for, in words: "1 minute at 1080p on 8 x 80 GB"."""

from __future__ import annotations

import re
from dataclasses import dataclass

from opensora.data.aspect_ratios import RESOLUTIONS, closest_aspect_key, get_resolution
from opensora_kernels.vae import parse_bytes

_SECONDS = {"s": 1, "sec": 1, "second": 1, "seconds": 1, "min": 60, "minute": 60, "minutes": 60}
_DURATION = re.compile(r"([\d.]+)\s*(s|sec|seconds?|min|minutes?|frames?)\b")
_SIZE = re.compile(r"\b(\d+)\s*x\s*(\d+)(?:\s*(?:px|pixels))?\b(?!\s*(?:[kmgt]i?b|gpus?)\b)")
_MACHINE = re.compile(r"\b(\d+)\s*x\s*([\d.]+\s*[kmgt]i?b)\b")


@dataclass(frozen=True)
class Asked:
    """Parts of a request; None for what it does not say."""

    num_frames: int | None = None
    pixels: tuple[int, int] | None = None
    num_gpus: int | None = None
    memory: int | None = None


def read_request(text: str, *, fps: float = 24.0, aspect: float = 9 / 16) -> Asked:
    """Duration ("1 minute", "4s", "51 frames"), size ("1080p", "720x1280") and machine ("8 x 80 GB") in any order.

    `aspect` is height over width, of the sizes that a resolution has. Errors: ValueError for a text with none of them,
    and for words that are no part of one.
    """
    rest = text.lower()
    found: dict[str, object] = {}
    if machine := _MACHINE.search(rest):
        found |= {"num_gpus": int(machine[1]), "memory": parse_bytes(_unit(machine[2]))}
        rest = rest.replace(machine[0], " ")
    if size := _SIZE.search(rest):
        found["pixels"] = (int(size[1]), int(size[2]))
        rest = rest.replace(size[0], " ")
    if duration := _DURATION.search(rest):
        found["num_frames"] = frames_of(duration[0], fps=fps)
        rest = rest.replace(duration[0], " ")
    words = [word for word in re.split(r"[\s,]+", rest) if word not in ("", "a", "at", "of", "on", "in", "gpus", "for")]
    if "pixels" not in found and words and words[0] in RESOLUTIONS:
        found["pixels"] = pixels_of(words.pop(0), aspect)
    if words or not found:
        raise ValueError(f'request: must be like "1 minute at 1080p on 8 x 80 GB", got {text!r}')
    return Asked(**found)  # type: ignore[arg-type]


def frames_of(text: str, *, fps: float) -> int:
    """Frames of "51", "51 frames", "4s" or "1 minute". Errors: ValueError for other text and for less than a frame."""
    match = re.fullmatch(r"([\d.]+)\s*([a-z]*)", text.strip().lower())
    unit = match[2] if match else ""
    if match is None or not (unit in _SECONDS or unit in ("", "frame", "frames")):
        raise ValueError(f'num_frames: must be frames or a time, like "51" or "4s", got {text!r}')
    try:
        count = float(match[1]) * (_SECONDS[unit] * fps if unit in _SECONDS else 1)
    except ValueError:
        count = 0
    if count < 1:
        raise ValueError(f"num_frames: must be at least one frame, got {text!r}")
    return round(count)


def pixels_of(resolution: str, aspect: float) -> tuple[int, int]:
    """Height and width of a resolution at the aspect nearest to `aspect`, or of "720x1280". Errors: ValueError."""
    if size := re.fullmatch(r"(\d+)x(\d+)", resolution.strip()):
        return int(size[1]), int(size[2])
    return get_resolution(resolution).sizes[closest_aspect_key(aspect, 1.0, resolution)]


def _unit(text: str) -> str:
    """ "80 gb" with its unit as `parse_bytes` knows it."""
    return text.upper().replace("IB", "iB")
