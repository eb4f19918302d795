"""Frames to files: mp4, gif, png and contact sheets.

Frames are uint8 TCHW, RGB, values 0-255: T frames, C = 3 channels, H height, W width. Every file appears under its
name only when complete; the same frames give the same bytes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from av.container import OutputContainer
from av.video.reformatter import ColorRange, Colorspace
from av.video.stream import VideoStream
from PIL import Image
from torch import Tensor


def to_uint8(video: Tensor) -> Tensor:
    """Turn a model's video into frames: round((v + 1) / 2 * 255), values outside [-1, 1] clipped.

    Shapes: float (3, T, H, W) -> uint8 (T, 3, H, W). Raises ValueError for another shape or values that are not finite.
    """
    if video.dim() != 4 or video.shape[0] != 3:
        raise ValueError(f"to_uint8: video must have shape (3, T, H, W), got {tuple(video.shape)}")
    video = video.detach().float().cpu()
    if not torch.isfinite(video).all():
        raise ValueError(f"to_uint8: video must be finite, got {int((~torch.isfinite(video)).sum())} NaN or infinities")
    return ((video.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 0, 2, 3).contiguous()


def write_video(path: str | Path, frames: Tensor, *, fps: float, crf: int = 18) -> Path:
    """Write uint8 (T, 3, H, W) frames in the format that the suffix of `path` names: .mp4, .gif or .png (one frame).

    Raises ValueError for another suffix, shape or dtype, or several frames into a .png; OSError when the disk is
    full, in which case a file that was there before is still there.
    """
    suffix = Path(path).suffix.lower()
    if suffix == ".mp4":
        return write_mp4(path, frames, fps=fps, crf=crf)
    if suffix == ".gif":
        return write_gif(path, frames, fps=fps)
    if suffix == ".png":
        if frames.shape[0] != 1:
            raise ValueError(f"write_video: a .png holds one frame, got {frames.shape[0]}; write .mp4 or .gif")
        return write_png(path, frames[0])
    raise ValueError(f"write_video: path must end in .mp4, .gif or .png, got {str(path)!r}")


def write_mp4(path: str | Path, frames: Tensor | Iterable[Tensor], *, fps: float, crf: int = 18) -> Path:
    """Encode uint8 (T, 3, H, W) frames as H.264 4:2:0, the one kind of mp4 that every player opens.

    `frames` may come in chunks of one H and W, each encoded and let go before the next is asked for. `crf` is x264's
    quality, 0 (lossless up to the colour conversion) to 51. An odd height or width is made even by repeating the last
    row or column, because 4:2:0 has no half pixels. Errors as for `write_video`, and whatever making a chunk raises;
    no file of that name is left then that was not there before.
    """
    if isinstance(frames, Tensor):
        _check_frames("write_mp4", frames)
        frames = [frames]
    if not fps > 0:
        raise ValueError(f"write_mp4: fps must be positive, got {fps}")
    rate = Fraction(fps).limit_denominator(1001)
    with (
        _replacing(path) as temporary,
        av.open(str(temporary), "w", format="mp4", options={"fflags": "+bitexact", "movflags": "+faststart"}) as file,
    ):
        stream, size, count = None, None, 0
        for chunk in frames:
            _check_frames("write_mp4", chunk)
            if stream is None:
                size = chunk.shape[2:]
                stream = _add_h264(file, size, rate, crf)
            if chunk.shape[2:] != size:
                raise ValueError(
                    f"write_mp4: frames must be of one size, got {tuple(size)}, then {tuple(chunk.shape[2:])}"
                )
            for pixels in _even(chunk.permute(0, 2, 3, 1).numpy()):
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
                frame = frame.reformat(
                    format="yuv420p", dst_colorspace=Colorspace.SMPTE170M, dst_color_range=ColorRange.MPEG
                )
                frame.pts, frame.time_base = count, 1 / rate
                file.mux(stream.encode(frame))
                count += 1
        if stream is None:
            raise ValueError("write_mp4: frames must hold at least one frame, got no chunk")
        file.mux(stream.encode())
    return Path(path)


def _add_h264(file: OutputContainer, size: Sequence[int], rate: Fraction, crf: int) -> VideoStream:
    # x264's output depends on the number of threads, and with mbtree on what its uninitialised memory holds.
    options = {"crf": str(crf), "threads": "1", "x264-params": "mbtree=0", "flags": "+bitexact"}
    stream = file.add_stream("libx264", rate=rate, options=options)
    stream.height, stream.width = (pixels + pixels % 2 for pixels in size)
    stream.pix_fmt = "yuv420p"
    stream.codec_context.time_base = 1 / rate
    # Tagged, because players guess BT.709 for large and BT.601 for small untagged pictures.
    stream.codec_context.colorspace = Colorspace.SMPTE170M
    stream.codec_context.color_range = ColorRange.MPEG
    return stream


def _even(frames_THWC: np.ndarray) -> np.ndarray:
    num_odd_rows, num_odd_columns = (size % 2 for size in frames_THWC.shape[1:3])
    return np.pad(frames_THWC, ((0, 0), (0, num_odd_rows), (0, num_odd_columns), (0, 0)), mode="edge")


def write_gif(path: str | Path, frames: Tensor, *, fps: float) -> Path:
    """Write uint8 (T, 3, H, W) frames as an endless gif; a gif's clock ticks in 1/100 s, so `fps` is rounded to it."""
    _check_frames("write_gif", frames)
    if not fps > 0:
        raise ValueError(f"write_gif: fps must be positive, got {fps}")
    images = [_image(frame).quantize(256, method=Image.Quantize.MEDIANCUT) for frame in frames]
    milliseconds = max(10, 10 * round(100 / fps))
    with _replacing(path) as temporary:
        images[0].save(
            temporary, format="GIF", save_all=True, append_images=images[1:], duration=milliseconds, loop=0, disposal=1
        )
    return Path(path)


