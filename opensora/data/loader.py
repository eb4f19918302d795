"""Batches of clips in an order that a resumed run continues exactly, in this process or from workers."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import islice
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader

from opensora.config import DataConfig
from opensora.data.datasets import ClipDataset, Item
from opensora.data.manifest import read_manifest

logger = logging.getLogger(__name__)
Batch = dict[str, Any]


class BatchSampler(Protocol):
    """This rank's batches of one epoch as lists of dataset items, the same for the same epoch."""

    def set_epoch(self, epoch: int) -> None: ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[list[Item]]: ...


class ShuffledBatches:
    """Batches of rows for clips of one size, shuffled anew each epoch; the last, partial batch is dropped.

    Batch i of rank r is batch i * world_size + r of the epoch, and batches that not every rank gets are dropped.
    Raises ValueError when there are fewer rows than one batch for each rank needs.
    """

    def __init__(self, rows: list[int], batch_size: int, *, seed: int = 42, rank: int = 0, world_size: int = 1) -> None:
        if batch_size < 1:
            raise ValueError(f"ShuffledBatches: batch_size must be at least 1, got {batch_size}")
        if len(rows) < batch_size * world_size:
            raise ValueError(
                f"ShuffledBatches: rows must fill batches of {batch_size} on {world_size} ranks, got {len(rows)}"
            )
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.rows) // (self.batch_size * self.world_size)

    def __iter__(self) -> Iterator[list[Item]]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.rows), generator=generator).tolist()
        for number in range(self.rank, len(self) * self.world_size, self.world_size):
            yield [self.rows[index] for index in order[number * self.batch_size : (number + 1) * self.batch_size]]


class ClipLoader:
    """Iterate over batches, epoch after epoch.

    Each `for` loop gives the batches that the current epoch still holds, then moves on to the next epoch; `forever()`
    does that without end. A batch is a dict: video (B, 3, T, H, W) float32 in [-1, 1]; num_frames, height, width,
    ar, fps float32 (B,); text and path lists of B str. Files that could not be read are collected in `skipped`
    ({path: reason}), logged once each, and counted in `num_replaced`, which counts clips, not files.
    `state_dict()` after a batch, `load_state_dict()` and iteration give the batches that follow it, also with another
    number of ranks or workers. Global random number generators are neither read nor advanced.
    """

    def __init__(
        self,
        dataset: ClipDataset,
        batches: BatchSampler,
        *,
        num_workers: int = 0,
        world_size: int = 1,
        pin_memory: bool = False,
    ) -> None:
        if len(batches) == 0:
            raise ValueError("ClipLoader: batches must hold at least one batch per epoch, got none")
        self.dataset, self.batches = dataset, batches
        self.num_workers, self.world_size, self.pin_memory = num_workers, world_size, pin_memory
        self.epoch = 0
        self.num_batches_done = 0
        self.skipped: dict[str, str] = {}
        self.num_replaced = 0

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        self.batches.set_epoch(self.epoch)
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        self.batches.set_epoch(self.epoch)
        keys = [[(self.epoch, item) for item in batch] for batch in islice(self.batches, self.num_batches_done, None)]
        for batch in self._load(keys):
            self._note(batch.pop("skipped"))
            # Before the yield: the state saved while a batch is in use must lie after that batch.
            self.num_batches_done += 1
            yield batch
        self.epoch += 1
        self.num_batches_done = 0

    def forever(self) -> Iterator[Batch]:
        """Batches without end."""
        while True:
            yield from self

    def state_dict(self) -> dict[str, int]:
        """Where the loader stands. Batches are counted over all ranks, so that their number may change."""
        return {"epoch": self.epoch, "num_batches": self.num_batches_done * self.world_size}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after the batch at which `state_dict` was called; not while an iteration is under way."""
        self.epoch = int(state["epoch"])
        self.num_batches_done = int(state["num_batches"]) // self.world_size

    def _load(self, keys: list[list[tuple[int, Item]]]) -> Iterator[Batch]:
        if self.num_workers == 0:
            yield from (collate([self.dataset[key] for key in batch]) for batch in keys)
            return
        # A generator of its own: DataLoader otherwise draws the workers' seed from the global one, and the noise of a
        # run resumed in mid-epoch would differ from that of an unbroken one.
        yield from DataLoader(
            self.dataset,
            batch_sampler=keys,
            num_workers=self.num_workers,
            collate_fn=collate,
            pin_memory=self.pin_memory,
            generator=torch.Generator().manual_seed(self.epoch),
        )

    def _note(self, skipped: list[list[tuple[str, str]]]) -> None:
        self.num_replaced += sum(1 for of_clip in skipped if of_clip)
        for path, reason in (pair for of_clip in skipped for pair in of_clip):
            if path not in self.skipped:
                logger.warning("skipped %s: %s", path, reason)
            self.skipped[path] = reason


def collate(samples: list[dict[str, Any]]) -> Batch:
    """Samples of one size to a batch: videos stacked, numbers as float32 (B,), everything else as lists."""
    sizes = {tuple(sample["video"].shape) for sample in samples}
    if len(sizes) > 1:
        raise ValueError(
            f"collate: videos of a batch must have one shape, got {sorted(sizes)}; set image_size or buckets"
        )
    batch: Batch = {key: [sample[key] for sample in samples] for key in samples[0]}
    for key in ("num_frames", "height", "width", "ar", "fps"):
        batch[key] = torch.tensor(batch[key], dtype=torch.float32)
    batch["video"] = torch.stack(batch["video"])
    return batch


def make_loader(config: DataConfig, *, seed: int = 42, rank: int = 0, world_size: int = 1) -> ClipLoader:
    """The loader that a configuration describes: of one size, or bucketed when `config.buckets` is set.

    Raises what `read_manifest` raises, and ValueError when no clip is long enough or none fits a bucket.
    """
    manifest = read_manifest(config.manifest)
    if manifest.bad_rows:
        logger.warning("%s", manifest.describe())
    dataset = ClipDataset(
        manifest,
        num_frames=config.num_frames,
        image_size=config.image_size,
        frame_interval=config.frame_interval,
        seed=seed,
        cache_in_memory=config.cache_in_memory,
    )
    rows = dataset.fitting_rows()
    if len(rows) < len(dataset):
        logger.warning(
            "%d of %d clips are shorter than %d frames", len(dataset) - len(rows), len(dataset), config.num_frames
        )
    batches = ShuffledBatches(rows, config.batch_size, seed=seed, rank=rank, world_size=world_size)
    return ClipLoader(dataset, batches, num_workers=config.num_workers, world_size=world_size)
