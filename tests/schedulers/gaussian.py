"""Models of clips whose elements are independent and normally distributed, for which every step is known exactly.

Axes: B batch, C latent channels, T latent frames, H height, W width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from opensora.schedulers.gaussian_diffusion import GaussianDiffusion

MEAN, SIGMA = 0.3, 0.2
TEXT = torch.zeros(2, 1, 4, 8)


def clips(seed: int, shape: tuple[int, ...] = (2, 4, 3, 3, 5)) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class ExactNoise:
    """The expected noise in x at a timestep, integer or not; keeps what it was called with."""

    def __init__(self, betas: tuple[float, float] = (1e-4, 0.02)) -> None:
        self.log_signals = (1 - torch.linspace(*betas, 1000, dtype=torch.float64)).log().cumsum(0)
        self.calls: list[tuple[Tensor, Tensor, Tensor | None]] = []
        self.texts: list[Tensor] = []

    def signal(self, t: float) -> float:
        """alphas_cumprod at t."""
        below = min(int(t), 998)
        return float(torch.lerp(self.log_signals[below], self.log_signals[below + 1], t - below).exp())

    def __call__(self, x: Tensor, t: Tensor, *, y: Tensor, x_mask: Tensor | None = None, **ignored: object) -> Tensor:
        self.calls.append((x, t, x_mask))
        self.texts.append(y)
        signal = self.signal(float(t[0]))
        return (1 - signal) ** 0.5 * (x - signal**0.5 * MEAN) / (SIGMA**2 * signal + 1 - signal)


class ExactNoiseAndVariance(ExactNoise):
    """The variance of the true step back as well, for a chain: ancestral sampling then has no error at all."""

    def __init__(self, chain: GaussianDiffusion) -> None:
        super().__init__()
        self.chain = chain

    def __call__(self, x: Tensor, t: Tensor, **arguments: object) -> Tensor:
        noise, chain = super().__call__(x, t, **arguments), self.chain
        i = int((chain.timesteps == int(t[0])).nonzero())
        signal = float(chain.alphas_cumprod[i])
        remaining = SIGMA**2 * (1 - signal) / (SIGMA**2 * signal + 1 - signal)  # variance of x_0 given x_t
        variance = chain.posterior_variance[i] + chain.posterior_mean_coef1[i] ** 2 * remaining
        lower, upper = chain.posterior_log_variance_clipped[i], chain.log_betas[i]
        share = 2 * (variance.log() - lower) / (upper - lower) - 1
        return torch.cat([noise, share.expand_as(noise)], dim=1)
