"""Which clips a training reads, and how."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Fit = Literal["resize_crop", "center", "square", "long_side", "crop"]
# {resolution: {num_frames: (keep_probability or (keep, frame_probability), batch_size)}}
BucketTable = dict[str, dict[int, tuple[float | tuple[float, float], int]]]


@dataclass(frozen=True)
class DataConfig:
    """Which clips to read and how.

    `manifest` is a CSV, JSONL or Parquet file with columns path and text, or one of Open-Sora-Plan's lists. `encoded`
    is a folder of `opensora encode`, read in place of it. Rows without a text are left out and named, unless
    `empty_captions` is "keep". `fit`: how frames come to `image_size`, see `opensora.data.transforms`; `flip` mirrors
    every second clip. `file_fps` tells the model the file's frame rate, whatever `frame_interval` is (Open-Sora 1.1).

    `use_image_num` puts that many images beside each clip (Open-Sora-Plan's joint training): of `image_manifest`, or of
    `encoded_images`, or, where both are "", frames of the clip itself, with its caption.
    """

    manifest: str = ""
    buckets: BucketTable = field(default_factory=dict)
    image_size: tuple[int, int] | None = None
    num_frames: int = 51
    frame_interval: int = 1
    batch_size: int = 1
    num_workers: int = 0
    cache_in_memory: bool = False
    validation: str = ""
    encoded: str = ""
    empty_captions: Literal["skip", "keep"] = "skip"
    fit: Fit = "resize_crop"
    flip: bool = False
    file_fps: bool = False
    use_image_num: int = 0
    image_manifest: str = ""
    encoded_images: str = ""
