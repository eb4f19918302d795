"""Images beside clips, and clips of several sizes in one batch: joint training as Open-Sora-Plan does it.

Axes: B batch, C channels, T frames, I images, H height, W width; t, h, w those of latents.
Source: Open-Sora-Plan v1.1.0, opensora/dataset/t2v_datasets.py and opensora/utils/dataset_utils.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from opensora.data.datasets import split_key
from opensora.data.transforms import spread_indices

# Of the VAE: every fourth frame after the first, every eighth pixel; and what a batch is padded to.
TIME_STRIDE, SPACE_STRIDE = 4, 8
PADDED_TIME, PADDED_SPACE = 4, 16


class Samples(Protocol):
    """A dataset of clips: `ClipDataset` or `EncodedDataset`."""

    def __len__(self) -> int: ...
    def __getitem__(self, key: Any) -> dict[str, Any]: ...


class JointDataset(Dataset):
    """Clips, each with `num_images` images and their captions.

    A sample is that of `clips` and, beside it, image_text, a list of I captions, and images (I, 3, H, W); or, of
    encoded clips, image_latents and, with moments, image_latents_std (I, C, h, w), and where texts are encoded image_y
    (I, L, C) and image_mask (I, L).
    `images`: a dataset of single frames, of which clip i takes group i modulo the number of groups, or None for frames
    spread over the clip itself, with its caption.
    Errors: ValueError when there are too few images for one group, or when encoded clips shall give their own frames.
    """

    def __init__(self, clips: Samples, images: Samples | None, num_images: int) -> None:
        if num_images < 1:
            raise ValueError(f"JointDataset: num_images must be at least 1, got {num_images}")
        self.clips, self.images, self.num_images = clips, images, num_images
        self.groups = [] if images is None else image_groups(len(images), num_images)
        if images is not None and not self.groups:
            raise ValueError(
                f"use_image_num: {num_images} images beside each clip need a list of more than that, got {len(images)}"
            )

    def __len__(self) -> int:
        return len(self.clips)

    @property
    def manifest(self) -> Any:
        return self.clips.manifest

    def __getitem__(self, key: Any) -> dict[str, Any]:
        sample = self.clips[key]
        if self.images is None:
            return {**sample, **self._own_frames(sample)}
        epoch, item = split_key(key)
        row = item if isinstance(item, int) else int(str(item).partition("-")[0])
        images = [self.images[epoch, index] for index in self.groups[row % len(self.groups)]]
        joint = {"image_text": [image["text"] for image in images]}
        for name, joint_name in (
            ("video", "images"),
            ("latents", "image_latents"),
            ("latents_std", "image_latents_std"),
        ):
            if name in sample:
                joint[joint_name] = _stacked([image[name][:, 0] for image in images])
        for name in ("y", "mask"):
            if name in sample:
                joint[f"image_{name}"] = torch.stack(
                    [image[name].flatten(0, -2 if name == "y" else -1) for image in images]
                )
        return {
            **sample,
            **joint,
            "skipped": [*sample["skipped"], *(pair for image in images for pair in image["skipped"])],
        }

    def _own_frames(self, sample: dict[str, Any]) -> dict[str, Any]:
        if "video" not in sample:
            raise ValueError("use_image_num: encoded clips need encoded_images, for their own frames are not encoded")
        indices = spread_indices(0, sample["num_frames"], self.num_images)
        return {
            "images": sample["video"][:, indices].transpose(0, 1).contiguous(),
            "image_text": [sample["text"]] * self.num_images,
        }


def image_groups(num_images: int, group_size: int) -> list[list[int]]:
    """Images in groups, of which upstream drops the last one, also where it is full."""
    groups = [list(range(start, min(start + group_size, num_images))) for start in range(0, num_images, group_size)]
    return groups[:-1]


def _stacked(images: list[Tensor]) -> Tensor | list[Tensor]:
    """Images of several sizes stay a list, for `pad_clips` to pad."""
    return torch.stack(images) if len({image.shape for image in images}) == 1 else images


def padded_size(size: tuple[int, int, int]) -> tuple[int, int, int]:
    """(frames, height, width) of the clips of a batch of at most `size`, in whole pairs of latents."""
    num_frames, height, width = size
    return (
        round_up(num_frames - 1, PADDED_TIME) + 1,
        round_up(height, PADDED_SPACE),
        round_up(width, PADDED_SPACE),
    )


def round_up(number: int, multiple: int) -> int:
    return math.ceil(number / multiple) * multiple


def pad_clips(clips: Sequence[Tensor], size: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Clips (C, T, H, W) with grey, 0, right, below and at the end, and where there is picture.

    Shapes: fp32 (B, C, *padded) with padded = `padded_size(size)`, single frames staying single; masks float32
    (B, t, h, w), 1 for every latent that a pixel of the clip is part of. Errors: ValueError for a clip above `size`.
    """
    frames, height, width = padded_size(size if max(clip.shape[1] for clip in clips) > 1 else (1, *size[1:]))
    padded, masks = [], []
    for clip in clips:
        rest = [want - have for want, have in zip((frames, height, width), clip.shape[1:], strict=True)]
        if min(rest) < 0:
            raise ValueError(f"pad_clips: a clip must fit into {(frames, height, width)}, got {tuple(clip.shape[1:])}")
        padded.append(F.pad(clip, (0, rest[2], 0, rest[1], 0, rest[0])))
        mask = torch.zeros(num_latents((frames, height, width)))
        t, h, w = num_latents(tuple(clip.shape[1:]))
        mask[:t, :h, :w] = 1
        masks.append(mask)
    return torch.stack(padded), torch.stack(masks)


def num_latents(size: tuple[int, int, int]) -> tuple[int, int, int]:
    """(frames, height, width) of the latents that a clip of `size` touches, the last ones perhaps in part."""
    num_frames, height, width = size
    return (
        math.ceil((num_frames - 1) / TIME_STRIDE) + 1,
        math.ceil(height / SPACE_STRIDE),
        math.ceil(width / SPACE_STRIDE),
    )


def pad_batch(batch: dict[str, Any], size: tuple[int, int, int]) -> dict[str, Any]:
    """A batch of samples of several sizes: `video` and `images` padded to one, `attention_mask` (B, t + I, h, w)."""
    video, mask = pad_clips(batch["video"], size)
    if "images" not in batch:
        return {**batch, "video": video, "attention_mask": mask}
    stills = [image[:, None] for images in batch["images"] for image in images]
    images, image_mask = pad_clips(stills, size)
    num_clips = len(video)
    return {
        **batch,
        "video": video,
        "images": images[:, :, 0].unflatten(0, (num_clips, -1)),
        "attention_mask": torch.cat([mask, image_mask[:, 0].unflatten(0, (num_clips, -1))], dim=1),
    }
