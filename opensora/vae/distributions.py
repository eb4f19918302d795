"""The diagonal Gaussian that both encoders predict."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

DrawNoise = Callable[[Tensor], Tensor]
"""Takes the mean of a posterior and returns standard-normal noise of its shape, dtype and device."""


class DiagonalGaussian:
    """N(mean, exp(logvar)) from `moments` (B, 2C, ...), channels first the means, then the log variances.

    `logvar` is clamped to [-30, 20] as in Open-Sora 1.2; `moments` keeps the unclamped values.
    """

    def __init__(self, moments: Tensor) -> None:
        self.moments = moments
        self.mean, logvar = moments.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)

    def sample(self, draw_noise: DrawNoise) -> Tensor:
        return self.mean + torch.exp(0.5 * self.logvar) * draw_noise(self.mean)

    @property
    def std(self) -> Tensor:
        return torch.exp(0.5 * self.logvar)

    def mode(self) -> Tensor:
        return self.mean

    def kl(self) -> Tensor:
        """KL divergence from N(0, 1), summed over everything but the batch: (B,), in fp32."""
        mean, logvar = self.mean.float(), self.logvar.float()  # bf16 sums of 10,000 terms lose 3 digits
        return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).flatten(1).sum(dim=1)


def normal_noise(generator: torch.Generator | None) -> DrawNoise:
    """Noise from `generator`, drawn on the generator's own device so that a seed means the same noise everywhere."""

    def draw(mean: Tensor) -> Tensor:
        device = mean.device if generator is None else generator.device
        return torch.randn(mean.shape, generator=generator, device=device, dtype=mean.dtype).to(mean.device)

    return draw
