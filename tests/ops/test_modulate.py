"""What is special about modulate: the bits of upstream's eager chain, and the choice between two parameter sets."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from opensora_kernels import modulate, use
from tests.ops.properties import assert_triton_is_accurate, interpreted
from tests.ops.tokens import TILES, small_tiles, tokens_and_tables

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


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=interpreted)])
@pytest.mark.parametrize("normalize", [True, False])
def test_gradients_of_a_frame_flow_to_the_tables_that_it_chose_and_to_no_other(backend: str, normalize: bool):
    """Infinite gradients in the frames of one choice leave no trace in the gradients of the other's tables."""
    x, cotangent = draw(2, 12, 8, seed=1), draw(2, 12, 8, seed=6)
    tables = [draw(2, 8, seed=seed).requires_grad_() for seed in (2, 3, 4, 5)]
    frame_mask = torch.tensor([[True, False, True, False], [False, True, True, True]])
    is_first = frame_mask.repeat_interleave(3, 1)[:, :, None]

    def gradients(cotangent: Tensor) -> tuple[Tensor, ...]:
        shift, scale, shift0, scale0 = tables
        with use(modulate=backend):
            out = modulate(x, shift, scale, normalize=normalize, frame_mask=frame_mask, shift0=shift0, scale0=scale0)
        return torch.autograd.grad(out, tables, cotangent)

    plain = gradients(cotangent)
    for chosen, of_chosen, of_others in ((is_first, [0, 1], [2, 3]), (~is_first, [2, 3], [0, 1])):
        found = gradients(cotangent.where(~chosen, torch.inf))
        assert not any(found[index].isfinite().any() for index in of_chosen)
        assert all(torch.equal(found[index], plain[index]) for index in of_others)


@interpreted
@given(tokens_and_tables(["shift", "scale"], 1), st.booleans(), TILES, st.data())
def test_triton_is_as_accurate_as_pytorch(call: dict, normalize: bool, tile: dict, data: st.DataObject):
    # eps 0.1: the gradient of a norm over few channels is a difference that cancels to nothing
    call |= {"normalize": normalize, "eps": 0.1}
    tensors = [name for name, value in call.items() if isinstance(value, Tensor) and value.is_floating_point()]
    with small_tiles(tile):
        assert_triton_is_accurate("modulate", call, data.draw(st.lists(st.sampled_from(tensors), unique=True)))


@interpreted
@given(tokens_and_tables(["shift", "scale"], 1), TILES)
def test_triton_rounds_where_the_reference_rounds(call: dict, tile: dict):
    """Without LayerNorm, whose sums take another order, the bits are the same."""
    with use(modulate="reference"):
        expected = modulate(**call, normalize=False)
    with small_tiles(tile), use(modulate="triton"):
        assert torch.equal(modulate(**call, normalize=False), expected)
