"""Pictures and videos that a clip is made from: what it begins with, what it ends with, what it is an edit of.

What the mask strategies of the original do with latent frames, a guide says in frames: one file each, and encoded so
that a latent means where it is put what it means in the clip. Axes: C channels, T frames, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from opensora.conditioning.regions import box_mask, latent_mask, parse_box, soft_edges
from opensora.data.reading import VideoError, is_image, probe, read_frames
from opensora.data.transforms import transform_frames

DEFAULT_EDIT_RATIO = 0.7
"""Of an edit of whole frames; inside of a region everything is made anew unless told."""


@dataclass(frozen=True)
class Guide:
    """Files, "" where there is none.

    start: an image is the first frame; of a video, the last frames are the first. end: an image is the last frame; of a
    video, the first frames are the last. edit: a video, or for an image an image, of which the clip is an edit.
    edit_ratio in [0, 1]: how much of it is made anew: 0 nothing, 1 everything. edit_region: "top,left,height,width" in
    pixels of the clip, or an image or video that is bright there; all else stays as it is. The three files can be
    combined: an edited first frame as `start`, with `edit` and a region, is carried through the region.
    """

    start: str = ""
    end: str = ""
    edit: str = ""
    edit_ratio: float | None = None
    edit_region: str = ""

    def __bool__(self) -> bool:
        return any(getattr(self, item.name) not in ("", None) for item in fields(self))

    @property
    def strength(self) -> float:
        if self.edit_ratio is not None:
            return self.edit_ratio
        return 1.0 if self.edit_region else DEFAULT_EDIT_RATIO

    @property
    def has_videos(self) -> bool:
        """Whether a clip begins or ends with more than an image."""
        return any(path and not is_image(path) for path in (self.start, self.end))

    @property
    def goes_backward(self) -> bool:
        """Whether a clip of several loops grows at its beginning."""
        return bool(self.end) and not self.start


class VideoCoder(Protocol):
    """What is asked of a VAE."""

    def frames_of(self, num_latents: int) -> int: ...


class ClipShape(NamedTuple):
    """Frames, height and width in pixels; latent frames, and how many of them overlap with a video; frames a second."""

    num_frames: int
    height: int
    width: int
    num_latents: int
    overlap: int
    fps: float


class Placement(NamedTuple):
    """Latents (C, T, h, w) for the clip's frames from `position` on; strength 0 keeps them, 1 makes them anew."""

    latents: Tensor
    position: int
    strength: float


@dataclass(frozen=True)
class Source:
    """A guide's pictures for one clip, fp32 (3, T, H, W) in [-1, 1]; None where there is none.

    region: what is made anew, bool (T or 1, H, W).
    """

    start: Tensor | None = None
    end: Tensor | None = None
    edit: Tensor | None = None
    region: Tensor | None = None


def check_guide(guide: Guide, shape: ClipShape, vae: VideoCoder, num_loops: int, num_frames: int) -> None:
    """Everything that can be wrong with a guide of a clip of which `num_frames` are kept, before its files are decoded.
    Errors: ValueError naming the part."""
    if guide.edit_ratio is not None and not 0 <= guide.edit_ratio <= 1:
        raise ValueError(f"edit_ratio: must lie in [0, 1], got {guide.edit_ratio}")
    if not guide.edit and (guide.edit_region or guide.edit_ratio is not None):
        raise ValueError("edit: edit_region and edit_ratio need a video to edit, got none")
    if num_loops > 1 and (guide.edit or (guide.start and guide.end)):
        raise ValueError(f"loop: an edit, and a clip between two others, has one part, got loop {num_loops}")
    if guide.end and num_frames != shape.num_frames:
        raise ValueError(f"end: num_frames must be {shape.num_frames}, as the VAE makes them, got {num_frames}")
    if shape.num_latents == 1 and (guide.start or guide.end):
        raise ValueError("start, end: a single picture has nothing else to begin or end with; edit it instead")
    for name in ("start", "end", "edit"):
        path = getattr(guide, name)
        if not path:
            continue
        have, needed = _count(name, path, shape.fps), 1
        if name == "edit":
            needed, purpose = shape.num_frames, "a clip of that length"
        elif not is_image(path):
            needed, purpose = overlap_frames(shape, vae, at_end=name == "end"), f"{shape.overlap} latent frames"
        if have < needed:
            raise ValueError(
                f"{name}: {path} must have at least {needed} frames for {purpose}, got {have} at {shape.fps:g} a second"
            )
    given = [1 if is_image(path) else shape.overlap for path in (guide.start, guide.end) if path]
    if len(given) == 2 and sum(given) >= shape.num_latents:
        raise ValueError(
            f"start, end: must leave something to generate of {shape.num_latents} latent frames, "
            f"but {given[0]} and {given[1]} are given; see condition_frame_length"
        )
    if guide.edit_region:
        _read_region(guide.edit_region, shape)


