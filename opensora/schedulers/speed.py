"""Which timesteps training draws, and how it weights them, with Open-Sora's iddpm-speed (SpeeD, Wang et al. 2024).

Where noise levels hardly change from one timestep to the next, there is little to learn; steep ones come five times as
often. Source: hpcaitech/Open-Sora, tag v1.2.0, opensora/schedulers/iddpm/speed.py.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from opensora.schedulers.gaussian_diffusion import GaussianDiffusion

STEEP, SHARPNESS = 1e-4, 1e6
FLAT = 5e-5


class SpeedWeighting:
    """`probabilities` and `weights` (N,), float64 on the CPU. Half of the draws mirror others at `meaningful_steps`."""

    def __init__(self, chain: GaussianDiffusion) -> None:
        gradient = torch.gradient(chain.sqrt_one_minus_alphas_cumprod)[0].double()
        preference = (SHARPNESS * (gradient - STEEP)).tanh() + 1.5
        self.probabilities = preference / preference.sum()
        self.meaningful_steps = min(int((gradient < FLAT).int().argmax()) + 1, len(chain) - 1)
        self.snr = (chain.alphas_cumprod / (1 - chain.alphas_cumprod)).double()
        self.weights = 1 / (1 + self.snr)

    def draw(self, count: int, device: torch.device, generator: Generator | None = None) -> Tensor:
        """Timesteps (count,) int64: half of them drawn, then their mirror images."""
        probabilities = self.probabilities.to(device, torch.float32)
        drawn = torch.multinomial(probabilities, count // 2 + 1, replacement=True, generator=generator)
        is_before = drawn < self.meaningful_steps
        mirrored = torch.where(is_before, self.meaningful_steps - drawn, drawn - self.meaningful_steps)
        return torch.cat([drawn, mirrored])[:count]
