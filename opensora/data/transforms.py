"""From decoded frames to a clip of the requested length and size, values in [-1, 1].

Open-Sora ("resize_crop", "center"): videos are resized as float tensors, bilinear without antialiasing; images through
PIL, bicubic with it. Open-Sora-Plan ("square", "long_side"): both as float tensors, bilinear with antialiasing; for its
VAEs ("crop"): not resized. That is what the released models were trained on. T frames, C channels, H height, W width.
"""

from __future__ import annotations

import random

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from opensora.config import Fit

# Clips that keep their shape are cut to a multiple of this: latents are 8 pixels wide, patches two latents.
LONG_SIDE_STRIDE = 16


def temporal_crop_indices(
    num_frames: int, num_total: int, *, frame_interval: int = 1, generator: random.Random | None = None
) -> list[int]:
    """`num_frames` frame numbers spread over a random window of num_frames * frame_interval frames.

    The window starts at most at num_total - window - 1, so the very last frame is seen only in clips that are shorter
    than the window. Those are used whole, with a smaller interval.
    Errors: ValueError when the clip has fewer than `num_frames` frames.
    Source: Open-Sora v1.2.0, opensora/datasets/utils.py; `generator` defaults to Python's global one, as there.
    """
    begin, end = random_window(num_frames * frame_interval, num_total, generator=generator)
    if end - begin < num_frames:
        raise ValueError(f"temporal_crop: a clip must have at least {num_frames} frames, got {num_total}")
    return spread_indices(begin, end, num_frames)


def random_window(length: int, num_total: int, *, generator: random.Random | None = None) -> tuple[int, int]:
    """(begin, end) of up to `length` of a file's frames, as both systems draw it."""
    begin = (generator or random).randint(0, max(0, num_total - length - 1))
    return begin, min(begin + length, num_total)


def spread_indices(begin: int, end: int, count: int) -> list[int]:
    """`count` frame numbers from begin to end - 1, both included, rounded down."""
    return np.linspace(begin, end - 1, count, dtype=int).tolist()


def transform_video(frames_TCHW: Tensor, size: tuple[int, int], *, fit: Fit = "resize_crop") -> Tensor:
    """Resize and crop uint8 frames to `size` and map 0-255 to [-1, 1].

    Shapes: uint8 (T, 3, H, W) to fp32 (T, 3, *size). `size` is (height, width) in pixels.
    "resize_crop" fills `size` and cuts what juts out on both sides; "center" scales the shorter side to size[0] and
    cuts the centre; "square" cuts the central square and scales it; "long_side" scales the longer side down to size[0]
    if it is longer, and cuts right and below to multiples of 16, so that the result can be smaller than `size`; "crop"
    cuts the centre of frames as they are.
    Errors: ValueError for a `size` that is none, and for frames too small for "long_side" or "crop".
    Source: Open-Sora v1.2.0, opensora/datasets/video_transforms.py; of the last three Open-Sora-Plan v1.1.0,
    opensora/dataset/transform.py and opensora/models/ae/videobase/dataset_videobase.py.
    """
    _check_size(size)
    frames = frames_TCHW.float() / 255.0
    if fit == "square":
        return 2 * resize(center_crop(frames, (min(frames.shape[-2:]),) * 2), size) - 1
    if fit == "long_side":
        return 2 * crop_to_multiple(shrink_long_side(frames, size[0]), LONG_SIDE_STRIDE) - 1
    if fit == "crop":
        return 2 * center_crop(frames, size) - 1
    if fit == "resize_crop":
        scaled = fill_size((frames.shape[-2], frames.shape[-1]), size)
        top, left = (scaled[0] - size[0]) // 2, (scaled[1] - size[1]) // 2
        # A resize to the size it has would cost a copy and change nothing.
        if scaled != tuple(frames.shape[-2:]):
            frames = F.interpolate(frames, size=scaled, mode="bilinear", align_corners=False)
    else:
        factor = size[0] / min(frames.shape[-2:])
        frames = F.interpolate(frames, scale_factor=factor, mode="bilinear", align_corners=False)
        top, left = (round((have - want) / 2.0) for have, want in zip(frames.shape[-2:], size, strict=True))
    return (frames[..., top : top + size[0], left : left + size[1]] - 0.5) / 0.5


