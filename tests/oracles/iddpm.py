"""Replays the recorded tables, losses and trajectories of IDDPM: Open-Sora's, and Open-Sora-Plan's native diffusion."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from opensora.config import IDDPMConfig
from opensora.schedulers.gaussian_diffusion import GaussianDiffusion, retained_timesteps
from opensora.schedulers.iddpm import IDDPM
from opensora.schedulers.speed import SHARPNESS, SpeedWeighting
from tests.oracles.flow import ToyModel
from tests.oracles.registry import Case, Check, adapter

# Of the output's largest value, as the tree's README says for trajectories; we hold tables and losses to it too.
RELATIVE_LIMIT = 1e-5

# PyTorch's fp32 roots and logarithms differ by a unit in the last place from one kind of CPU to another; of the
# recorded roots 183 in 1000 are not the correctly rounded ones.
ULP = 2.0**-23
EXACT_TABLES = ("timesteps", "betas", "alphas_cumprod", "alphas_cumprod_prev")


def near(name: str, actual: Tensor, expected: Tensor) -> Check:
    return Check(name, actual, expected, max_abs=RELATIVE_LIMIT * float(expected.abs().max()))


@adapter("iddpm_tables")
def tables(case: Case) -> Iterator[Check]:
    for run, recorded in case.config["runs"].items():
        options = recorded["kwargs"]
        respacing = options.get("timestep_respacing", str(options.get("num_sampling_steps")))
        chain = GaussianDiffusion(retained_timesteps(1000, respacing))
        yield Check(f"{run}.num_timesteps", len(chain), recorded["num_timesteps"], exact=True)
        for name, expected in case.outputs.items():
            if name.startswith(f"{run}."):
                table = name.removeprefix(f"{run}.").replace("timestep_map", "timesteps")
                if table in EXACT_TABLES:
                    yield Check(name, getattr(chain, table), expected, exact=True)
                else:
                    error = (getattr(chain, table) - expected) / expected.abs().clamp_min(1e-30)
                    yield Check(name, error, torch.zeros_like(error), max_abs=2 * ULP)


@adapter("iddpm_speed_tables")
def speed_tables(case: Case) -> Iterator[Check]:
    speed = SpeedWeighting(GaussianDiffusion(retained_timesteps(1000, "")))
    yield Check("meaningful_steps", [speed.meaningful_steps], case.outputs["meaningful_steps"].tolist(), exact=True)
    # A unit in the last place of a root below 1, times SHARPNESS, in the argument of tanh; their sum is about N.
    rounding = SHARPNESS * ULP / 2 / len(speed.probabilities)
    yield Check("p", speed.probabilities, case.outputs["p"], max_abs=rounding)
    yield near("snr", speed.snr, case.outputs["snr"])
    yield near("weights", speed.weights, case.outputs["weights"])


@adapter("iddpm_training_loss")
def training_loss(case: Case) -> Iterator[Check]:
    inputs, toy = case.inputs, ToyModel()
    scheduler = IDDPM(IDDPMConfig(**case.config["IDDPM_kwargs"]))
    masks = {"frame_mask": inputs.get("mask"), "weights": inputs.get("weights")}
    x0, noise, t, told = inputs["x_start"], inputs["noise"], inputs["t"], {"y": inputs["y"]}
    loss = scheduler.training_losses(toy, x0, told, noise=noise, t=t, **masks)
    yield near("loss", loss, case.outputs["loss"])
    x_t, _, x_mask = toy.calls[0]
    terms = scheduler.loss_terms(toy(x_t, t, **told, x_mask=x_mask), x0, x_t, noise, t, **masks)
    yield near("mse", terms.mse, case.outputs["mse"])
    yield near("vb", terms.vb, case.outputs["vb"])


@adapter("iddpm_sampling")
def sampling(case: Case) -> Iterator[Check]:
    for run in case.config["runs"]:
        tag, z, y = run["tag"], case.inputs[f"z_{run['tag']}"], case.inputs["y"]
        is_guided = run["mode"] == "ddpm_cfg"
        config = IDDPMConfig(sampler="ddpm" if is_guided else "ddim", eta=run["eta"], **run["IDDPM_kwargs"])
        out = IDDPM(config).sample(
            ToyModel(),
            z,
            y,
            case.inputs["null"].expand_as(y) if is_guided else None,
            frame_mask=case.inputs.get(f"mask_{tag}"),
            draw_noise=draws(case.inputs[f"noise_{tag}"], len(z)),
        )
        yield near(f"sample_{tag}", out, case.outputs[f"sample_{tag}"])


def draws(noise: Tensor, batch: int) -> Callable[[Tensor], Tensor]:
    """The recorded draws in order, without those of the null rows, which no result depends on."""
    left = iter(noise)
    return lambda z: next(left)[:batch]


@adapter("native-diffusion-sampling")
def native_sampling(case: Case) -> Iterator[Check]:
    """Open-Sora-Plan's own diffusion, respaced to 25 steps."""

    def model(x: Tensor, t: Tensor, **ignored: Any) -> Tensor:
        mixed = torch.einsum("ij,bjthw->bithw", case.inputs["A"].float(), x)
        return mixed.tanh() * (0.3 + 0.7 * t.view(-1, 1, 1, 1, 1) / 1000)

    z = case.inputs["z"].float()
    for name, options in {"p_sample_loop": {"sampler": "ddpm"}, "ddim_sample_loop": {"sampler": "ddim"}}.items():
        scheduler = IDDPM(IDDPMConfig(num_sampling_steps=25, table_dtype="float64", **options))
        out = scheduler.sample(model, z, z, generator=torch.Generator().manual_seed(3902))
        yield near(name, out, case.outputs[name])
