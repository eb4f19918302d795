"""Clips that `opensora encode` has encoded: what takes the place of `ClipDataset` when nothing is encoded in training.

Axes: B batch, C channels, T latent frames, H, W latent height and width, L text tokens.
"""

from __future__ import annotations

from collections import OrderedDict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import Dataset

from opensora.config import DataConfig
from opensora.data.buckets import BucketKey, Buckets
from opensora.data.datasets import Item, split_key
from opensora.data.manifest import Clip, Manifest
from opensora.data.samplers import FixedSizeBatchSampler, VariableVideoBatchSampler
from opensora.data.shards import Row, read_index, read_settings

# A process may have 1024 files open on most systems, and workers have as many each.
MAX_OPEN_SHARDS = 256


class EncodedDataset(Dataset):
    """Encoded clips, under the keys of `ClipDataset` with these in place of `video`:

        latents      float32 (C, T, H, W): the posterior's mean
        latents_std  float32 (C, T, H, W): its standard deviation, where the folder has moments
        y, mask      (1, L, caption_channels) as stored and int64 (L,), where texts are encoded. Unless padding was
                     kept, it reads as 0; the mask says where it is

    `dataset[epoch, item]` is window `epoch` modulo the folder's number of windows, of row `item` or `item.index`, or
    another window of that row where this one could not be read. num_frames, height, width and ar are those of the clip
    in frames and pixels.
    Errors: ValueError for a folder that is none, not finished or damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.settings = read_settings(self.folder)
        rows = read_index(self.folder)
        self.num_windows: int = self.settings["windows"]
        numbers = sorted({row.row for row in rows})
        index_of = {number: index for index, number in enumerate(numbers)}
        self.windows: list[dict[int, Row]] = [{} for _ in numbers]
        for row in rows:
            self.windows[index_of[row.row]][row.window] = row
        if not rows:
            raise ValueError(f"encoded: folder must hold at least one clip, got none in {self.folder}")
        self._open: OrderedDict[str, Any] = OrderedDict()

    @cached_property
    def manifest(self) -> Manifest:
        """The clips that were encoded, as rows of a manifest."""
        firsts = [next(iter(windows.values())) for windows in self.windows]
        names = ("path", "text", "num_frames", "height", "width", "fps", "aes", "flow", "camera_motion")
        return Manifest(
            str(self.folder), tuple(Clip(**{name: getattr(row, name) for name in names}) for row in firsts), ()
        )

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, key: Item | tuple[int, Item]) -> dict[str, Any]:
        epoch, item = split_key(key)
        row = self.row(epoch, item if isinstance(item, int) else int(str(item).partition("-")[0]))
        return {
            **self._tensors(row),
            "text": row.text,
            "path": row.path,
            "num_frames": row.clip_frames,
            "height": row.clip_height,
            "width": row.clip_width,
            "ar": row.clip_height / row.clip_width,
            "fps": row.clip_fps,
            "aes": row.aes,
            "flow": row.flow,
            "camera_motion": row.camera_motion,
            "frames": (row.first_frame, row.last_frame),
            "skipped": [],
        }

    def __getstate__(self) -> dict[str, Any]:
        """For worker processes, which open files of their own."""
        return {**self.__dict__, "_open": OrderedDict()}

    def row(self, epoch: int, index: int) -> Row:
        if not 0 <= index < len(self):
            raise ValueError(f"EncodedDataset: item must be a row below {len(self)}, got {index}")
        windows = self.windows[index]
        return windows.get(epoch % self.num_windows) or list(windows.values())[epoch % len(windows)]

    def check(self, **expected: Any) -> None:
        """Refuse a folder of other models: `expected` are values of encoding.json, such as latent_channels=4.

        Errors: ValueError naming the first that differs.
        """
        for name, value in expected.items():
            if self.settings.get(name) != value:
                raise ValueError(
                    f"encoded: {self.folder} must have been made with {name} {value}, got {self.settings.get(name)}"
                )

    def _tensors(self, row: Row) -> dict[str, Tensor]:
        tensors = {"latents": self._read(row, f"{row.key}.latents").float()}
        if self.settings["store"] == "moments":
            tensors["latents_std"] = self._read(row, f"{row.key}.std").float()
        if row.text_key:
            length = self.settings["model_max_length"]
            y_LC = self._read(row, f"{row.text_key}.y")
            mask_L = torch.zeros(length, dtype=torch.int64)
            mask_L[: int(self._read(row, f"{row.text_key}.length"))] = 1
            padding = y_LC.new_zeros(length - len(y_LC), y_LC.shape[1])
            tensors |= {"y": torch.cat([y_LC, padding])[None], "mask": mask_L}
        return tensors

    def _read(self, row: Row, name: str) -> Tensor:
        path = self.folder / "shards" / row.shard
        try:
            if row.shard not in self._open:
                self._open[row.shard] = safe_open(path, "pt")
                if len(self._open) > MAX_OPEN_SHARDS:
                    self._open.popitem(last=False)
            return self._open[row.shard].get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"encoded: shard {path} must hold {name} of {row.path}: {error}") from error


class EncodedBatchSampler(VariableVideoBatchSampler):
    """Batches of encoded clips that share a bucket: the order that `VariableVideoBatchSampler` gives to the clips
    themselves in the epochs that were encoded, one for each window."""

    def __init__(self, dataset: EncodedDataset, buckets: Buckets, **options: Any) -> None:
        super().__init__([], buckets, **options)
        self.dataset = dataset

    def group_by_bucket(self) -> dict[BucketKey, list[int]]:
        groups: dict[BucketKey, list[int]] = {}
        window = self.epoch % self.dataset.num_windows
        for index, windows in enumerate(self.dataset.windows):
            row = windows.get(window)
            if row is not None:
                groups.setdefault(BucketKey(row.resolution, row.clip_frames, row.aspect), []).append(index)
        return groups


def encoded_batches(
    dataset: EncodedDataset, config: DataConfig, **ranks: Any
) -> EncodedBatchSampler | FixedSizeBatchSampler:
    """Batches in the order in which a training without the encoded folder has them.

    Which clips are kept in which buckets was drawn when they were encoded; batch sizes are those of `config.buckets`.
    Errors: ValueError for a folder of buckets that the configuration has no batch size for, or the reverse.
    """
    cells = {(row.resolution, row.clip_frames) for windows in dataset.windows for row in windows.values()}
    is_bucketed = any(resolution for resolution, _ in cells)
    if is_bucketed != bool(config.buckets):
        made = "buckets" if is_bucketed else "clips of one size"
        raise ValueError(
            f"data.buckets must be set for an encoded folder of buckets and for no other, got one of {made}"
        )
    if not is_bucketed:
        first = dataset.row(0, 0)
        size = (first.clip_frames, first.clip_height, first.clip_width)
        return FixedSizeBatchSampler(len(dataset), size, config.batch_size, **ranks)
    buckets = Buckets(config.buckets)
    for resolution, num_frames in sorted(cells):
        if not buckets.has(resolution, num_frames):
            raise ValueError(
                f"data.buckets must have a batch size for {num_frames} frames at {resolution}, as {dataset.folder} has"
            )
    return EncodedBatchSampler(dataset, buckets, **ranks)
