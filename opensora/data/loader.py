"""Batches of clips in an order that a resumed run continues exactly, in this process or from workers."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from opensora.config import DataConfig
from opensora.data.buckets import Buckets
from opensora.data.datasets import ClipDataset, Item
from opensora.data.encoded import EncodedDataset, encoded_batches
from opensora.data.joint import JointDataset, pad_batch
from opensora.data.manifest import Manifest, read_manifest
from opensora.data.samplers import FixedSizeBatchSampler, VariableVideoBatchSampler

logger = logging.getLogger(__name__)
# Beside what all ranks say alike of a manifest: files, of which each rank meets others.
skipped_logger = logging.getLogger(f"{__name__}.skipped")
Batch = dict[str, Any]
NUMBERS = {"num_frames", "height", "width", "ar", "fps"}
STACKED = {"video", "latents", "latents_std", "y", "mask", "images"} | {
    f"image_{name}" for name in ("latents", "latents_std", "y", "mask")
}
BatchSampler = FixedSizeBatchSampler | VariableVideoBatchSampler


class ClipLoader:
    """Iterate over batches, epoch after epoch.

    Each `for` loop gives the batches that the current epoch still holds, then moves on to the next epoch; `forever()`
    does that without end. A batch is a dict: video (B, 3, T, H, W) float32 in [-1, 1], or what `EncodedDataset` has in
    its place; num_frames, height, width, ar, fps float32 (B,); text and path lists of B str; aes, flow, camera_motion
    lists of B scores or None; of joint training, what `JointDataset` adds.
    Files that could not be read are collected in `skipped` ({path: reason}), logged once each, and counted in
    `num_replaced`, which counts clips, not files.
    `state_dict()` after a batch, `load_state_dict()` and iteration give the batches that follow it, also with another
    number of ranks or workers. Global random number generators are neither read nor advanced.
    """

    def __init__(
        self,
        dataset: Dataset,
        batches: BatchSampler,
        *,
        num_workers: int = 0,
        pin_memory: bool = False,
        padded_to: tuple[int, int, int] | None = None,
    ) -> None:
        self.dataset, self.batches = dataset, batches
        self._collate = partial(collate, padded_to=padded_to)
        self.num_workers, self.pin_memory = num_workers, pin_memory
        self.epoch = 0
        self.num_batches_done = 0
        self.skipped: dict[str, str] = {}
        self.num_replaced = 0

    def __len__(self) -> int:
        """Batches of the whole current epoch."""
        self.batches.set_epoch(self.epoch)
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        self.batches.set_epoch(self.epoch)
        self.batches.load_state_dict(self.batches.state_dict(self.num_batches_done))
        keys = [[(self.epoch, item) for item in batch] for batch in self.batches]
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
        self.batches.set_epoch(self.epoch)
        return self.batches.state_dict(self.num_batches_done)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after the batch at which `state_dict` was called; not while an iteration is under way."""
        self.batches.load_state_dict(state)
        self.epoch = state["epoch"]
        self.num_batches_done = state["last_micro_batch_access_index"] // self.batches.num_replicas

    def _load(self, keys: list[list[tuple[int, Item]]]) -> Iterator[Batch]:
        if self.num_workers == 0:
            yield from (self._collate([self.dataset[key] for key in batch]) for batch in keys)
            return
        # A generator of its own: DataLoader otherwise draws the workers' seed from the global one, and the noise of a
        # run resumed in mid-epoch would differ from that of an unbroken one.
        yield from DataLoader(
            self.dataset,
            batch_sampler=keys,
            num_workers=self.num_workers,
            collate_fn=self._collate,
            pin_memory=self.pin_memory,
            generator=torch.Generator().manual_seed(self.epoch),
        )

    def _note(self, skipped: list[list[tuple[str, str]]]) -> None:
        self.num_replaced += sum(1 for of_clip in skipped if of_clip)
        for path, reason in (pair for of_clip in skipped for pair in of_clip):
            if path not in self.skipped:
                count = len(self.skipped) + 1
                skipped_logger.warning("skipped %s: %s (unreadable files so far: %d)", path, reason, count)
            self.skipped[path] = reason


def collate(samples: list[dict[str, Any]], *, padded_to: tuple[int, int, int] | None = None) -> Batch:
    """Samples of one size to a batch: clips stacked, numbers as float32 (B,), everything else as lists.

    padded_to: (frames, height, width) to which clips of several sizes are padded, see `opensora.data.joint.pad_batch`.
    """
    batch: Batch = {key: [sample[key] for sample in samples] for key in samples[0]}
    for key in NUMBERS & batch.keys():
        batch[key] = torch.tensor(batch[key], dtype=torch.float32)
    if padded_to is not None:
        batch = pad_batch(batch, padded_to)
    for key in STACKED & batch.keys():
        if isinstance(batch[key], Tensor):
            continue
        sizes = {tuple(tensor.shape) for tensor in batch[key]}
        if len(sizes) > 1:
            raise ValueError(
                f"collate: {key} of a batch must have one shape, got {sorted(sizes)}; set image_size or buckets"
            )
        batch[key] = torch.stack(batch[key])
    return batch


