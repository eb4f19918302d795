"""Clips of one size, cut out of a manifest's files: what the loader puts into batches.

Axes: C channels, T frames, H height, W width. A clip that cannot be read is replaced by another one, drawn from
(seed, epoch, item) alone, so that a resumed run meets the same clips as an unbroken one.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from opensora.config import Fit
from opensora.data.manifest import Clip, Manifest
from opensora.data.reading import VideoError, is_image, read_frames
from opensora.data.samplers import ClipRequest
from opensora.data.transforms import temporal_crop_indices, transform_frames

# What upstream tells the model about still images instead of a frame rate.
IMAGE_FPS = 120.0
MAX_REPLACEMENTS = 10

Item = int | str | ClipRequest


class ClipDataset(Dataset):
    """Clips of a manifest as float (3, T, H, W) in [-1, 1] with caption and conditioning numbers.

    `dataset[item]` or `dataset[epoch, item]`; an item is a row number, for clips of `num_frames` frames of
    `image_size` (height, width; None: the file's own), or a `ClipRequest` or its spelling "row-T-H-W".
    The window of T * frame_interval frames is drawn from (seed, epoch, item), or begins where the manifest says.
    Returned keys:
        video    float32 (3, T, H, W), [-1, 1], resized to fill and cropped
        text, path   str
        num_frames, height, width   int, of `video`; ar = height / width
        fps      the file's frame rate // frame_interval, or itself with `file_fps`; 120 for a still image
        aes, flow, camera_motion   scores of the manifest, None where it has none
        frames   (first, last) frame of the file
        skipped  list of (path, reason): files that could not be read and in whose place this clip stands
    `flip` mirrors half of the clips, left to right. `cache_in_memory` keeps every decoded file as uint8; each worker
    process of a loader has its own cache.
    Errors: VideoError when neither the clip nor any of 10 replacements can be read; ValueError for a malformed item.
    Source: the item of Open-Sora 1.2's VariableVideoTextDataset, except that upstream's replacement is not repeatable.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        num_frames: int = 51,
        image_size: tuple[int, int] | None = None,
        frame_interval: int = 1,
        fit: Fit = "resize_crop",
        flip: bool = False,
        file_fps: bool = False,
        seed: int = 42,
        cache_in_memory: bool = False,
    ) -> None:
        for name, value in (("num_frames", num_frames), ("frame_interval", frame_interval)):
            if value < 1:
                raise ValueError(f"ClipDataset: {name} must be at least 1, got {value}")
        self.manifest = manifest
        self.num_frames = num_frames
        self.image_size = image_size
        self.frame_interval = frame_interval
        self.fit: Fit = fit
        self.flip, self.file_fps = flip, file_fps
        self.seed = seed
        self._cache: dict[str, Tensor] | None = {} if cache_in_memory else None

    def __len__(self) -> int:
        return len(self.manifest.clips)

    def __getitem__(self, key: Item | tuple[int, Item]) -> dict[str, Any]:
        epoch, item = split_key(key)
        row, num_frames, _ = self._parse(item)
        skipped: list[tuple[str, str]] = []
        for candidate in self._candidates(row, num_frames, epoch, item):
            try:
                return {**self.read(key, candidate), "skipped": skipped}
            except VideoError as error:
                # Not remembered: a resumed run would not know, and a file cut short has other, readable windows.
                skipped.append((error.path, error.reason))
        path, reason = skipped[0]
        raise VideoError(path, f"{reason}; the {len(skipped) - 1} clips tried in its place cannot be read either")

    def read(self, key: Item | tuple[int, Item], candidate: int | None = None) -> dict[str, Any]:
        """The clip of row `candidate`, or of the item's own, and no other in its place: raises VideoError."""
        epoch, item = split_key(key)
        row, num_frames, size = self._parse(item)
        candidate = row if candidate is None else candidate
        clip = self.manifest.clips[candidate]
        rng = random.Random(f"{self.seed}-{epoch}-{item}-{candidate}")
        indices = self._frames(clip, num_frames, rng)
        frames = self._pixels(clip, indices)
        try:
            video = transform_frames(frames, size or tuple(frames.shape[2:]), fit=self.fit)
        except ValueError as error:
            if self.fit not in ("long_side", "crop"):  # which do not enlarge small frames
                raise
            raise VideoError(clip.path, str(error)) from error
        if self.flip and rng.random() < 0.5:
            video = video.flip(-1)
        fps = clip.fps if self.file_fps else float(clip.fps // self.frame_interval)
        return _sample(clip, video, fps) | {"frames": (indices[0], indices[-1])}

    def _parse(self, item: Item) -> tuple[int, int, tuple[int, int] | None]:
        numbers = [item] if isinstance(item, int) else str(item).split("-")
        try:
            row, *size = (int(number) for number in numbers)
        except ValueError:
            row, size = -1, []
        if len(size) not in (0, 3) or not 0 <= row < len(self) or min(size, default=1) < 1:
            raise ValueError(f"ClipDataset: item must be a row below {len(self)} or 'row-T-H-W', got {item!r}")
        return (row, size[0], (size[1], size[2])) if size else (row, self.num_frames, self.image_size)

    def _candidates(self, row: int, num_frames: int, epoch: int, item: Item) -> Iterator[int]:
        """The row itself, then rows to take its place: as long, and also a still image or not."""
        yield row
        wanted = self.manifest.clips[row]
        needed = (num_frames - 1) * self.frame_interval + 1
        others = [
            number
            for number, clip in enumerate(self.manifest.clips)
            if number != row and clip.num_frames >= needed and is_image(clip.path) == is_image(wanted.path)
        ]
        rng = random.Random(f"{self.seed}-{epoch}-{item}")
        yield from rng.sample(others, min(MAX_REPLACEMENTS, len(others)))

    def _frames(self, clip: Clip, num_frames: int, rng: random.Random) -> list[int]:
        if clip.first_frame is None:
            needed = num_frames
        else:
            needed = clip.first_frame + (num_frames - 1) * self.frame_interval + 1
        if clip.num_frames < needed:
            raise VideoError(clip.path, f"holds {clip.num_frames} frames, {needed} are needed")
        if clip.first_frame is not None:
            return list(range(clip.first_frame, needed, self.frame_interval))
        return temporal_crop_indices(num_frames, clip.num_frames, frame_interval=self.frame_interval, generator=rng)

    def _pixels(self, clip: Clip, indices: list[int]) -> Tensor:
        if self._cache is None:
            return read_frames(clip.path, indices)
        if clip.path not in self._cache:
            self._cache[clip.path] = read_frames(clip.path)
        whole = self._cache[clip.path]
        if max(indices) >= len(whole):
            raise VideoError(clip.path, f"truncated: holds {len(whole)} frames, frame {max(indices)} is needed")
        return whole[indices]


def split_key(key: Item | tuple[int, Item]) -> tuple[int, Item]:
    """(epoch, item) of a dataset's key; an item alone is one of epoch 0."""
    return key if isinstance(key, tuple) and not isinstance(key, ClipRequest) else (0, key)


def _sample(clip: Clip, video_CTHW: Tensor, fps: float) -> dict[str, Any]:
    _, num_frames, height, width = video_CTHW.shape
    return {
        "video": video_CTHW,
        "text": clip.text,
        "path": clip.path,
        "num_frames": num_frames,
        "height": height,
        "width": width,
        "ar": height / width,
        "fps": IMAGE_FPS if is_image(clip.path) else fps,
        "aes": clip.aes,
        "flow": clip.flow,
        "camera_motion": clip.camera_motion,
    }