def _count(name: str, path: str, fps: float) -> int:
    """Frames of a file at the clip's rate. Errors: ValueError for one that cannot be opened."""
    try:
        info = probe(path)
    except VideoError as error:
        raise ValueError(f"{name}: {error}{'' if Path(path).exists() else ' (no such file)'}") from error
    return len(frames_at_rate(info.num_frames, info.fps, fps))


def _read_region(region: str, shape: ClipShape) -> Tensor:
    """What is made anew, bool (T or 1, H, W). Errors: ValueError for a box outside of the picture, a file that cannot
    be used, and one that names nothing."""
    box = parse_box(region)
    if box is not None:
        return box_mask(box, shape.height, shape.width)
    try:
        have = probe(region).num_frames
        frames = read_frames(region, range(min(have, shape.num_frames)))
    except VideoError as error:
        raise ValueError(
            f'edit_region: must be "top,left,height,width" in pixels, or a picture or video: {error}'
        ) from error
    if have != 1 and have < shape.num_frames:
        raise ValueError(f"edit_region: {region} must have 1 frame or at least {shape.num_frames}, got {have}")
    is_bright = transform_frames(frames, (shape.height, shape.width)).amax(dim=0) > 0  # any colour above half
    if not is_bright.any():
        raise ValueError(f"edit_region: {region} must be bright somewhere, got nothing to edit")
    return is_bright


def frames_at_rate(num_frames: int, source_fps: float, fps: float, *, from_end: bool = False) -> list[int]:
    """Numbers of the frames that show a video at another rate, from its first on, or with `from_end` up to its last."""
    if num_frames == 1 or source_fps <= 0 or abs(source_fps / fps - 1) < 0.01:
        return list(range(num_frames))
    step = source_fps / fps
    count = int((num_frames - 1) / step) + 1
    numbers = [min(num_frames - 1, round(i * step)) for i in range(count)]
    return [num_frames - 1 - number for number in reversed(numbers)] if from_end else numbers


def overlap_frames(shape: ClipShape, vae: VideoCoder, *, at_end: bool) -> int:
    """Frames that `shape.overlap` latents stand for at the clip's beginning, or at its end."""
    if at_end:
        return shape.num_frames - vae.frames_of(shape.num_latents - shape.overlap)
    return vae.frames_of(shape.overlap)


def read_source(guide: Guide, shape: ClipShape) -> Source:
    """Decode a guide's files, resized and cropped to the clip's size, at its frame rate."""
    size = (shape.height, shape.width)

    def read(path: str, *, count: int | None = None, from_end: bool = False) -> Tensor | None:
        if not path:
            return None
        info = probe(path)
        numbers = frames_at_rate(info.num_frames, info.fps, shape.fps, from_end=from_end)
        return transform_frames(read_frames(path, numbers[:count]), size)

    region = _read_region(guide.edit_region, shape) if guide.edit_region else None
    return Source(read(guide.start, from_end=True), read(guide.end), read(guide.edit, count=shape.num_frames), region)


