"""Training of diffusion transformers: rectified flow on the latents of captioned clips.

Axes: B batch, C channels, T latent frames, H, W latent height and width, L text tokens.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from opensora.checkpoints import load_model, load_weights, save_model
from opensora.conditioning.masks import MaskGenerator
from opensora.config import TrainConfig, VideoVAEConfig
from opensora.data.datasets import IMAGE_FPS, ClipDataset
from opensora.data.loader import make_loader
from opensora.models.stdit3 import STDiT3
from opensora.parallel import DTYPES, ParallelContext
from opensora.sampler import Sampler
from opensora.schedulers.rectified_flow import RectifiedFlow
from opensora.text.cleaning import clean_caption
from opensora.text.t5 import TextEncoder
from opensora.text.tiny import build_tiny_text_encoder
from opensora.training import (
    Batches,
    Job,
    LoaderBatches,
    ShuffledBatches,
    TrainingResult,
    prepare_process,
    run_job,
)
from opensora.vae import VideoVAE
from opensora.video import write_contact_sheet

logger = logging.getLogger(__name__)
SIZES = ("height", "width", "num_frames", "fps")


def run_train(config: TrainConfig, *, resume: bool = False, context: ParallelContext | None = None) -> TrainingResult:
    """Trains a transformer on the clips of `config.data`; see `run_job` for what it leaves in `config.run.output`.

    model/transformer/ there (and model/text_encoder/ when that is trained too) hold averaged weights.
    Errors: ValueError for a configuration that cannot train; see `run_job` for those met on the way.
    """
    if not 0 <= config.image_ratio <= 1:
        raise ValueError(f"train: image_ratio must lie in [0, 1], got {config.image_ratio}")
    if config.cache_latents and config.data.buckets:
        raise ValueError("train: cache_latents needs clips of one size, got data.buckets; set one of them only")
    context = context or ParallelContext.single_process(config.run.device)
    prepare_process(config.run)
    dtype = DTYPES[config.run.dtype]
    loader = make_loader(
        config.data, seed=config.run.seed, rank=context.data_rank, num_replicas=context.data_world_size
    )
    captions = [clean_caption(clip.text) for clip in loader.dataset.manifest.clips]
    text = _text_encoder(config, captions).to(context.device)
    vae = load_model(config.vae, VideoVAE, VideoVAEConfig, dtype=dtype, device=context.device).requires_grad_(False)
    transformer = context.wrap(_transformer(config))
    task = _FlowTask(config, transformer, text, vae, context)
    task.check()
    batches: Batches = LoaderBatches(loader)
    if config.cache_latents:
        batches = task.cached_batches(loader.dataset)
    modules: dict[str, nn.Module] = {"transformer": transformer}
    if config.train_text_encoder:
        modules["text_encoder"] = text
    else:
        text.to(dtype).requires_grad_(False).eval()
    job = Job(modules, batches, task.loss, task.export, config, task.sample if config.sample_prompts else None)
    return run_job(job, config.optimizer, config.run, context, resume=resume)


def as_images(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes of a batch of clips of which only the first frame is left."""
    return {
        **batch,
        "num_frames": torch.ones_like(batch["num_frames"]),
        "fps": torch.full_like(batch["fps"], IMAGE_FPS),
    }


def _text_encoder(config: TrainConfig, captions: list[str]) -> TextEncoder:
    length = config.transformer.model_max_length
    if config.text_encoder:
        return TextEncoder.from_pretrained(config.text_encoder, model_max_length=length)
    if not config.train_text_encoder:
        raise ValueError("train: text_encoder must name a folder or hub id unless train_text_encoder is on, got ''")
    return build_tiny_text_encoder(captions, model_max_length=length, seed=config.run.seed)


def _transformer(config: TrainConfig) -> STDiT3:
    transformer = STDiT3(config.transformer)
    if config.initial_transformer is not None:
        report = load_weights(transformer, config.initial_transformer, strict=False)
        logger.warning("initial_transformer %s: %s", config.initial_transformer, report)
    transformer.set_gradient_checkpointing(config.run.checkpointing)
    return transformer


