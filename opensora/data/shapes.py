"""Generated, captioned clips of moving coloured shapes, and the measurement of whether a clip shows its caption.

Frames are uint8 TCHW, RGB: T frames, C channels, H height, W width. Lengths are fractions of the shorter side.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

# Hues 60 degrees apart, as far from each other as six colours can be.
COLORS: dict[str, tuple[float, float, float]] = {
    "red": (1.0, 0.0, 0.0),
    "yellow": (1.0, 1.0, 0.0),
    "green": (0.0, 1.0, 0.0),
    "cyan": (0.0, 1.0, 1.0),
    "blue": (0.0, 0.0, 1.0),
    "magenta": (1.0, 0.0, 1.0),
}
SHAPES = ("circle", "square", "triangle")
# Unit steps in (x, y), y pointing down.
DIRECTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}

# Below this chroma (max - min of R, G, B, 0-255) a pixel is background: the backgrounds made here stay under 20.
MIN_CHROMA = 60.0
# A movement counts from 1/16 of the side, and as a direction when one axis moves twice as far as the other.
MIN_TRAVEL = 1 / 16
MIN_AXIS_RATIO = 2.0


@dataclass(frozen=True)
class ShapeClip:
    """What one clip shows."""

    color: str
    shape: str
    direction: str

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("color", self.color, COLORS),
            ("shape", self.shape, SHAPES),
            ("direction", self.direction, DIRECTIONS),
        ):
            if value not in choices:
                raise ValueError(f"ShapeClip: {name} must be one of {', '.join(choices)}, got {value!r}")

    @property
    def caption(self) -> str:
        return f"a {self.color} {self.shape} moving {self.direction}"


def all_shape_clips() -> list[ShapeClip]:
    """Every combination of color, shape and direction: 72."""
    return [ShapeClip(*combination) for combination in product(COLORS, SHAPES, DIRECTIONS)]


def render_clip(clip: ShapeClip, *, seed: int, num_frames: int = 17, height: int = 64, width: int = 64) -> Tensor:
    """Draw the shape moving at constant speed over a dark, slightly uneven background.

    Shapes: returns uint8 (num_frames, 3, height, width). Size, start, speed, brightness and background follow from
    `seed`; the shape stays inside the picture and travels at least 0.32 of the shorter side (20 of 64 pixels).
    """
    rng = random.Random(seed)
    side = min(height, width)
    radius = rng.uniform(0.15, 0.24) * side
    step_x, step_y = DIRECTIONS[clip.direction]
    room_along = (width if step_x else height) - 2 * radius
    room_across = (height if step_x else width) - 2 * radius
    travel = rng.uniform(0.32 * side, room_along)
    start = radius + rng.uniform(0, room_along - travel)
    across = radius + rng.uniform(0, room_across)
    time_T = torch.linspace(0, 1, num_frames) if num_frames > 1 else torch.zeros(1)
    along_T = start + travel * time_T
    if step_x + step_y < 0:
        along_T = (width if step_x else height) - along_T
    across_T = torch.full_like(along_T, across)
    center_x_T, center_y_T = (along_T, across_T) if step_x else (across_T, along_T)

    # Pixel centres lie at half pixels.
    x_TW = torch.arange(width)[None, :] + 0.5 - center_x_T[:, None]
    y_TH = torch.arange(height)[None, :] + 0.5 - center_y_T[:, None]
    x_THW, y_THW = x_TW[:, None, :].expand(-1, height, -1), y_TH[:, :, None].expand(-1, -1, width)
    # Coverage falls from 1 to 0 within the pixel that the outline crosses.
    coverage_THW = (0.5 - _distance_outside(clip.shape, x_THW, y_THW, radius)).clamp(0, 1)

    brightness = rng.uniform(0.82, 1.0)
    color_C = torch.tensor([brightness * channel + 0.06 * (1 - channel) for channel in COLORS[clip.color]])
    video_TCHW = torch.lerp(
        _background(rng, height, width)[None], color_C[None, :, None, None], coverage_THW[:, None, :, :]
    )
    return (video_TCHW * 255).round().clamp(0, 255).to(torch.uint8)


def generate(
    index: int, *, seed: int = 0, num_frames: int = 17, height: int = 64, width: int = 64
) -> tuple[str, Tensor]:
    """Clip `index` of an endless, balanced series: (caption, frames); every 72 in a row show all combinations."""
    clips = all_shape_clips()
    clip = clips[index % len(clips)]
    return clip.caption, render_clip(
        clip, seed=seed * 1_000_003 + index, num_frames=num_frames, height=height, width=width
    )


def measure_clip(frames: Tensor) -> tuple[str | None, str | None]:
    """Read color and direction off a clip's pixels alone.

    Shapes: frames uint8 (T, 3, H, W). The color is the one of `COLORS` whose hue carries the most chroma above
    `MIN_CHROMA`; the direction is where the centroid of that color's chroma goes, first third to last third of the
    frames. None stands for no saturated pixels, or for no movement along one axis; a color that fills less than 0.5 %
    of the pixels is noise and counts as none.
    """
    if frames.dim() != 4 or frames.shape[1] != 3:
        raise ValueError(f"measure_clip: frames must have shape (T, 3, H, W), got {tuple(frames.shape)}")
    num_frames, _, height, width = frames.shape
    pixels = frames.float()
    chroma_THW = (pixels.amax(1) - pixels.amin(1)) * (pixels.amax(1) - pixels.amin(1) > MIN_CHROMA)
    if (chroma_THW > 0).float().mean() < 0.005:
        return None, None
    nearest_THW = _nearest_color(pixels)
    mass_of_color = [float((chroma_THW * (nearest_THW == number)).sum()) for number in range(len(COLORS))]
    dominant = max(range(len(COLORS)), key=mass_of_color.__getitem__)
    weight_THW = chroma_THW * (nearest_THW == dominant)

    num_compared = max(1, num_frames // 3)
    first, last = _centroid(weight_THW[:num_compared]), _centroid(weight_THW[-num_compared:])
    color = list(COLORS)[dominant]
    if first is None or last is None or num_frames < 2:
        return color, None
    # The thirds' centres are this fraction of the clip apart.
    span = (num_frames - num_compared) / max(1, num_frames - 1)
    travel_x, travel_y = (last[0] - first[0]) / span, (last[1] - first[1]) / span
    longer, shorter = max(abs(travel_x), abs(travel_y)), min(abs(travel_x), abs(travel_y))
    if longer < MIN_TRAVEL * min(height, width) or longer < MIN_AXIS_RATIO * shorter:
        return color, None
    if abs(travel_x) > abs(travel_y):
        return color, "right" if travel_x > 0 else "left"
    return color, "down" if travel_y > 0 else "up"


def _nearest_color(pixels_TCHW: Tensor) -> Tensor:
    """Number of the color of `COLORS` with the nearest hue: largest cosine after removing grey."""
    colors_NC = torch.tensor(list(COLORS.values()))
    colors_NC = colors_NC - colors_NC.mean(1, keepdim=True)
    colors_NC = colors_NC / colors_NC.norm(dim=1, keepdim=True)
    hues_TCHW = pixels_TCHW - pixels_TCHW.mean(1, keepdim=True)
    return torch.einsum("nc,tchw->tnhw", colors_NC, hues_TCHW).argmax(1)


def _centroid(weight_THW: Tensor) -> tuple[float, float] | None:
    """(x, y) of the weight in pixels, or None without weight."""
    total = float(weight_THW.sum())
    if total <= 0:
        return None
    _, height, width = weight_THW.shape
    x = float((weight_THW.sum((0, 1)) * torch.arange(width)).sum()) / total
    y = float((weight_THW.sum((0, 2)) * torch.arange(height)).sum()) / total
    return x, y


def _distance_outside(shape: str, x: Tensor, y: Tensor, radius: float) -> Tensor:
    """Distance in pixels to the outline, negative inside; every shape fits into the circle's bounding square."""
    if shape == "circle":
        return torch.hypot(x, y) - radius
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.9 * radius
    # Apex on top: two slanted sides from (0, -radius) to (+-radius, radius) and the base below.
    slant = (2 * x.abs() - y - radius) / math.sqrt(5)
    return torch.maximum(slant, y - radius)


def _background(rng: random.Random, height: int, width: int) -> Tensor:
    """A dark (3, H, W) slope of brightness with a slight tint, values 0.02-0.22."""
    level, slope_x, slope_y = rng.uniform(0.06, 0.15), rng.uniform(-0.04, 0.04), rng.uniform(-0.04, 0.04)
    tint_C = torch.tensor([rng.uniform(-0.03, 0.03) for _ in range(3)])
    x_W, y_H = torch.linspace(-1, 1, width), torch.linspace(-1, 1, height)
    grey_HW = level + slope_x * x_W[None, :] + slope_y * y_H[:, None]
    return (grey_HW[None] + tint_C[:, None, None]).clamp(0.02, 0.22)
