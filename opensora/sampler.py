"""Text, and images or videos to go on from, to clips: text encoder, diffusion transformer and VAE joined.

    from opensora.sampler import Sampler
    sampler = Sampler.from_preset("tiny")
    for clip in sampler.sample(["a red circle moving left"], seed=3):
        clip.save("out.mp4")

Axes: B batch, C channels, T frames, H height, W width, L text tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from opensora import presets
from opensora.checkpoints import load_model
from opensora.conditioning.masks import apply_mask_strategy, continue_mask_strategy
from opensora.config import RectifiedFlowConfig, SampleConfig, STDiT3Config, VideoVAEConfig
from opensora.data.reading import probe, read_frames
from opensora.data.transforms import transform_frames
from opensora.models.stdit3 import STDiT3
from opensora.parallel import DTYPES, resolve_device
from opensora.sampling.requests import ClipSize, PromptError, Request, clip_size, read_requests
from opensora.sampling.stages import StageCost, StageMeter
from opensora.schedulers.rectified_flow import RectifiedFlow
from opensora.text.t5 import TextEncoder
from opensora.vae import VideoVAE
from opensora.video import to_uint8, write_video
from opensora_kernels.vae import TilePlan, decode, gather, plan_tiles

TEXTS_AT_ONCE = 8

OnProgress = Callable[[str, int, int], None]
"""Called as (stage, steps done, steps in all) whenever a step of "text", "denoise" or "decode" is done."""


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


@dataclass(frozen=True)
class Plan:
    """Checked work: every request, the size of a clip in pixels and latents, how far loops overlap in frames, and how
    a batch is decoded (None: at once)."""

    requests: tuple[Request, ...]
    config: SampleConfig
    flow: RectifiedFlow
    size: ClipSize
    latent_size: tuple[int, int, int]
    overlap: int
    decoding: TilePlan | None = None

    @property
    def num_clips(self) -> int:
        return len(self.requests) * self.config.num_sample


class Sampler:
    """Generates clips. The models decide device and dtype; `costs` holds seconds and peak memory of the last run.

    Source: Open-Sora v1.2.0, scripts/inference.py (order of steps), with one random stream per clip instead of one for
    all: a clip depends on its own seed only, not on its neighbours in the batch.
    """

    def __init__(
        self,
        vae: VideoVAE,
        transformer: STDiT3,
        text_encoder: TextEncoder,
        *,
        flow: RectifiedFlowConfig | None = None,
        defaults: SampleConfig | None = None,
    ) -> None:
        _check_fit(vae, transformer, text_encoder)
        self.vae, self.transformer, self.text_encoder = vae.eval(), transformer.eval(), text_encoder.eval()
        self.flow = flow or RectifiedFlowConfig()
        self.defaults = defaults or SampleConfig()
        weight = transformer.x_embedder.proj.weight
        self.device, self.dtype = weight.device, weight.dtype
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
    ) -> Sampler:
        """Load the models of a preset; a folder or hub id given here takes the place of the preset's.

        config: sampling defaults in place of the preset's; its dtypes and device are those of the models.
        Errors: ValueError for an unknown preset; CheckpointError or OSError for weights that are absent or do not fit.
        """
        preset = presets.get(name)
        config = config or preset.sample
        place = {"dtype": DTYPES[config.dtype], "device": resolve_device(config.device)}
        diffusion = load_model(transformer or preset.transformer, STDiT3, STDiT3Config, **place)
        encoder = TextEncoder.from_pretrained(
            text_encoder or preset.text_encoder,
            model_max_length=diffusion.config.model_max_length,
            dtype=DTYPES[config.text_dtype],
            device=place["device"],
        )
        autoencoder = load_model(vae or preset.vae, VideoVAE, VideoVAEConfig, **place)
        return cls(autoencoder, diffusion, encoder, flow=preset.flow, defaults=config)

    def sample(
        self,
        prompts: str | Sequence[str],
        config: SampleConfig | None = None,
        *,
        seed: int | None = None,
        reference_paths: Sequence[str | None] | None = None,
        mask_strategies: Sequence[str | None] | None = None,
        flow: RectifiedFlowConfig | None = None,
        on_progress: OnProgress | None = None,
    ) -> list[Clip]:
        """Clips for `prompts`, `config.num_sample` of each. The same seed gives the same clips.

        config: default `self.defaults`; `seed` replaces its seed, and clip number n of the call uses seed + n.
        reference_paths, mask_strategies: none, one for all, or one for each prompt; see `Request`.
        Errors: before any work, PromptError for a prompt that cannot be used, ValueError for impossible sizes.
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        config = config or self.defaults
        plan = self.plan(
            prompts,
            config if seed is None else replace(config, seed=seed),
            reference_paths=reference_paths,
            mask_strategies=mask_strategies,
            flow=flow,
        )
        return list(self.run(plan, on_progress=on_progress))

    def plan(
        self,
        prompts: Sequence[str],
        config: SampleConfig,
        *,
        reference_paths: Sequence[str | None] | None = None,
        mask_strategies: Sequence[str | None] | None = None,
        flow: RectifiedFlowConfig | None = None,
        first_index: int = 0,
    ) -> Plan:
        """Check everything that `run` will need; errors as for `sample`."""
        size = clip_size(config)
        requests = read_requests(
            prompts,
            config,
            reference_paths=reference_paths,
            mask_strategies=mask_strategies,
            first_index=first_index,
        )
        latent_size = self.vae.latent_size((size.num_frames, size.height, size.width))
        if min(latent_size) < 1:
            raise ValueError(
                f"image_size: {size.height} x {size.width} is smaller than one latent of this VAE; "
                f"latents would be {latent_size[1]} x {latent_size[2]}"
            )
        overlap = self._loop_overlap(config, latent_size[0]) if config.loop > 1 else 0
        decoding = None
        if config.vae_memory is not None:
            batch = min(config.batch_size, len(requests) * config.num_sample)
            shape = (batch, self.vae.latent_channels, *latent_size)
            run = partial(self.vae.decode, num_frames=size.num_frames)
            decoding = plan_tiles(run, shape, config.vae_memory, self.dtype, self.device)
        flow = RectifiedFlow(flow or self.flow)
        plan = Plan(tuple(requests), config, flow, size, latent_size, overlap, decoding)
        plan.flow.sampling_timesteps(1, self._arguments(plan, 1))  # some lengths have no timesteps: says so now
        for index, request in enumerate(requests):
            try:
                self._rehearse_masks(plan, request)
            except ValueError as error:
                raise PromptError(index, str(error)) from error
        return plan

    @torch.no_grad()
    def run(self, plan: Plan, *, on_progress: OnProgress | None = None) -> Iterator[Clip]:
        """Generate the planned clips, batch after batch; each is complete when it comes out."""
        meter = StageMeter(self.device)
        self.costs = meter.costs
        report = _Progress(plan, on_progress)
        with meter.stage("text"):
            texts = self._encode_texts(plan)
            report.done("text")
        jobs = [(request, sample) for request in plan.requests for sample in range(plan.config.num_sample)]
        for start in range(0, len(jobs), plan.config.batch_size):
            batch = jobs[start : start + plan.config.batch_size]
            seeds = [plan.config.seed + r.index * plan.config.num_sample + sample for r, sample in batch]
            videos = self._generate(plan, [request for request, _ in batch], seeds, texts, meter, report)
            for (request, sample), seed, video in zip(batch, seeds, videos, strict=True):
                frames = to_uint8(video)
                yield Clip(frames, plan.size.save_fps, request.prompt, request.index, sample, seed)

    def _encode_texts(self, plan: Plan) -> dict[str, tuple[Tensor, Tensor]]:
        """Embeddings (L, C) and mask (L,) of every distinct text; the negative prompt is one of them."""
        distinct = list(dict.fromkeys(text for request in plan.requests for text in request.texts))
        if plan.config.negative_prompt is not None:
            distinct.append(plan.config.negative_prompt)
        encoded = {}
        for start in range(0, len(distinct), TEXTS_AT_ONCE):
            part = distinct[start : start + TEXTS_AT_ONCE]
            embeddings_B1LC, mask_BL = self.text_encoder.encode(part)
            embeddings_B1LC = embeddings_B1LC.to(self.device, self.dtype)
            encoded |= dict(zip(part, zip(embeddings_B1LC[:, 0], mask_BL.to(self.device), strict=True), strict=True))
        return encoded

    def _generate(
        self,
        plan: Plan,
        requests: list[Request],
        seeds: list[int],
        texts: dict[str, tuple[Tensor, Tensor]],
        meter: StageMeter,
        report: _Progress,
    ) -> list[Tensor]:
        """Videos (3, T, H, W) in about [-1, 1] for a batch, loops joined."""
        config = plan.config
        noise = _Noise(seeds, self.device, self.dtype)
        strategies = [request.mask_strategy for request in requests]
        references: list[list[Tensor]] = [[] for _ in requests]
        if any(request.references for request in requests):
            with meter.stage("references"):
                for b, request in enumerate(requests):
                    references[b] = [self._encode_file(path, plan, noise.of(b)) for path in request.references]
        parts: list[list[Tensor]] = [[] for _ in requests]
        videos = None
        for loop in range(config.loop):
            if videos is not None:
                with meter.stage("references"):
                    for b, video in enumerate(videos[:, :, -plan.overlap :]):
                        strategies[b] = continue_mask_strategy(
                            strategies[b],
                            loop=loop,
                            reference=len(references[b]),
                            length=config.condition_frame_length,
                            edit_ratio=config.condition_frame_edit,
                        )
                        references[b].append(self.vae.encode(video[None], draw_noise=noise.of(b))[0])
            with meter.stage("denoise"):
                z = noise.batch(torch.empty(len(requests), self.vae.latent_channels, *plan.latent_size))
                z, mask = apply_mask_strategy(z, references, strategies, loop, align=config.align)
                z = self._denoise(
                    plan, z, mask, [texts[request.texts[loop]] for request in requests], texts, noise, report
                )
            with meter.stage("decode"):
                run = partial(self.vae.decode, num_frames=plan.size.num_frames)
                videos = gather(decode(run, z.to(self.dtype), plan=plan.decoding))
                report.done("decode")
            for b, video in enumerate(videos):
                parts[b].append(video[:, plan.overlap if loop else 0 :].float().cpu())
        return [torch.cat(part, dim=1) for part in parts]

    def _denoise(
        self,
        plan: Plan,
        z: Tensor,
        mask_BT: Tensor | None,
        encoded: list[tuple[Tensor, Tensor]],
        texts: dict[str, tuple[Tensor, Tensor]],
        noise: _Noise,
        report: _Progress,
    ) -> Tensor:
        y_B1LC = torch.stack([embedding for embedding, _ in encoded])[:, None]
        mask_BL = torch.stack([mask for _, mask in encoded])
        null_B1LC = None
        if plan.flow.config.cfg_scale != 1:
            null_B1LC = self.transformer.y_embedder.y_embedding[None, None].expand_as(y_B1LC)
            if plan.config.negative_prompt is not None:
                # Upstream's null caption borrows the prompt's mask; a real one brings its own.
                embedding, mask = texts[plan.config.negative_prompt]
                null_B1LC = embedding[None, None].expand_as(y_B1LC)
                mask_BL = torch.cat([mask_BL, mask.expand_as(mask_BL)])
        if mask_BT is not None and bool((mask_BT == 1).all()):
            mask_BT = None  # nothing is given: the masked path would compute the same and draw noise for nothing
        return plan.flow.sample(
            self.transformer,
            z,
            y_B1LC,
            null_B1LC,
            mask_BL,
            arguments=self._arguments(plan, len(z)),
            frame_mask=mask_BT,
            draw_noise=noise.batch,
            on_step=lambda step, num_steps, z: report.done("denoise"),
        )

    def _arguments(self, plan: Plan, batch: int) -> dict[str, Tensor]:
        """The scalars a model is told, in its own dtype as upstream: bf16 makes 854 pixels 856."""
        size = plan.size
        values = {"fps": size.fps, "height": size.height, "width": size.width, "num_frames": size.num_frames}
        return {
            name: torch.full((batch,), float(value), dtype=self.dtype, device=self.device)
            for name, value in values.items()
        }

    def _encode_file(self, path: str, plan: Plan, draw_noise: Callable[[Tensor], Tensor]) -> Tensor:
        """Latents (C, T, H, W) of an image or a whole video, resized and cropped to the clip's size."""
        x_CTHW = transform_frames(read_frames(path), (plan.size.height, plan.size.width))
        return self.vae.encode(x_CTHW[None].to(self.device, self.dtype), draw_noise=draw_noise)[0]

    def _rehearse_masks(self, plan: Plan, request: Request) -> None:
        """Apply a request's masks to tensors without memory, for the errors that this raises."""
        height, width = plan.size.height, plan.size.width
        frames = [probe(path).num_frames for path in request.references] + [plan.overlap] * (plan.config.loop - 1)
        latents = [
            torch.empty(self.vae.latent_channels, *self.vae.latent_size((count, height, width)), device="meta")
            for count in frames
        ]
        z = torch.empty(1, self.vae.latent_channels, *plan.latent_size, device="meta")
        for loop in range(plan.config.loop):
            given = latents[: len(request.references) + loop]
            apply_mask_strategy(z, [given], [request.mask_strategy], loop, align=plan.config.align)

    def _loop_overlap(self, config: SampleConfig, num_latent_frames: int) -> int:
        """Pixel frames that a loop repeats from the one before: those that `condition_frame_length` latents stand for.

        Latents of whole chunks stand for whole chunks of frames, as upstream requires. Of the rest, the first stands
        for one frame and each further one for `factor`: the code of a clip's first frames, in which a loop begins.
        """
        length, chunk_frames = config.condition_frame_length, self.vae.config.micro_frame_size
        if num_latent_frames == 1:
            raise ValueError(f"loop: a clip of one latent frame cannot go on from itself, got loop {config.loop}")
        if not 0 < length < num_latent_frames:
            raise ValueError(
                f"condition_frame_length: must lie between 1 and {num_latent_frames - 1}, so that a clip of "
                f"{num_latent_frames} latent frames has something left to generate, got {length}"
            )
        factor = 2 ** sum(self.vae.config.temporal.temporal_downsample)
        chunk_latents = num_latent_frames if chunk_frames is None else -(-chunk_frames // factor)
        chunks, rest = divmod(length, chunk_latents)
        return chunks * (chunk_frames or 0) + (1 + factor * (rest - 1) if rest else 0)


class _Noise:
    """Standard-normal draws from one CPU stream per clip: the same on every device and in every batch."""

    def __init__(self, seeds: list[int], device: torch.device, dtype: torch.dtype) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._device, self._dtype = device, dtype

    def of(self, b: int) -> Callable[[Tensor], Tensor]:
        return lambda like: torch.randn(like.shape, generator=self._generators[b]).to(self._device, self._dtype)

    def batch(self, like: Tensor) -> Tensor:
        draws = [torch.randn(like.shape[1:], generator=generator) for generator in self._generators]
        return torch.stack(draws).to(self._device, self._dtype)


class _Progress:
    """Counts steps of each stage and passes the counts on."""

    def __init__(self, plan: Plan, on_progress: OnProgress | None) -> None:
        num_batches = -(-plan.num_clips // plan.config.batch_size) * plan.config.loop
        self._totals = {"text": 1, "denoise": num_batches * plan.flow.config.num_sampling_steps, "decode": num_batches}
        self._counts = dict.fromkeys(self._totals, 0)
        self._on_progress = on_progress

    def done(self, stage: str) -> None:
        self._counts[stage] += 1
        if self._on_progress is not None:
            self._on_progress(stage, self._counts[stage], self._totals[stage])


def _check_fit(vae: VideoVAE, transformer: STDiT3, text_encoder: TextEncoder) -> None:
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
