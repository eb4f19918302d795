"""Chains of noise levels: respacing, the tables' laws, likelihoods."""

from __future__ import annotations

import pytest
import torch

from opensora.schedulers.gaussian_diffusion import (
    GaussianDiffusion,
    discretized_normal_nll,
    linear_betas,
    normal_kl,
    retained_timesteps,
)


@pytest.mark.parametrize("respacing", ["1000", "ddim1000", "500,500"])
def test_respacing_with_all_timesteps_is_no_respacing(respacing: str):
    assert retained_timesteps(1000, respacing) == list(range(1000))
    chain = GaussianDiffusion(retained_timesteps(1000, respacing), dtype=torch.float64)
    torch.testing.assert_close(chain.betas, linear_betas(1000), atol=1e-14, rtol=0)


def test_respacing_keeps_ends_and_counts_of_each_part():
    retained = retained_timesteps(1000, "10, 15,20")
    assert retained == sorted(set(retained))
    assert [sum(start <= t < end for t in retained) for start, end in ((0, 334), (334, 667), (667, 1000))] == [
        10,
        15,
        20,
    ]
    assert {0, 333, 334, 666, 667, 999} <= set(retained)
    assert retained_timesteps(1000, "ddim50") == list(range(0, 1000, 20))


@pytest.mark.parametrize(
    ("respacing", "message"),
    [
        ("ddim7x", "must be '', 'ddimN' or counts"),
        ("ddim300", "no stride leaves that many of 1000 steps, got 'ddim300'"),
        ("10,-3", "must be '', 'ddimN' or counts"),
        ("0", "must be '', 'ddimN' or counts"),
        ("10,600", "a part has 500 timesteps, cannot keep 600"),
    ],
)
def test_respacings_that_cannot_be_are_refused(respacing: str, message: str):
    with pytest.raises(ValueError, match=f"timestep_respacing: {message}"):
        retained_timesteps(1000, respacing)


def test_too_few_timesteps_for_the_betas_are_refused():
    assert float(linear_betas(21).max()) < 1
    with pytest.raises(ValueError, match="num_timesteps: must be at least 21, or betas reach 1, got 20"):
        linear_betas(20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_respaced_chain_has_the_noise_levels_of_the_whole_one(dtype: torch.dtype):
    whole = GaussianDiffusion(retained_timesteps(1000, ""), dtype=torch.float64)
    chain = GaussianDiffusion(retained_timesteps(1000, "20"), dtype=dtype)
    expected = whole.alphas_cumprod[chain.timesteps]
    # 20 factors rounded to fp32: the relative error of a product is at most the sum of theirs, 2^-24 and 2^-24 each.
    torch.testing.assert_close(chain.alphas_cumprod.double(), expected, atol=0, rtol=40 * 2**-24)
    assert chain.alphas_cumprod.dtype == dtype


def test_noise_is_found_again_and_the_posterior_of_the_first_step_is_the_clean_clip():
    chain = GaussianDiffusion(retained_timesteps(1000, "10"), dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 2, 4, 3, 3, 5, generator=generator)
    for t in (torch.tensor([0, 9]), 4):
        # The clean clip is a difference of terms as large as 1/sqrt(ab), about 157 at the last step.
        torch.testing.assert_close(chain.clean(chain.add_noise(x0, noise, t), noise, t), x0, atol=1e-4, rtol=0)
    torch.testing.assert_close(chain.posterior_mean(x0, noise, 0), x0, atol=1e-6, rtol=1e-6)


def test_one_index_for_all_samples_gives_the_numbers_of_an_index_for_each():
    chain = GaussianDiffusion(retained_timesteps(1000, "10"))
    x0, noise = torch.randn(2, 2, 4, 3, 3, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(chain.add_noise(x0, noise, 7), chain.add_noise(x0, noise, torch.tensor([7, 7])))


def test_learned_variance_lies_between_its_bounds():
    chain = GaussianDiffusion(retained_timesteps(1000, "10"), dtype=torch.float64)
    shares = torch.tensor([-1.0, 1.0])
    variances = chain.log_variance(shares, 5).exp()
    expected = torch.stack([chain.posterior_variance[5], chain.betas[5]]).float()
    torch.testing.assert_close(variances, expected)


def test_divergence_is_that_of_torch_and_zero_for_equal_distributions():
    means = torch.tensor([0.0, 0.5, -1.0])
    log_variances = torch.tensor([-2.0, 0.0, 1.0])
    ours = normal_kl(means, log_variances, means.flip(0), log_variances.flip(0))
    first = torch.distributions.Normal(means, (0.5 * log_variances).exp())
    second = torch.distributions.Normal(means.flip(0), (0.5 * log_variances.flip(0)).exp())
    torch.testing.assert_close(ours, torch.distributions.kl_divergence(first, second))
    assert float(normal_kl(means, log_variances, means, log_variances).abs().max()) == 0


def test_bins_of_the_likelihood_fill_the_line():
    bins = torch.linspace(-1, 1, 256, dtype=torch.float64)
    mean, log_sigma = torch.tensor(0.2, dtype=torch.float64), torch.tensor(-1.0, dtype=torch.float64)
    probabilities = (-discretized_normal_nll(bins, mean, log_sigma)).exp()
    assert float(probabilities.sum()) == pytest.approx(1.0, abs=1e-6)
