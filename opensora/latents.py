"""Latents of all clips in memory and in a file, for clips of one size that are trained on many times.

Axes: N clips, C channels, T latent frames, H, W latent height and width.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from opensora.config import TrainConfig
from opensora.data.datasets import ClipDataset
from opensora.data.shards import replacing
from opensora.inputs import Encoders
from opensora.parallel import ParallelContext
from opensora.training import ShuffledBatches

logger = logging.getLogger(__name__)
NUMBERS = ("height", "width", "num_frames", "fps")


def cached_batches(
    config: TrainConfig, encoders: Encoders, clips: ClipDataset, context: ParallelContext
) -> ShuffledBatches[dict[str, Any]]:
    """Batches from latents in memory: the posterior mean of each clip, one window of it.

    They are read from `run.output`/latents.safetensors where that was made of the same clips by the same VAE. Where it
    was not, each rank encodes all clips, and the main one writes the file.
    """
    latents, numbers, captions = _encode_all(config, encoders, clips, context)

    def load(indices: list[int]) -> dict[str, Any]:
        columns = {name: numbers[indices, i] for i, name in enumerate(NUMBERS)}
        return columns | {"latents": latents[indices], "text": [captions[index] for index in indices]}

    return ShuffledBatches(
        [0] * len(captions),
        load,
        batch_size=config.data.batch_size,
        seed=config.run.seed,
        rank=context.data_rank,
        world_size=context.data_world_size,
    )


def _encode_all(
    config: TrainConfig, encoders: Encoders, clips: ClipDataset, context: ParallelContext
) -> tuple[Tensor, Tensor, list[str]]:
    """(latents (N, C, T, H, W), sizes and fps (N, 4), captions)."""
    path = Path(config.run.output) / "latents.safetensors"
    key = _cache_key(config, encoders.vae, clips)
    if path.exists():
        with safe_open(path, "pt") as stored:
            metadata = stored.metadata() or {}
            if metadata.get("key") == key:
                captions = json.loads(metadata["captions"])
                return stored.get_tensor("latents"), stored.get_tensor("numbers"), captions
    logger.warning("encoding %d clips", len(clips))
    latents, numbers, captions = [], [], []
    for index in range(len(clips)):
        clip = clips[index]
        for skipped, reason in clip["skipped"]:
            logger.warning("skipped %s: %s", skipped, reason)
        latents.append(encoders.encode_pixels(clip["video"][None], sample_posterior=False)[0].cpu())
        numbers.append([float(clip[name]) for name in NUMBERS])
        captions.append(clip["text"])
    cached = {"latents": torch.stack(latents), "numbers": torch.tensor(numbers)}
    if context.is_main:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            save_file(cached, temporary, metadata={"key": key, "captions": json.dumps(captions)})
    return cached["latents"], cached["numbers"], captions


def _cache_key(config: TrainConfig, vae: Any, clips: ClipDataset) -> str:
    """What cached latents depend on: VAE weights, precision, the manifest's rows, and how clips are cut."""
    digest = hashlib.sha256()
    for name, tensor in vae.state_dict().items():
        digest.update(name.encode() + tensor.cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    data = replace(config.data, batch_size=0, num_workers=0, validation="")
    digest.update(repr((data, config.run.seed, config.run.dtype, clips.manifest.clips)).encode())
    return digest.hexdigest()
