"""Transformers as small as they can be, trained by the loop on latents in memory, on any number of ranks.

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
from torch import Tensor, nn

from opensora.config import (
    LatteT2VConfig,
    OptimizerConfig,
    RectifiedFlowConfig,
    RunConfig,
    STDiT2Config,
    STDiT3Config,
)
from opensora.models import LatteT2V, STDiT2, STDiT3
from opensora.parallel import ParallelContext
from opensora.schedulers.rectified_flow import RectifiedFlow
from opensora.training import Adversary, Job, ShuffledBatches, TrainingResult, prepare_process, run_job

TEXT = {"caption_channels": 6, "model_max_length": 4}
STDIT = TEXT | {"input_sq_size": 16, "hidden_size": 12, "depth": 1, "num_heads": 2, "class_dropout_prob": 0.3}
MODEL = STDiT3Config(**STDIT)
FRAMES, SIDE = 3, 4


def stdit3() -> STDiT3:
    return STDiT3(MODEL)


def stdit2() -> STDiT2:
    return STDiT2(STDiT2Config(**STDIT))


def latte() -> LatteT2V:
    heads = {"num_attention_heads": 2, "attention_head_dim": 6, "cross_attention_dim": 12, "num_layers": 2}
    return LatteT2V(LatteT2VConfig(**TEXT, **heads, sample_size=(SIDE, SIDE), video_length=FRAMES))


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
    validate: Callable[[nn.Module, int], Mapping[str, float]] | None = None,
    build: Callable[[], nn.Module] = stdit3,
    **run_options: Any,
) -> TrainingResult:
    """Trains for NUM_STEPS unless told otherwise; `before_loss`, called with the batch's step, may scale the loss."""
    options = {"steps": NUM_STEPS, "dtype": "fp32", "device": "cpu", "log_every": 1, "checkpoint_every": 2}
    run = RunConfig(output=str(output), tensorboard=False, **(options | run_options))
    prepare_process(run)
    model = build()
    for parameter in model.parameters():  # some start without effect, and would make a wrong gradient small
        if parameter.requires_grad and parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    next(p for p in model.parameters() if p.requires_grad).requires_grad_(False)
    model = context.wrap(model)
    numbers = torch.Generator().manual_seed(3)
    x = torch.randn(NUM_SAMPLES, 4, FRAMES, SIDE, SIDE, generator=numbers)
    y = torch.randn(NUM_SAMPLES, 1, TEXT["model_max_length"], TEXT["caption_channels"], generator=numbers)

    def load(indices: list[int]) -> dict[str, Any]:
        return {"latents": x[indices], "y": y[indices]}

    batches = ShuffledBatches(
        [0] * NUM_SAMPLES,
        load,
        batch_size=BATCH_SIZE,
        seed=run.seed,
        rank=context.data_rank,
        world_size=context.data_world_size,
    )
    flow = RectifiedFlow(RectifiedFlowConfig(use_timestep_transform=False))
    sizes = {name: torch.full((BATCH_SIZE,), 32.0) for name in ("height", "width", "fps", "num_frames", "ar")}

    def velocity(x: Tensor, timestep: Tensor, *, y: Tensor, **arguments: Any) -> Tensor:
        if isinstance(model, LatteT2V):
            return model(x, timestep, y[:, 0], sequence=context.sequence)
        return model(x, timestep, y, sequence=context.sequence, **arguments)

    with torch.no_grad():  # as a first validation does
        velocity(x[:BATCH_SIZE], torch.zeros(BATCH_SIZE), y=y[:BATCH_SIZE], **sizes)

    def loss(batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        factor = before_loss(batch["step"]) if before_loss is not None else None
        error = flow.training_losses(velocity, batch["latents"], sizes | {"y": batch["y"]}).mean()
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
