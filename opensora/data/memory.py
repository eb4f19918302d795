"""Clips held in memory: for data sets of a few thousand small clips, decoding once beats any loader."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from opensora.config import DataConfig
from opensora.data.manifest import read_manifest
from opensora.data.reading import VideoError, read_frames


@dataclass(frozen=True)
class ClipsInMemory:
    """The clips of a manifest: `frames` uint8 (T, 3, H, W) each, their captions and frame rates (0 for an image).

    `skipped` names each file that could not be used, with the reason.
    """

    frames: list[Tensor]
    captions: list[str]
    fps: list[float]
    skipped: list[str]

    def __len__(self) -> int:
        return len(self.frames)

    def batch(self, indices: list[int]) -> Tensor:
        """(B, T, 3, H, W) of clips of one size."""
        return torch.stack([self.frames[index] for index in indices])


def load_clips(manifest: str, config: DataConfig) -> ClipsInMemory:
    """Reads the first `num_frames` frames (every `frame_interval`-th) of each clip that has them, at its own size.

    Errors: ValueError when the manifest or every file in it is unusable.
    """
    listed = read_manifest(manifest)
    frames, captions, fps = [], [], []
    skipped = [f"row {bad.number} {bad.path}: {bad.reason}" for bad in listed.bad_rows]
    for clip in listed.clips:
        num_frames = 1 if clip.num_frames == 1 else config.num_frames
        try:
            clip_frames = read_frames(clip.path, range(0, num_frames * config.frame_interval, config.frame_interval))
        except VideoError as error:
            skipped.append(str(error))
            continue
        frames.append(clip_frames)
        captions.append(clip.text)
        fps.append(clip.fps / config.frame_interval)
    if not frames:
        raise ValueError(
            f"data.manifest: must name at least one readable clip, got {manifest}: {'; '.join(skipped[:5])}"
        )
    return ClipsInMemory(frames, captions, fps, skipped)
