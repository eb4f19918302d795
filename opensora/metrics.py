"""How close two clips are: PSNR, SSIM and, where its weights are at hand, LPIPS; and how sharp one is. By frame.

Axes: B clips, T frames, C channels, H height, W width. Source: Open-Sora-Plan v1.1.0, opensora/eval.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from opensora.perceptual import LPIPS

WINDOW, SIGMA = 11, 1.5
C1, C2 = 0.01**2, 0.03**2
SAME, SAME_DB = 1e-10, 100.0  # a mean squared error below the first counts as the second

SCORES = ("psnr", "ssim", "sharpness")

Distance = Callable[[Tensor, Tensor], Tensor]
"""Two batches of frames (N, 3, H, W) in [-1, 1] to N distances."""


def psnr(frames: Tensor, other: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, computed in fp64; 100 where the frames agree.

    Shapes: (*, C, H, W), uint8 or floating-point in [0, 1] -> (*).
    Errors: ValueError for shapes that differ; TypeError for other dtypes.
    """
    frames, other = _prepared("psnr", frames, other)
    error = (frames - other).square().mean((-3, -2, -1))
    return torch.where(error < SAME, SAME_DB, -10 * torch.log10(error.clamp_min(SAME)))


def ssim(frames: Tensor, other: Tensor) -> Tensor:
    """Structural similarity in fp64: a Gaussian window of 11 x 11 pixels that never leaves the frame, each channel by
    itself, averaged.

    Shapes: (*, C, H, W), uint8 or floating-point in [0, 1], at least 11 x 11 -> (*). Errors: as for `psnr`.
    """
    frames, other = _prepared("ssim", frames, other)
    if min(frames.shape[-2:]) < WINDOW:
        raise ValueError(f"ssim: frames must have at least {WINDOW} x {WINDOW} pixels, got {tuple(frames.shape)}")
    leading, (height, width) = frames.shape[:-2], frames.shape[-2:]
    a, b = (side.reshape(-1, 1, height, width) for side in (frames, other))
    mean_a, mean_b = _blurred(a), _blurred(b)
    variance_a, variance_b = _blurred(a * a) - mean_a**2, _blurred(b * b) - mean_b**2
    covariance = _blurred(a * b) - mean_a * mean_b
    likeness = (2 * mean_a * mean_b + C1) * (2 * covariance + C2)
    likeness = likeness / ((mean_a**2 + mean_b**2 + C1) * (variance_a + variance_b + C2))
    return likeness.mean((1, 2, 3)).reshape(leading).mean(-1)


def gradient_energy(frames: Tensor) -> Tensor:
    """Mean squared difference of neighbouring pixels, across plus down, in fp64: lower in a blurred frame.

    Shapes: (*, C, H, W), uint8 or floating-point in [0, 1], at least 2 x 2 -> (*). Errors: TypeError for other dtypes.
    """
    frames = _in_unit_range("gradient_energy", frames)
    return frames.diff(dim=-1).square().mean((-3, -2, -1)) + frames.diff(dim=-2).square().mean((-3, -2, -1))


def scores_of_clip(frames: Tensor, other: Tensor) -> Tensor:
    """The three SCORES of a reconstruction, averaged over its frames.

    PSNR in dB; SSIM, NaN for frames smaller than its window; gradient energy of `other` in units of that of `frames`.
    Shapes: (T, C, H, W) as in `psnr` -> (3,). Errors: as `psnr`.
    """
    likeness = ssim(frames, other).mean() if min(frames.shape[-2:]) >= WINDOW else torch.tensor(torch.nan).double()
    sharpness = gradient_energy(other).mean() / gradient_energy(frames).mean().clamp_min(1e-12)
    return torch.stack([psnr(frames, other).mean(), likeness, sharpness])


def lpips_alex() -> Distance | str:
    """LPIPS on AlexNet, or a sentence that says what of its weights is missing here: those of the five layers lie in
    the package `lpips`, AlexNet's in torch's hub folder. Nothing is downloaded."""
    package = find_spec("lpips")
    if package is None or not package.submodule_search_locations:
        return "the package lpips is not installed"
    layers = Path(package.submodule_search_locations[0]) / "weights" / "v0.1" / "alex.pth"
    backbone = Path(torch.hub.get_dir()) / "checkpoints" / "alexnet-owt-7be5be79.pth"
    for name, path in (("LPIPS", layers), ("AlexNet", backbone)):
        if not path.exists():
            return f"the weights of {name} are not there ({path})"
    weights: dict[str, Tensor] = {}
    for path in (layers, backbone):
        weights |= torch.load(path, map_location="cpu", weights_only=True)
    network = LPIPS.from_weights(weights, backbone="alex", source=f"{layers} with {backbone}")
    return lambda frames, other: network(frames, other).flatten()


def _prepared(name: str, frames: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    if frames.shape != other.shape or frames.dim() < 3:
        raise ValueError(
            f"{name}: frames and other must have one shape (*, C, H, W), got {tuple(frames.shape)} and "
            f"{tuple(other.shape)}"
        )
    return _in_unit_range(name, frames), _in_unit_range(name, other)


def _in_unit_range(name: str, frames: Tensor) -> Tensor:
    if frames.dtype == torch.uint8:
        return frames.double() / 255
    if not frames.is_floating_point():
        raise TypeError(f"{name}: frames must be uint8 or floating-point, got {frames.dtype}")
    return frames.double()


def _blurred(x_N1HW: Tensor) -> Tensor:
    """Weighted means over each window that fits."""
    offsets = torch.arange(WINDOW, dtype=x_N1HW.dtype, device=x_N1HW.device) - WINDOW // 2
    weights = torch.exp(-(offsets**2) / (2 * SIGMA**2))
    weights = weights / weights.sum()
    return F.conv2d(F.conv2d(x_N1HW, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))