@dataclass(frozen=True)
class _FlowTask:
    """The parts of the loop's job: what a step computes, what is exported, what a sample shows."""

    config: TrainConfig
    transformer: STDiT3
    text: TextEncoder
    vae: VideoVAE
    context: ParallelContext
    known_texts: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def check(self) -> None:
        model = self.config.transformer
        for name, value, other, expected in (
            ("in_channels", model.in_channels, "the VAE's latent channels", self.vae.latent_channels),
            ("caption_channels", model.caption_channels, "the text encoder's", self.text.output_dim),
        ):
            if value != expected:
                raise ValueError(f"train: transformer.{name} must equal {other}, {expected}, got {value}")
        MaskGenerator(self.config.mask_ratios)  # refuses unknown kinds now, not after the clips are encoded

    def loss(self, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        x0_BCTHW = self._latents(batch)
        if self.config.image_ratio and float(torch.rand(())) < self.config.image_ratio:
            x0_BCTHW, batch = x0_BCTHW[:, :, :1], as_images(batch)
        y, mask_BL = self._embed(batch["text"])
        arguments = {name: batch[name].to(self.context.device) for name in SIZES} | {"y": y, "mask": mask_BL}
        frame_mask = None
        if self.config.mask_ratios:
            frame_mask = MaskGenerator(self.config.mask_ratios)(x0_BCTHW.shape[0], x0_BCTHW.shape[2])
            # A batch with nothing masked needs no second set of modulations.
            frame_mask = None if frame_mask.all() else frame_mask.to(self.context.device)
        flow = RectifiedFlow(self.config.flow)
        return flow.training_losses(self.transformer, x0_BCTHW, arguments, frame_mask=frame_mask).mean(), {}

    def export(self, folder: Path, states: Mapping[str, Mapping[str, Tensor]]) -> None:
        save_model(folder / "transformer", states["transformer"], self.config.transformer)
        if self.config.train_text_encoder:
            self.text.save_pretrained(folder / "text_encoder")

    def sample(self, folder: Path, step: int) -> dict[str, float]:
        """One row of frames for each of `sample_prompts`, the same noise every time."""
        sampler = Sampler(
            self.vae, self.transformer, self.text, scheduler=self.config.flow, defaults=self.config.sample
        )
        clips = sampler.sample(self.config.sample_prompts)
        write_contact_sheet(folder / f"step-{step:08d}.png", [clip.frames for clip in clips])
        return {"seconds_per_sample": sum(cost.seconds for cost in sampler.costs.values()) / len(clips)}

    def cached_batches(self, clips: ClipDataset) -> ShuffledBatches[dict[str, Any]]:
        """Batches from latents in memory: the posterior mean of each clip, one window of it."""
        latents, numbers, captions = self._encode_all(clips)

        def load(indices: list[int]) -> dict[str, Any]:
            columns = {name: numbers[indices, i] for i, name in enumerate(SIZES)}
            return columns | {"latents": latents[indices], "text": [captions[index] for index in indices]}

        return ShuffledBatches(
            [0] * len(captions),
            load,
            batch_size=self.config.data.batch_size,
            seed=self.config.run.seed,
            rank=self.context.data_rank,
            world_size=self.context.data_world_size,
        )

    @torch.no_grad()
    def _encode_all(self, clips: ClipDataset) -> tuple[Tensor, Tensor, list[str]]:
        """(latents (N, C, T, H, W), sizes and fps (N, 4), captions), from `output`/latents.safetensors if it fits."""
        path = Path(self.config.run.output) / "latents.safetensors"
        key = self._cache_key(clips)
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
            x = clip["video"][None].to(self.vae.scale)
            latents.append(self.vae.encode(x, sample_posterior=False)[0].float().cpu())
            numbers.append([float(clip[name]) for name in SIZES])
            captions.append(clip["text"])
        cached = {"latents": torch.stack(latents), "numbers": torch.tensor(numbers)}
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".writing")
        save_file(cached, temporary, metadata={"key": key, "captions": json.dumps(captions)})
        temporary.replace(path)
        return cached["latents"], cached["numbers"], captions

    def _cache_key(self, clips: ClipDataset) -> str:
        """What cached latents depend on: VAE weights, precision, the manifest's rows, and how clips are cut."""
        digest = hashlib.sha256()
        for name, tensor in self.vae.state_dict().items():
            digest.update(name.encode() + tensor.cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        data = replace(self.config.data, batch_size=0, num_workers=0, validation="")
        digest.update(repr((data, self.config.run.seed, self.config.run.dtype, clips.manifest.clips)).encode())
        return digest.hexdigest()

    def _latents(self, batch: Mapping[str, Any]) -> Tensor:
        if "latents" in batch:
            return batch["latents"].to(self.context.device)
        with torch.no_grad():
            return self.vae.encode(batch["video"].to(self.vae.scale)).float()

    def _embed(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Embeddings (B, 1, L, C), with gradients if the encoder is trained, and mask (B, L)."""
        captions = [clean_caption(caption) for caption in captions]
        if self.config.train_text_encoder:
            ids_BL, mask_BL = self.text.tokenize(captions)
            return self.text(ids_BL, mask_BL), mask_BL.to(self.context.device)
        if not self.config.cache_latents:
            return self.text.encode(captions)
        new = sorted(set(captions) - self.known_texts.keys())
        if new:
            y_B1LC, mask_BL = self.text.encode(new)
            self.known_texts.update(zip(new, zip(y_B1LC, mask_BL, strict=True), strict=True))
        pairs = [self.known_texts[caption] for caption in captions]
        return torch.stack([y for y, _ in pairs]), torch.stack([mask for _, mask in pairs])
