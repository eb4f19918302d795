"""What is special about guided_euler_step: guidance, channels beyond z's, frames that stay, dtypes."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from opensora_kernels import guided_euler_step, use
from tests.ops.properties import DTYPES, Numbers, assert_triton_is_accurate, interpreted

TILES = st.sampled_from([(1, 16), (2, 4), (4, 8), (8, 2)])


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_equals_the_update_written_out_per_sample():
    z, velocity, dt = draw(2, 4, 3, 2, 2, seed=1), draw(4, 8, 3, 2, 2, seed=2), torch.tensor([0.1, 0.25])
    frame_mask = torch.tensor([[True, False, True], [False, True, True]])
    have = guided_euler_step(z, velocity, dt, guidance_scale=7.0, frame_mask=frame_mask)
    for b in range(2):
        for t in range(3):
            conditional, null = velocity[b, :4, t], velocity[2 + b, :4, t]
            moved = z[b, :, t] + (null + 7.0 * (conditional - null)) * dt[b]
            assert torch.equal(have[b, :, t], moved if frame_mask[b, t] else z[b, :, t])


def test_scale_one_follows_the_conditional_rows_and_zero_the_null_rows():
    # Quarters in [-2, 2): every sum below is exact, so that v_null + (v_conditional - v_null) is v_conditional.
    generator = torch.Generator().manual_seed(1)
    z = torch.randint(-8, 8, (2, 4, 3, 2, 2), generator=generator).float() / 4
    velocity = torch.randint(-8, 8, (4, 4, 3, 2, 2), generator=generator).float() / 4
    dt = torch.tensor([0.5, 0.25])
    for scale, rows in ((1.0, velocity[:2]), (0.0, velocity[2:])):
        want = guided_euler_step(z, rows, dt, guidance_scale=None)
        assert torch.equal(guided_euler_step(z, velocity, dt, guidance_scale=scale), want)


def test_steps_of_a_straight_flow_end_at_its_data_point():
    noise, data = draw(1, 4, 3, 2, 2, seed=1).double(), draw(1, 4, 3, 2, 2, seed=2).double()
    z = noise
    for dt in (0.5, 0.3, 0.2):
        z = guided_euler_step(z, data - noise, torch.tensor([dt], dtype=torch.float64), guidance_scale=None)
    torch.testing.assert_close(z, data)


def test_bf16_latents_take_the_dtype_of_an_fp32_velocity():
    z, velocity, dt = draw(1, 4, 3, 2, 2, seed=1).bfloat16(), draw(2, 4, 3, 2, 2, seed=2), torch.tensor([0.1])
    frame_mask = torch.tensor([[True, False, True]])
    have = guided_euler_step(z, velocity, dt, guidance_scale=7.0, frame_mask=frame_mask)
    assert have.dtype == torch.float32
    assert torch.equal(have, guided_euler_step(z.float(), velocity, dt, guidance_scale=7.0, frame_mask=frame_mask))
    assert guided_euler_step(z, velocity.bfloat16(), dt, guidance_scale=7.0).dtype == torch.bfloat16


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    numbers = Numbers(draw(st.integers(0, 2**16)), draw(DTYPES))
    batch, num_channels, extra, frames, height, width = (
        draw(st.integers(low, high)) for low, high in ((0, 2), (1, 4), (0, 3), (1, 3), (1, 4), (1, 5))
    )
    call: dict[str, Any] = {"guidance_scale": draw(st.sampled_from([None, 1.0, 7.0]))}

    def clip(*shape: int, dtype: torch.dtype) -> Tensor:
        match draw(st.sampled_from(["dense", "channels_last", "some_frames", "patches"])):
            case "channels_last":
                return numbers(*shape, dtype=dtype).contiguous(memory_format=torch.channels_last_3d)
            case "some_frames":
                return numbers(*shape[:2], shape[2] + 2, *shape[3:], dtype=dtype)[:, :, 1:-1]
            case "patches":
                return numbers(*reversed(shape), dtype=dtype).permute(4, 3, 2, 1, 0)
        return numbers(*shape, dtype=dtype)

    rows = batch if call["guidance_scale"] is None else 2 * batch
    call["z"] = clip(batch, num_channels, frames, height, width, dtype=draw(DTYPES))
    call["velocity"] = clip(rows, num_channels + extra, frames, height, width, dtype=numbers.dtype)
    call["dt"] = numbers(batch, dtype=draw(DTYPES))
    if draw(st.booleans()):
        moves = draw(st.lists(st.booleans(), min_size=batch * frames, max_size=batch * frames))
        call["frame_mask"] = torch.tensor(moves, dtype=torch.bool).view(batch, frames)
    return call


def small_tiles(tile: tuple[int, int]) -> mock._patch:
    from opensora_kernels.ops.guided_euler_step import triton_kernel

    constants = {"BLOCK_C": tile[0], "BLOCK_P": tile[1], "num_warps": 4}
    return mock.patch.object(triton_kernel, "configuration", return_value=constants)


@interpreted
@given(calls(), TILES)
def test_triton_has_the_bits_of_the_reference(call: dict[str, Any], tile: tuple[int, int]):
    with use(guided_euler_step="reference"):
        expected = guided_euler_step(**call)
    with small_tiles(tile), use(guided_euler_step="triton"):
        actual = guided_euler_step(**call)
    assert actual.dtype == expected.dtype
    assert torch.equal(actual, expected)
    axes = [axis for axis in range(5) if actual.shape[axis] > 1 and actual.numel()]
    assert [actual.stride(axis) for axis in axes] == [expected.stride(axis) for axis in axes]


@interpreted
@given(calls(), TILES, st.lists(st.sampled_from(["z", "velocity", "dt"]), unique=True, min_size=1))
def test_triton_gradients_are_as_accurate_as_those_of_pytorch(call: dict[str, Any], tile: tuple, wanted: list[str]):
    with small_tiles(tile):
        assert_triton_is_accurate("guided_euler_step", call, wanted)


@interpreted
def test_frames_that_stay_are_not_touched_by_their_velocity():
    z, velocity = draw(2, 4, 3, 2, 2, seed=1), draw(4, 4, 3, 2, 2, seed=2)
    frame_mask = torch.tensor([[True, False, True], [False, True, True]])
    velocity[:2].transpose(1, 2)[~frame_mask] = torch.nan
    z.requires_grad_()
    velocity.requires_grad_()
    with use(guided_euler_step="triton"):
        out = guided_euler_step(z, velocity, torch.ones(2), guidance_scale=7.0, frame_mask=frame_mask)
    out.sum().backward()
    assert torch.equal(out.transpose(1, 2)[~frame_mask], z.transpose(1, 2)[~frame_mask])
    assert torch.equal(z.grad, torch.ones_like(z))
    assert not velocity.grad.unflatten(0, (2, 2)).transpose(2, 3)[:, ~frame_mask].any()
