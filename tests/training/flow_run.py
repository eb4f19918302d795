"""STDiT3 as small as it can be, trained by the loop on latents in memory, on any number of ranks.

Everything that could differ between ranks is there: caption dropout, random noise and timesteps, weights that are
frozen, and blocks whose weights do not divide by the number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from opensora.config import OptimizerConfig, RectifiedFlowConfig, RunConfig, STDiT3Config
from opensora.models import STDiT3
from opensora.parallel import ParallelContext
from opensora.schedulers.rectified_flow import RectifiedFlow
from opensora.training import Adversary, Job, ShuffledBatches, TrainingResult, prepare_process, run_job

MODEL = STDiT3Config(
    input_sq_size=16, hidden_size=12, depth=1, num_heads=2, caption_channels=6, model_max_length=4,
    class_dropout_prob=0.3,
)  # fmt: skip
# eps: Adam's first steps are lr * sign(gradient), which a gradient of rounding errors alone must not decide.
OPTIMIZER = OptimizerConfig(lr=1e-3, eps=1e-4, ema_decay=0.9, grad_clip=0.5, weight_decay=0.01)
NUM_STEPS = 4
NUM_SAMPLES = 20
BATCH_SIZE = 1


def train_flow(
    output: Path,
    context: ParallelContext,
    *,
    accumulation_steps: int = 1,
    resume: bool = False,
    optimizer: OptimizerConfig = OPTIMIZER,
    before_loss: Callable[[int], float | None] | None = None,
    adversary: Callable[[], Adversary] | None = None,
    sample: Callable[[Path, int], Mapping[str, float]] | None = None,
    validate: Callable[[STDiT3, int], Mapping[str, float]] | None = None,
    **run_options: Any,
) -> TrainingResult:
    """Trains for NUM_STEPS unless told otherwise; `before_loss`, called with the batch's step, may scale the loss."""
    options = {"steps": NUM_STEPS, "dtype": "fp32", "device": "cpu", "log_every": 1, "checkpoint_every": 2}
    run = RunConfig(output=str(output), tensorboard=False, **(options | run_options))
    prepare_process(run)
    model = context.wrap(_model())
    batches = _batches(context, run.seed)
    flow = RectifiedFlow(RectifiedFlowConfig(use_timestep_transform=False))
    arguments = {name: torch.full((BATCH_SIZE,), 32.0) for name in ("height", "width", "fps")}
    arguments |= {"sequence": context.sequence}

    with torch.no_grad():  # as a first validation does
        model(torch.ones(BATCH_SIZE, 4, 3, 4, 4), torch.zeros(BATCH_SIZE), torch.ones(BATCH_SIZE, 1, 4, 6), **arguments)

    def loss(batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        factor = before_loss(batch["step"]) if before_loss is not None else None
        error = flow.training_losses(model, batch["latents"], arguments | {"y": batch["y"]}).mean()
        return error * (1.0 if factor is None else factor), {"twice": 2 * error}

    def export(folder: Path, states: Mapping[str, Mapping[str, Tensor]]) -> None:
        save_file({name: tensor.contiguous() for name, tensor in states["model"].items()}, folder / "flow.safetensors")

    job = Job(
        {"model": model},
        batches,
        loss,
        export,
        {"transformer": MODEL},
        sample,
        adversary=adversary() if adversary is not None else None,
        validate=(lambda step: validate(model, step)) if validate is not None else None,
    )
    optimizer = replace(optimizer, accumulation_steps=accumulation_steps)
    return run_job(job, optimizer, run, context, resume=resume)


def _model() -> STDiT3:
    model = STDiT3(MODEL)
    for parameter in model.parameters():  # some start without effect, and would make a wrong gradient small
        if parameter.requires_grad and parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    next(parameter for parameter in model.parameters() if parameter.requires_grad).requires_grad_(False)
    return model


def _batches(context: ParallelContext, seed: int) -> ShuffledBatches[dict[str, Any]]:
    numbers = torch.Generator().manual_seed(3)
    x = torch.randn(NUM_SAMPLES, 4, 3, 4, 4, generator=numbers)
    y = torch.randn(NUM_SAMPLES, 1, MODEL.model_max_length, MODEL.caption_channels, generator=numbers)
    ranks = {"rank": context.data_rank, "world_size": context.data_world_size}
    return ShuffledBatches(
        [0] * NUM_SAMPLES,
        lambda indices: {"latents": x[indices], "y": y[indices]},
        batch_size=BATCH_SIZE,
        seed=seed,
        **ranks,
    )
