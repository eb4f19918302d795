"""Reading frames from video and image files, decoding no more than was asked for.

Frames are uint8 TCHW, RGB, values 0-255: T frames, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".webp", ".tif", ".tiff"})
# Below this, decoding from the first frame costs less than indexing the packets of the file in order to seek.
SEEK_FROM_FRAME = 32


class VideoError(ValueError):
    """A file that cannot be read as video or image: `path` names it, `reason` says why."""

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = str(path)
        self.reason = reason

    def __reduce__(self) -> tuple[type[VideoError], tuple[str, str]]:
        return VideoError, (self.path, self.reason)


@dataclass(frozen=True)
class VideoInfo:
    """What a file holds: frames, frames per second (0 for an image), pixels."""

    num_frames: int
    fps: float
    height: int
    width: int


def is_image(path: str | Path) -> bool:
    """Whether the file's name says that it is a still image."""
    return Path(path).suffix.lower() in IMAGE_SUFFIXES


def probe(path: str | Path) -> VideoInfo:
    """Read the number of frames, the frame rate and the size, decoding nothing.

    The count comes from the header, or from counting packets where the header has none.
    Raises VideoError for a file that is missing, empty, without a video stream or damaged at its start.
    """
    if is_image(path):
        with _open_image(path) as image:
            # Orientations 5 to 8 of EXIF tag 274 swap the axes.
            swapped = image.getexif().get(274, 1) >= 5
            width, height = reversed(image.size) if swapped else image.size
        return VideoInfo(1, 0.0, height, width)
    try:
        with av.open(str(path)) as container:
            stream = _video_stream(container, path)
            num_frames = stream.frames or sum(1 for packet in container.demux(stream) if packet.size)
            rate = stream.average_rate or stream.guessed_rate
            info = VideoInfo(num_frames, float(rate or 0), stream.height, stream.width)
    except (OSError, av.FFmpegError) as error:
        raise VideoError(path, _reason(error)) from error
    if min(info.num_frames, info.height, info.width) < 1:
        raise VideoError(path, f"holds no frames ({info.num_frames} frames of {info.height} x {info.width})")
    return info


def read_frames(path: str | Path, indices: Sequence[int] | None = None, *, num_threads: int = 1) -> Tensor:
    """Decode the frames at `indices` (every frame when None).

    Shapes: returns uint8 (T, 3, H, W), frame t being number `indices[t]` of the file; indices may repeat and come in
        any order. Decoding begins at the key frame before the first of them and ends with the last of them.
    Units: frames count from 0; pixels are RGB, 0-255.
    Errors: VideoError when the file cannot be opened or decoded, a needed frame is damaged, or the file ends before
        the last index; ValueError for a negative index or an empty list.
    """
    if indices is not None and (len(indices) == 0 or min(indices) < 0):
        raise ValueError(f"read_frames: indices must be one or more frame numbers from 0, got {list(indices)}")
    if is_image(path):
        return _read_image(path, indices)
    wanted = None if indices is None else set(indices)
    frames: dict[int, np.ndarray] = {}
    try:
        with av.open(str(path)) as container:
            stream = _video_stream(container, path)
            stream.codec_context.thread_count = num_threads
            for index, frame in _numbered_frames(container, stream, min(wanted) if wanted else 0):
                if wanted is None or index in wanted:
                    if frame.is_corrupt:
                        raise VideoError(path, f"frame {index} is damaged")
                    frames[index] = frame.to_ndarray(format="rgb24")
                if wanted is not None and len(frames) == len(wanted):
                    break
            declared = stream.frames
    except (OSError, av.FFmpegError) as error:
        raise VideoError(path, _reason(error)) from error
    if wanted is None:
        if not frames or len(frames) < declared:
            raise VideoError(path, f"truncated: {len(frames)} of {declared} frames could be decoded")
        indices = sorted(frames)
    missing = sorted(wanted - frames.keys()) if wanted is not None else []
    if missing:
        raise VideoError(path, f"truncated: frame {missing[0]} could not be decoded (header says {declared} frames)")
    sizes = {frame.shape for frame in frames.values()}
    if len(sizes) > 1:
        raise VideoError(path, f"the frame size changes within the file: {sorted(sizes)}")
    return torch.from_numpy(np.stack([frames[index] for index in indices])).permute(0, 3, 1, 2).contiguous()


def _numbered_frames(
    container: av.container.InputContainer, stream: av.VideoStream, first: int
) -> Iterator[tuple[int, av.VideoFrame]]:
    """Decoded frames with their numbers, starting at or before frame `first`."""
    if first >= SEEK_FROM_FRAME:
        # Exact also for variable frame rates, where number = time x rate is not.
        packets = (packet for packet in container.demux(stream) if packet.size and not packet.is_discard)
        timestamps = sorted(packet.pts for packet in packets if packet.pts is not None)
        if first < len(timestamps) and len(set(timestamps)) == len(timestamps):
            number_of = {timestamp: number for number, timestamp in enumerate(timestamps)}
            container.seek(timestamps[first], stream=stream, backward=True)
            for frame in container.decode(stream):
                if frame.pts in number_of:
                    yield number_of[frame.pts], frame
            return
        container.seek(0)
    yield from enumerate(container.decode(stream))


def _video_stream(container: av.container.InputContainer, path: str | Path) -> av.VideoStream:
    if not container.streams.video:
        raise VideoError(path, "has no video stream")
    return container.streams.video[0]


def _open_image(path: str | Path) -> Image.Image:
    try:
        return Image.open(path)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise VideoError(path, _reason(error)) from error


def _read_image(path: str | Path, indices: Sequence[int] | None) -> Tensor:
    if indices is not None and max(indices) > 0:
        raise VideoError(path, f"is a still image, it has no frame {max(indices)}")
    with _open_image(path) as image:
        try:
            pixels = np.array(ImageOps.exif_transpose(image).convert("RGB"))
        except (OSError, ValueError, SyntaxError) as error:  # PIL reports a damaged PNG as SyntaxError
            raise VideoError(path, _reason(error)) from error
    frame_CHW = torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
    return frame_CHW[None].repeat(1 if indices is None else len(indices), 1, 1, 1)


def _reason(error: Exception) -> str:
    """The message without FFmpeg's error number and the file's name, which VideoError says anyway."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
