"""What is special about gate_residual: the bits of upstream's eager chain, and the modulation of the next branch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from opensora_kernels import gate_residual, modulate, use
from tests.ops.properties import assert_triton_is_accurate, interpreted
from tests.ops.tokens import TILES, small_tiles, tokens_and_tables

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


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=interpreted)])
def test_gradients_of_a_frame_flow_to_the_tables_that_it_chose_and_to_no_other(backend: str):
    """Infinite gradients in the frames of one choice leave no trace in the gradients of the other's tables."""
    x, y, cotangent = (draw(2, 12, 8, seed=seed) for seed in (1, 2, 3))
    tables = {
        name: draw(2, 8, seed=4 + index).requires_grad_() for index, name in enumerate(("gate", "shift", "scale"))
    }
    tables |= {f"{name}0": draw(2, 8, seed=7).requires_grad_() for name in tables}
    frame_mask = torch.tensor([[True, False, True, False], [False, True, True, True]])
    is_first = frame_mask.repeat_interleave(3, 1)[:, :, None]

    def gradients(cotangent: Tensor) -> dict[str, Tensor]:
        with use(gate_residual=backend):
            outs = gate_residual(x, y, frame_mask=frame_mask, **tables)
        found = torch.autograd.grad(outs, list(tables.values()), [cotangent, cotangent])
        return dict(zip(tables, found, strict=True))

    plain = gradients(cotangent)
    for chosen, is_of_first in ((is_first, True), (~is_first, False)):
        for name, grad in gradients(cotangent.where(~chosen, torch.inf)).items():
            if name.endswith("0") == is_of_first:
                assert torch.equal(grad, plain[name]), name
            else:
                assert not grad.isfinite().any(), name


@interpreted
@pytest.mark.parametrize("used", [0, 1])
def test_a_result_that_nothing_uses_has_no_part_in_the_gradients(used: int):
    values = [draw(2, 6, 16, seed=seed).requires_grad_() for seed in (1, 2)]
    values += [draw(2, 16, seed=seed).requires_grad_() for seed in (3, 4, 5)]
    cotangent = draw(2, 6, 16, seed=6)
    found = []
    for backend in ("reference", "triton"):
        with use(gate_residual=backend):
            x, y, gate, shift, scale = values
            outs = gate_residual(x, y, gate, shift=shift, scale=scale, eps=0.1)
        found.append(torch.autograd.grad(outs[used], values, cotangent, allow_unused=True))
    for want, have in zip(*found, strict=True):
        torch.testing.assert_close(have, torch.zeros_like(have) if want is None else want)


@interpreted
def test_the_gradient_of_x_is_that_of_the_sum_and_no_copy():
    x, y, gate, cotangent = draw(2, 6, 8, seed=1), draw(2, 6, 8, seed=2), draw(2, 8, seed=3), draw(2, 6, 8, seed=4)
    with use(gate_residual="triton"):
        for leaves in ((x,), (x, y)):
            for leaf in leaves:
                leaf.requires_grad_()
            grad, *_ = torch.autograd.grad(gate_residual(x, y, gate), leaves, cotangent)
            assert grad.data_ptr() == cotangent.data_ptr()


@interpreted
@given(tokens_and_tables(["gate", "shift", "scale"], 2), st.booleans(), TILES, st.data())
def test_triton_is_as_accurate_as_pytorch(call: dict, modulates: bool, tile: dict, data: st.DataObject):
    if modulates:
        call["eps"] = 0.1  # the gradient of a norm over few channels is a difference that cancels to nothing
    else:
        call = {name: value for name, value in call.items() if not name.startswith(("shift", "scale"))}
    tensors = [name for name, value in call.items() if isinstance(value, Tensor) and value.is_floating_point()]
    with small_tiles(tile):
        assert_triton_is_accurate("gate_residual", call, data.draw(st.lists(st.sampled_from(tensors), unique=True)))


@interpreted
@given(tokens_and_tables(["gate"], 2), TILES)
def test_triton_rounds_where_the_reference_rounds(call: dict, tile: dict):
    with use(gate_residual="reference"):
        expected = gate_residual(**call)
    with small_tiles(tile), use(gate_residual="triton"):
        assert torch.equal(gate_residual(**call), expected)
