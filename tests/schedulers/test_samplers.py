"""DPM-Solver++ and diffusers' schedulers: laws; and what all schedulers share. Recorded trajectories are replayed by
tests.oracles."""

from __future__ import annotations

import sys
from typing import get_args

import pytest
import torch
from torch import Tensor

from opensora.config import (
    DiffusersSamplerConfig,
    DPMSolverConfig,
    IDDPMConfig,
    RectifiedFlowConfig,
    SampleConfig,
    SampleMethod,
    SchedulerConfig,
)
from opensora.schedulers import (
    IDDPM,
    DiffusersSampler,
    DPMSolver,
    RectifiedFlow,
    Scheduler,
    TrainingScheduler,
    build,
    diffusers_samplers,
)
from opensora.schedulers.diffusers_samplers import METHODS
from tests.schedulers.configurations import DIFFUSERS, model_for, name, scheduler_for
from tests.schedulers.gaussian import MEAN, SIGMA, TEXT, ExactNoise, clips

# numpy's about what diffusers does with tensors, thousands of them.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

STOCHASTIC = ("DDPM", "EulerAncestralDiscrete", "KDPM2AncestralDiscrete")
ALL = [RectifiedFlowConfig(use_timestep_transform=False), IDDPMConfig(), DPMSolverConfig(), *DIFFUSERS]


@pytest.mark.parametrize("config", [DPMSolverConfig(), *DIFFUSERS], ids=name)
def test_sampling_a_known_gaussian_gives_its_mean_and_spread(config: SchedulerConfig):
    z = clips(0, (2, 4, 4, 32, 32))
    out = scheduler_for(config).sample(
        model_for(config), z, TEXT, num_sampling_steps=200, generator=torch.Generator().manual_seed(1)
    )
    # Methods of first order lose 3 % of the spread at 200 steps and 15 % at 40, those that draw noise twice as much.
    is_stochastic = name(config) in STOCHASTIC
    assert float(out.mean()) == pytest.approx(MEAN, abs=0.01)
    assert float(out.std()) == pytest.approx(SIGMA, rel=0.1 if is_stochastic else 0.05)


def test_the_solver_comes_nearer_with_the_square_of_its_steps():
    model, z = ExactNoise(), clips(0)
    # The path of an element keeps its place in the distribution, whose mean and deviation are known at both ends.
    start, end = model.signal(999), model.signal(0)
    deviations = [(SIGMA**2 * signal + 1 - signal) ** 0.5 for signal in (start, end)]
    exact = end**0.5 * MEAN + (z - start**0.5 * MEAN) * deviations[1] / deviations[0]
    errors = [
        float((DPMSolver().sample(model, z, TEXT, num_sampling_steps=count) - exact).abs().max())
        for count in (160, 640)
    ]
    assert errors[1] < errors[0] / 10  # 16 for second order, 4 for first


@pytest.mark.parametrize("config", ALL, ids=name)
def test_every_scheduler_has_the_shared_interface(config: SchedulerConfig):
    scheduler = scheduler_for(config)
    assert isinstance(scheduler, Scheduler)
    assert isinstance(scheduler, TrainingScheduler) == isinstance(config, RectifiedFlowConfig | IDDPMConfig)
    assert scheduler.config == config
    model, steps = ExactNoise(), []
    scheduler.sample(
        lambda x, t, **arguments: torch.cat([model(x, t, **arguments)] * 2, dim=1),
        clips(0),
        TEXT,
        num_sampling_steps=6,
        on_step=lambda i, num_calls, z: steps.append((i, num_calls, z.shape)),
    )
    timesteps = scheduler.sampling_timesteps(2, {}, 6)
    assert torch.equal(torch.stack([t for _, t, _ in model.calls]), timesteps)
    assert steps == [(i, len(timesteps), (2, 4, 3, 3, 5)) for i in range(len(timesteps))]


def test_each_configuration_builds_its_own_scheduler():
    kinds = [RectifiedFlow, IDDPM, DPMSolver, *[DiffusersSampler] * 10]
    assert [type(build(config)) for config in ALL] == kinds
    with pytest.raises(TypeError, match=r"config must be one of RectifiedFlowConfig, .* got SampleConfig"):
        build(SampleConfig())


class WithDenoiser:
    """Works once for the prompt, as transformers do; remembers how it was asked."""

    def __init__(self, function: object) -> None:
        self.function, self.asked = function, []

    def denoiser(self, y: Tensor, mask: Tensor | None = None, *, with_variance: bool, **arguments: object):
        self.asked.append((y, mask, with_variance, arguments))
        copies = len(y) // 2

        def denoise(x: Tensor, t: Tensor, x_mask: Tensor | None = None) -> Tensor:
            out = self.function(x.repeat(copies, 1, 1, 1, 1), t.repeat(copies), y=y)
            return out if with_variance else out[:, :4]

        return denoise


