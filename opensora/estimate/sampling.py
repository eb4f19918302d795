"""What making a clip takes on each GPU, stage by stage, and the longest clip that a machine can make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from opensora.config import LatteT2VConfig, Preset
from opensora.estimate.denoisers import Denoiser, LatentClip
from opensora.estimate.paper import Affine
from opensora.estimate.placement import Hardware, SequenceDegree, exchange_bytes, largest, sequence_degree, shard_of
from opensora.estimate.texts import build_text_encoder, text_peak
from opensora.estimate.vaes import Size, VAEOnPaper, decoding_plan, vae_on_paper, weights_of
from opensora.estimate.weights import frozen_bytes
from opensora.parallel import DTYPES

_LENGTHS = ((16, 96), (160, 320))
"""Latent frames of clips that are run on paper: short ones, and those whose attention over time is long."""


@dataclass(frozen=True)
class Stage:
    """Of a sampling run, on each of `num_gpus`: `weights` that are there, `peak` of everything, in bytes."""

    name: str
    num_gpus: int
    weights: int
    peak: int
    fits: bool
    flops: float
    seconds: float
    how: str


@dataclass(frozen=True)
class SamplingEstimate:
    """One clip at a time. `largest_frames`: of the longest clip that fits, 0 if none does. `notes`: what to know."""

    preset: str
    size: Size
    hardware: Hardware
    degree: SequenceDegree
    offloads: bool
    stages: list[Stage]
    largest_frames: int
    notes: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return all(stage.fits for stage in self.stages)


class SamplingOnPaper:
    """A preset's sampler on some hardware: the tokens of a clip are shared by all GPUs, and one of them decodes."""

    def __init__(self, preset: Preset, hardware: Hardware) -> None:
        self.preset, self.hardware = preset, hardware
        self._dtype, self._text_dtype = DTYPES[preset.sample.dtype], DTYPES[preset.sample.text_dtype]
        self._denoiser = Denoiser(preset.transformer_config, self._dtype)
        self.degree = sequence_degree(hardware.num_gpus, self._denoiser.num_heads)
        self._vae: VAEOnPaper = vae_on_paper(preset, self._dtype)
        self._peaks: dict[object, Affine] = {}

    def estimate(self, size: Size) -> SamplingEstimate:
        """Of a clip of frames, height and width in pixels. Models leave the GPU between their stages if they must."""
        stages = self._stages(size, offloads=False)
        offloads = not all(stage.fits for stage in stages)
        if offloads:
            stages = self._stages(size, offloads=True)
        return SamplingEstimate(
            self.preset.name,
            size,
            self.hardware,
            self.degree,
            offloads,
            stages,
            self.largest_frames(size[1:]) if stages[0].fits and stages[2].fits else 0,
            self._notes(size),
        )

    def largest_frames(self, pixels: Sequence[int]) -> int:
        """Frames of the longest clip whose denoising fits, the other models being elsewhere meanwhile."""
        step = self._vae.vae.padded_frames(2) - 1 if hasattr(self._vae.vae, "padded_frames") else 1
        step = max(step, 1)

        def fits(count: int) -> bool:
            return self._denoising_peak((1 + step * count, *pixels), self._transformer) <= self.hardware.memory

        count = largest(fits, 10**6)
        return 1 + step * count if count else 0

    def _stages(self, size: Size, *, offloads: bool) -> list[Stage]:
        all_weights = self._transformer + self._text + weights_of(self._vae.vae)

        def there(weights: int) -> int:
            return weights if offloads else all_weights

        return [
            self._text_stage(there(self._text)),
            self._denoising(size, there(self._transformer)),
            self._decoding(size, there(weights_of(self._vae.vae))),
        ]

    def _text_stage(self, weights: int) -> Stage:
        length = self._denoiser.config.model_max_length
        peak = self.hardware.reserved + weights + text_peak(self.preset, 2, length, self._text_dtype)
        return self._stage("text", self.hardware.num_gpus, weights, peak, 0.0, f"T5 in {self.preset.sample.text_dtype}")

    def _denoising(self, size: Size, weights: int) -> Stage:
        num_steps = self._num_steps
        flops = num_steps * self._denoiser.flops(self._latents(size))
        how = f"{num_steps} steps with guidance"
        if self.degree.ranks > 1:
            how += f", ulysses x ring {self.degree}"
        peak = self._denoising_peak(size, weights)
        return self._stage("denoise", self.hardware.num_gpus, weights, peak, flops, how)

    def _decoding(self, size: Size, weights: int) -> Stage:
        latents = self._latents(size)
        held = self.hardware.reserved + weights + latents.size[0] * latents.size[1] * latents.size[2] * 16
        whole = held + self._vae.peak("decode", size)
        flops = self._vae.flops("decode", size)
        if whole <= self.hardware.memory:
            return self._stage("decode", 1, weights, whole, flops, "all frames at once")
        try:
            plan = decoding_plan(self._vae.vae, size, self.hardware.memory - held)
        except ValueError as error:
            return self._stage("decode", 1, weights, whole, flops, str(error))
        assert plan.peak_bytes is not None
        how = f"{plan.strategy}{'' if plan.strategy.is_exact else ' (not exact)'}; --vae-memory"
        return self._stage("decode", 1, weights, held + plan.peak_bytes, flops, how)

    def _stage(self, name: str, num_gpus: int, weights: int, peak: int, flops: float, how: str) -> Stage:
        fits = peak <= self.hardware.memory
        return Stage(name, num_gpus, weights, peak, fits, flops, self.hardware.seconds(flops, num_gpus), how)

    def _denoising_peak(self, size: Size, weights: int) -> int:
        latents = self._latents(size)
        is_long = self._denoiser.grid(latents)[0] > 128
        key = (is_long, latents.size[1:])
        if key not in self._peaks:
            lengths = _LENGTHS[is_long]
            clips = [replace(latents, size=(length, *latents.size[1:])) for length in lengths]
            self._peaks[key] = Affine.through(*lengths, *map(self._activations, clips))
        return self.hardware.reserved + weights + self._peaks[key](latents.size[0])

    def _activations(self, clip: LatentClip) -> int:
        """Most bytes of a step beyond weights on a rank: of its share of the tokens, or of all of them before they are
        shared out; with the latents and what a step makes of them."""
        denoiser = self._denoiser
        shard = shard_of(denoiser, clip, self.degree)
        of_blocks = denoiser.sampling_memory(shard) + exchange_bytes(denoiser, clip, self.degree)
        tokens = denoiser.num_tokens(clip) * denoiser.hidden_size * denoiser.dtype.itemsize
        whole = tokens if self.degree.ranks > 1 else 0
        latents = 4 * 6 * denoiser.config.in_channels * clip.size[0] * clip.size[1] * clip.size[2]
        return latents + max(of_blocks, whole + whole // self.degree.ranks)

    def _latents(self, size: Size) -> LatentClip:
        """With guidance: a row with the text and one without."""
        vae = self._vae.vae
        num_frames = vae.padded_frames(size[0]) if hasattr(vae, "padded_frames") else size[0]
        length = self._denoiser.config.model_max_length
        return LatentClip(2, vae.latent_size((num_frames, *size[1:])), length, tuple(size[1:]))

    @property
    def _num_steps(self) -> int:
        return self.preset.scheduler.num_sampling_steps

    @cached_property
    def _transformer(self) -> int:
        return frozen_bytes(self._denoiser.build(), self._dtype)

    @cached_property
    def _text(self) -> int:
        return frozen_bytes(build_text_encoder(self.preset.text_encoder), self._text_dtype)

    def _notes(self, size: Size) -> tuple[str, ...]:
        config = self._denoiser.config
        latent_frames = self._latents(size).size[0]
        if isinstance(config, LatteT2VConfig) and latent_frames not in (1, config.video_length):
            frames = self._vae.vae.frames_of(config.video_length)
            return (f"these weights make clips of 1 or {frames} frames; the figures are of a model for longer ones",)
        if not isinstance(config, LatteT2VConfig) and size[0] > 408:
            return ("these weights were trained on up to 16 seconds at a time; longer clips may drift",)
        return ()
