"""What a training stage takes on each GPU, for each of its buckets; a clip of any size may take the buckets' place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod

from torch import nn

from opensora.config import Preset, TrainConfig
from opensora.data.aspect_ratios import closest_aspect_key, get_resolution
from opensora.estimate.denoisers import Checkpointing, Denoiser, LatentClip
from opensora.estimate.fits import forward_flops, training_memory
from opensora.estimate.paper import Affine, StepMemory
from opensora.estimate.placement import Hardware, SequenceDegree, exchange_bytes, largest, sequence_degree, shard_of
from opensora.estimate.texts import build_text_encoder, text_peak
from opensora.estimate.vaes import Size, VAEOnPaper, vae_on_paper
from opensora.estimate.weights import WeightMemory, frozen_bytes, weight_memory
from opensora.parallel import DTYPES
from opensora.training.flops import FORWARD_AND_BACKWARD
from opensora.vae import VAETiling

_MOST_CLIPS = 4096


@dataclass(frozen=True)
class BucketClip:
    """Clips of one kind: frames, height and width in pixels, and how many make a batch."""

    name: str
    size: Size
    batch: int


@dataclass(frozen=True)
class BucketMemory:
    """One GPU's share of a step on one bucket; `flops` and `num_tokens` are those of its batch.

    kept: activations that wait for the backward pass. peak: the most that the GPU holds of all. largest_batch: clips
    that fit; 0 where none does. seconds: of `flops` and what is computed again, data and communication left out.
    """

    clip: BucketClip
    num_tokens: int
    kept: int
    peak: int
    fits: bool
    largest_batch: int
    flops: float
    seconds: float


@dataclass(frozen=True)
class TrainingEstimate:
    """Of a stage on some hardware. `encoders`: bytes of the frozen text encoder and VAE on each GPU."""

    preset: str
    hardware: Hardware
    degree: SequenceDegree
    checkpointing: Checkpointing
    weights: WeightMemory
    encoders: int
    buckets: list[BucketMemory]


@dataclass
class TrainingOnPaper:
    """A preset's stage, to be asked for the memory of its buckets.

    has_encoders: whether text encoder and VAE run beside the transformer, or their results come from files.
    """

    preset: Preset
    config: TrainConfig
    hardware: Hardware
    has_encoders: bool = True

    def __post_init__(self) -> None:
        self._dtype = DTYPES[self.config.run.dtype]
        self._denoiser = Denoiser(self.config.transformer, self._dtype)
        self._model = self._denoiser.build()
        for name, parameter in self._model.named_parameters():
            if name.startswith(self.config.frozen):
                parameter.requires_grad_(False)
        self._vae: VAEOnPaper = vae_on_paper(self.preset, self._dtype)

    def estimate(
        self, clips: Sequence[BucketClip], *, checkpointing: Checkpointing, sequence_ranks: int = 1
    ) -> TrainingEstimate:
        """The memory of each of `clips`; `sequence_ranks` GPUs share each clip.

        Errors: ValueError for a number of ranks that does not divide that of the GPUs.
        """
        if self.hardware.num_gpus % sequence_ranks:
            raise ValueError(
                f"estimate: sequence ranks must divide the {self.hardware.num_gpus} GPUs, got {sequence_ranks}"
            )
        degree = sequence_degree(sequence_ranks, self._denoiser.num_heads)
        weights = weight_memory(
            self._model,
            num_ranks=self.hardware.num_gpus,
            sharding=self.config.parallel.sharding,
            itemsize=self._dtype.itemsize,
        )
        encoders = self._encoders()
        # One clip is run on paper itself, many are taken from a fit.
        self._forward_flops = self._denoiser.flops if len(clips) == 1 else partial(forward_flops, self._denoiser)
        rows = [self._bucket(clip, degree, checkpointing, weights, encoders) for clip in clips]
        return TrainingEstimate(self.preset.name, self.hardware, degree, checkpointing, weights, encoders, rows)

    def _bucket(
        self,
        clip: BucketClip,
        degree: SequenceDegree,
        checkpointing: Checkpointing,
        weights: WeightMemory,
        encoders: int,
    ) -> BucketMemory:
        latents = self._latents(clip.size)
        activations, kept = self._activations(latents, degree, checkpointing)
        states = weights.total - weights.unsharded

        def peak(batch: int) -> int:
            training = weights.unsharded + activations(batch)
            return self.hardware.reserved + states + encoders + max(training, self._encoding(clip.size, batch))

        parts = self._parts(latents)
        forward = clip.batch * sum(self._forward_flops(part) for part in parts) / degree.ranks
        # The ranks of a sequence encode the same clips, each all of them.
        flops = FORWARD_AND_BACKWARD * forward + clip.batch * self._encoding_flops(clip.size)
        recomputed = forward if checkpointing == "full" else 0
        return BucketMemory(
            clip,
            clip.batch * sum(self._denoiser.num_tokens(part) for part in parts) // degree.ranks,
            kept(clip.batch),
            peak(clip.batch),
            peak(clip.batch) <= self.hardware.memory,
            largest(lambda batch: peak(batch) <= self.hardware.memory, _MOST_CLIPS),
            flops,
            self.hardware.seconds(flops + recomputed, 1),
        )

    def _latents(self, size: Size) -> LatentClip:
        num_frames = self._vae.vae.padded_frames(size[0]) if hasattr(self._vae.vae, "padded_frames") else size[0]
        latent_size = self._vae.vae.latent_size((num_frames, *size[1:]))
        length = self.config.transformer.model_max_length
        return LatentClip(1, latent_size, length, size[1:], has_frame_mask=bool(self.config.mask_ratios))

    def _parts(self, clip: LatentClip) -> list[LatentClip]:
        """A clip, and the images beside it as clips of one frame."""
        num_images = self.config.data.use_image_num
        images = replace(clip, batch=num_images, size=(1, *clip.size[1:]))
        return [clip, images] if num_images and clip.size[0] > 1 else [clip]

    def _activations(
        self, clip: LatentClip, degree: SequenceDegree, checkpointing: Checkpointing
    ) -> tuple[Affine, Affine]:
        """Peak, with the buffers of an exchange and the batch itself, and kept bytes, of a number of clips."""
        first, *others = (shard_of(self._denoiser, part, degree) for part in self._parts(clip))

        def memory(number: int) -> StepMemory:
            """A clip's evaluation, while those of the images beside it are kept or wait to be computed."""
            found = training_memory(self._denoiser, replace(first, batch=number), checkpointing)
            for part in others:
                beside = training_memory(self._denoiser, replace(part, batch=number * part.batch), checkpointing)
                found = StepMemory(found.kept + beside.kept, found.peak + beside.kept)
            return found

        one, two = memory(1), memory(2)
        config, number = self._denoiser.config, clip.size[0] * clip.size[1] * clip.size[2]
        batch_bytes = 4 * number * config.in_channels * 3  # fp32: clean, noise, noisy
        batch_bytes += clip.num_text_tokens * config.caption_channels * self._dtype.itemsize
        extra = batch_bytes + exchange_bytes(self._denoiser, clip, degree)
        peak = Affine.through(1, 2, one.peak + extra, two.peak + 2 * extra)
        return peak, Affine.through(1, 2, one.kept, two.kept)

    def _encoders(self) -> int:
        if not self.has_encoders:
            return 0
        frozen = frozen_bytes(self._vae.vae, self._dtype)
        if self.config.train_text_encoder:
            return frozen
        return frozen + frozen_bytes(self._text_encoder(), self._dtype)

    def _encoding(self, size: Size, batch: int) -> int:
        """Most bytes beyond weights while text or pixels are encoded."""
        if not self.has_encoders:
            return 0
        length = self.config.transformer.model_max_length
        text = text_peak(self.preset, batch, length, self._dtype)
        if not self.config.tile_vae:
            return max(text, self._vae.peak("encode", size, batch))
        tiling = VAETiling()
        tile = (min(size[0], tiling.sample_frames or size[0]), *(min(side, tiling.sample_size) for side in size[1:]))
        pixels = 3 * batch * prod(size) * self._dtype.itemsize
        return max(text, pixels + self._vae.peak("encode", tile, batch))

    def _encoding_flops(self, size: Size) -> float:
        """Of a clip; tiles compute twice where they overlap."""
        if not self.has_encoders:
            return 0.0
        flops = float(self._vae.flops("encode", size))
        if self.config.tile_vae:
            tiling = VAETiling()
            stride = int(tiling.sample_size * (1 - tiling.overlap))
            for side in size[1:]:
                flops *= sum(min(tiling.sample_size, side - start) for start in range(0, side, stride)) / side
        return flops

    def _text_encoder(self) -> nn.Module:
        return build_text_encoder(self.preset.text_encoder)


def buckets_of(config: TrainConfig, aspect: float = 9 / 16) -> Iterator[BucketClip]:
    """The buckets of a stage that train on something, smallest pictures first, at the aspect nearest to the given one
    (height over width); a stage without buckets has its one size. Errors: ValueError for a stage without sizes."""
    data = config.data
    if not data.buckets:
        if data.image_size is None:
            raise ValueError("estimate: the stage must have data.buckets or data.image_size, got neither")
        yield BucketClip(f"{data.num_frames} frames", (data.num_frames, *data.image_size), data.batch_size)
        return
    for resolution in sorted(data.buckets, key=lambda name: get_resolution(name).num_pixels):
        table = get_resolution(resolution)
        pixels = table.sizes[closest_aspect_key(aspect, 1.0, resolution)]
        for num_frames, (_, batch) in sorted(data.buckets[resolution].items()):
            if batch:
                name = f"{resolution}, {'image' if num_frames == 1 else f'{num_frames} frames'}"
                yield BucketClip(name, (int(num_frames), *pixels), batch)
