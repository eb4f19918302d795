"""Parts of a picture that are made anew, from pixels to latents.

Axes: T frames (of pixels, or of latents), H height, W width.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Box(NamedTuple):
    """A rectangle of pixels."""

    top: int
    left: int
    height: int
    width: int


def parse_box(text: str) -> Box | None:
    """ "top,left,height,width" in pixels; None for what has no four fields, as the name of a file.

    Errors: ValueError naming the field that is no whole number, and for an empty box.
    """
    fields = text.split(",")
    if len(fields) != len(Box._fields):
        return None
    values = []
    for name, field in zip(Box._fields, fields, strict=True):
        try:
            values.append(int(field))
        except ValueError as error:
            raise ValueError(f"edit_region {text!r}: {name} must be a whole number of pixels, got {field!r}") from error
    box = Box(*values)
    if box.height < 1 or box.width < 1 or box.top < 0 or box.left < 0:
        raise ValueError(f"edit_region {text!r}: must begin at 0 or later and hold at least one pixel, got {box}")
    return box


def box_mask(box: Box, height: int, width: int) -> Tensor:
    """bool (1, H, W), True inside of the box. Errors: ValueError for a box that does not lie inside of the picture."""
    if box.top + box.height > height or box.left + box.width > width:
        raise ValueError(f"edit_region: must lie inside of {height} x {width} pixels, got {tuple(box)}")
    mask = torch.zeros(1, height, width, dtype=torch.bool)
    mask[:, box.top : box.top + box.height, box.left : box.left + box.width] = True
    return mask


def latent_mask(mask_THW: Tensor, starts: Sequence[int], size: tuple[int, int]) -> Tensor:
    """bool (latents, h, w): True where any pixel of any frame behind a latent is.

    mask bool (T, H, W), or (1, H, W) for all frames alike. starts: the first frame of every latent, and the number of
    frames at the end. size: height and width of the latents.
    """
    coarse = F.adaptive_max_pool2d(mask_THW[:, None].float(), size)[:, 0] > 0
    if len(coarse) == 1:
        return coarse.expand(len(starts) - 1, -1, -1)
    pairs = itertools.pairwise(starts)
    return torch.stack([coarse[start:end].any(dim=0) for start, end in pairs])


def soft_edges(mask_THW: Tensor, width: int) -> Tensor:
    """fp32 (T, H, W): 0 outside, rising inside to 1 over `width` pixels from every edge, or in the middle of less.

    The picture's own border is no edge.
    """
    inside = mask_THW[:, None].float()
    depth = inside.clone()
    for _ in range(width - 1):  # of a region that shrinks by a pixel on all sides
        outside = F.max_pool2d(F.pad(1 - inside, (1, 1, 1, 1)), 3, stride=1)
        inside = 1 - outside
        depth += inside
    deepest = depth.amax(dim=(1, 2, 3), keepdim=True).clamp(min=1)
    return (depth / deepest)[:, 0]
