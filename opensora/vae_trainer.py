"""Training of the stacked video VAE. Axes: B batch, C channels, T frames, H height, W width."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opensora.checkpoints import load_model, save_model
from opensora.config import TrainVAEConfig, VideoVAEConfig
from opensora.data.datasets import ClipDataset
from opensora.data.loader import make_loader
from opensora.metrics import psnr
from opensora.parallel import DTYPES, ParallelContext
from opensora.training import Job, LoaderBatches, TrainingResult, prepare_process, run_job
from opensora.vae import VAELoss, VideoVAE
from opensora.vae.initialization import initialize_for_training
from opensora.video import to_uint8, write_contact_sheet

NUM_SAMPLE_CLIPS = 4


def run_train_vae(
    config: TrainVAEConfig, *, resume: bool = False, context: ParallelContext | None = None
) -> TrainingResult:
    """Trains a VAE on the clips of `config.data`; see `run_job` for what it leaves in `config.run.output`.

    model/vae/ there is a model folder with averaged weights, and with `scale` and `shift` set to the standard deviation
    and mean of each latent channel over training clips, so that its latents are about N(0, 1).
    Errors: ValueError for a configuration that cannot train; see `run_job` for those met on the way.
    """
    if config.loss.discriminator_start >= 0:
        raise ValueError(
            "train-vae: loss.discriminator_start must be -1 (no adversarial term) in this version, "
            f"got {config.loss.discriminator_start}"
        )
    context = context or ParallelContext.single_process(config.run.device)
    prepare_process(config.run)
    vae = context.wrap(_build(config, context.device))
    loader = make_loader(
        config.data, seed=config.run.seed, rank=context.data_rank, num_replicas=context.data_world_size
    )
    heldout = None
    if config.data.validation:
        heldout = make_loader(replace(config.data, manifest=config.data.validation, batch_size=1)).dataset
    task = _VAETask(config, vae, loader.dataset, heldout, context)
    job = Job({"vae": vae}, LoaderBatches(loader), task.loss, task.export, config, task.sample)
    return run_job(job, config.optimizer, config.run, context, resume=resume)


def _build(config: TrainVAEConfig, device: torch.device) -> VideoVAE:
    if config.initial_vae is None:
        vae = VideoVAE(config.vae)
        initialize_for_training(vae, log_variance=config.initial_log_variance)
    else:
        vae = load_model(config.initial_vae, VideoVAE, VideoVAEConfig, dtype=torch.float32)
    if config.freeze_spatial:
        vae.spatial_vae.requires_grad_(False)
    if config.spatial_only:
        vae.temporal_vae.requires_grad_(False)
    if config.freeze_encoder:
        for part in (vae.spatial_vae.module, vae.temporal_vae):
            part.encoder.requires_grad_(False)
            part.quant_conv.requires_grad_(False)
    if config.run.checkpointing != "none":
        vae.set_gradient_checkpointing()
    if device.type == "cuda":
        # cuDNN's layout. Not on the CPU: there a bf16 step takes 1.60 s so and 1.29 s without (GroupNorm's backward).
        vae.spatial_vae.to(memory_format=torch.channels_last)
    return vae


@dataclass(frozen=True)
class _VAETask:
    """The parts of the loop's job: what a step computes, what is exported, what a sample shows."""

    config: TrainVAEConfig
    vae: VideoVAE
    clips: ClipDataset
    heldout: ClipDataset | None
    context: ParallelContext

    def loss(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        x_BCTHW = self._moved(_mixed(batch["video"], self.config))
        needs_pixels = self.config.loss.use_real_rec_loss
        through_time = not self.config.spatial_only
        output = self.vae(x_BCTHW, decode_pixels=needs_pixels, through_time=through_time)
        losses = VAELoss(self.config.loss)(x_BCTHW, output)
        terms = {name: value for name, value in vars(losses).items() if name != "total" and value is not None}
        return losses.total, terms

    def export(self, folder: Path, states: Mapping[str, Mapping[str, Tensor]]) -> None:
        state, config = dict(states["vae"]), self.vae.config
        if not self.config.freeze_encoder:
            mean_C, std_C = self._latent_statistics()
            state |= {"shift": mean_C.view(1, -1, 1, 1, 1), "scale": std_C.view(1, -1, 1, 1, 1)}
            config = replace(config, shift=tuple(mean_C.tolist()), scale=tuple(std_C.tolist()))
        save_model(folder / "vae", state, config)

    def sample(self, folder: Path, step: int) -> dict[str, float]:
        """A sheet of clips above their reconstructions, and the PSNR of both sets."""
        values = {}
        for name, clips in (("train", self.clips), ("heldout", self.heldout)):
            if clips is None:
                continue
            rows, scores = [], []
            for index in _spread(len(clips), NUM_SAMPLE_CLIPS):
                x = self._moved(clips[index]["video"][None])
                x_rec = self._reconstruct(x)
                rows += [to_uint8(x[0]), to_uint8(x_rec[0])]
                scores.append(float(psnr(rows[-2], rows[-1]).mean()))
            write_contact_sheet(folder / f"{name}-{step:08d}.png", rows)
            values[f"psnr_{name}"] = sum(scores) / len(scores)
        return values

    def _reconstruct(self, x_BCTHW: Tensor) -> Tensor:
        if self.config.spatial_only:
            return self.vae.spatial_vae.decode(self.vae.spatial_vae.encode(x_BCTHW, None))
        return self.vae.decode(self.vae.encode(x_BCTHW, sample_posterior=False), x_BCTHW.shape[2])

    def _latent_statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel of z over up to `num_statistics_clips` training clips."""
        sums, squares, count = 0.0, 0.0, 0
        for index in _spread(len(self.clips), self.config.num_statistics_clips):
            normalised = self.vae.encode(self._moved(self.clips[index]["video"][None]), sample_posterior=False)
            z_CN = (normalised * self.vae.scale + self.vae.shift)[0].flatten(1).double()
            sums, squares, count = sums + z_CN.sum(1), squares + z_CN.square().sum(1), count + z_CN.shape[1]
        mean_C = sums / count
        std_C = (squares / count - mean_C.square()).clamp(min=0).sqrt()
        return mean_C.float().cpu(), std_C.float().cpu()

    def _moved(self, x_BCTHW: Tensor) -> Tensor:
        return x_BCTHW.to(self.context.device, DTYPES[self.config.run.dtype], non_blocking=True)


def _mixed(x_BCTHW: Tensor, config: TrainVAEConfig) -> Tensor:
    """Some batches become single frames, or all get a random length, from a random start."""
    num_frames = x_BCTHW.shape[2]
    length = num_frames
    if config.mixed == "random":
        length = int(torch.randint(1, num_frames + 1, ()))
    elif config.mixed == "image" and torch.rand(()) < config.mixed_image_ratio:
        length = 1
    start = int(torch.randint(0, num_frames - length + 1, ()))
    return x_BCTHW[:, :, start : start + length]


def _spread(total: int, count: int) -> list[int]:
    """Up to `count` of `total` indices, evenly spread."""
    count = min(total, count)
    return [math.floor(i * total / count) for i in range(count)]
