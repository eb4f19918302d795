"""AdamW and the learning rate as a pure function of the step, so that resuming needs no scheduler state."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from opensora.config import OptimizerConfig


def build_optimizer(weights: Sequence[Tensor], config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over fp32 `weights`: one fused pass on CPU and CUDA, a foreach pass elsewhere."""
    is_fused = all(weight.device.type in ("cpu", "cuda") for weight in weights)
    return torch.optim.AdamW(
        list(weights),
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=is_fused,
        foreach=not is_fused,
    )


def learning_rate(step: int, config: OptimizerConfig, num_steps: int) -> float:
    """The learning rate of 0-based `step` of `num_steps`.

    lr * (step + 1) / (warmup_steps + 1) while step < warmup_steps (as Open-Sora 1.2); then constant, or half a cosine
    from lr down to `final_lr_ratio` * lr at the last step.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / (config.warmup_steps + 1)
    if config.decay == "constant":
        return config.lr
    num_decay_steps = max(1, num_steps - 1 - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / num_decay_steps)
    floor = config.final_lr_ratio
    return config.lr * (floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress)))
