"""Replays the recorded trajectories of DPM-Solver++ and of diffusers' schedulers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from opensora.config import DiffusersSamplerConfig, DPMSolverConfig
from opensora.schedulers.diffusers_samplers import DiffusersSampler
from opensora.schedulers.dpm_solver import DPMSolver
from tests.oracles.flow import ToyModel
from tests.oracles.registry import Case, Check, adapter

SOLVER_LIMIT = 1e-5  # of the output's largest value
TIMESTEP_LIMIT = 1e-4
# Open-Sora-Plan's limits, of the output's largest value.
DIFFUSERS_LIMIT = {"HeunDiscrete": 5e-3, "KDPM2AncestralDiscrete": 5e-3}
USUAL_DIFFUSERS_LIMIT = 1e-4
# The recorded constructor leaves it False; set_timesteps then turns it on, as ours is from the start.
TURNED_ON = {"DPMSolverSinglestep": {"lower_order_final": True}}


@adapter("dpms_sampling")
def dpm_solver(case: Case) -> Iterator[Check]:
    for run in case.config["runs"]:
        tag, toy, y = run["tag"], ToyModel(), case.inputs["y"]
        solver = DPMSolver(DPMSolverConfig(**run["kwargs"]))
        out = solver.sample(toy, case.inputs[f"z_{tag}"], y, case.inputs["null"].expand_as(y))
        expected = case.outputs[f"sample_{tag}"]
        yield Check(f"sample_{tag}", out, expected, max_abs=SOLVER_LIMIT * float(expected.abs().max()))
        timesteps = torch.stack([t for _, t, _ in toy.calls])
        yield Check(f"t_{tag}", timesteps, case.outputs[f"t_{tag}"], max_abs=TIMESTEP_LIMIT)


@adapter("samplers")
def diffusers_samplers(case: Case) -> Iterator[Check]:
    for method, defaults in case.config["defaults"].items():
        for count in (10, 50):
            yield from diffusers_run(case, method, count, defaults | TURNED_ON.get(method, {}))


def diffusers_run(case: Case, method: str, count: int, defaults: dict[str, Any]) -> Iterator[Check]:
    name, states = f"{method}.{count}", []
    recorded = case.config["runs"][name]
    sampler = DiffusersSampler(DiffusersSamplerConfig(sample_method=method, num_sampling_steps=count))
    scheduler = sampler.scheduler(None, torch.device("cpu"))
    ours = {option: scheduler.config[option] for option in defaults}
    yield Check(f"{name}.config", ours, defaults, exact=True)
    sigma, expected = float(scheduler.init_noise_sigma), recorded["init_noise_sigma"]
    yield Check(f"{name}.init_noise_sigma", sigma, expected, exact=True)
    timesteps = sampler.sampling_timesteps(1)[:, 0].double()
    recorded_timesteps = torch.tensor(recorded["timesteps"], dtype=torch.float64)
    yield Check(f"{name}.timesteps", timesteps, recorded_timesteps, max_abs=TIMESTEP_LIMIT)

    z = case.inputs["x_T_unit"].float()
    out = sampler.sample(
        predicted_noise(case.inputs["mu"].float(), case.inputs["A"].float()),
        z,
        z,
        generator=torch.Generator().manual_seed(3805),
        on_step=lambda i, num_calls, z: states.append(z),
    )
    limit = DIFFUSERS_LIMIT.get(method, USUAL_DIFFUSERS_LIMIT)
    for part, actual in {"first": states[0], "mid": states[len(states) // 2], "x0": out}.items():
        expected = case.outputs[f"{name}.{part}"]
        yield Check(f"{name}.{part}", actual, expected, max_abs=limit * float(expected.abs().max()))


def predicted_noise(mean: Tensor, mixing: Tensor) -> Any:
    """The recordings' model: exact for normally distributed clips of variance 1/4, and a linear disturbance."""
    log_signals = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).log().cumsum(0)

    def model(x: Tensor, t: Tensor, **ignored: Any) -> Tensor:
        timestep = float(t[0])
        below = int(timestep)
        above = min(below + 1, 999)
        signal = float(torch.lerp(log_signals[below], log_signals[above], timestep - below).exp())
        exact = (1 - signal) ** 0.5 * (x - signal**0.5 * mean) / (0.25 * signal + 1 - signal)
        return exact + 0.05 * torch.einsum("ij,bjthw->bithw", mixing, x)

    return model
