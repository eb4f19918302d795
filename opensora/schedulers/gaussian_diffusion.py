"""The tables and formulas of denoising diffusion: a chain of noise levels, its posteriors, and their likelihoods.

q(x_t | x_0) = N(sqrt(ab_t) x_0, 1 - ab_t), ab_t the product of 1 - beta up to t; models predict the noise in x_t.
Source: Ho et al. 2020, Nichol and Dhariwal 2021, as in hpcaitech/Open-Sora, tags v1.0.0 and v1.2.0,
opensora/schedulers/iddpm.

Axes: B batch, C latent channels, T latent frames, H height, W width, N noise levels of the chain.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

FIRST_BETA, LAST_BETA = 1e-4, 0.02


def linear_betas(num_timesteps: int) -> Tensor:
    """(N,) float64, from 1e-4 to 0.02 for 1000 timesteps; fewer timesteps have larger ones. ValueError for so few that
    one step would add more noise than there is."""
    fewest = int(1000 * LAST_BETA) + 1
    if num_timesteps < fewest:
        raise ValueError(f"num_timesteps: must be at least {fewest}, or betas reach 1, got {num_timesteps}")
    scale = 1000 / num_timesteps
    return torch.linspace(FIRST_BETA * scale, LAST_BETA * scale, num_timesteps, dtype=torch.float64)


def retained_timesteps(num_timesteps: int, respacing: str) -> list[int]:
    """Which of num_timesteps stay, ascending.

    respacing: "" all of them; "ddimN" every k-th, with the smallest k that leaves N; "10,15,20" cuts the timesteps into
    three equal parts and spreads that many over each, ends included.
    Errors: ValueError for text that is neither, for no such k, and for more timesteps than a part has.
    """
    if respacing == "":
        return list(range(num_timesteps))
    if respacing.startswith("ddim") and respacing[4:].isdecimal():
        for stride in range(1, num_timesteps):
            strided = range(0, num_timesteps, stride)
            if len(strided) == int(respacing[4:]):
                return list(strided)
        raise ValueError(f"timestep_respacing: no stride leaves that many of {num_timesteps} steps, got {respacing!r}")
    counts = respacing.split(",")
    if not all(count.strip().isdecimal() and int(count) for count in counts):
        raise ValueError(f"timestep_respacing: must be '', 'ddimN' or counts like '10,15,20', got {respacing!r}")
    size, larger_parts = divmod(num_timesteps, len(counts))
    retained: list[int] = []
    start = 0
    for part, count in enumerate(map(int, counts)):
        length = size + (part < larger_parts)
        if count > length:
            raise ValueError(f"timestep_respacing: a part has {length} timesteps, cannot keep {count} ({respacing!r})")
        stride = (length - 1) / (count - 1) if count > 1 else 1.0
        position = 0.0
        for _ in range(count):
            retained.append(start + round(position))
            position += stride  # added up, not multiplied: upstream's rounding decides which timesteps stay
        start += length
    return retained


class GaussianDiffusion:
    """A chain of noise levels, some or all of num_timesteps; its functions take an index into it.

    An index is an int for all samples, or (B,) int64. `timesteps` (N,) int64 are the original timesteps, which models
    are told. All tables are (N,) on the CPU in `dtype`: float32 as Open-Sora 1.1 and 1.2, which round the betas first,
    or float64 as Open-Sora 1.0 and Open-Sora-Plan. Formulas take them rounded to fp32.
    """

    def __init__(self, timesteps: list[int], *, num_timesteps: int = 1000, dtype: torch.dtype = torch.float32) -> None:
        self.num_timesteps = num_timesteps
        self.timesteps = torch.tensor(timesteps)
        retained = (1 - linear_betas(num_timesteps)).cumprod(0)[self.timesteps]
        self.betas = (1 - retained / torch.cat([retained.new_ones(1), retained[:-1]])).to(dtype)

        alphas = 1 - self.betas
        self.alphas_cumprod = alphas.cumprod(0)
        self.alphas_cumprod_prev = torch.cat([alphas.new_ones(1), self.alphas_cumprod[:-1]])
        self.sqrt_alphas_cumprod = self.alphas_cumprod.sqrt()
        self.sqrt_one_minus_alphas_cumprod = (1 - self.alphas_cumprod).sqrt()
        self.sqrt_recip_alphas_cumprod = (1 / self.alphas_cumprod).sqrt()
        self.sqrt_recipm1_alphas_cumprod = (1 / self.alphas_cumprod - 1).sqrt()

        self.posterior_variance = self.betas * (1 - self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)
        # The first variance is 0, for its step ends at the clean clip; its logarithm is taken of the second one.
        variance = torch.cat([self.posterior_variance[1:2], self.posterior_variance[1:]])
        self.posterior_log_variance_clipped = variance.log()
        self.posterior_mean_coef1 = self.betas * self.alphas_cumprod_prev.sqrt() / (1 - self.alphas_cumprod)
        self.posterior_mean_coef2 = (1 - self.alphas_cumprod_prev) * alphas.sqrt() / (1 - self.alphas_cumprod)
        self.log_betas = self.betas.log()

    def __len__(self) -> int:
        return len(self.betas)

    @staticmethod
    def at(table: Tensor, t: int | Tensor) -> Tensor:
        """A table's values at t in fp32, to be multiplied with (B, C, T, H, W)."""
        if isinstance(t, int):
            return table[t].float()
        return table.float().to(t.device)[t].view(-1, 1, 1, 1, 1)

    def add_noise(self, x0: Tensor, noise: Tensor, t: int | Tensor) -> Tensor:
        """A draw of q(x_t | x_0), made of a standard-normal one."""
        signal, sigma = self.at(self.sqrt_alphas_cumprod, t), self.at(self.sqrt_one_minus_alphas_cumprod, t)
        return signal * x0.float() + sigma * noise.float()

    def clean(self, x_t: Tensor, noise: Tensor, t: int | Tensor) -> Tensor:
        """The x_0 that gives x_t with this noise."""
        return self.at(self.sqrt_recip_alphas_cumprod, t) * x_t - self.at(self.sqrt_recipm1_alphas_cumprod, t) * noise

    def posterior_mean(self, x0: Tensor, x_t: Tensor, t: int | Tensor) -> Tensor:
        """The mean of q(x_{t-1} | x_t, x_0)."""
        return self.at(self.posterior_mean_coef1, t) * x0 + self.at(self.posterior_mean_coef2, t) * x_t

    def log_variance(self, share: Tensor, t: int | Tensor) -> Tensor:
        """The learned variance's logarithm: share in [-1, 1] leads from the posterior's variance to beta."""
        share = (share + 1) / 2
        return share * self.at(self.log_betas, t) + (1 - share) * self.at(self.posterior_log_variance_clipped, t)


def normal_kl(mean: Tensor, log_variance: Tensor, other_mean: Tensor, other_log_variance: Tensor) -> Tensor:
    """KL divergence of the second normal distribution from the first, for each element, in nats."""
    return 0.5 * (
        other_log_variance
        - log_variance
        + (log_variance - other_log_variance).exp()
        + (mean - other_mean).square() * (-other_log_variance).exp()
        - 1
    )


def discretized_normal_nll(x: Tensor, mean: Tensor, log_sigma: Tensor) -> Tensor:
    """-log of the probability of x's bin, of 255 in [-1, 1], for each element, in nats; the outer bins are open.

    Source: Ho et al. 2020, with the approximate normal distribution function of the original code.
    """
    inverse = (-log_sigma).exp()
    upper = _normal_cdf(inverse * (x - mean + 1 / 255))
    lower = _normal_cdf(inverse * (x - mean - 1 / 255))
    probability = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return -probability.clamp(min=1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh())
