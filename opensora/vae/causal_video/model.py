"""CausalVideoVAE of Open-Sora-Plan 1.0 and 1.1: clips of 4 n + 1 frames to n + 1 frames of latents, and back.

Axes: B batch, C channels, T frames, H height, W width.
Source: Open-Sora-Plan v1.1.0, opensora/models/ae/videobase/causal_vae/modeling_causalvae.py (behaviour, parameter
names), and opensora/models/ae/videobase/__init__.py (the scale of latents).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from opensora.config import CausalVideoVAEConfig
from opensora.vae.causal_video.coder import Decoder, Encoder, convolution
from opensora.vae.causal_video.layers import CausalConv3d
from opensora.vae.causal_video.tiling import VAETiling
from opensora.vae.distributions import DiagonalGaussian, DrawNoise, normal_noise
from opensora.vae.output import VAEOutput
from opensora_kernels.vae import run_tiled

Progress = Callable[[int, int], None]


class CausalVideoVAE(nn.Module):
    """Clips in pixels to latents and back; a single frame is an image.

    Shapes: x (B, 3, T, H, W) in [-1, 1], T = 1, 5, 9, ... in the releases; z (B, embed_dim, *latent_size((T, H, W))),
    multiplied by `config.scaling_factor`. GroupNorm statistics span all frames of a run.
    `tiling`: where a clip is larger than its tiles or windows, they are run one by one and joined; None runs all clips
    whole. The memory format of x, contiguous or channels_last_3d, is kept through all layers.
    """

    keys_not_loaded = ("loss.",)  # discriminator and perceptual network, in upstream's training checkpoints

    def __init__(self, config: CausalVideoVAEConfig, tiling: VAETiling | None = None) -> None:
        super().__init__()
        if not config.double_z:
            raise ValueError("CausalVideoVAE: double_z must be true, for the encoder predicts mean and variance")
        self.config = config
        self.tiling = tiling
        self.latent_channels = config.embed_dim
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = convolution("q_conv", config.q_conv, 2 * config.z_channels, 2 * config.embed_dim, 1)
        self.post_quant_conv = convolution("q_conv", config.q_conv, config.embed_dim, config.z_channels, 1)
        num_frames, self.space_factor, _ = self.decoder.result_size((2, 1, 1))
        self.time_factor = num_frames - 1
        size = (num_frames, self.space_factor, self.space_factor)
        if self.latent_size(size) != (2, 1, 1):
            raise ValueError(
                "CausalVideoVAE: encoder and decoder must resample alike, but latents of (T, H, W) = (2, 1, 1) decode "
                f"to {size}, which encode to {self.latent_size(size)}"
            )

    def encode(
        self,
        x_BCTHW: Tensor,
        *,
        generator: torch.Generator | None = None,
        sample_posterior: bool = True,
        draw_noise: DrawNoise | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        """Scaled latents of a clip.

        The posterior is sampled with noise from `generator` or, when given, from `draw_noise`; `sample_posterior=False`
        takes its mean. `progress` gets the number of tiles done and of all tiles. Errors: ValueError when x is not
        (B, 3, T, H, W), T is not 1 + time_factor * n, or a frame is smaller than one latent.
        """
        self._check_pixels(x_BCTHW)
        posterior = self.posterior(x_BCTHW, progress=progress)
        z = posterior.sample(draw_noise or normal_noise(generator)) if sample_posterior else posterior.mode()
        return z * self.config.scaling_factor

    def encode_moments(self, x_BCTHW: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the posterior that `encode` samples, scaled as it does."""
        self._check_pixels(x_BCTHW)
        posterior = self.posterior(x_BCTHW)
        return posterior.mode() * self.config.scaling_factor, posterior.std * self.config.scaling_factor

    def decode(
        self,
        z_BCTHW: Tensor,
        num_frames: int | None = None,
        *,
        out: Tensor | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        """Pixels of scaled latents: (B, 3, 1 + time_factor * (T - 1), H * space_factor, W * space_factor), not clamped.

        `num_frames`, when given, must be that number. `out` receives the result, on whatever device it is.
        Errors: ValueError when z is not (B, embed_dim, T, H, W), is empty, or does not hold `num_frames`.
        """
        if z_BCTHW.ndim != 5 or z_BCTHW.shape[1] != self.latent_channels or min(z_BCTHW.shape[2:]) < 1:
            raise ValueError(
                f"decode: z must have shape (B, {self.latent_channels}, T, H, W) with T, H, W >= 1, "
                f"got {tuple(z_BCTHW.shape)}"
            )
        expected = 1 + self.time_factor * (z_BCTHW.shape[2] - 1)
        if num_frames not in (None, expected):
            raise ValueError(
                f"decode: num_frames must be {expected} for {z_BCTHW.shape[2]} frames of latents, got {num_frames}"
            )
        return self.decode_unscaled(z_BCTHW / self.config.scaling_factor, out=out, progress=progress)

    def posterior(self, x_BCTHW: Tensor, *, progress: Progress | None = None) -> DiagonalGaussian:
        """N(mean, exp(logvar)) of the unscaled latents, for any number of frames.

        Frames after the last 1 + time_factor * n change it through GroupNorm alone. Tiles are joined by moments.
        """
        tiling = None if self.tiling is None else self.tiling.of_pixels()
        size = self.encoder.result_size
        return DiagonalGaussian(run_tiled(self._encode_tile, x_BCTHW, tiling, result_size=size, progress=progress))

    def decode_unscaled(
        self, z_BCTHW: Tensor, *, out: Tensor | None = None, progress: Progress | None = None
    ) -> Tensor:
        """Pixels of latents as `posterior` has them."""
        tiling = None if self.tiling is None else self.tiling.of_latents()
        size = self.decoder.result_size
        return run_tiled(self._decode_tile, z_BCTHW, tiling, result_size=size, out=out, progress=progress)

    def forward(
        self,
        x_BCTHW: Tensor,
        *,
        generator: torch.Generator | None = None,
        draw_noise: DrawNoise | None = None,
        decode_pixels: bool = True,
    ) -> VAEOutput:
        """Encode, sample the posterior and decode, for training. Errors: as for `encode`."""
        self._check_pixels(x_BCTHW)
        posterior = self.posterior(x_BCTHW)
        z_BCTHW = posterior.sample(draw_noise or normal_noise(generator))
        return VAEOutput(self.decode_unscaled(z_BCTHW) if decode_pixels else None, z_BCTHW, [posterior])

    def latent_size(self, size: tuple[int, int, int]) -> tuple[int, int, int]:
        """(frames, height, width) of the latents of a clip of `size` in frames and pixels; partial ones are dropped."""
        return self.encoder.result_size(size)

    def padded_frames(self, num_frames: int) -> int:
        """The shortest clip of at least `num_frames` frames that it takes."""
        return num_frames + (1 - num_frames) % self.time_factor

    def frames_of(self, num_latents: int) -> int:
        """Frames that the first `num_latents` latents of a clip stand for."""
        return 1 + self.time_factor * (num_latents - 1)

    def set_gradient_checkpointing(self, enabled: bool = True) -> None:
        """Keep only block inputs for the backward pass and compute the blocks again: less memory, a third more time."""
        self.encoder.gradient_checkpointing = self.decoder.gradient_checkpointing = enabled

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight whose gradients balance an adversarial loss: the decoder's last convolution."""
        conv_out = self.decoder.conv_out
        return (conv_out.conv if isinstance(conv_out, CausalConv3d) else conv_out).weight

    def _encode_tile(self, x_BCTHW: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(x_BCTHW))

    def _decode_tile(self, z_BCTHW: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(z_BCTHW))

    def _check_pixels(self, x: Tensor) -> None:
        channels, factor = self.config.in_channels, self.space_factor
        if x.ndim != 5 or x.shape[1] != channels:
            raise ValueError(f"encode: x must have shape (B, {channels}, T, H, W), got {tuple(x.shape)}")
        if min(x.shape[3:]) < factor:
            raise ValueError(f"encode: x must have at least {factor} x {factor} pixels, got {tuple(x.shape)}")
        num_frames, step = x.shape[2], self.time_factor
        if num_frames < 1 or (num_frames - 1) % step:
            below = max(1, num_frames - (num_frames - 1) % step)
            raise ValueError(
                f"encode: x must have 1, {1 + step}, {1 + 2 * step}, ... frames ({step} n + 1), got {num_frames}; "
                f"the nearest are {below} and {below + step}"
            )