def make_loader(
    config: DataConfig, *, seed: int = 42, rank: int = 0, num_replicas: int = 1, needs_captions: bool = True
) -> ClipLoader:
    """The loader that a configuration describes: bucketed when `config.buckets` is set, otherwise of one size; of
    latents where `config.encoded` is set, see `opensora.data.encoded`.

    One size is `num_frames` frames of `image_size`, or of the clips' own size where that is the same for all. Clips
    and batches that do not fill a batch or a step of all ranks are left out. Without `needs_captions`, clips without a
    text are as good as others, whatever `config.empty_captions` says.
    Raises what `read_manifest` and `EncodedDataset` raise, and ValueError when no clip is long enough, none fits a
    bucket, the clips have several sizes and none was asked for, there are too few for one batch, or options exclude
    each other.
    """
    _check(config)
    ranks = {"rank": rank, "num_replicas": num_replicas, "seed": seed, "drop_last": True}
    if not needs_captions:
        config = replace(config, empty_captions="keep")
    if config.encoded:
        dataset: Any = EncodedDataset(config.encoded)
        batches = encoded_batches(dataset, config, **ranks)
    else:
        dataset, batches = _clips_on_disk(config, seed, ranks)
    if config.use_image_num:
        images = _stored_images(config, dataset) if config.encoded else _images_on_disk(config, seed)
        dataset = JointDataset(dataset, images, config.use_image_num)
    padded_to = None
    if config.fit == "long_side" and not config.encoded:
        padded_to = (config.num_frames, *config.image_size)
    loader = ClipLoader(dataset, batches, num_workers=config.num_workers, padded_to=padded_to)
    len(loader)  # Plans the first epoch, so that clips that make no batch are reported here and not in mid-run.
    return loader


def read_clips(config: DataConfig, manifest: str) -> Manifest:
    """The usable rows of a manifest; the others are named in the log.

    Errors: those of `read_manifest`; ValueError for ''.
    """
    if not manifest:
        raise ValueError("data.manifest must name a list of clips (CSV, JSONL, Parquet, JSON or text), got ''")
    read = read_manifest(manifest, empty_captions=config.empty_captions)
    if read.bad_rows:
        logger.warning("%s", read.describe())
    return read


def one_size(manifest: Manifest, config: DataConfig) -> tuple[Manifest, tuple[int, int, int]]:
    """The clips that are long enough for a training without buckets, and (frames, height, width) of all of them."""
    manifest = _long_enough(manifest, config)
    return manifest, (config.num_frames, *(config.image_size or _common_size(manifest)))


def _check(config: DataConfig) -> None:
    if config.use_image_num < 0:
        raise ValueError(f"data.use_image_num must be at least 0, got {config.use_image_num}")
    for name in ("image_manifest", "encoded_images"):
        if getattr(config, name) and not config.use_image_num:
            raise ValueError(f"data.{name} needs use_image_num, the number of images beside each clip, got 0")
    if config.encoded and config.image_manifest:
        raise ValueError("data.image_manifest cannot stand beside encoded clips: encode it and give encoded_images")
    if config.encoded_images and not config.encoded:
        raise ValueError("data.encoded_images needs encoded, clips encoded likewise, got ''")
    for name, is_set in (("use_image_num", config.use_image_num), ("fit 'long_side'", config.fit == "long_side")):
        if is_set and (config.buckets or (config.image_size is None and not config.encoded)):
            raise ValueError(f"data.{name} needs image_size and no buckets, got {config.image_size}")


def _clips_on_disk(config: DataConfig, seed: int, ranks: dict[str, Any]) -> tuple[ClipDataset, BatchSampler]:
    manifest = read_clips(config, config.manifest)
    batches: BatchSampler
    if config.buckets:
        shapes = [(clip.num_frames, clip.height, clip.width) for clip in manifest.clips]
        batches = VariableVideoBatchSampler(
            shapes, Buckets(config.buckets), frame_interval=config.frame_interval, **ranks
        )
    else:
        manifest, size = one_size(manifest, config)
        batches = FixedSizeBatchSampler(len(manifest.clips), size, config.batch_size, **ranks)
    return clips_of(manifest, config, seed), batches


def clips_of(manifest: Manifest, config: DataConfig, seed: int) -> ClipDataset:
    """Clips as a configuration wants them cut."""
    return ClipDataset(
        manifest,
        num_frames=config.num_frames,
        image_size=config.image_size,
        frame_interval=config.frame_interval,
        fit=config.fit,
        flip=config.flip,
        file_fps=config.file_fps,
        seed=seed,
        cache_in_memory=config.cache_in_memory,
    )


def _images_on_disk(config: DataConfig, seed: int) -> ClipDataset | None:
    if not config.image_manifest:
        return None
    manifest = read_clips(config, config.image_manifest)
    return clips_of(manifest, replace(config, num_frames=1, frame_interval=1), seed)


def _stored_images(config: DataConfig, clips: EncodedDataset) -> EncodedDataset | None:
    if not config.encoded_images:
        return None
    images = EncodedDataset(config.encoded_images)
    images.check(num_frames=1, **{name: clips.settings[name] for name in ("vae", "text_encoder", "store")})
    return images


def _long_enough(manifest: Manifest, config: DataConfig) -> Manifest:
    """Without the clips that end before `num_frames` frames `frame_interval` apart."""
    needed = (config.num_frames - 1) * config.frame_interval + 1
    clips = tuple(clip for clip in manifest.clips if clip.num_frames >= needed)
    if not clips:
        longest = max(clip.num_frames for clip in manifest.clips)
        raise ValueError(
            f"make_loader: num_frames {config.num_frames} every {config.frame_interval} need clips of {needed} frames, "
            f"but the longest in {manifest.path} has {longest}"
        )
    if len(clips) < len(manifest.clips):
        num_short = len(manifest.clips) - len(clips)
        logger.warning("%s: %d clips left out, shorter than %d frames", manifest.path, num_short, needed)
    return replace(manifest, clips=clips)


def _common_size(manifest: Manifest) -> tuple[int, int]:
    sizes = {(clip.height, clip.width) for clip in manifest.clips}
    if len(sizes) > 1:
        raise ValueError(
            f"make_loader: image_size or buckets must be set for {len(sizes)} sizes of clips, like {sorted(sizes)[:3]}"
        )
    return sizes.pop()
