"""Text, and images or videos to go on from, to clips: text encoder, diffusion transformer and VAE joined.

    from opensora.sampler import Sampler
    sampler = Sampler.from_preset("tiny")
    for clip in sampler.sample(["a red circle moving left"], seed=3):
        clip.save("out.mp4")

Axes: B batch, C channels, T frames, H height, W width, L text tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from opensora import presets
from opensora.conditioning.masks import apply_mask_strategy, parse_mask_strategy
from opensora.config import RectifiedFlowConfig, SampleConfig, SchedulerConfig
from opensora.data.reading import probe
from opensora.loading import load_models
from opensora.parallel import resolve_device
from opensora.sampling.generation import Generation, ModelsAtWork, Texts
from opensora.sampling.guides import ClipShape, Guide, check_guide, overlap_frames
from opensora.sampling.noise import ClipNoise
from opensora.sampling.offload import Workplace
from opensora.sampling.plan import OnProgress, Plan, Progress
from opensora.sampling.requests import ClipSize, PromptError, Request, clip_size, read_requests
from opensora.sampling.stages import StageCost, StageMeter
from opensora.schedulers import build
from opensora.video import to_uint8, write_video
from opensora_kernels import SequenceShards
from opensora_kernels.vae import plan_tiles

TEXTS_AT_ONCE = 8


@dataclass(frozen=True)
class Clip:
    """A finished clip: frames uint8 (T, 3, H, W), and what made it."""

    frames: Tensor
    fps: float
    prompt: str
    index: int
    sample: int
    seed: int

    def save(self, path: str | Path) -> Path:
        """Write .mp4, .gif or (one frame) .png; see `opensora.video.write_video`."""
        return write_video(path, self.frames, fps=self.fps)


class Sampler:
    """Generates clips with any of the systems. `costs` holds seconds and peak memory of the last run.

    Models work on `device`, by default where the transformer is; with `offload` they are there only while they work.
    `sequence` spreads the transformer's tokens over ranks, all of which are asked for the same and make the same clips.
    Source: Open-Sora v1.2.0, scripts/inference.py (order of steps), with one random stream per clip instead of one for
    all: a clip depends on its own seed only, not on its neighbours in the batch. Open-Sora-Plan v1.1.0,
    opensora/sample/pipeline_videogen.py.
    """

    def __init__(
        self,
        vae: Any,
        transformer: nn.Module,
        text_encoder: Any,
        *,
        scheduler: SchedulerConfig | None = None,
        defaults: SampleConfig | None = None,
        device: torch.device | None = None,
        offload: bool = False,
        sequence: SequenceShards | None = None,
    ) -> None:
        """vae: VideoVAE, CausalVideoVAE or FrameVAE. transformer: any of `opensora.models`. text_encoder: a TextEncoder
        or what stands for one. Errors: ValueError for parts that do not fit each other."""
        _check_fit(vae, transformer, text_encoder)
        self.vae, self.transformer, self.text_encoder = vae.eval(), transformer.eval(), text_encoder.eval()
        self.scheduler = scheduler or RectifiedFlowConfig()
        self.defaults = defaults or SampleConfig()
        weight = next(transformer.parameters())
        self.device, self.dtype = device or weight.device, weight.dtype
        self.workplace = Workplace(self.device, offload=offload)
        if self.workplace.offload:
            for model in (self.vae, self.transformer, self.text_encoder):
                model.to("cpu")
        self.models = ModelsAtWork(self.vae, self.transformer, self.workplace, self.dtype, sequence)
        self.costs: dict[str, StageCost] = {}

    @classmethod
    def from_preset(
        cls,
        name: str = "tiny",
        *,
        vae: str | Path | None = None,
        transformer: str | Path | None = None,
        text_encoder: str | Path | None = None,
        config: SampleConfig | None = None,
        offload: bool = False,
        text_cache: str | Path | None = None,
        sequence: SequenceShards | None = None,
    ) -> Sampler:
        """Load the models of a preset; a folder or hub id given here takes the place of the preset's.

        config: sampling defaults in place of the preset's; its dtypes and device are those of the models.
        offload: each model is on the device only while it works. text_cache: a folder for embeddings of texts, with
        which the text encoder is loaded for new texts alone. sequence: as for the class.
        Errors: ValueError for an unknown preset; CheckpointError or OSError for weights that are absent or do not fit.
        """
        preset = presets.get(name)
        config = config or preset.sample
        device = resolve_device(config.device)
        models = load_models(
            preset,
            dtype=config.dtype,
            text_dtype=config.text_dtype,
            device=torch.device("cpu") if offload else device,
            vae=vae,
            transformer=transformer,
            text_encoder=text_encoder,
            text_cache=text_cache,
        )
        parts = (models.vae, models.transformer, models.text_encoder)
        work = {"device": device, "offload": offload, "sequence": sequence}
        return cls(*parts, scheduler=preset.scheduler, defaults=config, **work)

    def sample(
        self,
        prompts: str | Sequence[str],
        config: SampleConfig | None = None,
        *,
        seed: int | None = None,
        reference_paths: Sequence[str | None] | None = None,
        mask_strategies: Sequence[str | None] | None = None,
        guide: Guide | Sequence[Guide | None] | None = None,
        scheduler: SchedulerConfig | None = None,
        on_progress: OnProgress | None = None,
    ) -> list[Clip]:
        """Clips for `prompts`, `config.num_sample` of each. The same seed gives the same clips.

        config: default `self.defaults`; `seed` replaces its seed, and clip number n of the call uses seed + n.
        guide: what clips begin with, end with, or are edits of; one for all prompts, or one for each.
        reference_paths, mask_strategies: the original's way to say it; none, one for all, or one for each prompt.
        Errors: before any work, PromptError for a prompt that cannot be used, ValueError for impossible sizes.
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        config = config or self.defaults
        plan = self.plan(
            prompts,
            config if seed is None else replace(config, seed=seed),
            reference_paths=reference_paths,
            mask_strategies=mask_strategies,
            guides=[guide] if isinstance(guide, Guide) else guide,
            scheduler=scheduler,
        )
        return list(self.run(plan, on_progress=on_progress))

    def plan(
        self,
        prompts: Sequence[str],
        config: SampleConfig,
        *,
        reference_paths: Sequence[str | None] | None = None,
        mask_strategies: Sequence[str | None] | None = None,
        guides: Sequence[Guide | None] | None = None,
        scheduler: SchedulerConfig | None = None,
        first_index: int = 0,
    ) -> Plan:
        """Check everything that `run` will need; errors as for `sample`."""
        size = clip_size(config)
        requests = read_requests(
            prompts,
            config,
            reference_paths=reference_paths,
            mask_strategies=mask_strategies,
            guides=guides,
            first_index=first_index,
        )
        num_frames = self.vae.padded_frames(size.num_frames)
        latent_size = self.vae.latent_size((num_frames, size.height, size.width))
        if min(latent_size) < 1:
            raise ValueError(
                f"image_size: {size.height} x {size.width} is smaller than one latent of this VAE; "
                f"latents would be {latent_size[1]} x {latent_size[2]}"
            )
        self._check_size(size, latent_size[0])
        overlap = _overlap(config, latent_size[0], is_needed=any(request.guide.has_videos for request in requests))
        shape = ClipShape(num_frames, size.height, size.width, latent_size[0], overlap, size.save_fps)
        if self.transformer.null_caption is None:
            requests = [replace(r, negative="") if r.negative is None else r for r in requests]
        decoding = None
        if config.vae_memory is not None:
            batch = min(config.batch_size, len(requests) * config.num_sample)
            latents = (batch, self.vae.latent_channels, *latent_size)
            run = partial(self.vae.decode, num_frames=num_frames)
            decoding = plan_tiles(run, latents, config.vae_memory, self.dtype, self.device)
        plan = Plan(tuple(requests), config, build(scheduler or self.scheduler), size, shape, latent_size, decoding)
        # Some lengths have no timesteps, and some numbers of steps make no sense: says so now.
        plan.scheduler.sampling_timesteps(1, plan.arguments(1, self.device, self.dtype))
        for index, request in enumerate(requests):
            try:
                check_guide(request.guide, shape, self.vae, config.loop, size.num_frames)
                self._rehearse_masks(plan, request)
            except ValueError as error:
                raise PromptError(index, str(error)) from error
        return plan

    @torch.no_grad()
    def run(self, plan: Plan, *, on_progress: OnProgress | None = None) -> Iterator[Clip]:
        """Generate the planned clips, batch after batch; each is complete when it comes out."""
        meter = StageMeter(self.device)
        self.costs = meter.costs
        report = Progress(plan, on_progress)
        with meter.stage("text"), self.workplace.use(self.text_encoder):
            texts = self._encode_texts(plan)
        report.done("text")
        for batch in plan.batches():
            seeds = [plan.config.seed + r.index * plan.config.num_sample + sample for r, sample in batch]
            noise = ClipNoise(seeds, self.device, self.dtype)
            clips = Generation(plan, self.models, [request for request, _ in batch], texts, noise, meter, report)
            videos = clips.run()
            for (request, sample), seed, video in zip(batch, seeds, videos, strict=True):
                frames = to_uint8(video)
                yield Clip(frames, plan.size.save_fps, request.prompt, request.index, sample, seed)

    def _encode_texts(self, plan: Plan) -> Texts:
        """Negative prompts are among them."""
        wanted = [text for request in plan.requests for text in request.texts]
        wanted += [request.negative for request in plan.requests if request.negative is not None]
        distinct = list(dict.fromkeys(wanted))
        encoded = {}
        for start in range(0, len(distinct), TEXTS_AT_ONCE):
            part = distinct[start : start + TEXTS_AT_ONCE]
            embeddings_B1LC, mask_BL = self.text_encoder.encode(part)
            embeddings_B1LC = embeddings_B1LC.to(self.device, self.dtype)
            encoded |= dict(zip(part, zip(embeddings_B1LC[:, 0], mask_BL.to(self.device), strict=True), strict=True))
        return encoded

    def _check_size(self, size: ClipSize, num_latents: int) -> None:
        """Some transformers know clips of one length alone, and pictures of whole patches."""
        length = self.transformer.only_length
        if length is not None and num_latents not in (1, length):
            frames = self.vae.frames_of(length)
            raise ValueError(f"num_frames: this transformer makes clips of 1 or {frames} frames, got {size.num_frames}")
        multiple = self.transformer.latent_multiple
        pixels = multiple * self.vae.space_factor
        if multiple > 1 and (size.height % pixels or size.width % pixels):
            raise ValueError(
                f"image_size: must be multiples of {pixels} pixels for this transformer, got {size.height} {size.width}"
            )

    def _rehearse_masks(self, plan: Plan, request: Request) -> None:
        """Apply a request's masks to tensors without memory, for the errors that this raises."""
        height, width = plan.size.height, plan.size.width
        frames = [probe(path).num_frames for path in request.references]
        if plan.config.loop > 1:
            frames += [overlap_frames(plan.shape, self.vae, at_end=False)] * (plan.config.loop - 1)
        latents = [
            torch.empty(self.vae.latent_channels, *self.vae.latent_size((count, height, width)), device="meta")
            for count in frames
        ]
        z = torch.empty(1, self.vae.latent_channels, *plan.latent_size, device="meta")
        for number, group in enumerate(parse_mask_strategy(request.mask_strategy)):
            where = f"mask_strategy {request.mask_strategy!r}: group {number}"
            if group.loop >= plan.config.loop:
                raise ValueError(f"{where} is for loop {group.loop}, but there are loops 0 to {plan.config.loop - 1}")
            have = latents[group.reference].shape[1]
            start = group.reference_start % have if -have <= group.reference_start < have else 0
            if start + group.length > have:
                raise ValueError(
                    f"{where} asks for {group.length} latent frames from {group.reference_start} on, but reference "
                    f"{group.reference} has {have}"
                )
        for loop in range(plan.config.loop):
            given = latents[: len(request.references) + loop]
            apply_mask_strategy(z, [given], [request.mask_strategy], loop, align=plan.config.align)


