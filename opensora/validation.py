"""The loss on held-out clips, for each bucket and timestep: Open-Sora 1.2's measure of how a training goes.

Source: hpcaitech/Open-Sora v1.2.0, eval/loss: ten timesteps, no frames given, every clip in every bucket it fills.
Ours: posterior means, and noise that depends on the clip alone, so that two measurements differ by the weights only.

Axes: B batch, C channels, T latent frames, H, W latent height and width.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from opensora.config import DataConfig
from opensora.data.buckets import Buckets
from opensora.data.datasets import ClipDataset
from opensora.data.loader import clips_of, collate, read_clips, skipped_logger
from opensora.data.samplers import ClipRequest
from opensora.data.shards import replacing
from opensora.inputs import Encoders, Inputs
from opensora.parallel import ParallelContext
from opensora.schedulers import TrainingScheduler

# Ten points inside [0, 1], both ends left out.
SHARES = tuple(i / 11 for i in range(1, 11))
Conditioned = Callable[[Inputs], Callable[..., Tensor]]


@dataclass(frozen=True)
class HeldOut:
    """Held-out clips, and which of them are cut how for each bucket. rows: of which (timesteps) one batch holds."""

    clips: ClipDataset
    requests: Mapping[str, tuple[ClipRequest, ...]]
    rows: Mapping[str, int]


def held_out(config: DataConfig, num_clips: int) -> HeldOut:
    """The first `num_clips` clips of `config.validation` that fill each bucket of the training, or its one size.

    Errors: those of `read_manifest`; ValueError when no clip is large and long enough for any bucket.
    """
    manifest = read_clips(config, config.validation)
    requests: dict[str, tuple[ClipRequest, ...]] = {}
    rows: dict[str, int] = {}
    for name, batch_size, assign in _buckets(config):
        sizes = [(row, assign(clip.num_frames, clip.height, clip.width)) for row, clip in enumerate(manifest.clips)]
        chosen = [ClipRequest(row, *size) for row, size in sizes if size is not None][:num_clips]
        if chosen:
            requests[name], rows[name] = tuple(chosen), max(1, min(batch_size, len(SHARES)))
    if not requests:
        raise ValueError(
            f"validation: clips of {config.validation} must fill a bucket, of {len(manifest.clips)} none do"
        )
    clips = clips_of(manifest, replace(config, flip=False), seed=0)
    return HeldOut(clips, requests, rows)


def _buckets(config: DataConfig) -> Iterator[tuple[str, int, Callable[..., tuple[int, int, int] | None]]]:
    """Name, batch size in training, and a function from a clip's (frames, height, width) to the size it is cut to."""
    if not config.buckets:
        size = config.image_size

        def fixed(num_frames: int, height: int, width: int) -> tuple[int, int, int] | None:
            needed = (config.num_frames - 1) * config.frame_interval + 1
            return None if num_frames < needed else (config.num_frames, *(size or (height, width)))

        yield f"{config.num_frames}_frames", config.batch_size, fixed
        return
    for resolution, cells in config.buckets.items():
        for num_frames, (probability, batch_size) in cells.items():
            keep = probability[0] if isinstance(probability, (tuple, list)) else probability
            if keep <= 0:
                continue
            # Alone in its table and always kept, a bucket takes every clip that fills it.
            alone = Buckets({resolution: {num_frames: (1.0, batch_size)}})

            def in_bucket(
                num_frames: int, height: int, width: int, alone: Buckets = alone
            ) -> tuple[int, int, int] | None:
                key = alone.assign(num_frames, height, width, frame_interval=config.frame_interval)
                return None if key is None else alone.size(key)

            yield f"{resolution}_{num_frames}_frames", batch_size, in_bucket


@torch.no_grad()
def validation_losses(
    data: HeldOut,
    encoders: Encoders,
    scheduler: TrainingScheduler,
    conditioned: Conditioned,
    context: ParallelContext,
) -> dict[str, list[float]]:
    """{bucket: mean loss at each of `SHARES`}. `conditioned` makes of a batch the function (x, t, **sizes) -> output.

    Ranks that read different data share the clips; all of them call the model equally often, as sharded weights need.
    """
    losses = {}
    for name, requests in data.requests.items():
        share = -(-len(requests) // context.data_world_size)
        sums = torch.zeros(2, len(SHARES), device=context.device)
        for i in range(share):
            number = i * context.data_world_size + context.data_rank
            request = requests[number % len(requests)]
            clip = data.clips[request]
            for path, reason in clip["skipped"]:
                skipped_logger.warning("skipped %s, held out: %s", path, reason)
            inputs = encoders(collate([clip]), sample_posterior=False)
            of_clip = _losses_of_clip(inputs, request.index, data.rows[name], scheduler, conditioned)
            if number < len(requests):  # the last round may have clips for some ranks only
                sums += torch.stack([of_clip, torch.ones_like(of_clip)])
        total, count = context.mean(sums)
        losses[name] = (total / count).tolist()
    return losses


def _losses_of_clip(
    inputs: Inputs, seed: int, rows: int, scheduler: TrainingScheduler, conditioned: Conditioned
) -> Tensor:
    """One loss for each of `SHARES`, `rows` of them at a time."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(inputs.x0.shape, generator=generator).to(inputs.x0)
    losses = []
    for start in range(0, len(SHARES), rows):
        shares = SHARES[start : start + rows]
        t = torch.cat([scheduler.timesteps_at(share, 1, inputs.x0.device) for share in shares])
        copies = inputs.copies(len(shares))
        model = conditioned(copies)
        losses.append(scheduler.training_losses(model, copies.x0, copies.sizes, noise=noise.expand_as(copies.x0), t=t))
    return torch.cat(losses)


def summary(losses: Mapping[str, list[float]]) -> dict[str, float]:
    """Scalars to record: the mean over buckets, and that of each bucket."""
    means = {name: sum(values) / len(values) for name, values in losses.items()}
    return {"validation": sum(means.values()) / len(means)} | {f"validation/{k}": mean for k, mean in means.items()}


def write_losses(path: Path, step: int, losses: Mapping[str, list[float]]) -> None:
    """Add the losses of one step to a CSV file with the columns step, bucket, timestep and loss, in place of any that
    it holds of this step."""
    columns = ("step", "bucket", "timestep", "loss")
    rows: list[tuple[object, ...]] = []
    if path.exists():
        with path.open(newline="") as file:
            rows = [tuple(row[name] for name in columns) for row in csv.DictReader(file) if row["step"] != str(step)]
    for name, values in losses.items():
        rows += [(step, name, f"{1000 * share:.1f}", f"{loss:.6g}") for share, loss in zip(SHARES, values, strict=True)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)