def textual(x: Tensor, t: Tensor, *, y: Tensor, **ignored: object) -> Tensor:
    noise = ExactNoise()(x, t, y=y) + y.mean(dim=(1, 2, 3)).view(-1, 1, 1, 1, 1)
    return torch.cat([noise, 0.1 * noise], dim=1)


@pytest.mark.parametrize("config", ALL, ids=name)
def test_a_denoiser_is_asked_once_and_gives_the_numbers_of_plain_calls(config: SchedulerConfig):
    model, text = WithDenoiser(textual), TEXT + 0.1
    mask = torch.arange(16).view(4, 4)
    options = {"num_sampling_steps": 5, "arguments": {"fps": torch.tensor([8.0, 24.0])}}

    def sample(model: object) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return scheduler_for(config).sample(model, clips(0), text, TEXT, mask, generator=generator, **options)

    assert torch.equal(sample(model), sample(textual))
    ((y, asked_mask, with_variance, arguments),) = model.asked
    is_null_first = isinstance(config, DPMSolverConfig | DiffusersSamplerConfig)
    assert torch.equal(y, torch.cat([TEXT, text] if is_null_first else [text, TEXT]))
    assert torch.equal(asked_mask, mask.roll(2, 0) if is_null_first else mask)
    assert with_variance == isinstance(config, IDDPMConfig)
    assert arguments == options["arguments"]


@pytest.mark.parametrize("config", [DPMSolverConfig(), *DIFFUSERS], ids=name)
def test_guidance_extrapolates_from_null_to_text(config: SchedulerConfig):
    z, text = clips(0), TEXT + 0.1
    out = scheduler_for(config).sample(
        textual, z, text, TEXT, cfg_scale=3.0, num_sampling_steps=5, draw_noise=torch.zeros_like
    )
    alone = scheduler_for(config).sample(textual, z, TEXT + 0.3, num_sampling_steps=5, draw_noise=torch.zeros_like)
    torch.testing.assert_close(out, alone, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("config", DIFFUSERS, ids=name)
def test_noise_of_diffusers_comes_from_the_caller_alone(config: DiffusersSamplerConfig):
    draws: list[Tensor] = []

    def draw(z: Tensor) -> Tensor:
        draws.append(clips(10 + len(draws)))
        return draws[-1]

    def sample(**options: object) -> Tensor:
        return scheduler_for(config).sample(model_for(config), clips(0), TEXT, num_sampling_steps=6, **options)

    before = torch.get_rng_state()
    drawn = sample(draw_noise=draw)
    assert bool(draws) == (config.sample_method in STOCHASTIC)
    assert torch.equal(torch.get_rng_state(), before)
    seeded = [sample(generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(seeded[0], seeded[1])
    assert torch.equal(seeded[0], seeded[2]) == (config.sample_method not in STOCHASTIC)
    first = iter(draws)
    assert torch.equal(sample(draw_noise=lambda z: next(first)), drawn)


@pytest.mark.parametrize("config", ALL, ids=name)
@pytest.mark.parametrize("count", [-1, 0, 100_000])
def test_numbers_of_steps_that_make_no_sense_are_refused(config: SchedulerConfig, count: int):
    with pytest.raises(ValueError, match=rf"num_sampling_steps: must be from \d to \d+, got {count}"):
        scheduler_for(config).sampling_timesteps(1, {}, count)


@pytest.mark.parametrize("config", DIFFUSERS, ids=name)
def test_the_fewest_steps_are_those_that_begin_at_noise(config: DiffusersSamplerConfig):
    fewest = METHODS[config.sample_method].fewest_steps
    timesteps = scheduler_for(config).sampling_timesteps(1, {}, fewest)
    assert float(timesteps[0]) >= 500
    with pytest.raises(ValueError, match=f"num_sampling_steps: must be from {fewest} to 1000, got {fewest - 1}"):
        scheduler_for(config).sampling_timesteps(1, {}, fewest - 1)
    out = scheduler_for(config).sample(model_for(config), clips(0), TEXT, num_sampling_steps=fewest)
    assert torch.isfinite(out).all()


def test_every_method_of_the_configuration_is_known():
    assert set(METHODS) == set(get_args(SampleMethod))


def test_an_unknown_method_is_refused_with_all_known_ones():
    with pytest.raises(ValueError, match=r"sample_method: must be one of DDIM, .*, got 'LMS'"):
        DiffusersSampler(DiffusersSamplerConfig(sample_method="LMS"))


def test_diffusers_is_needed_only_by_its_own_samplers_and_only_when_they_work(monkeypatch: pytest.MonkeyPatch):
    assert not hasattr(diffusers_samplers, "diffusers")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    sampler = build(DiffusersSamplerConfig())
    with pytest.raises(ImportError, match="diffusers"):
        sampler.sampling_timesteps(1)
