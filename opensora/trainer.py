"""Training of diffusion transformers: any of them, with rectified flow or IDDPM, on the latents of captioned clips.

Axes: B batch, C channels, T latent frames, I images beside each clip, H, W latent height and width, L text tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from opensora.checkpoints import save_model
from opensora.conditioning.masks import MaskGenerator
from opensora.config import IDDPMConfig, LatteT2VConfig, TrainConfig
from opensora.data.encoded import EncodedDataset
from opensora.data.loader import ClipLoader, make_loader
from opensora.data.prefetch import Prefetcher
from opensora.encoding import check_encoded
from opensora.estimate.work import TransformerWork
from opensora.initial_weights import check_resumed, newest_checkpoint, start_from
from opensora.inputs import Encoders, Inputs, captions_of
from opensora.latents import cached_batches
from opensora.loading import MODEL_OF, load_vae
from opensora.parallel import DTYPES, ParallelContext
from opensora.sampler import Sampler
from opensora.schedulers import TrainingScheduler, build
from opensora.text.t5 import TextEncoder
from opensora.text.tiny import build_tiny_text_encoder
from opensora.training import Batches, Job, LoaderBatches, TrainingResult, check_options, prepare_process, run_job
from opensora.vae import VAETiling
from opensora.validation import HeldOut, held_out, summary, validation_losses, write_losses
from opensora.video import write_contact_sheet

logger = logging.getLogger(__name__)


def run_train(config: TrainConfig, *, resume: bool = False, context: ParallelContext | None = None) -> TrainingResult:
    """Trains a transformer on the clips of `config.data`; see `run_job` for what it leaves in `config.run.output`.

    model/transformer/ there (and model/text_encoder/ when that is trained too) hold averaged weights; validation.csv
    the loss of held-out clips by step, bucket and timestep, from before the first step on.
    Errors: ValueError for a configuration that cannot train, and for resuming a run of another model; see `run_job` for
    those met on the way.
    """
    check_options(config.optimizer, config.run)
    _check(config)
    if resume:
        check_resumed(config.run.output, config.transformer)
    context = context or ParallelContext.single_process(config.run.device)
    _check_ranks(config, context)
    prepare_process(config.run)
    loader = make_loader(
        config.data, seed=config.run.seed, rank=context.data_rank, num_replicas=context.data_world_size
    )
    vae, text = _encoders(config, loader.dataset, context)
    transformer = context.wrap(_transformer(config))
    encoders = Encoders(
        vae, text, context.device, trains_text=config.train_text_encoder, keeps_texts=config.cache_latents
    )
    work = TransformerWork(config.transformer)
    task = _Task(config, transformer, encoders, build(config.scheduler), context, _held_out(config), work)
    task.check()
    modules: dict[str, nn.Module] = {"transformer": transformer}
    if config.train_text_encoder:
        modules["text_encoder"] = text
    elif text is not None:
        text.to(DTYPES[config.run.dtype]).requires_grad_(False).eval()
    job = Job(
        modules,
        _batches(config, encoders, loader, context),
        task.loss,
        task.export,
        config,
        sample=task.sample if config.sample_prompts else None,
        validate=task.validate if task.held_out is not None else None,
    )
    if task.held_out is not None and context.from_main(newest_checkpoint(config.run.output)) is None:
        task.validate_start()
    return run_job(job, config.optimizer, config.run, context, resume=resume)


def _batches(config: TrainConfig, encoders: Encoders, loader: ClipLoader, context: ParallelContext) -> Batches:
    if config.cache_latents:
        return cached_batches(config, encoders, loader.dataset, context)
    if context.device.type != "cpu" or config.data.num_workers:
        return Prefetcher(loader, context.device)
    return LoaderBatches(loader)


def _check(config: TrainConfig) -> None:
    """Refuses what no files are needed to see."""
    if not 0 <= config.image_ratio <= 1:
        raise ValueError(f"train: image_ratio must lie in [0, 1], got {config.image_ratio}")
    for name in ("buckets", "encoded", "use_image_num"):
        if config.cache_latents and getattr(config.data, name):
            raise ValueError(
                f"train: cache_latents needs clips of one size alone, got data.{name}; set one of them only"
            )
    MaskGenerator(config.mask_ratios)  # refuses unknown kinds now, not after the clips are encoded
    if isinstance(config.transformer, LatteT2VConfig):
        if config.mask_ratios:
            raise ValueError(
                f"train: mask_ratios must be empty for LatteT2V, no frame is given, got {config.mask_ratios}"
            )
        if not isinstance(config.scheduler, IDDPMConfig):
            kind = type(config.scheduler).__name__
            raise ValueError(f"train: scheduler must be an IDDPMConfig for LatteT2V, got {kind}")


def _check_ranks(config: TrainConfig, context: ParallelContext) -> None:
    """Refuses what would leave sharded ranks waiting for each other."""
    if not isinstance(config.transformer, LatteT2VConfig) or config.parallel.sharding == "none":
        return
    lengths = {int(num_frames) for cells in config.data.buckets.values() for num_frames in cells}
    if context.data_world_size > 1 and (config.image_ratio or (1 in lengths and len(lengths) > 1)):
        # A rank with an image gathers no weights of temporal attention, for which the others wait.
        raise ValueError(
            "train: parallel.sharding must be 'none' for LatteT2V where some ranks have clips and others images, "
            f"got image_ratio {config.image_ratio} and buckets of {sorted(lengths)} frames; data.use_image_num "
            "puts images beside clips"
        )


def _encoders(config: TrainConfig, dataset: Any, context: ParallelContext) -> tuple[Any | None, TextEncoder | None]:
    """VAE and text encoder, as far as clips and captions are not stored encoded, or are shown beside the training."""
    stored = getattr(dataset, "clips", dataset)  # the clips of a joint data set
    is_stored = isinstance(stored, EncodedDataset)
    is_shown = bool(config.run.validate_every and config.data.validation)
    is_shown |= bool(config.run.sample_every and config.sample_prompts)
    text = vae = None
    if is_shown or not (is_stored and stored.settings["text_encoder"]):
        text = _text_encoder(config, dataset.manifest.clips, context)
    if is_shown or not is_stored:
        vae = _vae(config, context)
    if is_stored:
        check_encoded(stored, config.transformer, vae=vae, text=text)
        if config.train_text_encoder and stored.settings["text_encoder"]:
            raise ValueError(f"train: train_text_encoder needs captions as text, but {stored.folder} holds embeddings")
    return vae, text


def _text_encoder(config: TrainConfig, clips: tuple[Any, ...], context: ParallelContext) -> TextEncoder:
    length = config.transformer.model_max_length
    if config.text_encoder:
        encoder = TextEncoder.from_pretrained(config.text_encoder, model_max_length=length)
    elif config.train_text_encoder:
        captions = captions_of({"text": [clip.text for clip in clips]})
        encoder = build_tiny_text_encoder(captions, model_max_length=length, seed=config.run.seed)
    else:
        raise ValueError("train: text_encoder must name a folder or hub id unless train_text_encoder is on, got ''")
    return encoder.to(context.device)


def _vae(config: TrainConfig, context: ParallelContext) -> Any:
    if not config.vae:
        raise ValueError("train: vae must name a folder, file or hub id, got ''")
    vae = load_vae(config.vae, config.vae_kind, dtype=DTYPES[config.run.dtype], device=context.device)
    if config.tile_vae:
        if config.vae_kind != "causal":
            raise ValueError(f"train: tile_vae is for the causal VAE alone, got vae_kind {config.vae_kind}")
        vae.tiling = VAETiling()
    return vae.requires_grad_(False)


def _transformer(config: TrainConfig) -> nn.Module:
    transformer = MODEL_OF[type(config.transformer)](config.transformer)
    if config.initial_transformer is not None:
        report = start_from(transformer, config.initial_transformer)
        logger.warning("initial_transformer %s: %s", config.initial_transformer, report)
    for name, parameter in transformer.named_parameters():
        if name.startswith(config.frozen):
            parameter.requires_grad_(False)
    transformer.set_gradient_checkpointing(config.run.checkpointing)
    return transformer


def _held_out(config: TrainConfig) -> HeldOut | None:
    if not (config.run.validate_every and config.data.validation):
        return None
    return held_out(config.data, config.num_validation_clips)


@dataclass(frozen=True)
class _Task:
    """The parts of the loop's job: what a step computes, what is exported, what a sample shows."""

    config: TrainConfig
    transformer: nn.Module
    encoders: Encoders
    scheduler: TrainingScheduler
    context: ParallelContext
    held_out: HeldOut | None
    work: TransformerWork

    def check(self) -> None:
        model, vae, text = self.config.transformer, self.encoders.vae, self.encoders.text
        for name, value, other, expected in (
            ("in_channels", model.in_channels, "the VAE's latent channels", vae and vae.latent_channels),
            ("caption_channels", model.caption_channels, "the text encoder's", text and text.output_dim),
        ):
            if expected is not None and value != expected:
                raise ValueError(f"train: transformer.{name} must equal {other}, {expected}, got {value}")

    def loss(self, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        inputs = self.encoders(batch)
        if self.config.image_ratio and float(torch.rand(())) < self.config.image_ratio:
            inputs = inputs.first_frames()
        options: dict[str, Any] = {"frame_mask": self._frame_mask(inputs.x0)}
        if inputs.attention_mask is not None:
            options["loss_mask"] = inputs.attention_mask  # IDDPM's alone: `_check` has seen to it
        losses = self.scheduler.training_losses(self.conditioned(inputs), inputs.x0, inputs.sizes, **options)
        return losses.mean(), self.work.of(inputs.x0, inputs.y, inputs.num_images)

    def conditioned(self, inputs: Inputs) -> Callable[..., Tensor]:
        """The transformer as schedulers call it, (x, t, x_mask=None, **sizes) -> output, with the texts of a batch."""
        options: dict[str, Any] = {}
        if self.context.sequence is not None:
            options["sequence"] = self.context.sequence
        if isinstance(self.config.transformer, LatteT2VConfig):

            def latte(x: Tensor, t: Tensor, **sizes: Tensor) -> Tensor:
                return self.transformer(
                    x,
                    t,
                    inputs.y,
                    attention_mask=inputs.attention_mask,
                    encoder_attention_mask=inputs.text_mask,
                    use_image_num=inputs.num_images,
                    enable_temporal_attentions=x.shape[2] - inputs.num_images > 1,
                    **options,
                )

            return latte
        if inputs.num_images or inputs.attention_mask is not None:
            raise ValueError("train: images beside clips and padded clips are for LatteT2V alone; use buckets")
        mask = None if inputs.text_mask is None else inputs.text_mask[:, 0]

        def stdit(x: Tensor, t: Tensor, **conditions: Tensor) -> Tensor:
            return self.transformer(x, t, y=inputs.y, mask=mask, **conditions, **options)

        return stdit

    def export(self, folder: Path, states: Mapping[str, Mapping[str, Tensor]]) -> None:
        save_model(folder / "transformer", states["transformer"], self.config.transformer)
        if self.config.train_text_encoder:
            self.encoders.text.save_pretrained(folder / "text_encoder")

    def sample(self, folder: Path, step: int) -> dict[str, float]:
        """A video of each of `sample_prompts` and one sheet of all, the same noise every time."""
        encoders, config = self.encoders, self.config
        sampler = Sampler(
            encoders.vae, self.transformer, encoders.text, scheduler=config.scheduler, defaults=config.sample
        )
        clips = sampler.sample(config.sample_prompts)
        if self.context.is_main:
            write_contact_sheet(folder / f"step-{step:08d}.png", [clip.frames for clip in clips])
            for clip in clips:
                if len(clip.frames) > 1:
                    clip.save(folder / f"step-{step:08d}-{clip.index}-{clip.sample}.mp4")
        return {"seconds_per_sample": sum(cost.seconds for cost in sampler.costs.values()) / len(clips)}

    def validate(self, step: int) -> dict[str, float]:
        """The loss on held-out clips with the weights as they are; also added to validation.csv."""
        losses = validation_losses(self.held_out, self.encoders, self.scheduler, self.conditioned, self.context)
        if self.context.is_main:
            write_losses(Path(self.config.run.output) / "validation.csv", step, losses)
        return summary(losses)

    def validate_start(self) -> None:
        """What the loss is before the first step, to be compared with."""
        self.transformer.eval()
        # A forward pass by itself would leave the outermost weights unsharded, and the optimizer would take those.
        with self.context.whole(self.transformer):
            values = self.validate(0)
        self.transformer.train()
        if self.context.is_main:
            logger.warning("validation before the first step: %.4g", values["validation"])

    def _frame_mask(self, x0_BCTHW: Tensor) -> Tensor | None:
        if not self.config.mask_ratios:
            return None
        mask_BT = MaskGenerator(self.config.mask_ratios)(x0_BCTHW.shape[0], x0_BCTHW.shape[2])
        # A batch with nothing masked needs no second set of modulations.
        return None if mask_BT.all() else mask_BT.to(self.context.device)
