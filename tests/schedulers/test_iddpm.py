"""IDDPM: laws of sampling, frames, guidance and losses; recorded numbers are replayed by tests.oracles."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from opensora.config import IDDPMConfig
from opensora.schedulers.iddpm import IDDPM
from tests.schedulers.gaussian import MEAN, SIGMA, TEXT, ExactNoise, ExactNoiseAndVariance, clips

TEN = IDDPMConfig(num_sampling_steps=10)
DDIM = replace(TEN, sampler="ddim")


def as_output(noise: Tensor, share: float = 0.0) -> Tensor:
    return torch.cat([noise, torch.full_like(noise, share)], dim=1)


class FixedNoise:
    """Predicts the same noise whatever it is shown: DDIM's path is then a straight one."""

    def __init__(self, noise: Tensor) -> None:
        self.noise = noise

    def __call__(self, x: Tensor, t: Tensor, **ignored: object) -> Tensor:
        return as_output(self.noise.repeat(len(x) // len(self.noise), 1, 1, 1, 1))


@pytest.mark.parametrize("num_steps", [5, 50])
def test_ancestral_sampling_of_a_known_gaussian_has_its_mean_and_variance(num_steps: int):
    scheduler = IDDPM(replace(TEN, num_sampling_steps=num_steps))
    z = clips(0, (2, 4, 4, 32, 32))
    out = scheduler.sample(
        ExactNoiseAndVariance(scheduler.chain()), z, TEXT, generator=torch.Generator().manual_seed(1)
    )
    # Six standard errors of 32768 draws, and the last step, which leaves out a variance of at most 1 - ab_0 = 1e-4.
    assert float(out.mean()) == pytest.approx(MEAN, abs=6 * SIGMA / len(out.flatten()) ** 0.5)
    assert float(out.var()) == pytest.approx(SIGMA**2, rel=6 * (2 / len(out.flatten())) ** 0.5 + 1e-4 / SIGMA**2)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_of_a_known_gaussian_has_nearly_its_mean_and_variance(eta: float):
    model, z = ExactNoise(), clips(0, (2, 4, 4, 32, 32))
    scheduler = IDDPM(replace(DDIM, num_sampling_steps=200, eta=eta))
    out = scheduler.sample(
        lambda x, t, **arguments: as_output(model(x, t, **arguments)),
        z,
        TEXT,
        generator=torch.Generator().manual_seed(1),
    )
    assert float(out.mean()) == pytest.approx(MEAN, abs=0.01)
    assert float(out.std()) == pytest.approx(SIGMA, rel=0.1)  # 200 steps of first order


def test_ddim_backwards_and_forwards_returns():
    x0, noise = clips(0), clips(1)
    scheduler = IDDPM(DDIM)
    inverted = scheduler.invert(FixedNoise(noise), x0, TEXT)
    last = scheduler.chain().alphas_cumprod[-1].sqrt()
    torch.testing.assert_close(inverted, last * x0 + (1 - last**2).sqrt() * noise, atol=1e-5, rtol=1e-5)
    # On the way back, rounding of terms up to 1/sqrt(ab) = 157 times as large: 157 times 2^-24 for each of ten steps.
    torch.testing.assert_close(scheduler.sample(FixedNoise(noise), inverted, TEXT), x0, atol=5e-4, rtol=0)


def test_inversion_of_a_known_gaussian_comes_back_the_better_the_more_steps():
    model, x0 = ExactNoise(), MEAN + SIGMA * clips(0)
    errors = []
    for count in (20, 200):
        scheduler = IDDPM(replace(DDIM, num_sampling_steps=count))
        output = lambda x, t, **arguments: as_output(model(x, t, **arguments))  # noqa: E731
        errors.append(float((scheduler.sample(output, scheduler.invert(output, x0, TEXT), TEXT) - x0).abs().max()))
    assert errors[1] < errors[0] / 3
    assert errors[1] < 0.1


def test_guidance_takes_chosen_channels_from_both_texts_and_the_rest_from_the_prompt():
    def model(x: Tensor, t: Tensor, *, y: Tensor, **ignored: object) -> Tensor:
        assert torch.equal(x[:2], x[2:])
        return as_output(y.mean(dim=(1, 2, 3)).view(-1, 1, 1, 1, 1).expand_as(x))

    z = clips(0)
    for cfg_channel, expected in ((None, [5.0] * 4), (3, [5.0] * 3 + [2.0]), (0, [2.0] * 4)):
        config = replace(DDIM, cfg_channel=cfg_channel, num_sampling_steps=2)
        out = IDDPM(config).sample(model, z, TEXT + 2, TEXT + 1, cfg_scale=4.0)
        straight = FixedNoise(torch.tensor(expected).view(1, 4, 1, 1, 1).expand_as(z))
        torch.testing.assert_close(out, IDDPM(config).sample(straight, z, TEXT), atol=1e-3, rtol=1e-5)


def test_given_frames_wait_for_their_step_and_take_the_rest_noised():
    model, chain = ExactNoise(), IDDPM(TEN).chain()
    frame_mask = torch.tensor([[0.0, 1.0, 0.35]]).repeat(2, 1)
    z, draws = clips(0), []

    def draw(x: Tensor) -> Tensor:
        draws.append(clips(10 + len(draws)))
        return draws[-1]

    out = IDDPM(TEN).sample(
        lambda x, t, **arguments: as_output(model(x, t, **arguments)), z, TEXT, frame_mask=frame_mask, draw_noise=draw
    )
    assert len(draws) == 20
    for call, (x, t, x_mask) in enumerate(model.calls):
        i = 9 - call  # the index into the chain
        assert t.tolist() == [int(chain.timesteps[i])] * 2
        assert x_mask.tolist() == [[False, True, i < 3]] * 2
        if i > 3:
            assert torch.equal(x[:, :, 2], z[:, :, 2])
        if i == 3:
            assert torch.equal(x[:, :, 2], chain.add_noise(z, draws[2 * call], 3)[:, :, 2])
        if i > 0:
            assert torch.equal(x[:, :, 0], z[:, :, 0])
    # A frame with 0 is noised at the last step by sqrt(1 - ab_0) = 0.01, which is taken off as far as it is foreseen.
    assert float((out - z)[:, :, 0].abs().max()) < 0.06
    assert float((out - z)[:, :, 2].abs().max()) > 0.3


def test_a_mask_of_ones_gives_the_numbers_of_no_mask_for_the_same_draws():
    chain = IDDPM(TEN).chain()

    def sample(frame_mask: Tensor | None, draws: list[Tensor]) -> Tensor:
        left = iter(draws)
        return IDDPM(TEN).sample(
            ExactNoiseAndVariance(chain), clips(0), TEXT, frame_mask=frame_mask, draw_noise=lambda z: next(left)
        )

    draws = [clips(10 + i) for i in range(20)]
    assert torch.equal(sample(None, draws[1::2]), sample(torch.ones(2, 3), draws))


def test_a_generator_makes_samples_repeatable_and_ddim_without_eta_draws_nothing():
    chain = IDDPM(TEN).chain()

    def sample(config: IDDPMConfig, generator: torch.Generator) -> Tensor:
        return IDDPM(config).sample(ExactNoiseAndVariance(chain), clips(0), TEXT, generator=generator)

    first, second = (sample(TEN, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()
    sample(DDIM, generator)
    assert torch.equal(generator.get_state(), before)


def test_timesteps_are_those_that_the_model_is_told():
    model = ExactNoise()
    scheduler = IDDPM(replace(DDIM, timestep_respacing="ddim20"))
    scheduler.sample(lambda x, t, **arguments: as_output(model(x, t, **arguments)), clips(0), TEXT)
    timesteps = scheduler.sampling_timesteps(2)
    assert torch.equal(torch.stack([t for _, t, _ in model.calls]), timesteps)
    assert timesteps[:, 0].tolist() == list(range(950, -1, -50))
    assert len(scheduler.sampling_timesteps(2, {}, 7)) == 7


@pytest.mark.parametrize("num_steps", [0, 1, 1001])
def test_numbers_of_steps_that_cannot_be_are_refused(num_steps: int):
    with pytest.raises(ValueError, match=f"num_sampling_steps: must be from 2 to 1000, got {num_steps}"):
        IDDPM(TEN).sampling_timesteps(1, {}, num_steps)


def test_bad_configurations_and_models_are_refused():
    with pytest.raises(ValueError, match=r"eta: must lie in \[0, 1\], got 2"):
        IDDPM(replace(DDIM, eta=2.0))
    with pytest.raises(ValueError, match="model: must predict noise and variance, 8 channels, got 4"):
        IDDPM(TEN).sample(ExactNoise(), clips(0), TEXT)
    masks = {"frame_mask": torch.ones(2, 3), "loss_mask": torch.ones(2, 3, 3, 5)}
    with pytest.raises(ValueError, match="loss_mask: cannot go together with frame_mask"):
        IDDPM().training_losses(FixedNoise(clips(1)), clips(0), **masks)
    with pytest.raises(ValueError, match=r"t: must be int64 of shape \(2,\), got torch.float32 of \(2,\)"):
        IDDPM().training_losses(FixedNoise(clips(1)), clips(0), t=torch.tensor([0.0, 500.0]))


def test_the_true_noise_has_no_error_and_the_bound_grows_with_a_wrong_variance():
    scheduler, x0, noise, t = IDDPM(), MEAN + SIGMA * clips(0), clips(1), torch.tensor([0, 500])
    x_t = scheduler.training_chain.add_noise(x0, noise, t)
    terms = [scheduler.loss_terms(as_output(noise, share), x0, x_t, noise, t) for share in (-1.0, 0.5)]
    assert terms[0].mse.tolist() == [0.0, 0.0]
    # With the true noise and the lower variance, the predicted step is the true one: no divergence but rounding.
    assert float(terms[0].vb[1].abs()) < 1e-4
    assert float(terms[1].vb[1]) > float(terms[0].vb[1])
    losses = scheduler.training_losses(FixedNoise(noise), x0, noise=noise, t=t)
    torch.testing.assert_close(losses, sum(scheduler.loss_terms(as_output(noise), x0, x_t, noise, t)))


def test_the_bound_teaches_the_variance_alone():
    scheduler, x0, noise, t = IDDPM(), clips(0), clips(1), torch.tensor([0, 500])
    x_t = scheduler.training_chain.add_noise(x0, noise, t)
    output = as_output(clips(2), 0.3).requires_grad_()
    scheduler.loss_terms(output, x0, x_t, noise, t).vb.sum().backward()
    assert float(output.grad[:, :4].abs().max()) == 0
    assert float(output.grad[:, 4:].abs().min()) > 0


def test_given_frames_count_for_nothing_and_are_shown_nearly_clean():
    x0, noise, t = clips(0), clips(1), torch.tensor([500, 900])
    frame_mask = torch.tensor([[True, False, True], [True, True, True]])
    wrong = noise.clone()
    wrong[:, :, 1] += 2.0  # an error in the second frame alone
    seen = {}

    def model(x: Tensor, t: Tensor, *, x_mask: Tensor) -> Tensor:
        seen.update(x=x, x_mask=x_mask)
        return as_output(wrong, -1.0)

    scheduler = IDDPM()
    scheduler.training_losses(model, x0, noise=noise, t=t, frame_mask=frame_mask)
    assert seen["x_mask"] is frame_mask
    assert torch.equal(seen["x"][0, :, 1], scheduler.training_chain.add_noise(x0, noise, 0)[0, :, 1])
    mse = scheduler.loss_terms(as_output(wrong), x0, seen["x"], noise, t, frame_mask=frame_mask).mse
    torch.testing.assert_close(mse, torch.tensor([0.0, 4.0 / 3]))


def test_padding_adds_nothing_but_counts_in_the_mean():
    x0, noise, t = clips(0), clips(1), torch.tensor([500, 900])
    loss_mask = torch.ones(2, 3, 3, 5)
    loss_mask[0, 2] = 0
    scheduler = IDDPM()
    x_t = scheduler.training_chain.add_noise(x0, noise, t)
    mse, vb = scheduler.loss_terms(as_output(noise + 1), x0, x_t, noise, t, loss_mask=loss_mask)
    torch.testing.assert_close(mse, torch.tensor([2.0 / 3, 1.0]))
    whole = scheduler.loss_terms(as_output(noise + 1), x0, x_t, noise, t).vb
    assert float(vb[0]) < float(whole[0])
    assert float(vb[1]) == float(whole[1])


def test_weights_multiply_the_squared_error_at_their_timestep():
    x0, noise, t = clips(0), clips(1), torch.tensor([100, 900])
    x_t = IDDPM().training_chain.add_noise(x0, noise, t)
    output, weights = as_output(noise + 1), torch.arange(1000.0)
    plain = IDDPM().loss_terms(output, x0, x_t, noise, t)
    weighted = IDDPM().loss_terms(output, x0, x_t, noise, t, weights=weights)
    torch.testing.assert_close(weighted.mse, t.float())
    assert torch.equal(weighted.vb, plain.vb)


def test_training_draws_repeat_with_their_generator():
    model = FixedNoise(clips(1))
    losses = [IDDPM().training_losses(model, clips(0), generator=torch.Generator().manual_seed(0)) for _ in range(2)]
    assert torch.equal(*losses)


def test_speed_weighting_draws_steep_timesteps_more_often_and_weights_by_noise():
    scheduler = IDDPM(IDDPMConfig(is_speed_weighted=True))
    t = scheduler.training_timesteps(200_001, torch.device("cpu"), generator=torch.Generator().manual_seed(0))
    assert t.dtype == torch.int64
    assert int(t.min()) >= 0
    assert int(t.max()) < 1000
    drawn = t[:100_001]
    share = float((drawn < 640).float().mean())
    assert share == pytest.approx(640 * 2.5 / (640 * 2.5 + 360 * 0.5), abs=0.01)
    mirrored = t[100_001:]
    expected = torch.where(drawn < 700, 700 - drawn, drawn - 700)[:100_000]
    assert torch.equal(mirrored, expected)

    x0, noise, t = clips(0), clips(1), torch.tensor([3, 900])
    plain = IDDPM().training_losses(FixedNoise(noise + 1), x0, noise=noise, t=t)
    weighted = scheduler.training_losses(FixedNoise(noise + 1), x0, noise=noise, t=t)
    expected = plain - 1 + scheduler.speed.weights[t].float()
    torch.testing.assert_close(weighted, expected, atol=1e-5, rtol=1e-5)
