"""Replays the recorded trajectories, losses and timesteps of the samplers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from opensora.config import RectifiedFlowConfig
from opensora.schedulers.rectified_flow import RectifiedFlow, timestep_transform
from tests.oracles.registry import Case, Check, adapter

TRAJECTORY_LIMIT = 1e-4
# The recordings name only what differs from the original class's defaults; ours are those of the released model.
ORIGINAL_DEFAULTS = {
    "num_sampling_steps": 10,
    "cfg_scale": 4.0,
    "use_timestep_transform": False,
    "sample_method": "uniform",
}


def flow(options: dict[str, Any]) -> RectifiedFlow:
    return RectifiedFlow(RectifiedFlowConfig(**ORIGINAL_DEFAULTS | options))


class ToyModel:
    """The closed-form model of the recordings; keeps what it was called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def __call__(self, x: Tensor, t: Tensor, *, y: Tensor, x_mask: Tensor | None = None, **ignored: Any) -> Tensor:
        self.calls.append((x, t, x_mask))
        mean = y.mean(dim=tuple(range(1, y.ndim))).view(-1, 1, 1, 1, 1)
        s = (t / 1000).view(-1, 1, 1, 1, 1)
        weight = 1.0 if x_mask is None else torch.where(x_mask, 1.0, 0.25)[:, None, :, None, None]
        velocity = 0.6 * x.sin() * weight + 0.3 * mean + 0.2 * s - 0.1 * x * s
        return torch.cat([velocity, 0.4 * x.cos() - 0.1 * mean], dim=1)


@adapter("rflow_sampling")
def sampling(case: Case) -> Iterator[Check]:
    for run in case.config["runs"]:
        tag, toy = run["tag"], ToyModel()
        z, y = case.inputs[f"z_{tag}"], case.inputs["y"]
        batch = len(z)
        sizes = zip(("height", "width", "num_frames"), run["height_width_numframes"], strict=True)
        noises = iter(case.inputs.get(f"noise_{tag}", []))
        out = flow(run["RFLOW_kwargs"]).sample(
            toy,
            z,
            y,
            case.inputs["null"].expand_as(y),
            arguments={name: torch.full((batch,), float(value)) for name, value in sizes},
            frame_mask=case.inputs.get(f"mask_{tag}"),
            draw_noise=lambda z, noises=noises: next(noises),
        )
        yield Check(f"sample_{tag}", out, case.outputs[f"sample_{tag}"], max_abs=TRAJECTORY_LIMIT)
        model_in, timesteps, masks = zip(*toy.calls, strict=True)
        expected = case.outputs[f"model_in_{tag}"]
        yield Check(f"model_in_{tag}", torch.stack(model_in)[:, :batch], expected, max_abs=TRAJECTORY_LIMIT)
        expected = case.outputs[f"timesteps_{tag}"]
        yield Check(f"timesteps_{tag}", torch.stack(timesteps), expected, max_abs=TRAJECTORY_LIMIT)
        if f"x_mask_{tag}" in case.outputs:
            expected = case.outputs[f"x_mask_{tag}"]
            # We pass no mask where all frames are noised: the same model without the second modulation.
            everywhere = torch.ones(expected.shape[1:], dtype=torch.bool)
            actual = torch.stack([everywhere if mask is None else mask for mask in masks])
            yield Check(f"x_mask_{tag}", actual, expected, exact=True)


@adapter("rflow_timestep_transform")
def transform(case: Case) -> Iterator[Check]:
    for row in case.config["rows"]:
        dtype = getattr(torch, row["args_dtype"])
        sizes = [torch.tensor([row[name]], dtype=dtype) for name in ("height", "width", "num_frames")]
        name = f"t_{row['i']}"
        actual = timestep_transform(case.inputs["t"], *sizes, scale=row["scale"])
        yield Check(name, actual, case.outputs[name], max_abs=TRAJECTORY_LIMIT)


@adapter("rflow_training_loss")
def training_loss(case: Case) -> Iterator[Check]:
    toy = ToyModel()
    loss = flow(case.config["RFLOW_kwargs"]).training_losses(
        toy,
        case.inputs["x_start"],
        {"y": case.inputs["y"]},
        noise=case.inputs["noise"],
        frame_mask=case.inputs.get("mask"),
        t=case.inputs["t"],
    )
    x_t, t, _ = toy.calls[0]
    yield Check("loss", loss, case.outputs["loss"], max_abs=1e-5)
    yield Check("x_t", x_t, case.outputs["x_t"], max_abs=1e-5)
    yield Check("t_model", t, case.outputs["t_model"], max_abs=TRAJECTORY_LIMIT)


@adapter("rflow_training_timestep_distribution")
def timestep_distribution(case: Case) -> Iterator[Check]:
    """Both sides are random: quantiles and moments may differ by six standard errors of the recorded draw."""
    size = {"height": torch.tensor([480.0]), "width": torch.tensor([854.0]), "num_frames": torch.tensor([102.0])}
    generator = torch.Generator().manual_seed(0)
    levels = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])
    for row in case.config["rows"]:
        t = flow(row["kwargs"]).training_timesteps(2**18, torch.device("cpu"), size, generator=generator)
        name = f"quantiles_{row['i']}"
        expected = case.outputs[name]
        # Standard error of a quantile: sqrt(p (1 - p) / n) / density, the density estimated from our own draw.
        error = (levels * (1 - levels) / row["n"]).sqrt()
        spread = t.quantile((levels + error).clamp(max=1)) - t.quantile((levels - error).clamp(min=0))
        yield Check(name, (t.quantile(levels) - expected) / spread, torch.zeros(5), max_abs=3.0)
        name = f"moments_{row['i']}"
        standard_error = t.std() / row["n"] ** 0.5
        actual = (torch.stack([t.mean(), t.std()]) - case.outputs[name]) / standard_error
        yield Check(name, actual, torch.zeros(2), max_abs=6.0)