def write_png(path: str | Path, frame: Tensor) -> Path:
    """Write one uint8 (3, H, W) frame."""
    _check_frames("write_png", frame[None])
    with _replacing(path) as temporary:
        _image(frame).save(temporary, format="PNG")
    return Path(path)


def write_contact_sheet(path: str | Path, clips: Sequence[Tensor], *, num_columns: int = 9, gap: int = 2) -> Path:
    """Write one picture with a row for each clip and `num_columns` frames of it, evenly spaced from first to last.

    Shapes: each clip uint8 (T, 3, H, W), all of one H and W. Raises ValueError for no clips or clips of several sizes.
    """
    sizes = {tuple(clip.shape[2:]) for clip in clips}
    if len(sizes) != 1:
        raise ValueError(f"write_contact_sheet: clips must be one or more of the same size, got sizes {sorted(sizes)}")
    for clip in clips:
        _check_frames("write_contact_sheet", clip)
    num_columns = min(num_columns, max(clip.shape[0] for clip in clips))
    height, width = sizes.pop()
    sheet = torch.full((3, len(clips) * (height + gap) + gap, num_columns * (width + gap) + gap), 32, dtype=torch.uint8)
    for row, clip in enumerate(clips):
        indices = torch.linspace(0, clip.shape[0] - 1, num_columns).round().long().unique()
        for column, index in enumerate(indices.tolist()):
            top, left = gap + row * (height + gap), gap + column * (width + gap)
            sheet[:, top : top + height, left : left + width] = clip[index]
    return write_png(path, sheet)


def _check_frames(function: str, frames: Tensor) -> None:
    if frames.dtype != torch.uint8:
        raise TypeError(f"{function}: frames must be uint8, got {frames.dtype}; see to_uint8")
    if frames.dim() != 4 or frames.shape[1] != 3 or 0 in frames.shape:
        raise ValueError(f"{function}: frames must have shape (T, 3, H, W), none of them 0, got {tuple(frames.shape)}")


def _image(frame_CHW: Tensor) -> Image.Image:
    return Image.fromarray(frame_CHW.permute(1, 2, 0).contiguous().numpy())


@contextmanager
def _replacing(path: str | Path) -> Iterator[Path]:
    """A temporary name beside `path` that takes its place on success and vanishes on any failure."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error  # not the temporary name
    finally:
        temporary.unlink(missing_ok=True)
