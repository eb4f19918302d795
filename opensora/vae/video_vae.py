"""The stacked video VAE of Open-Sora 1.2: a 2-D VAE per frame, then a causal VAE over time.

Axes: B batch, C channels, T frames, H height, W width.
Source: hpcaitech/Open-Sora v1.2.0, opensora/models/vae/vae.py, VideoAutoencoderPipeline (behaviour, parameter names).
"""

from __future__ import annotations

from dataclasses import asdict

import torch
from torch import Tensor, nn

from opensora.config import VideoVAEConfig
from opensora.vae.distributions import DiagonalGaussian, DrawNoise, normal_noise
from opensora.vae.output import VAEOutput
from opensora.vae.spatial import SpatialVAE
from opensora.vae.temporal import TemporalVAE


class VideoVAE(nn.Module):
    """Clips in pixels to latents and back.

    Shapes: x (B, 3, T, H, W) in [-1, 1]; z (B, latent_channels, *latent_size((T, H, W))), normalised to
    (z - shift) / scale. Frames go through the temporal VAE in independent chunks of `config.micro_frame_size` and
    through the 2-D VAE `config.micro_batch_size` at a time (None: all at once). Inputs must have the dtype of the
    weights, unless autocast is on.
    """

    def __init__(self, config: VideoVAEConfig) -> None:
        super().__init__()
        if config.temporal.in_out_channels != config.spatial.latent_channels:
            raise ValueError(
                "VideoVAE: temporal.in_out_channels must equal spatial.latent_channels, "
                f"got {config.temporal.in_out_channels} and {config.spatial.latent_channels}"
            )
        self.config = config
        self.latent_channels = config.temporal.embed_dim
        self.spatial_vae = SpatialVAE(config.spatial, config.micro_batch_size)
        self.temporal_vae = TemporalVAE(**asdict(config.temporal))
        self.register_buffer("scale", _per_channel("scale", config.scale, self.latent_channels))
        self.register_buffer("shift", _per_channel("shift", config.shift, self.latent_channels))

    def encode(
        self,
        x_BCTHW: Tensor,
        *,
        generator: torch.Generator | None = None,
        sample_posterior: bool = True,
        draw_noise: DrawNoise | None = None,
    ) -> Tensor:
        """Normalised latents of a clip.

        Both posteriors are sampled, as upstream does, with noise from `generator` or, when given, from `draw_noise`:
        one draw per 2-D micro batch of (frames, C, h, w), then one per temporal chunk of (B, C, t, h, w).
        `sample_posterior=False` takes their means. Raises ValueError when x is not (B, 3, T, H, W) or too small.
        """
        self._check_pixels("encode", x_BCTHW)
        if draw_noise is None and sample_posterior:
            draw_noise = normal_noise(generator)
        x_z = self.spatial_vae.encode(x_BCTHW, draw_noise if sample_posterior else None)
        z, _ = self._encode_time(x_z, draw_noise if sample_posterior else None)
        return (z - self.shift) / self.scale

    def encode_moments(self, x_BCTHW: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the temporal posterior, normalised as `encode` does, of the 2-D one's mean."""
        self._check_pixels("encode", x_BCTHW)
        mean, posteriors = self._encode_time(self.spatial_vae.encode(x_BCTHW, None), None)
        std = torch.cat([posterior.std for posterior in posteriors], dim=2)
        return (mean - self.shift) / self.scale, std / self.scale

    def decode(self, z_BCTHW: Tensor, num_frames: int) -> Tensor:
        """Pixels of normalised latents: (B, 3, num_frames, H, W), not clamped.

        H and W are latent sizes times the 2-D factor. Raises ValueError when z does not hold latent_size of num_frames.
        """
        expected = self._latent_frames(num_frames)
        if z_BCTHW.ndim != 5 or z_BCTHW.shape[1] != self.latent_channels or z_BCTHW.shape[2] != expected:
            raise ValueError(
                f"decode: z must have shape (B, {self.latent_channels}, {expected}, H, W) for {num_frames} frames, "
                f"got {tuple(z_BCTHW.shape)}"
            )
        return self.spatial_vae.decode(self._decode_time(z_BCTHW * self.scale + self.shift, num_frames))

    def forward(
        self,
        x_BCTHW: Tensor,
        *,
        generator: torch.Generator | None = None,
        draw_noise: DrawNoise | None = None,
        decode_pixels: bool = True,
        through_time: bool = True,
    ) -> VAEOutput:
        """Encode and decode for training.

        `decode_pixels=False` saves the 2-D decoder when no loss looks at pixels; `through_time=False` leaves the
        temporal VAE out, to train the 2-D one alone: z and z_rec are x_z then.
        """
        self._check_pixels("forward", x_BCTHW)
        draw_noise = draw_noise or normal_noise(generator)
        x_z = self.spatial_vae.encode(x_BCTHW, draw_noise)
        if not through_time:
            return VAEOutput(self.spatial_vae.decode(x_z) if decode_pixels else None, x_z, [], x_z, x_z)
        z, posteriors = self._encode_time(x_z, draw_noise)
        z_rec = self._decode_time(z, x_BCTHW.shape[2])
        x_rec = self.spatial_vae.decode(z_rec) if decode_pixels else None
        return VAEOutput(x_rec, z, posteriors, x_z, z_rec)

    def latent_size(self, size: tuple[int, int, int]) -> tuple[int, int, int]:
        """(frames, height, width) of the latents of a clip of `size` in frames and pixels."""
        num_frames, height, width = size
        return (self._latent_frames(num_frames), *self.spatial_vae.latent_size(height, width))

    @property
    def space_factor(self) -> int:
        return self.spatial_vae.factor

    @property
    def time_factor(self) -> int:
        return self.temporal_vae.time_factor

    def padded_frames(self, num_frames: int) -> int:
        """The shortest clip of at least `num_frames` frames that it takes."""
        return num_frames

    def frames_of(self, num_latents: int) -> int:
        """Frames that the first `num_latents` latents of a clip stand for.

        Those of whole chunks stand for whole chunks of frames. Of the rest, the first stands for one frame and each
        further one for `time_factor`.
        """
        chunk_frames = self.config.micro_frame_size
        chunk_latents = num_latents + 1 if chunk_frames is None else self.temporal_vae.latent_frames(chunk_frames)
        chunks, rest = divmod(num_latents, chunk_latents)
        return chunks * (chunk_frames or 0) + (1 + self.time_factor * (rest - 1) if rest else 0)

    def set_gradient_checkpointing(self, enabled: bool = True) -> None:
        """Keep only block inputs for the backward pass and compute the blocks again: less memory, a third more time."""
        self.temporal_vae.encoder.gradient_checkpointing = enabled
        self.temporal_vae.decoder.gradient_checkpointing = enabled
        if enabled:
            self.spatial_vae.module.enable_gradient_checkpointing()
        else:
            self.spatial_vae.module.disable_gradient_checkpointing()

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight whose gradients balance an adversarial loss: the temporal decoder's last convolution."""
        return self.temporal_vae.decoder.conv_out.conv.weight

    def _encode_time(self, x_z: Tensor, draw_noise: DrawNoise | None) -> tuple[Tensor, list[DiagonalGaussian]]:
        chunks = x_z.split(self.config.micro_frame_size or x_z.shape[2], dim=2)
        posteriors = [self.temporal_vae.encode(chunk) for chunk in chunks]
        z = [p.mode() if draw_noise is None else p.sample(draw_noise) for p in posteriors]
        return torch.cat(z, dim=2), posteriors

    def _decode_time(self, z: Tensor, num_frames: int) -> Tensor:
        chunk_frames = self.config.micro_frame_size or num_frames
        chunks = z.split(self.temporal_vae.latent_frames(chunk_frames), dim=2)
        lengths = [min(chunk_frames, num_frames - start) for start in range(0, num_frames, chunk_frames)]
        decoded = [self.temporal_vae.decode(*pair) for pair in zip(chunks, lengths, strict=True)]
        return torch.cat(decoded, dim=2)

    def _latent_frames(self, num_frames: int) -> int:
        if num_frames < 1:
            raise ValueError(f"VideoVAE: num_frames must be at least 1, got {num_frames}")
        chunk_frames = self.config.micro_frame_size or num_frames
        whole, rest = divmod(num_frames, chunk_frames)
        return whole * self.temporal_vae.latent_frames(chunk_frames) + self.temporal_vae.latent_frames(rest)

    def _check_pixels(self, name: str, x: Tensor) -> None:
        channels, factor = self.config.spatial.in_channels, self.spatial_vae.factor
        if x.ndim != 5 or x.shape[1] != channels:
            raise ValueError(f"{name}: x must have shape (B, {channels}, T, H, W), got {tuple(x.shape)}")
        if x.shape[2] < 1 or min(x.shape[3:]) < factor:
            raise ValueError(
                f"{name}: x must have a frame and at least {factor} x {factor} pixels, got {tuple(x.shape)}"
            )


def _per_channel(name: str, value: tuple[float, ...] | list[float] | float, channels: int) -> Tensor:
    """(1, C, 1, 1, 1), or a scalar when one number serves all channels; both forms exist in released checkpoints."""
    if isinstance(value, int | float):
        return torch.tensor(float(value))
    if len(value) != channels:
        raise ValueError(f"VideoVAE: {name} must be a number or have {channels} entries, got {len(value)}")
    return torch.tensor(value, dtype=torch.float32).view(1, -1, 1, 1, 1)
