"""The 2-D part of the stacked VAE: diffusers' AutoencoderKL, frame by frame.

Axes: B batch, C channels, T frames, H height, W width; N = B * T frames, sample after sample.
Source: hpcaitech/Open-Sora v1.2.0, opensora/models/vae/vae.py, VideoAutoencoderKL.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

import torch
from torch import Tensor, nn

from opensora.config import SpatialVAEConfig
from opensora.vae.distributions import DiagonalGaussian, DrawNoise


class SpatialVAE(nn.Module):
    """Encodes and decodes every frame of a clip by itself, `micro_batch_size` frames at a time (None: all at once).

    Latents are multiplied by `config.scaling_factor` on encode and divided by it on decode. Height and width are
    halved, rounding down, between levels, so 426 pixels become 53 latents at factor 8 and decode to 424 pixels.
    """

    def __init__(self, config: SpatialVAEConfig, micro_batch_size: int | None = None) -> None:
        super().__init__()
        with torch.device("cpu"):  # its modules keep tensors, which a caller's torch.device("meta") would leave empty
            from diffusers import AutoencoderKL  # 2 s of imports that only a model needs

        self._hold(AutoencoderKL(**asdict(config)), micro_batch_size, config.scaling_factor)

    @classmethod
    def of(cls, module: nn.Module, *, micro_batch_size: int | None, scaling_factor: float) -> SpatialVAE:
        """Around an AutoencoderKL that is there already; its own scaling factor is not asked."""
        vae = cls.__new__(cls)
        nn.Module.__init__(vae)
        vae._hold(module, micro_batch_size, scaling_factor)
        return vae

    def _hold(self, module: nn.Module, micro_batch_size: int | None, scaling_factor: float) -> None:
        self.module, self.micro_batch_size, self.scaling_factor = module, micro_batch_size, scaling_factor
        self.factor = 2 ** (len(module.config.block_out_channels) - 1)

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        return height // self.factor, width // self.factor

    def encode(self, x_BCTHW: Tensor, draw_noise: DrawNoise | None) -> Tensor:
        """Sample the posterior of every frame, one noise draw per micro batch; without `draw_noise` return the mean."""

        def encode_frames(x_NCHW: Tensor) -> Tensor:
            posterior = DiagonalGaussian(self.module.encode(x_NCHW).latent_dist.parameters)
            z_NCHW = posterior.mode() if draw_noise is None else posterior.sample(draw_noise)
            return z_NCHW * self.scaling_factor

        return self._frame_by_frame(encode_frames, x_BCTHW)

    def encode_moments(self, x_BCTHW: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of every frame's posterior, scaled as `encode` does."""

        def encode_frames(x_NCHW: Tensor) -> Tensor:
            posterior = DiagonalGaussian(self.module.encode(x_NCHW).latent_dist.parameters)
            return torch.cat([posterior.mode(), posterior.std], dim=1) * self.scaling_factor

        mean, std = self._frame_by_frame(encode_frames, x_BCTHW).chunk(2, dim=1)
        return mean, std

    def decode(self, z_BCTHW: Tensor) -> Tensor:
        def decode_frames(z_NCHW: Tensor) -> Tensor:
            return self.module.decode(z_NCHW / self.scaling_factor).sample

        return self._frame_by_frame(decode_frames, z_BCTHW)

    def _frame_by_frame(self, function: Callable[[Tensor], Tensor], x_BCTHW: Tensor) -> Tensor:
        x_NCHW = x_BCTHW.transpose(1, 2).flatten(0, 1)
        if type(x_NCHW) is Tensor and x_NCHW.device.type == "cpu" and not torch.is_grad_enabled():
            # which PyTorch's convolutions on a CPU do not reorder; those after it keep it
            x_NCHW = x_NCHW.contiguous(memory_format=torch.channels_last)
        y_NCHW = _in_batches(function, x_NCHW, self.micro_batch_size)
        return y_NCHW.unflatten(0, (x_BCTHW.shape[0], x_BCTHW.shape[2])).transpose(1, 2)


def _in_batches(function: Callable[[Tensor], Tensor], x: Tensor, size: int | None) -> Tensor:
    if size is None or size >= len(x):
        return function(x)
    if torch.is_grad_enabled() or type(x) is not Tensor:  # a clip that is recorded has no memory to write to
        return torch.cat([function(part) for part in x.split(size)])
    first = function(x[:size])
    out = first.new_empty(len(x), *first.shape[1:])  # written in place: a list and cat would hold every frame twice
    out[:size] = first
    for start in range(size, len(x), size):
        out[start : start + size] = function(x[start : start + size])
    return out
