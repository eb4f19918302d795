"""What is special about modulate: the bits of upstream's eager chain, and the choice between two parameter sets."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from opensora_kernels import modulate, use

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@DTYPES
def test_equals_pytorch_layer_norm_then_scale_and_shift(dtype: torch.dtype):
    x, shift, scale = draw(2, 6, 32, seed=1, dtype=dtype), draw(2, 32, seed=2, dtype=dtype), draw(2, 32, dtype=dtype)
    want = torch.nn.LayerNorm(32, eps=1e-6, elementwise_affine=False)(x) * (1 + scale[:, None]) + shift[:, None]
    with use(modulate="reference"):
        assert torch.equal(modulate(x, shift, scale), want)


@DTYPES
@pytest.mark.parametrize("normalize", [True, False])
def test_choosing_parameters_per_frame_has_the_bits_of_choosing_between_two_results(
    dtype: torch.dtype, normalize: bool
):
    """Upstream computes both branches in full and picks per frame; choosing the (B, T, C) parameters first is equal."""
    num_frames, num_sites = 5, 3
    x = draw(2, num_frames * num_sites, 32, seed=1, dtype=dtype)
    shift, scale, shift0, scale0 = (draw(2, 32, seed=seed, dtype=dtype) for seed in (2, 3, 4, 5))
    frame_mask = torch.tensor([[True, False, True, True, False], [False] * 5])
    normed = F.layer_norm(x, (32,), eps=1e-6) if normalize else x
    noised = normed * (1 + scale[:, None]) + shift[:, None]
    clean = normed * (1 + scale0[:, None]) + shift0[:, None]
    want = torch.where(frame_mask.repeat_interleave(num_sites, 1)[:, :, None], noised, clean)
    with use(modulate="reference"):
        have = modulate(x, shift, scale, normalize=normalize, frame_mask=frame_mask, shift0=shift0, scale0=scale0)
    assert torch.equal(have, want)


def test_a_mask_that_is_all_true_has_the_bits_of_no_mask():
    x, shift, scale, other = draw(2, 6, 8, seed=1), draw(2, 8, seed=2), draw(2, 8, seed=3), draw(2, 8, seed=4)
    frame_mask = torch.ones(2, 3, dtype=torch.bool)
    have = modulate(x, shift, scale, frame_mask=frame_mask, shift0=other, scale0=other)
    assert torch.equal(have, modulate(x, shift, scale))


def test_parameters_of_frames_not_chosen_get_no_gradient():
    x, shift, scale = draw(1, 6, 8, seed=1), draw(1, 8, seed=2), draw(1, 8, seed=3)
    shift0, scale0 = (draw(1, 8, seed=seed).requires_grad_() for seed in (4, 5))
    frame_mask = torch.ones(1, 3, dtype=torch.bool)
    modulate(x, shift, scale, frame_mask=frame_mask, shift0=shift0, scale0=scale0).sum().backward()
    assert not shift0.grad.any()
    assert not scale0.grad.any()
