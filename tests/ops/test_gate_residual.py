"""What is special about gate_residual: the bits of upstream's eager chain, and the modulation of the next branch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from opensora_kernels import gate_residual, modulate, use

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@DTYPES
def test_choosing_gates_per_frame_has_the_bits_of_choosing_between_two_results(dtype: torch.dtype):
    """Upstream multiplies the branch by both gates, picks per frame and adds; choosing the gate first is equal."""
    num_frames, num_sites = 5, 3
    x, y = (draw(2, num_frames * num_sites, 32, seed=seed, dtype=dtype) for seed in (1, 2))
    gate, gate0 = draw(2, 32, seed=3, dtype=dtype), draw(2, 32, seed=4, dtype=dtype)
    frame_mask = torch.tensor([[True, False, True, True, False], [False] * 5])
    token_mask = frame_mask.repeat_interleave(num_sites, 1)[:, :, None]
    with use(gate_residual="reference"):
        have = gate_residual(x, y, gate, frame_mask=frame_mask, gate0=gate0)
        assert torch.equal(have, x + torch.where(token_mask, gate[:, None] * y, gate0[:, None] * y))
        assert torch.equal(gate_residual(x, y, gate), x + gate[:, None] * y)


@DTYPES
def test_with_shift_and_scale_returns_the_sum_and_its_modulation(dtype: torch.dtype):
    x, y = (draw(2, 6, 16, seed=seed, dtype=dtype) for seed in (1, 2))
    gate, gate0, shift, scale, shift0, scale0 = (draw(2, 16, seed=seed, dtype=dtype) for seed in range(3, 9))
    frame_mask = torch.tensor([[True, False], [False, True]])
    tables = {"shift": shift, "scale": scale, "shift0": shift0, "scale0": scale0, "frame_mask": frame_mask}
    total, modulated = gate_residual(x, y, gate, gate0=gate0, **tables)
    assert torch.equal(total, gate_residual(x, y, gate, gate0=gate0, frame_mask=frame_mask))
    assert torch.equal(modulated, modulate(total, **tables))


def test_a_zero_gate_passes_x_through():
    x, y = draw(2, 6, 8, seed=1), draw(2, 6, 8, seed=2)
    assert torch.equal(gate_residual(x, y, torch.zeros(2, 8)), x)
