"""An exponential moving average of weights, kept in fp32."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class EMA:
    """average <- decay * average + (1 - decay) * weight after every step, starting from the first weights.

    fp32: at decay 0.9999 one step moves the average by 1e-4 of the difference, which bf16 (3 digits) would swallow.
    """

    def __init__(self, weights: Sequence[Tensor], decay: float) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"EMA: decay must lie in [0, 1), got {decay}")
        self.decay = decay
        self.averages = [weight.detach().to(torch.float32, copy=True) for weight in weights]

    @torch.no_grad()
    def update(self, weights: Sequence[Tensor]) -> None:
        """Moves the averages towards fp32 `weights`, all tensors in one foreach pass."""
        torch._foreach_lerp_(self.averages, list(weights), 1.0 - self.decay)
