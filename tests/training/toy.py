"""A regression that trains in milliseconds, with everything that could break an exact resume: dropout, Python and
NumPy random numbers, shuffling, several layers."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from opensora.config import OptimizerConfig, RunConfig
from opensora.parallel import ParallelContext
from opensora.training import Job, ShuffledBatches, TrainingResult, prepare_process, run_job

OPTIMIZER = OptimizerConfig(lr=1e-2, eps=1e-8, warmup_steps=2, decay="cosine", ema_decay=0.9)


@dataclass
class Hooks:
    """What a test lets happen inside: `before_loss(count)` is called with the 0-based number of the batch, `see` with
    the batch, and `factor(count)` scales the loss."""

    noise: float = 0.1
    before_loss: Callable[[int], object] | None = None
    factor: Callable[[int], float] | None = None
    see: Callable[[Tensor], object] | None = None
    sample: Callable[[Path, int], dict[str, float]] | None = None


def toy_model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.2), nn.SiLU(), nn.Linear(16, 1))


def train(
    output: Path,
    *,
    steps: int = 6,
    resume: bool = False,
    batch_size: int = 4,
    optimizer: OptimizerConfig = OPTIMIZER,
    hooks: Hooks | None = None,
    model: nn.Module | None = None,
    context: ParallelContext | None = None,
    keys: tuple[int, ...] = (0,) * 16 + (1,) * 6,
    **run_options: object,
) -> TrainingResult:
    """Run the toy for `steps` steps."""
    hooks = hooks or Hooks()
    options = {"dtype": "fp32", "device": "cpu", "log_every": 1, "checkpoint_every": 2, "tensorboard": False}
    run = RunConfig(output=str(output), steps=steps, **(options | run_options))
    prepare_process(run)
    model = model or toy_model()
    x = torch.randn(len(keys), 4, generator=torch.Generator().manual_seed(1))
    batches = ShuffledBatches(keys, lambda indices: x[indices], batch_size=batch_size, seed=run.seed)
    dtype = torch.bfloat16 if run.dtype == "bf16" else torch.float32
    count = 0

    def loss(x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        nonlocal count
        if hooks.before_loss is not None:
            hooks.before_loss(count)
        if hooks.see is not None:
            hooks.see(x)
        factor = 1.0 if hooks.factor is None else hooks.factor(count)
        count += 1
        target = x.sum(1, keepdim=True) + hooks.noise * (random.random() + np.random.rand())
        error = (model(x.to(dtype)).float() - target).square().mean()
        return error * factor, {"half": error / 2}

    def export(folder: Path, states: dict[str, dict[str, Tensor]]) -> None:
        save_file({name: tensor.contiguous() for name, tensor in states["toy"].items()}, folder / "toy.safetensors")

    job = Job({"toy": model}, batches, loss, export, {"optimizer": optimizer}, hooks.sample)
    return run_job(job, optimizer, run, context or ParallelContext.single_process("cpu"), resume=resume)


def constant(optimizer: OptimizerConfig = OPTIMIZER, **changes: object) -> OptimizerConfig:
    """An optimizer whose learning rate does not depend on the length of the run."""
    return replace(optimizer, decay="constant", warmup_steps=0, **changes)
