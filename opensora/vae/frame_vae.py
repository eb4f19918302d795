"""The VAE of Open-Sora 1.0 and 1.1: an image VAE that takes a clip as so many pictures.

Axes: B batch, C channels, T frames, H height, W width.
Source: hpcaitech/Open-Sora v1.2.0, opensora/models/vae/vae.py, VideoAutoencoderKL.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from opensora.vae.distributions import DrawNoise, normal_noise
from opensora.vae.spatial import SpatialVAE

SCALING_FACTOR = 0.18215
"""Of Stable Diffusion 1.x. Upstream uses it with every checkpoint, those of SDXL included."""


class FrameVAE(nn.Module):
    """Clips in pixels to latents and back, frame by frame, `micro_batch_size` frames at a time (None: all at once).

    Shapes: x (B, 3, T, H, W) in [-1, 1]; z (B, latent_channels, T, H // 8, W // 8), multiplied by 0.18215. The state
    dict is that of diffusers' AutoencoderKL below `spatial_vae.module`.
    """

    time_factor = 1

    def __init__(self, module: nn.Module, micro_batch_size: int | None = 4) -> None:
        """module: an AutoencoderKL of diffusers."""
        super().__init__()
        self.spatial_vae = SpatialVAE.of(module, micro_batch_size=micro_batch_size, scaling_factor=SCALING_FACTOR)
        self.in_channels, self.latent_channels = module.config.in_channels, module.config.latent_channels

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        micro_batch_size: int | None = 4,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> FrameVAE:
        """Load an AutoencoderKL in diffusers' layout, as stabilityai/sd-vae-ft-ema: a folder or hub id.

        Errors: ValueError for a folder that holds none, or one with weights missing.
        """
        from diffusers import AutoencoderKL

        is_lean = find_spec("accelerate") is not None  # diffusers says on five lines that it would like to be asked
        try:
            module, found = AutoencoderKL.from_pretrained(
                folder, torch_dtype=dtype, low_cpu_mem_usage=is_lean, output_loading_info=True
            )
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"vae: {folder} must hold an AutoencoderKL in diffusers' layout: {reason}") from error
        missing = sorted(found["missing_keys"])
        if missing:  # diffusers draws them, and only warns
            raise ValueError(f"vae: {folder} must hold every weight, lacks {len(missing)}: {', '.join(missing[:12])}")
        return cls(module, micro_batch_size).to(device).eval()

    @property
    def space_factor(self) -> int:
        return self.spatial_vae.factor

    def encode(
        self,
        x_BCTHW: Tensor,
        *,
        generator: torch.Generator | None = None,
        sample_posterior: bool = True,
        draw_noise: DrawNoise | None = None,
    ) -> Tensor:
        """Scaled latents of a clip: a sample of every frame's posterior, or its mean with `sample_posterior=False`.

        Raises ValueError when x is not (B, 3, T, H, W) or smaller than one latent.
        """
        self._check_pixels(x_BCTHW)
        noise = draw_noise or normal_noise(generator)
        return self.spatial_vae.encode(x_BCTHW, noise if sample_posterior else None)

    def encode_moments(self, x_BCTHW: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the posterior that `encode` samples, scaled as it does."""
        self._check_pixels(x_BCTHW)
        return self.spatial_vae.encode_moments(x_BCTHW)

    def decode(self, z_BCTHW: Tensor, num_frames: int | None = None) -> Tensor:
        """Pixels of scaled latents, not clamped: (B, 3, T, 8 H, 8 W). `num_frames`, when given, must be T."""
        if z_BCTHW.ndim != 5 or z_BCTHW.shape[1] != self.latent_channels or num_frames not in (None, z_BCTHW.shape[2]):
            raise ValueError(
                f"decode: z must have shape (B, {self.latent_channels}, {num_frames or 'T'}, H, W), "
                f"got {tuple(z_BCTHW.shape)}"
            )
        return self.spatial_vae.decode(z_BCTHW)

    def latent_size(self, size: tuple[int, int, int]) -> tuple[int, int, int]:
        """(frames, height, width) of the latents of a clip of `size` in frames and pixels."""
        return (size[0], *self.spatial_vae.latent_size(*size[1:]))

    def padded_frames(self, num_frames: int) -> int:
        """The shortest clip of at least `num_frames` frames that it takes."""
        return num_frames

    def frames_of(self, num_latents: int) -> int:
        """Frames that the first `num_latents` latents of a clip stand for."""
        return num_latents

    def _check_pixels(self, x_BCTHW: Tensor) -> None:
        if x_BCTHW.ndim != 5 or x_BCTHW.shape[1] != self.in_channels or x_BCTHW.shape[2] < 1:
            raise ValueError(f"encode: x must have shape (B, {self.in_channels}, T, H, W), got {tuple(x_BCTHW.shape)}")
        if min(x_BCTHW.shape[3:]) < self.space_factor:
            raise ValueError(
                f"encode: x must have at least {self.space_factor} x {self.space_factor} pixels, "
                f"got {tuple(x_BCTHW.shape)}"
            )
