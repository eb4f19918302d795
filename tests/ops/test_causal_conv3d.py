"""What is special about causal_conv3d: order in time, chunks, padding, statistics. The rest is the contract's."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from torch import Tensor, nn

from opensora_kernels import Norm, causal_conv3d, cpu_steps, group_norm_silu, use
from opensora_kernels.vae.memory import Ledger
from tests.ops.accuracy import assert_accurate
from tests.vae.live_bytes import LiveBytes


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def source_index(index: int, size: int, padding: str) -> int | None:
    """Where a padded position reads from, None for a zero."""
    if 0 <= index < size:
        return index
    if padding == "zeros":
        return None
    if padding == "replicate":
        return min(max(index, 0), size - 1)
    return -index if index < 0 else 2 * (size - 1) - index


def tap_by_tap(
    x: Tensor, weight: Tensor, *, stride: tuple[int, ...], dilation: tuple[int, ...], pads: tuple[int, ...],
    paddings: tuple[str, str], groups: int = 1,
) -> Tensor:  # fmt: skip
    """The definition, one output position and tap at a time; pads = (front, left, right, top, bottom)."""
    front, left, right, top, bottom = pads
    padded = (x.shape[2] + front, x.shape[3] + top + bottom, x.shape[4] + left + right)
    kernel = weight.shape[2:]
    sizes = [(p - d * (k - 1) - 1) // s + 1 for p, d, k, s in zip(padded, dilation, kernel, stride, strict=True)]
    out = x.new_zeros(x.shape[0], weight.shape[0], *sizes)
    grouped_weight = weight.unflatten(0, (groups, -1))
    for where in itertools.product(*map(range, sizes)):
        for tap in itertools.product(*map(range, kernel)):
            position = [
                w * s + k * d - p
                for w, s, k, d, p in zip(where, stride, tap, dilation, (front, top, left), strict=True)
            ]
            kinds = (paddings[0], paddings[1], paddings[1])
            read = [source_index(i, n, kind) for i, n, kind in zip(position, x.shape[2:], kinds, strict=True)]
            if None not in read:
                values = x[:, :, read[0], read[1], read[2]].unflatten(1, (groups, -1))
                products = torch.einsum("bgc,goc->bgo", values, grouped_weight[..., tap[0], tap[1], tap[2]])
                out[:, :, where[0], where[1], where[2]] += products.flatten(1)
    return out


@pytest.mark.parametrize("time_padding", ["zeros", "replicate", "none"])
@pytest.mark.parametrize("space_padding", ["zeros", "replicate", "reflect"])
@pytest.mark.parametrize(
    ("kernel", "stride", "dilation", "groups", "time_pad", "space_pad"),
    [
        ((3, 3, 3), (1, 1, 1), (1, 1, 1), 1, None, None),
        ((3, 3, 3), (2, 1, 1), (1, 1, 1), 1, None, None),
        ((3, 3, 3), (2, 2, 2), (1, 1, 1), 2, 2, None),
        ((2, 3, 1), (1, 1, 1), (2, 1, 2), 2, None, None),
        ((1, 3, 3), (1, 2, 2), (1, 1, 1), 1, None, (0, 1, 0, 1)),
        ((2, 2, 4), (1, 1, 1), (1, 1, 1), 1, 3, (1, 2, 0, 1)),
    ],
)
def test_every_output_is_the_sum_over_its_taps(
    time_padding: str, space_padding: str, kernel: tuple[int, ...], stride: tuple[int, ...],
    dilation: tuple[int, ...], groups: int, time_pad: int | None, space_pad: tuple[int, ...] | None,
):  # fmt: skip
    x = drawn(2, 4, 4, 4, 5, dtype=torch.float64)
    weight = drawn(2, 4 // groups, *kernel, seed=1, dtype=torch.float64)
    if time_padding == "none":
        time_pad = None
    actual = causal_conv3d(
        x, weight, stride=stride, dilation=dilation, groups=groups, time_padding=time_padding,
        space_padding=space_padding, time_pad=time_pad, space_pad=space_pad,
    )  # fmt: skip
    front = 0 if time_padding == "none" else time_pad
    front = dilation[0] * (kernel[0] - 1) + 1 - stride[0] if front is None else front
    vertical, horizontal = (dilation[i] * (kernel[i] - 1) // 2 for i in (1, 2))
    margins = space_pad or (horizontal, horizontal, vertical, vertical)
    expected = tap_by_tap(
        x, weight, stride=stride, dilation=dilation, groups=groups, pads=(front, *margins),
        paddings=(time_padding, space_padding),
    )  # fmt: skip
    # at most 144 products of size about 1 in fp64, in another order: 144 * 1.1e-16 * 12
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-13)


@pytest.mark.parametrize("stride", [1, (2, 1, 1)])
@pytest.mark.parametrize("norm", [None, Norm("rms"), Norm("group", num_groups=2, per_frame=True)])
def test_future_frames_do_not_change_past_output(stride: int | tuple[int, ...], norm: Norm | None):
    x, weight = drawn(1, 4, 6, 5, 5), drawn(4, 4, 3, 3, 3, seed=1)
    changed = x.clone()
    changed[:, :, 4:] = torch.nan
    options: dict[str, Any] = {"stride": stride, "norm": norm, "activation": "silu"}
    whole, partly = causal_conv3d(x, weight, **options), causal_conv3d(changed, weight, **options)
    num_past = 4 if stride == 1 else 2
    assert torch.equal(whole[:, :, :num_past], partly[:, :, :num_past])
    assert partly[:, :, num_past:].isnan().any(dim=(1, 3, 4)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("kernel_t", "stride", "dilation", "time_pad"),
    [
        (3, 1, 1, None),
        (3, (2, 1, 1), 1, None),
        (3, (2, 1, 1), 1, 2),
        (2, 1, (2, 1, 1), None),
        (1, 1, 1, None),
        (4, (3, 1, 1), 1, 0),
    ],
)
@pytest.mark.parametrize("lengths", [(4, 4, 4), (1, 4, 4, 3), (5, 2, 5)])
@pytest.mark.parametrize("time_padding", ["zeros", "replicate"])
def test_chunks_with_state_equal_the_whole_clip_bit_for_bit(
    dtype: torch.dtype, kernel_t: int, stride: int | tuple[int, ...], dilation: int | tuple[int, ...],
    time_pad: int | None, lengths: tuple[int, ...], time_padding: str,
):  # fmt: skip
    if lengths[0] == 1 and (time_pad == 0 or (time_pad is None and stride != 1)):
        lengths = (lengths[0] + lengths[1], *lengths[2:])  # a chunk must hold one window
    x, weight = drawn(1, 16, 12, 9, 8, dtype=dtype), drawn(16, 16, kernel_t, 3, 3, seed=1, dtype=dtype)
    bias, residual = drawn(16, seed=2, dtype=dtype), None
    norm = Norm("rms", drawn(16, seed=3, dtype=dtype))
    options: dict[str, Any] = {
        "stride": stride, "dilation": dilation, "time_padding": time_padding, "time_pad": time_pad, "norm": norm,
        "activation": "silu", "space_padding": "replicate", "residual": residual, "return_state": True,
    }  # fmt: skip
    whole, last = causal_conv3d(x, weight, bias, **options)
    state, pieces = None, []
    for chunk in x.split(lengths, 2):
        piece, state = causal_conv3d(chunk, weight, bias, state=state, **options)
        pieces.append(piece)
    assert torch.equal(torch.cat(pieces, 2), whole)
    assert torch.equal(state, last)


def test_chunks_give_the_gradients_of_the_whole_clip():
    x, weight = drawn(1, 4, 6, 5, 5, dtype=torch.float64), drawn(4, 4, 3, 3, 3, seed=1, dtype=torch.float64)
    x.requires_grad_(), weight.requires_grad_()
    whole = torch.autograd.grad(causal_conv3d(x, weight).square().sum(), (x, weight))
    first, state = causal_conv3d(x[:, :, :2], weight, return_state=True)
    second = causal_conv3d(x[:, :, 2:], weight, state=state)
    chunked = torch.autograd.grad(first.square().sum() + second.square().sum(), (x, weight))
    for have, want in zip(chunked, whole, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-12, atol=1e-12)


def test_state_does_not_keep_the_clip_alive():
    x, weight = drawn(1, 4, 8, 5, 5), drawn(4, 4, 3, 3, 3, seed=1)
    _, state = causal_conv3d(x, weight, return_state=True)
    assert state.shape == (1, 4, 2, 5, 5)
    assert state.untyped_storage().nbytes() == state.numel() * state.element_size()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["group", "rms"])
def test_block_rounds_where_the_unfused_modules_round(kind: str, dtype: torch.dtype):
    x, residual = drawn(2, 8, 5, 6, 7, dtype=dtype), drawn(2, 6, 5, 6, 7, seed=4, dtype=dtype)
    scale, shift = drawn(8, seed=2, dtype=dtype), drawn(8, seed=3, dtype=dtype)
    conv = nn.Conv3d(8, 6, 3, padding=(0, 1, 1), dtype=dtype)
    if kind == "group":
        hidden = F.group_norm(x, 4, scale, shift, 1e-6)
    else:
        unit = F.normalize(x.float(), dim=1).to(dtype)
        hidden = unit * 8**0.5 * scale.view(-1, 1, 1, 1) + shift.view(-1, 1, 1, 1)
    expected = conv(F.pad(F.silu(hidden), (0, 0, 0, 0, 2, 0))) + residual
    actual = causal_conv3d(
        x, conv.weight, conv.bias, norm=Norm(kind, scale, shift, 4), activation="silu", residual=residual
    )
    assert torch.equal(actual, expected)


def test_activation_alone_leaves_the_input_as_it_was():
    x, weight = drawn(1, 4, 3, 5, 5), drawn(4, 4, 3, 3, 3, seed=1)
    before = x.clone()
    with torch.no_grad():
        actual = causal_conv3d(x, weight, activation="silu")
    assert torch.equal(x, before)
    torch.testing.assert_close(actual, causal_conv3d(F.silu(x), weight))


def test_statistics_of_the_output_serve_the_next_group_norm():
    """Mean 30, deviation 0.1: sums of squares in fp32 would lose the variance altogether."""
    x, weight = drawn(2, 8, 4, 12, 12), drawn(8, 8, 3, 3, 3, seed=1) * 0.01
    bias = torch.full((8,), 30.0)
    out, statistics = causal_conv3d(x, weight, bias, return_statistics=True)
    assert statistics.dtype == torch.float32
    for per_frame in (False, True):
        wide, wide_statistics = out.double(), statistics.double()
        if per_frame:
            folded = F.group_norm(wide.transpose(1, 2).flatten(0, 1), 4, eps=1e-6)
            truth = F.silu(folded).unflatten(0, (2, 4)).transpose(1, 2)
        else:
            truth = F.silu(F.group_norm(wide, 4, eps=1e-6))
        actual = group_norm_silu(wide, 4, per_frame=per_frame, statistics=wide_statistics)
        # means of size 30 rounded to fp32 are off by 2e-6; over a deviation of 0.1 that is 2e-5
        torch.testing.assert_close(actual, truth, rtol=0, atol=4e-5)


def test_statistics_of_all_chunks_normalise_each_chunk_as_the_whole_clip():
    x, weight = drawn(1, 8, 6, 5, 5, dtype=torch.float64), drawn(8, 8, 3, 3, 3, seed=1, dtype=torch.float64)
    whole, statistics = causal_conv3d(x, weight, return_statistics=True)
    expected = causal_conv3d(whole, weight, norm=Norm("group", num_groups=4), activation="silu")
    norm = Norm("group", num_groups=4, statistics=statistics)
    first, state = causal_conv3d(whole[:, :, :2], weight, norm=norm, activation="silu", return_state=True)
    second = causal_conv3d(whole[:, :, 2:], weight, norm=norm, activation="silu", state=state)
    torch.testing.assert_close(torch.cat([first, second], 2), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("time_padding", ["zeros", "replicate"])
def test_channels_last_goes_in_and_comes_out(dtype: torch.dtype, time_padding: str):
    x = drawn(1, 4, 3, 5, 6, dtype=dtype).contiguous(memory_format=torch.channels_last_3d)
    out, state = causal_conv3d(
        x, drawn(6, 4, 3, 3, 3, seed=1, dtype=dtype), time_padding=time_padding, norm=Norm("group", num_groups=2),
        activation="silu", return_state=True,
    )  # fmt: skip
    assert out.is_contiguous(memory_format=torch.channels_last_3d)
    assert state.is_contiguous(memory_format=torch.channels_last_3d)


def test_autocast_accepts_fp32_weights():
    x, weight = drawn(1, 4, 3, 5, 6, dtype=torch.bfloat16), drawn(4, 4, 3, 3, 3, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        out = causal_conv3d(x, weight)
    assert torch.equal(out, causal_conv3d(x, weight.bfloat16()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "norm",
    [None, Norm("rms"), Norm("group", num_groups=2), Norm("group", num_groups=2, per_frame=True)],
    ids=["none", "rms", "clip", "frame"],
)
@pytest.mark.parametrize(
    ("kernel_t", "stride", "options"),
    [
        (3, 1, {"time_padding": "replicate", "space_padding": "replicate"}),
        (3, 2, {"time_padding": "none"}),
        (2, (2, 1, 1), {"time_pad": 1}),
        (1, 1, {}),
    ],
)
def test_steps_of_a_few_frames_give_the_whole_clip(
    monkeypatch: pytest.MonkeyPatch, kernel_t: int, stride: Any, options: Any, norm: Norm | None, dtype: torch.dtype
):
    x = torch.randn(2, 4, 7, 6, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight = torch.randn(6, 4, kernel_t, 3, 3, generator=torch.Generator().manual_seed(1)).to(dtype)
    options = options | {"stride": stride, "norm": norm, "activation": "silu"}
    options |= {"return_state": True, "return_statistics": True}
    residual = torch.ones_like(causal_conv3d(x, weight, **options)[0])
    results = []
    for backend, size in (("reference", 0), ("library", 2 * x[:, :, 0].nbytes), ("library", 1)):
        monkeypatch.setattr(cpu_steps, "STEP_BYTES", size)
        with torch.no_grad(), use(causal_conv3d=backend):
            results.append(causal_conv3d(x, weight, residual=residual, **options))
    with torch.no_grad(), use(causal_conv3d="reference"):
        wide = {name: value.double() if isinstance(value, Tensor) else value for name, value in options.items()}
        truth = causal_conv3d(x.double(), weight.double(), residual=residual.double(), **wide)
    for steps in results[1:]:
        assert_accurate(steps, results[0], truth, "steps", coarsest=dtype)


@pytest.mark.parametrize("norm", [None, Norm("rms"), Norm("group", num_groups=2)], ids=["none", "rms", "clip"])
@pytest.mark.parametrize(
    ("kernel", "options"),
    [
        ((3, 3, 3), {"time_padding": "replicate", "space_padding": "replicate"}),
        ((2, 1, 3), {"return_state": True}),
        ((3, 1, 1), {"time_padding": "none"}),
        ((1, 3, 3), {}),
    ],
)
def test_a_result_that_overwrites_x_is_the_same(
    monkeypatch: pytest.MonkeyPatch, kernel: tuple[int, ...], options: Any, norm: Norm | None
):
    monkeypatch.setattr(cpu_steps, "STEP_BYTES", 1)
    x = torch.randn(1, 4, 7, 6, 5, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(4, 4, *kernel, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        kept, given = x.clone(), x.clone()
        expected = causal_conv3d(kept, weight, norm=norm, activation="silu", **options)
        found = causal_conv3d(given, weight, norm=norm, activation="silu", may_overwrite=True, **options)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert torch.equal(kept, x)
    results = found if isinstance(found, tuple) else (found,)
    assert results[0].untyped_storage().data_ptr() == given.untyped_storage().data_ptr()
    assert all(each.untyped_storage().data_ptr() != given.untyped_storage().data_ptr() for each in results[1:])


@pytest.mark.parametrize("step_bytes", [1, 8 << 20])
def test_a_state_is_kept_from_a_clip_that_the_result_overwrites(monkeypatch: pytest.MonkeyPatch, step_bytes: int):
    monkeypatch.setattr(cpu_steps, "STEP_BYTES", step_bytes)
    x, weight = torch.randn(1, 4, 5, 6, 6), torch.randn(4, 4, 3, 3, 3)
    with torch.no_grad():
        out, state = causal_conv3d(x.clone(), weight, time_padding="none", return_state=True, may_overwrite=True)
        expected = causal_conv3d(x, weight, time_padding="none", return_state=True)
    assert torch.equal(out, expected[0])
    assert torch.equal(state, x[:, :, -2:])


@pytest.mark.parametrize("kernel", [(3, 3, 3), (1, 3, 3)], ids=str)
def test_an_fp32_clip_has_a_forward_mode_derivative(kernel: tuple[int, ...]):
    x, change, weight = torch.randn(1, 2, 3, 5, 5), torch.randn(1, 2, 3, 5, 5), torch.randn(3, 2, *kernel)
    _, found = torch.func.jvp(lambda each: causal_conv3d(each, weight), (x,), (change,))
    torch.testing.assert_close(found, causal_conv3d(change, weight))


@pytest.mark.parametrize("name", ["x", "weight", "state"])
def test_no_forward_mode_derivative_is_lost_on_the_way(name: str):
    values = {
        "x": torch.randn(1, 2, 3, 5, 5),
        "weight": torch.randn(3, 2, 3, 3, 3),
        "state": torch.randn(1, 2, 2, 5, 5),
    }

    def results(value: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return causal_conv3d(**values | {name: value}, activation="silu", return_statistics=True)

    change = torch.randn(values[name].shape)
    _, found = torch.func.jvp(results, (values[name],), (change,))
    with use("reference"):
        _, expected = torch.func.jvp(results, (values[name],), (change,))
    torch.testing.assert_close(found, expected)
    with fwAD.dual_level():
        found = tuple(fwAD.unpack_dual(each).tangent for each in results(fwAD.make_dual(values[name], change)))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("num_frames", [2, 16])
def test_the_copies_of_frames_with_a_kernel_of_one_tap_are_foreseen(num_frames: int):
    x, weight = torch.randn(1, 8, num_frames, 32, 32), torch.randn(8, 8, 1, 3, 3)
    with torch.no_grad(), LiveBytes() as live:
        causal_conv3d(x, weight)
    with torch.no_grad(), Ledger(torch.device("cpu")) as ledger:
        causal_conv3d(x.to("meta"), weight.to("meta"))
    assert live.peak <= ledger.peak


def test_x_is_not_overwritten_where_gradients_or_another_size_need_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cpu_steps, "STEP_BYTES", 1)
    x = torch.randn(1, 4, 7, 6, 5, generator=torch.Generator().manual_seed(0))
    kept, weight = x.clone(), torch.randn(4, 4, 3, 3, 3, generator=torch.Generator().manual_seed(1))
    causal_conv3d(x, weight.clone().requires_grad_(), may_overwrite=True)
    for options in ({"stride": (2, 1, 1)}, {"space_pad": (1, 1, 0, 0)}, {"time_pad": 3}):
        with torch.no_grad():
            causal_conv3d(x, weight, may_overwrite=True, **options)
    with torch.no_grad():
        causal_conv3d(x, weight[:2], may_overwrite=True)
        causal_conv3d(x[:, :, :, ::2], weight, may_overwrite=True)
    assert torch.equal(x, kept)


@pytest.mark.parametrize("num_frames", [2, 64])
def test_autocast_gives_one_dtype_whatever_the_size(num_frames: int):
    x, weight = torch.randn(1, 16, num_frames, 64, 64), torch.randn(16, 16, 3, 3, 3)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert causal_conv3d(x, weight).dtype is torch.bfloat16
        assert causal_conv3d(x, weight, may_overwrite=True).dtype is torch.bfloat16
