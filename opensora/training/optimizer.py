"""AdamW and the learning rate as a pure function of the step, so that resuming needs no scheduler state."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from opensora.config import OptimizerConfig

MOMENTS = ("exp_avg", "exp_avg_sq")


def build_optimizer(weights: Sequence[Tensor], config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW over fp32 `weights`: Apex's FusedAdam where it can run, else PyTorch's own.

    PyTorch's is one fused pass on CPU and CUDA and a foreach pass elsewhere.
    """
    options = {"lr": config.lr, "betas": config.betas, "eps": config.eps, "weight_decay": config.weight_decay}
    if why_not_apex(weights) is None:
        from apex.optimizers import FusedAdam

        return FusedAdam(list(weights), adam_w_mode=True, **options)
    is_fused = all(weight.device.type in ("cpu", "cuda") for weight in weights)
    return torch.optim.AdamW(list(weights), fused=is_fused, foreach=not is_fused, **options)


def why_not_apex(weights: Sequence[Tensor]) -> str | None:
    """Why Apex's FusedAdam does not serve these weights, or None."""
    devices = {weight.device.type for weight in weights}
    if devices != {"cuda"}:
        return f"apex's FusedAdam runs on CUDA alone, and these weights are on {', '.join(sorted(devices))}"
    try:
        from apex.optimizers import FusedAdam
    except ImportError as error:
        return f"apex is not installed ({error})"
    try:
        FusedAdam([weights[0]])  # a build without CUDA extensions says so here
    except (ImportError, RuntimeError) as error:
        return f"apex was built without its CUDA extensions ({error})"
    return None


def moments(optimizer: torch.optim.Optimizer, weights: Sequence[Tensor]) -> dict[str, list[Tensor]]:
    """{name of a moment: one tensor for each of `weights`}; empty before the first step."""
    if not optimizer.state:
        return {}
    return {name: [optimizer.state[weight][name] for weight in weights] for name in MOMENTS}


def set_moments(optimizer: torch.optim.Optimizer, values: dict[str, list[Tensor]], num_updates: int) -> None:
    """Puts the optimizer where it was after `num_updates` steps with these moments; the tensors become its own."""
    groups = optimizer.state_dict()["param_groups"]
    for group in groups:
        if "step" in group:  # Apex counts for all weights at once
            group["step"] = num_updates
    indices = range(len(next(iter(values.values()), [])))
    state = {
        i: {name: of_all[i] for name, of_all in values.items()} | {"step": torch.tensor(float(num_updates))}
        for i in indices
    }
    optimizer.load_state_dict({"state": state, "param_groups": groups})


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
