"""What is special about upsample_conv3d: what the upsampled clip is, and how it mixes with its convolution."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from opensora_kernels import backends, cpu_steps, upsample_conv3d, use


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def pick_centre(channels: int, kernel: tuple[int, int, int]) -> Tensor:
    """The convolution that returns its newest, central input."""
    weight = torch.zeros(channels, channels, *kernel, dtype=torch.float64)
    weight[range(channels), range(channels), -1, kernel[1] // 2, kernel[2] // 2] = 1
    return weight


def frames_doubled(x: Tensor) -> Tensor:
    """The first frame, then between the others: 1/4 of the one before and 3/4, 3/4 and 1/4 of the one after."""
    rest = x[:, :, 1:]
    frames = [x[:, :, 0]]
    for index in range(rest.shape[2]):
        now, before, after = (rest[:, :, min(max(index + step, 0), rest.shape[2] - 1)] for step in (0, -1, 1))
        frames += [0.25 * before + 0.75 * now, 0.75 * now + 0.25 * after]
    return torch.stack(frames, 2)


def test_every_pixel_becomes_four():
    x = drawn(2, 3, 2, 4, 5)
    out = upsample_conv3d(x, pick_centre(3, (1, 3, 3)))
    assert torch.equal(out, x.repeat_interleave(2, 3).repeat_interleave(2, 4))


@pytest.mark.parametrize("num_frames", [1, 2, 3, 5])
def test_first_frame_stays_and_the_others_are_interpolated_among_themselves(num_frames: int):
    x = drawn(2, 3, num_frames, 4, 5)
    out = upsample_conv3d(x, pick_centre(3, (3, 3, 3)), mode="linear_time", time_padding="replicate")
    assert out.shape[2] == 2 * num_frames - 1
    torch.testing.assert_close(out, frames_doubled(x), rtol=0, atol=1e-14)
    assert torch.equal(out[:, :, 0], x[:, :, 0])


@pytest.mark.parametrize("num_frames", [1, 4])
def test_mix_is_a_share_of_the_clip_and_the_rest_of_its_convolution(num_frames: int):
    x, weight, bias = drawn(1, 3, num_frames, 4, 5), drawn(3, 3, 3, 3, 3, seed=1), drawn(3, seed=2)
    mix_factor = torch.tensor([2.0], dtype=torch.float64)
    upsampled = frames_doubled(x)
    padded = F.pad(torch.cat([upsampled[:, :, :1]] * 2 + [upsampled], 2), (1, 1, 1, 1))
    share = 0.8807970779778823  # 1 / (1 + exp(-2))
    expected = share * upsampled + (1 - share) * F.conv3d(padded, weight, bias)
    actual = upsample_conv3d(
        x, weight, bias, mode="linear_time", time_padding="replicate", mix_factor=mix_factor
    )  # fmt: skip
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


def test_future_frames_do_not_change_past_output_beyond_the_interpolation():
    """Interpolation looks one frame ahead, the convolution none."""
    x, weight = drawn(1, 3, 5, 4, 4), drawn(3, 3, 3, 3, 3, seed=1)
    changed = x.clone()
    changed[:, :, 4] = torch.nan
    whole = upsample_conv3d(x, weight, mode="linear_time", time_padding="replicate")
    partly = upsample_conv3d(changed, weight, mode="linear_time", time_padding="replicate")
    # frame 4 is the source of the upsampled frames 6 (a quarter), 7 and 8
    assert torch.equal(whole[:, :, :6], partly[:, :, :6])
    assert partly[:, :, 6:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rounds_where_the_unfused_modules_round(dtype: torch.dtype):
    x, weight = drawn(1, 4, 3, 5, 4, dtype=dtype), drawn(4, 4, 3, 3, 3, seed=1, dtype=dtype)
    mix_factor = torch.tensor([0.7], dtype=dtype)
    tail = F.interpolate(x[:, :, 1:], scale_factor=(2, 1, 1), mode="trilinear")
    upsampled = torch.cat([x[:, :, :1], tail], 2)
    padded = torch.cat([upsampled[:, :, :1]] * 2 + [upsampled], 2)
    share = torch.sigmoid(mix_factor)
    expected = share * upsampled + (1 - share) * F.conv3d(padded, weight, padding=(0, 1, 1))
    with use("reference"):  # whose convolution is PyTorch's
        actual = upsample_conv3d(x, weight, mode="linear_time", time_padding="replicate", mix_factor=mix_factor)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("mode", ["nearest_space", "linear_time"])
def test_channels_last_goes_in_and_comes_out(mode: str):
    x = drawn(2, 4, 3, 5, 6).contiguous(memory_format=torch.channels_last_3d)
    out = upsample_conv3d(x, drawn(6, 4, 1, 3, 3), mode=mode)
    assert out.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("space_padding", ["zeros", "replicate", "reflect"])
@pytest.mark.parametrize("time_padding", ["zeros", "replicate", "none"])
@pytest.mark.parametrize("num_front", [None, 1, 4])
def test_steps_of_any_size_give_the_clip(
    space_padding: str, time_padding: str, num_front: int | None, monkeypatch: pytest.MonkeyPatch
):
    if time_padding == "none" and num_front is not None:
        pytest.skip("there are no frames in front")
    x, weight, bias = drawn(2, 3, 7, 4, 5), drawn(4, 3, 3, 3, 3, seed=1), drawn(4, seed=2)
    options = {"time_padding": time_padding, "space_padding": space_padding, "time_pad": num_front}
    with use(upsample_conv3d="reference"):
        expected = upsample_conv3d(x, weight, bias, **options)
    frame_bytes = 2 * 4 * 4 * 20 * x.itemsize
    for num_frames in (1, 2, 3, 100):
        monkeypatch.setattr(cpu_steps, "STEP_BYTES", num_frames * frame_bytes)
        with use(upsample_conv3d="library"):
            torch.testing.assert_close(upsample_conv3d(x, weight, bias, **options), expected, rtol=0, atol=1e-12)


def test_the_cpu_takes_the_library_and_says_why_it_sometimes_cannot():
    arguments = [drawn(1, 3, 2, 4, 5), drawn(4, 3, 1, 3, 3), None, "nearest_space", "zeros", "zeros", 0, [1, 1, 1, 1]]
    assert backends.choose("upsample_conv3d", *arguments, None) == "library"
    for index, value, reason in (
        (1, drawn(4, 3, 1, 5, 5), "3 x 3 taps"),
        (0, drawn(0, 3, 2, 4, 5), "an empty clip"),
    ):
        others = [*arguments[:index], value, *arguments[index + 1 :], None]
        assert reason in backends.why_not("upsample_conv3d", "library", *others)
        assert backends.choose("upsample_conv3d", *others) == "reference"
    assert "without a mix" in backends.why_not("upsample_conv3d", "library", *arguments, torch.ones(1))
    arguments[0].requires_grad_()
    assert backends.choose("upsample_conv3d", *arguments, None) == "reference"


@pytest.mark.parametrize("num_frames", [1, 4])
def test_interpolated_frames_are_mixed_the_same_with_and_without_gradients(num_frames: int):
    x, weight, share = drawn(1, 3, num_frames, 4, 5), drawn(3, 3, 3, 3, 3, seed=1), torch.tensor([0.7]).double()
    options = {"mode": "linear_time", "time_padding": "replicate", "mix_factor": share}
    expected, kept = upsample_conv3d(x, weight.clone().requires_grad_(), **options), x.clone()
    with torch.no_grad():
        assert torch.equal(upsample_conv3d(x, weight, **options), expected)
    assert torch.equal(x, kept)
