"""A batch of clips from their texts and from what they are given: noise, denoising, decoding, and loops.

Axes: B batch, C channels, T frames, H height, W width, L text tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from opensora.conditioning.masks import apply_mask_strategy, continue_mask_strategy
from opensora.data.reading import read_frames
from opensora.data.transforms import transform_frames
from opensora.sampling.guides import (
    Placement,
    Source,
    cross_faded,
    end_with,
    join,
    overlap_frames,
    paste,
    placements,
    read_source,
    region_strength,
)
from opensora.sampling.noise import ClipNoise
from opensora.sampling.offload import Workplace
from opensora.sampling.plan import Plan, Progress
from opensora.sampling.requests import Request
from opensora.sampling.stages import StageMeter
from opensora.schedulers import KnownRegion, with_given_frames
from opensora_kernels import SequenceShards
from opensora_kernels.vae import decode, gather

Texts = dict[str, tuple[Tensor, Tensor]]
"""Embeddings (L, C) and mask (L,) of every distinct text."""


@dataclass(frozen=True)
class ModelsAtWork:
    """A VAE and a transformer, where they work, in which dtype, and over which ranks the transformer's tokens lie."""

    vae: Any
    transformer: nn.Module
    workplace: Workplace
    dtype: torch.dtype
    sequence: SequenceShards | None = None


