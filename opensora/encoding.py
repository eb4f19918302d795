"""`opensora encode`: latents and text embeddings of a manifest's clips, made once and not in every step of a training.

Axes: B batch, C channels, T frames, H height, W width, L text tokens.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from opensora.config import EncodeConfig, TransformerConfig
from opensora.data.buckets import BucketKey, Buckets
from opensora.data.datasets import ClipDataset
from opensora.data.encoded import EncodedDataset
from opensora.data.loader import clips_of, one_size, read_clips
from opensora.data.manifest import Manifest
from opensora.data.reading import VideoError
from opensora.data.samplers import ClipRequest, VariableVideoBatchSampler
from opensora.data.shards import Row, ShardWriter, Unread, open_folder, read_parts, write_index
from opensora.inputs import captions_of
from opensora.text.t5 import TextEncoder

logger = logging.getLogger(__name__)
STORED = {"bf16": torch.bfloat16, "fp32": torch.float32}
VERSION = 1
# What a caption is made of, as in training: scores are appended to it.
CAPTION_PARTS = ("text", "aes", "flow", "camera_motion")
MAX_KNOWN_TEXTS = 1024


@dataclass(frozen=True)
class EncodeResult:
    """What the folder holds now. `unread` names each clip that could not be read; `is_finished`: the index is there."""

    num_encoded: int
    num_items: int
    unread: tuple[Unread, ...]
    manifest: str
    is_finished: bool


# Called with clips done and to do, of this process and run, in frames x pixels, and clips not read.
Progress = Callable[[int, int, int], None]


def run_encode(
    config: EncodeConfig,
    vae: nn.Module,
    text: TextEncoder | None,
    *,
    rank: int = 0,
    world_size: int = 1,
    progress: Progress | None = None,
) -> EncodeResult:
    """Encode the share of `rank` of what is not yet in `config.output`; the last rank to finish writes the index.

    The clips are those that a training with `config.data` and `config.seed` reads in epochs 0 to `windows` - 1, cut
    alike. A process may be killed at any moment: whole shards stay, and the same call goes on after them, with any
    number of ranks. Clips that cannot be read are skipped and named in the result.
    Errors: ValueError for a folder made with other weights, settings or clips, for options out of range, for what
    `make_loader` refuses, and when no clip at all can be read; OSError when a shard cannot be written.
    """
    _check(config, rank, world_size)
    folder = Path(config.output)
    manifest, items = _plan(config)
    open_folder(folder, encoding_settings(config, vae, text, manifest))
    there = read_parts(folder)
    done = {(row.row, row.window) for row in there.rows} if config.retry_unread else there.items
    batches = _batches(items, config.batch_size)[rank::world_size]
    batches = [left for batch in batches if (left := [item for item in batch if item.name not in done])]
    encoder = _ClipEncoder(config, vae, text)
    writer = ShardWriter(folder, rank, config.shard_bytes)
    total, finished, num_unread = sum(item.cost for batch in batches for item in batch), 0, 0
    for batch, samples in zip(
        batches, _read(clips_of(manifest, config.data, config.seed), batches, config), strict=True
    ):
        readable = []
        for item, sample in zip(batch, samples, strict=True):
            if isinstance(sample, VideoError):
                logger.warning("skipped %s: %s", sample.path, sample.reason)
                writer.note_unread(Unread(*item.name, sample.path, sample.reason))
                num_unread += 1
            else:
                readable.append((item, sample))
        for row, tensors in encoder.encode(readable):
            writer.add(row, tensors)
        finished += sum(item.cost for item in batch)
        if progress is not None:
            progress(finished, total, num_unread)
    writer.flush()
    return _finish(folder, manifest, {item.name for item in items})


@dataclass(frozen=True)
class _Item:
    """One clip to encode."""

    window: int
    request: ClipRequest
    bucket: BucketKey | None

    @property
    def name(self) -> tuple[int, int]:
        return self.request.index, self.window

    @property
    def cost(self) -> int:
        return self.request.num_frames * self.request.height * self.request.width


def _plan(config: EncodeConfig) -> tuple[Manifest, list[_Item]]:
    """The clips of every window, ordered so that those of one size, and windows of one clip, follow each other."""
    manifest = read_clips(config.data, config.data.manifest)
    if not config.data.buckets:
        manifest, size = one_size(manifest, config.data)
        requests = [ClipRequest(index, *size) for index in range(len(manifest.clips))]
        return manifest, [_Item(window, request, None) for request in requests for window in range(config.windows)]
    shapes = [(clip.num_frames, clip.height, clip.width) for clip in manifest.clips]
    buckets = Buckets(config.data.buckets)
    sampler = VariableVideoBatchSampler(shapes, buckets, frame_interval=config.data.frame_interval, seed=config.seed)
    items = []
    for window in range(config.windows):
        sampler.set_epoch(window)
        for key, rows in sampler.group_by_bucket().items():
            items += [_Item(window, ClipRequest(index, *buckets.size(key)), key) for index in rows]
    if not items:
        raise ValueError(f"encode: some clip must fit a bucket of data.buckets, got none of {len(shapes)} that does")
    items.sort(key=lambda item: (item.request[1:], item.request.index, item.window))
    return manifest, items


def _batches(items: list[_Item], batch_size: int) -> list[list[_Item]]:
    batches: list[list[_Item]] = []
    for item in items:
        if batches and len(batches[-1]) < batch_size and batches[-1][0].request[1:] == item.request[1:]:
            batches[-1].append(item)
        else:
            batches.append([item])
    return batches


class _Reader(Dataset):
    """Samples or, in the place of those that cannot be read, the error."""

    def __init__(self, clips: ClipDataset) -> None:
        self.clips = clips

    def __getitem__(self, item: _Item) -> dict[str, Any] | VideoError:
        try:
            sample = self.clips.read((item.window, item.request))
        except VideoError as error:
            return error
        return {**sample, "clip": self.clips.manifest.clips[item.request.index]}


def _read(clips: ClipDataset, batches: list[list[_Item]], config: EncodeConfig) -> Iterator[list[Any]]:
    generator = torch.Generator().manual_seed(config.seed)  # DataLoader would draw from the global one
    workers = {"num_workers": config.data.num_workers, "generator": generator}
    return iter(DataLoader(_Reader(clips), batch_sampler=batches, collate_fn=list, **workers))


@dataclass
class _ClipEncoder:
    """Samples to rows of the index and tensors of a shard."""

    config: EncodeConfig
    vae: nn.Module
    text: TextEncoder | None
    known_texts: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    @torch.no_grad()
    def encode(self, batch: list[tuple[_Item, dict[str, Any]]]) -> Iterator[tuple[Row, dict[str, Tensor]]]:
        if not batch:
            return
        weight = next(self.vae.parameters())
        video_BCTHW = torch.stack([sample["video"] for _, sample in batch]).to(weight)
        latents = self._latents(video_BCTHW)
        captions = captions_of({name: [sample[name] for _, sample in batch] for name in CAPTION_PARTS})
        self._embed(captions)
        for number, ((item, sample), caption) in enumerate(zip(batch, captions, strict=True)):
            key = f"{item.request.index}-{item.window}"
            tensors = {f"{key}.{name}": values[number] for name, values in latents.items()}
            text_key = ""
            if self.text is not None:
                text_key = f"text-{hashlib.sha256(caption.encode()).hexdigest()[:20]}"
                tensors |= {f"{text_key}.{name}": tensor for name, tensor in self.known_texts[caption].items()}
            yield _row(item, sample, key, text_key), tensors

    def _latents(self, video_BCTHW: Tensor) -> dict[str, Tensor]:
        storage = STORED[self.config.storage]
        if self.config.store == "mean":
            latents = {"latents": self.vae.encode(video_BCTHW, sample_posterior=False)}
        else:
            latents = dict(zip(("latents", "std"), self.vae.encode_moments(video_BCTHW), strict=True))
        return {name: values.to("cpu", storage) for name, values in latents.items()}

    def _embed(self, captions: list[str]) -> None:
        """Fill `known_texts`: many clips of a set can have one caption, and each window of a clip has."""
        if self.text is None:
            return
        if len(self.known_texts) > MAX_KNOWN_TEXTS:
            self.known_texts.clear()
        new = [caption for caption in dict.fromkeys(captions) if caption not in self.known_texts]
        if not new:
            return
        y_B1LC, mask_BL = self.text.encode(new)
        for caption, y_1LC, mask_L in zip(new, y_B1LC, mask_BL.cpu(), strict=True):
            length = int(mask_L.sum())
            if not mask_L[:length].all():
                raise ValueError("encode: text_encoder must pad on the right, got a caption with padding in front")
            kept = len(mask_L) if self.config.keep_padding else length
            y_LC = y_1LC[0, :kept].to("cpu", STORED[self.config.storage])
            self.known_texts[caption] = {"y": y_LC, "length": torch.tensor(length)}


def _row(item: _Item, sample: dict[str, Any], key: str, text_key: str) -> Row:
    clip = sample["clip"]
    first_frame, last_frame = sample["frames"]
    return Row(
        **{name: getattr(clip, name) for name in ("path", "text", "num_frames", "height", "width", "fps")},
        **{name: getattr(clip, name) for name in ("aes", "flow", "camera_motion")},
        row=item.request.index,
        window=item.window,
        first_frame=first_frame,
        last_frame=last_frame,
        clip_frames=sample["num_frames"],
        clip_height=sample["height"],
        clip_width=sample["width"],
        clip_fps=sample["fps"],
        resolution=item.bucket.resolution if item.bucket else "",
        aspect=item.bucket.aspect if item.bucket else "",
        key=key,
        text_key=text_key,
    )


def _finish(folder: Path, manifest: Manifest, wanted: set[tuple[int, int]]) -> EncodeResult:
    contents = read_parts(folder)
    is_finished = contents.items >= wanted
    if is_finished and not contents.rows:
        first = contents.unread[0]
        raise ValueError(
            f"encode: at least one clip must be readable, got {len(contents.unread)} that are not, like {first.path}: "
            f"{first.reason}"
        )
    if is_finished:
        write_index(folder, contents.rows)
    return EncodeResult(len(contents.rows), len(wanted), tuple(contents.unread), manifest.describe(), is_finished)


def encoding_settings(
    config: EncodeConfig, vae: nn.Module, text: TextEncoder | None, manifest: Manifest
) -> dict[str, Any]:
    """What the content of a folder depends on: weights, precision, how clips are cut, and which clips there are."""
    data = config.data
    clips = hashlib.sha256()
    for clip in manifest.clips:
        path = os.path.relpath(clip.path, Path(data.manifest).parent)
        clips.update(json.dumps({**asdict(clip), "path": path}).encode())
    return {
        "version": VERSION,
        "vae": weights_digest(vae),
        "latent_channels": vae.latent_channels,
        "text_encoder": "" if text is None else text_digest(text),
        "caption_channels": 0 if text is None else text.output_dim,
        "model_max_length": 0 if text is None else text.model_max_length,
        "clips": clips.hexdigest(),
        "buckets": data.buckets,
        **{
            name: getattr(data, name)
            for name in ("image_size", "num_frames", "frame_interval", "fit", "flip", "file_fps")
        },
        **{name: getattr(config, name) for name in ("windows", "store", "storage", "keep_padding", "tile_vae")},
        **{name: getattr(config, name) for name in ("seed", "dtype", "text_dtype")},
    }


def check_encoded(
    dataset: EncodedDataset,
    transformer: TransformerConfig,
    *,
    vae: nn.Module | None = None,
    text: TextEncoder | None = None,
) -> None:
    """Refuse encoded clips that a transformer cannot be trained on, or that other models have encoded.

    `vae` and `text`, where they are at hand, are those that will decode and embed in sampling.
    Errors: ValueError naming what differs.
    """
    dataset.check(latent_channels=transformer.in_channels)
    if vae is not None:
        dataset.check(vae=weights_digest(vae))
    if dataset.settings["text_encoder"]:
        for name in ("caption_channels", "model_max_length"):
            dataset.check(**{name: getattr(transformer, name)})
        if text is not None:
            dataset.check(text_encoder=text_digest(text))


def weights_digest(module: nn.Module) -> str:
    """A digest of a module's weights rounded to bf16, so that it is the same of weights loaded in fp32 and bf16."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().to("cpu", torch.bfloat16).reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def text_digest(text: TextEncoder) -> str:
    """A digest of an encoder's weights and of its tokenizer's words."""
    words = hashlib.sha256(json.dumps(text.tokenizer.get_vocab(), sort_keys=True).encode()).hexdigest()
    return f"{weights_digest(text.model)}-{words[:16]}"


def _check(config: EncodeConfig, rank: int, world_size: int) -> None:
    if not config.output:
        raise ValueError("encode: output must name a folder, got ''")
    for name in ("windows", "batch_size", "shard_bytes"):
        if getattr(config, name) < 1:
            raise ValueError(f"encode: {name} must be at least 1, got {getattr(config, name)}")
    if not 0 <= rank < world_size:
        raise ValueError(f"encode: rank must lie in [0, world_size = {world_size}), got {rank}")
    if config.data.fit == "long_side":
        raise ValueError("encode: data.fit must give every clip of a batch one size, got 'long_side'")