def _overlap(config: SampleConfig, num_latents: int, *, is_needed: bool) -> int:
    """Latent frames that a loop, or a clip that begins or ends with a video, repeats."""
    length = config.condition_frame_length
    if config.loop == 1 and not is_needed:
        return min(length, num_latents)
    if config.loop > 1 and num_latents == 1:
        raise ValueError(f"loop: a clip of one latent frame cannot go on from itself, got loop {config.loop}")
    if num_latents > 1 and not 0 < length < num_latents:
        raise ValueError(
            f"condition_frame_length: must lie between 1 and {num_latents - 1}, so that a clip of "
            f"{num_latents} latent frames has something left to generate, got {length}"
        )
    return min(length, num_latents - 1)


def _check_fit(vae: Any, transformer: nn.Module, text_encoder: Any) -> None:
    config = transformer.config
    for rule, ours, theirs in (
        ("transformer in_channels must equal the VAE's latent channels", config.in_channels, vae.latent_channels),
        (
            "transformer caption_channels must equal the text encoder's",
            config.caption_channels,
            text_encoder.output_dim,
        ),
        (
            "transformer model_max_length must equal the text encoder's",
            config.model_max_length,
            text_encoder.model_max_length,
        ),
    ):
        if ours != theirs:
            raise ValueError(f"Sampler: {rule}, got {ours} and {theirs}")