class Generation:
    """Some clips that are made together, each with random numbers of its own; `run` makes them."""

    def __init__(
        self,
        plan: Plan,
        models: ModelsAtWork,
        requests: list[Request],
        texts: Texts,
        noise: ClipNoise,
        meter: StageMeter,
        report: Progress,
    ) -> None:
        self.plan, self.models, self.requests, self.texts = plan, models, requests, texts
        self.noise, self.meter, self.report = noise, meter, report
        self.vae, self.device = models.vae, models.workplace.device
        self.strategies = [request.mask_strategy for request in requests]
        self.references: list[list[Tensor]] = [[] for _ in requests]
        self.sources = [Source() for _ in requests]
        self.placements: list[list[Placement]] = [[] for _ in requests]
        self.known: KnownRegion | None = None

    def run(self) -> list[Tensor]:
        """Videos (3, T, H, W) in about [-1, 1], fp32 on the CPU, loops and given videos joined."""
        if any(request.references or request.guide for request in self.requests):
            with self.meter.stage("references"), self.models.workplace.use(self.vae):
                self._read_references()
        wholes: list[Tensor | None] = [None for _ in self.requests]
        for loop in range(self.plan.config.loop):
            with self.meter.stage("denoise"), self.models.workplace.use(self.models.transformer):
                z = self._denoise(loop)
            with self.meter.stage("decode"), self.models.workplace.use(self.vae):
                num_frames = self.plan.shape.num_frames
                run = partial(self.vae.decode, num_frames=num_frames)
                videos = gather(decode(run, z.to(self.models.dtype), plan=self.plan.decoding))
                self.report.done("decode")
            for b, (request, video) in enumerate(zip(self.requests, videos, strict=True)):
                part = video.float().cpu()
                wholes[b] = self._with_part(wholes[b], part, goes_backward=request.guide.goes_backward)
            if loop + 1 < self.plan.config.loop:
                with self.meter.stage("references"), self.models.workplace.use(self.vae):
                    self._go_on_from(videos, loop + 1)
        return [self._finish(b, whole) for b, whole in enumerate(wholes)]

    def _read_references(self) -> None:
        strengths = []
        for b, request in enumerate(self.requests):
            encode = self._encoder(b)
            for path in request.references:
                frames = read_frames(path)
                self.references[b].append(encode(transform_frames(frames, self.plan.shape[1:3])))
            source = self.sources[b] = read_source(request.guide, self.plan.shape)
            self.placements[b] = placements(request.guide, source, self.plan.shape, self.vae, encode)
            if source.region is not None:
                z = encode(source.edit)
                ratio = request.guide.strength
                strengths.append((b, z, region_strength(source.region, ratio, self.plan.shape, self.vae, z)))
        if strengths:
            z = torch.zeros(len(self.requests), *strengths[0][1].shape, device=self.device)
            strength = torch.ones(len(z), 1, *z.shape[2:], device=self.device)
            for b, latents, of_region in strengths:
                z[b], strength[b] = latents.float(), of_region.to(self.device)
            self.known = KnownRegion(z, strength)

    def _encoder(self, b: int) -> Callable[[Tensor], Tensor]:
        """Pixels (3, T, H, W) to latents (C, T, H, W), with the random numbers of clip b."""

        def encode(x_CTHW: Tensor) -> Tensor:
            x_BCTHW = x_CTHW[None].to(self.device, self.models.dtype)
            return self.vae.encode(x_BCTHW, draw_noise=self.noise.of(b))[0]

        return encode

    def _go_on_from(self, videos: Tensor, loop: int) -> None:
        """What the parts of loop number `loop` share with those before them."""
        config, shape = self.plan.config, self.plan.shape
        count = overlap_frames(shape, self.vae, at_end=False)
        for b, video in enumerate(videos):
            self.placements[b] = []
            if self.requests[b].guide.goes_backward:
                self.placements[b] = [end_with(video, shape, self.vae, self._encoder(b))]
                continue
            self.strategies[b] = continue_mask_strategy(
                self.strategies[b],
                loop=loop,
                reference=len(self.references[b]),
                length=config.condition_frame_length,
                edit_ratio=config.condition_frame_edit,
            )
            self.references[b].append(self._encoder(b)(video[:, -count:]))

    def _with_part(self, whole: Tensor | None, part: Tensor, *, goes_backward: bool) -> Tensor:
        """The clip so far and a part after it, or before it. Frames of both are taken from the earlier part, as
        upstream does; backwards they are cross-faded, for a part ends less exactly with them than one begins."""
        if whole is None:
            return part
        if goes_backward:
            return cross_faded(part, whole, overlap_frames(self.plan.shape, self.vae, at_end=True))
        return torch.cat([whole, part[:, overlap_frames(self.plan.shape, self.vae, at_end=False) :]], dim=1)

    def _finish(self, b: int, video: Tensor) -> Tensor:
        config, source = self.plan.config, self.sources[b]
        video = paste(video, source, self.vae.space_factor)
        if config.join_given:
            video = join(video, source, self.plan.shape, self.vae)
        surplus = self.plan.shape.num_frames - self.plan.size.num_frames
        return video[:, : video.shape[1] - surplus]

    def _denoise(self, loop: int) -> Tensor:
        """Latents of the clips' parts."""
        plan, transformer = self.plan, self.models.transformer
        noise_BCTHW = self.noise.batch(torch.empty(len(self.requests), self.vae.latent_channels, *plan.latent_size))
        z, mask_BT = self._given(noise_BCTHW, loop)
        known = self.known
        if mask_BT is not None and not transformer.takes_frame_mask:
            known, z = with_given_frames(known, z, mask_BT, lambda z: noise_BCTHW)
            mask_BT = None
        y_B1LC, null_B1LC, mask_BL = self._text_of(loop)
        arguments: dict[str, Any] = plan.arguments(len(z), self.device, self.models.dtype)
        if self.models.sequence is not None:
            arguments["sequence"] = self.models.sequence
        return plan.scheduler.sample(
            transformer,
            z,
            y_B1LC,
            null_B1LC,
            mask_BL,
            arguments=arguments,
            frame_mask=mask_BT,
            region=known,
            draw_noise=self.noise.batch,
            on_step=lambda step, num_steps, z: self.report.done("denoise"),
        )

    def _given(self, noise: Tensor, loop: int) -> tuple[Tensor, Tensor | None]:
        """Noise with the given frames in place, and how much of each frame is generated; None if all of all."""
        z, mask_BT = apply_mask_strategy(noise, self.references, self.strategies, loop, align=self.plan.config.align)
        for b, placed in enumerate(self.placements):
            for latents, position, strength in placed:
                frames = slice(position, position + latents.shape[1])
                z[b, :, frames] = latents.to(z)
                mask_BT[b, frames] = strength
        if mask_BT is not None:
            # What is all made anew begins as noise; the original's strategies leave the reference there.
            z = torch.where((mask_BT < 1).to(z.device)[:, None, :, None, None], z, noise)
        # Nothing is given: the masked path would compute the same and draw noise for nothing.
        return z, None if mask_BT is None or bool((mask_BT == 1).all()) else mask_BT

    def _text_of(self, loop: int) -> tuple[Tensor, Tensor | None, Tensor]:
        """Captions, what guidance moves away from, and the masks of both.

        The null caption borrows the prompt's mask; a negative prompt brings its own, unless it is cut to the prompt's.
        """
        encoded = [self.texts[request.texts[loop]] for request in self.requests]
        y_B1LC = torch.stack([embedding for embedding, _ in encoded])[:, None]
        mask_BL = torch.stack([mask for _, mask in encoded])
        if self.plan.scheduler.config.cfg_scale == 1:
            return y_B1LC, None, mask_BL
        null, null_masks = [], []
        for b, request in enumerate(self.requests):
            if request.negative is None:
                embedding, mask = self.models.transformer.null_caption.to(y_B1LC), mask_BL[b]
            else:
                embedding, mask = self.texts[request.negative]
            null.append(embedding)
            null_masks.append(mask_BL[b] if self.plan.config.cut_negative else mask)
        null_mask_BL = torch.stack(null_masks)
        if not torch.equal(null_mask_BL, mask_BL):
            mask_BL = torch.cat([mask_BL, null_mask_BL])
        return y_B1LC, torch.stack(null)[:, None], mask_BL
