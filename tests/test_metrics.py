"""PSNR and SSIM against their definitions; the recorded answers of the original are replayed by the oracles."""

from __future__ import annotations

import pytest
import torch

from opensora.metrics import lpips_alex, psnr, ssim


def clips(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    clip = torch.rand(shape, generator=generator)
    return clip, (clip + 0.1 * torch.randn(shape, generator=generator)).clamp(0, 1)


def test_psnr_of_a_constant_error_is_its_logarithm():
    frames = torch.full((2, 5, 3, 8, 8), 0.5)
    assert torch.allclose(psnr(frames, frames + 0.1), torch.full((2, 5), 20.0, dtype=torch.float64), atol=1e-5)


def test_equal_frames_have_100_db_and_a_likeness_of_one():
    frames, _ = clips(2, 3, 16, 16)
    assert psnr(frames, frames).tolist() == [100.0, 100.0]
    assert torch.allclose(ssim(frames, frames), torch.ones(2, dtype=torch.float64))


def test_ssim_of_one_window_is_the_formula_of_its_weighted_moments():
    a, b = (frames.double() for frames in clips(1, 11, 11))
    offsets = torch.arange(-5.0, 6, dtype=torch.float64)
    weights = torch.exp(-(offsets[:, None] ** 2 + offsets**2) / 4.5)
    weights /= weights.sum()

    def mean(x: torch.Tensor) -> torch.Tensor:
        return (weights * x).sum()

    covariance = mean((a - mean(a)) * (b - mean(b)))
    variances = mean((a - mean(a)) ** 2) + mean((b - mean(b)) ** 2)
    means = 2 * mean(a) * mean(b) + 1e-4, mean(a) ** 2 + mean(b) ** 2 + 1e-4
    expected = means[0] * (2 * covariance + 9e-4) / (means[1] * (variances + 9e-4))
    assert ssim(a, b).item() == pytest.approx(expected.item(), abs=1e-12)


def test_bytes_are_measured_like_the_fractions_that_they_stand_for():
    frames, other = (clip.mul(255).round().to(torch.uint8) for clip in clips(3, 16, 16))
    assert torch.allclose(psnr(frames, other), psnr(frames / 255, other / 255), atol=1e-4)
    assert torch.allclose(ssim(frames, other), ssim(frames / 255, other / 255), atol=1e-6)


def test_wrong_frames_are_refused():
    frames, _ = clips(3, 16, 16)
    with pytest.raises(ValueError, match="one shape"):
        psnr(frames, frames[:, :8])
    with pytest.raises(ValueError, match="at least 11 x 11"):
        ssim(frames[:, :8], frames[:, :8])
    with pytest.raises(TypeError, match="int64"):
        psnr(frames.long(), frames.long())


def test_lpips_says_what_is_missing_instead_of_downloading_it(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    reason = lpips_alex()
    assert "lpips is not installed" in reason or str(tmp_path) in reason
