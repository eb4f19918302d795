"""Training of the stacked video VAE.

Axes: B batch, C channels, T frames, H height, W width. Clips wait in memory as uint8 (T, C, H, W): the 2-D VAE, which
works frame by frame, then sees a batch of them as (B * T, C, H, W) without a copy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from opensora.checkpoints import load_model, save_model
from opensora.config import TrainVAEConfig, VideoVAEConfig
from opensora.data.memory import ClipsInMemory, load_clips
from opensora.parallel import ParallelContext
from opensora.training import Job, ShuffledBatches, TrainingResult, run_job
from opensora.training.loop import DTYPES, seed_everything
from opensora.vae import VAELoss, VideoVAE
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
    if config.run.num_threads is not None:
        torch.set_num_threads(config.run.num_threads)
    seed_everything(config.run.seed)
    vae, vae_config = _build(config, context.device)
    vae = context.wrap(vae)
    clips = load_clips(config.data.manifest, config.data)
    heldout = load_clips(config.data.validation, config.data) if config.data.validation else None
    task = _VAETask(config, vae, vae_config, clips, heldout, context)
    batches = ShuffledBatches(
        [clip.shape for clip in clips.frames],
        clips.batch,
        batch_size=config.data.batch_size,
        seed=config.run.seed,
        rank=context.data_rank,
        world_size=context.data_world_size,
    )
    job = Job({"vae": vae}, batches, task.loss, task.export, config, task.sample)
    return run_job(job, config.optimizer, config.run, context, resume=resume)


def _build(config: TrainVAEConfig, device: torch.device) -> tuple[VideoVAE, VideoVAEConfig]:
    if config.initial_vae is None:
        vae = VideoVAE(config.vae)
    else:
        vae = load_model(config.initial_vae, VideoVAE, VideoVAEConfig, dtype=torch.float32)
    if config.freeze_spatial:
        vae.spatial_vae.requires_grad_(False)
    if config.run.grad_checkpoint:
        vae.set_gradient_checkpointing()
    if device.type == "cuda":
        # cuDNN's layout. Not on the CPU: there a bf16 step takes 1.60 s so and 1.29 s without (GroupNorm's backward).
        vae.spatial_vae.to(memory_format=torch.channels_last)
    return vae, vae.config


@dataclass(frozen=True)
class _VAETask:
    """The parts of the loop's job: what a step computes, what is exported, what a sample shows."""

    config: TrainVAEConfig
    vae: VideoVAE
    vae_config: VideoVAEConfig
    clips: ClipsInMemory
    heldout: ClipsInMemory | None
    context: ParallelContext

    def loss(self, batch_BTCHW: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        x_BCTHW = self._pixels(_mixed(batch_BTCHW, self.config))
        needs_pixels = self.config.loss.use_real_rec_loss
        output = VAELoss(self.config.loss)(x_BCTHW, self.vae(x_BCTHW, decode_pixels=needs_pixels))
        terms = {name: value for name, value in vars(output).items() if name != "total" and value is not None}
        return output.total, terms

    def export(self, folder: Path, states: Mapping[str, Mapping[str, Tensor]]) -> None:
        mean_C, std_C = self._latent_statistics()
        state = dict(states["vae"]) | {"shift": mean_C.view(1, -1, 1, 1, 1), "scale": std_C.view(1, -1, 1, 1, 1)}
        config = replace(self.vae_config, shift=tuple(mean_C.tolist()), scale=tuple(std_C.tolist()))
        save_model(folder / "vae", state, config)

    def sample(self, folder: Path, step: int) -> dict[str, float]:
        """A sheet of clips above their reconstructions, and the PSNR of both sets."""
        values = {}
        for name, clips in (("train", self.clips), ("heldout", self.heldout)):
            if clips is None:
                continue
            indices = _spread(len(clips.frames), NUM_SAMPLE_CLIPS)
            rows, scores = [], []
            for index in indices:
                frames_TCHW = clips.frames[index]
                x = self._pixels(frames_TCHW[None])
                x_rec = to_uint8(self.vae.decode(self.vae.encode(x, sample_posterior=False), x.shape[2])[0])
                rows += [frames_TCHW, x_rec]
                scores.append(psnr(rows[-2], rows[-1]))
            write_contact_sheet(folder / f"{name}-{step:08d}.png", rows)
            values[f"psnr_{name}"] = sum(scores) / len(scores)
        return values

    def _latent_statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel of z over up to `num_statistics_clips` training clips."""
        sums, squares, count = 0.0, 0.0, 0
        for index in _spread(len(self.clips.frames), self.config.num_statistics_clips):
            normalised = self.vae.encode(self._pixels(self.clips.frames[index][None]), sample_posterior=False)
            z_CN = (normalised * self.vae.scale + self.vae.shift)[0].flatten(1).double()
            sums, squares, count = sums + z_CN.sum(1), squares + z_CN.square().sum(1), count + z_CN.shape[1]
        mean_C = sums / count
        std_C = (squares / count - mean_C.square()).clamp(min=0).sqrt()
        return mean_C.float().cpu(), std_C.float().cpu()

    def _pixels(self, frames_BTCHW: Tensor) -> Tensor:
        """uint8 (B, T, C, H, W) as (B, C, T, H, W) in [-1, 1], in the training precision, without a layout copy."""
        frames = frames_BTCHW.to(self.context.device, non_blocking=True)
        return frames.to(DTYPES[self.config.run.dtype]).div_(127.5).sub_(1.0).transpose(1, 2)


def psnr(frames: Tensor, other: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 clips (T, C, H, W): the mean over frames; 100 where they agree."""
    error_T = (frames.double() - other.double()).div(255).square().mean(dim=(1, 2, 3))
    return float((-10 * torch.log10(error_T.clamp(min=1e-10))).mean())


def _mixed(batch_BTCHW: Tensor, config: TrainVAEConfig) -> Tensor:
    """Some batches become single frames, or all get a random length, from a random start."""
    num_frames = batch_BTCHW.shape[1]
    length = num_frames
    if config.mixed == "random":
        length = int(torch.randint(1, num_frames + 1, ()))
    elif config.mixed == "image" and torch.rand(()) < config.mixed_image_ratio:
        length = 1
    start = int(torch.randint(0, num_frames - length + 1, ()))
    return batch_BTCHW[:, start : start + length]


def _spread(total: int, count: int) -> list[int]:
    """Up to `count` of `total` indices, evenly spread."""
    count = min(total, count)
    return [math.floor(i * total / count) for i in range(count)]
