"""Which clips a training reads, and how."""

from __future__ import annotations

from dataclasses import dataclass, field

# {resolution: {num_frames: (keep_probability or (keep, frame_probability), batch_size)}}
BucketTable = dict[str, dict[int, tuple[float | tuple[float, float], int]]]


@dataclass(frozen=True)
class DataConfig:
    """Which clips to read and how. `manifest` is a CSV, JSONL or Parquet file with columns path and text."""

    manifest: str = ""
    buckets: BucketTable = field(default_factory=dict)
    image_size: tuple[int, int] | None = None
    num_frames: int = 51
    frame_interval: int = 1
    batch_size: int = 1
    num_workers: int = 0
    cache_in_memory: bool = False
    validation: str = ""