def placements(
    guide: Guide, source: Source, shape: ClipShape, vae: VideoCoder, encode: Callable[[Tensor], Tensor]
) -> list[Placement]:
    """What of a clip is given as whole frames. encode: pixels (3, T, H, W) to latents (C, t, h, w)."""
    found = []
    if source.edit is not None and source.region is None:
        found.append(Placement(encode(source.edit), 0, guide.strength))
    if source.start is not None:
        found.append(begin_with(source.start, shape, vae, encode))
    if source.end is not None:
        found.append(end_with(source.end, shape, vae, encode))
    return found


def begin_with(frames: Tensor, shape: ClipShape, vae: VideoCoder, encode: Callable[[Tensor], Tensor]) -> Placement:
    """The clip begins with the last of `frames` (3, T, H, W), or with its only one."""
    count = min(frames.shape[1], overlap_frames(shape, vae, at_end=False))
    return Placement(encode(frames[:, -count:]), 0, 0.0)


def end_with(frames: Tensor, shape: ClipShape, vae: VideoCoder, encode: Callable[[Tensor], Tensor]) -> Placement:
    """The clip ends with the first of `frames` (3, T, H, W), or with its only one.

    The first latent of a causal VAE stands for one frame, others for several: frames that end a clip are encoded as the
    end of one, with their first repeated before them.
    """
    overlap = shape.overlap if frames.shape[1] > 1 else 1
    count = min(frames.shape[1], shape.num_frames - vae.frames_of(shape.num_latents - overlap))
    before = frames[:, :1].expand(-1, shape.num_frames - count, -1, -1)
    latents = encode(torch.cat([before, frames[:, :count]], dim=1))
    return Placement(latents[:, -overlap:], shape.num_latents - overlap, 0.0)


def region_strength(region_THW: Tensor, strength: float, shape: ClipShape, vae: VideoCoder, latents: Tensor) -> Tensor:
    """fp32 (1, t, h, w) for latents (C, t, h, w): `strength` where a pixel of the region lies behind, else 0."""
    starts = [0, *(vae.frames_of(count) for count in range(1, shape.num_latents)), shape.num_frames]
    return latent_mask(region_THW, starts, tuple(latents.shape[2:]))[None].float() * strength


def paste(video: Tensor, source: Source, edge: int) -> Tensor:
    """A generated video (3, T, H, W), outside of the region replaced by the original, with a soft edge inside of it."""
    if source.region is None or source.edit is None:
        return video
    share = soft_edges(source.region, edge).to(video)[None]
    height, width = video.shape[2:]  # a VAE may round a size down to whole latents
    return torch.lerp(source.edit[..., :height, :width].to(video), video, share[..., :height, :width])


def join(video: Tensor, source: Source, shape: ClipShape, vae: VideoCoder) -> Tensor:
    """Given videos before and after what was generated, which is cross-faded with them where both have a frame."""
    height, width = video.shape[2:]
    if source.start is not None and source.start.shape[1] > 1:
        given = source.start[..., :height, :width].to(video)
        video = cross_faded(given, video, overlap_frames(shape, vae, at_end=False))
    if source.end is not None and source.end.shape[1] > 1:
        given = source.end[..., :height, :width].to(video)
        video = cross_faded(video, given, overlap_frames(shape, vae, at_end=True))
    return video


def cross_faded(before: Tensor, after: Tensor, count: int) -> Tensor:
    """Two videos (C, T, H, W) as one, of which `count` frames are the last of the first and the first of the second."""
    share = torch.arange(1, count + 1, device=before.device, dtype=before.dtype)[:, None, None] / (count + 1)
    shared = torch.lerp(before[:, before.shape[1] - count :], after[:, :count], share)
    return torch.cat([before[:, : before.shape[1] - count], shared, after[:, count:]], dim=1)