def transform_image(image: Image.Image | Tensor, size: tuple[int, int], *, fit: Fit = "resize_crop") -> Tensor:
    """Resize and crop one RGB image to `size` and map 0-255 to [-1, 1].

    Shapes: a PIL image or uint8 (3, H, W) to fp32 (3, *size). `size` is (height, width) in pixels; "center" needs a
    square one and halves large images by box averaging first (as in OpenAI's guided-diffusion).
    Source: Open-Sora v1.2.0, opensora/datasets/utils.py.
    """
    _check_size(size)
    if isinstance(image, Tensor):
        image = Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())
    if fit == "resize_crop":
        scaled = fill_size((image.height, image.width), size)
        # Halves are rounded to even here and down in videos: the original does so.
        top, left = round((scaled[0] - size[0]) / 2.0), round((scaled[1] - size[1]) / 2.0)
        image = image.resize((scaled[1], scaled[0]), Image.Resampling.BICUBIC)
    else:
        if size[0] != size[1]:
            raise ValueError(f"transform_image: fit 'center' needs a square size, got {size}")
        while min(image.size) >= 2 * size[0]:
            image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
        factor = size[0] / min(image.size)
        image = image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.BICUBIC)
        top, left = (image.height - size[0]) // 2, (image.width - size[1]) // 2
    image = image.crop((left, top, left + size[1], top + size[0]))
    pixels_CHW = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return (pixels_CHW.float() / 255.0 - 0.5) / 0.5


def transform_frames(frames_TCHW: Tensor, size: tuple[int, int], *, fit: Fit = "resize_crop") -> Tensor:
    """A clip for a model: uint8 (T, 3, H, W) to fp32 (3, T, *size) in [-1, 1]; one frame takes Open-Sora's image path,
    where `fit` is Open-Sora's."""
    if frames_TCHW.shape[0] == 1 and fit in ("resize_crop", "center"):
        return transform_image(frames_TCHW[0], size, fit=fit)[:, None]
    return transform_video(frames_TCHW, size, fit=fit).transpose(0, 1).contiguous()


def fill_size(source: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """The smallest (height, width) of `source`'s shape that covers `target`."""
    (height, width), (target_height, target_width) = source, target
    ratio_height, ratio_width = target_height / height, target_width / width
    if ratio_height > ratio_width:
        return target_height, round(width * ratio_height)
    return round(height * ratio_width), target_width


def center_crop(frames_TCHW: Tensor, size: tuple[int, int]) -> Tensor:
    """The central (height, width) pixels; halves are rounded to even. ValueError for frames smaller than that."""
    (height, width), (rows, columns) = frames_TCHW.shape[-2:], size
    if height < rows or width < columns:
        raise ValueError(f"center_crop: frames must have at least {rows} x {columns} pixels, got {height} x {width}")
    top, left = round((height - rows) / 2.0), round((width - columns) / 2.0)
    return frames_TCHW[..., top : top + rows, left : left + columns]


def resize(frames_TCHW: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, corner to corner, with antialiasing."""
    return F.interpolate(frames_TCHW, size=size, mode="bilinear", align_corners=True, antialias=True)


def shrink_long_side(frames_TCHW: Tensor, length: int) -> Tensor:
    """The longer side scaled to `length` pixels, unless it is that short."""
    height, width = frames_TCHW.shape[-2:]
    if max(height, width) <= length:
        return frames_TCHW
    if height > width:
        return resize(frames_TCHW, (length, int(width * length / height)))
    return resize(frames_TCHW, (int(height * length / width), length))


def crop_to_multiple(frames_TCHW: Tensor, stride: int) -> Tensor:
    """Without the pixels right and below that do not fill a multiple of `stride`. ValueError where none are left."""
    height, width = (side // stride * stride for side in frames_TCHW.shape[-2:])
    if min(height, width) < stride:
        rule = f"frames must have at least {stride} x {stride} pixels"
        raise ValueError(f"crop_to_multiple: {rule}, got {tuple(frames_TCHW.shape[-2:])}")
    return frames_TCHW[..., :height, :width]


def _check_size(size: tuple[int, int]) -> None:
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"transform: size must be a positive (height, width) in pixels, got {size}")
