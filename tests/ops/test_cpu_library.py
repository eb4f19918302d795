"""Laws of the compiled CPU library's norms: every capability, any number of threads, any cut of a clip, borders."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from opensora_kernels import causal_conv3d, cpu_norms, group_norm_silu, rms_norm_silu, use
from opensora_kernels._extension import why_not_loaded
from opensora_kernels.norms import Norm, frame_statistics
from tests.ops.accuracy import assert_accurate

LAYOUTS = [torch.contiguous_format, torch.channels_last_3d]
DTYPES = [torch.float32, torch.bfloat16]
CAPABILITIES = {"generic": 0, "avx2": 1, "avx512": 2, "avx512_bf16": 3}


@pytest.fixture(autouse=True)
def _library() -> Iterator[None]:
    if (reason := why_not_loaded("cpu")) is not None:
        pytest.skip(reason)
    yield
    torch.ops.opensora_kernels.cpu_capability(-1)


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, mean: float = 0.0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + mean).to(dtype)


def norms_of(x: Tensor) -> list[Tensor]:
    """Both norms of x, and the gradients of the one over groups."""
    num_channels = x.shape[1]
    weight, bias = drawn(num_channels, seed=1, mean=1.0).to(x.dtype), drawn(num_channels, seed=2).to(x.dtype)
    leaves = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
    out = group_norm_silu(leaves[0], 3, *leaves[1:], per_frame=True)
    cotangent = drawn(*x.shape, seed=3).to(x.dtype)
    return [rms_norm_silu(x, weight, bias), out.detach(), *torch.autograd.grad(out, leaves, cotangent)]


@pytest.mark.parametrize("name", CAPABILITIES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_capability_is_as_accurate_as_pytorch(dtype: torch.dtype, layout: torch.memory_format, name: str):
    if torch.ops.opensora_kernels.cpu_capability(CAPABILITIES[name]) != CAPABILITIES[name]:
        pytest.skip(f"this CPU has no {name}")
    # 39 channels: two vectors and a rest of each width; 143 positions: more than one block of 128, and a rest
    x = drawn(2, 39, 2, 11, 13, dtype=dtype, mean=0.5).contiguous(memory_format=layout)
    with use(group_norm_silu="cpu", rms_norm_silu="cpu"):
        actual = norms_of(x)
    with use("reference"):
        assert_accurate(actual, norms_of(x), norms_of(x.double()), name)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_numbers_do_not_depend_on_the_number_of_threads(layout: torch.memory_format):
    x = drawn(1, 48, 3, 40, 40, dtype=torch.bfloat16).contiguous(memory_format=layout)
    before, found = torch.get_num_threads(), []
    try:
        with use(group_norm_silu="cpu", rms_norm_silu="cpu"):
            for num_threads in (1, 2, 3):
                torch.set_num_threads(num_threads)
                found.append(norms_of(x))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(*pair) for pair in zip(found[0], other, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics_of_a_frame_are_its_own_and_do_not_cancel(dtype: torch.dtype, layout: torch.memory_format):
    x = (drawn(2, 5, 4, 70, 70) * 0.25 + 300).to(dtype).contiguous(memory_format=layout)
    found, truth = cpu_norms.frame_statistics(x), frame_statistics(x.double())
    # fp32 knows 300 to 2^-15; sums of squares and of means would keep no digit of deviations of 0.25
    torch.testing.assert_close(found[..., 0].double(), truth[..., 0], rtol=0, atol=4 * 2**-15)
    torch.testing.assert_close(found[..., 1].double(), truth[..., 1], rtol=2**-13, atol=0)
    assert torch.equal(cpu_norms.frame_statistics(x[:, :, 1:3]), found[:, :, 1:3])


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("mode", ["zeros", "replicate", "reflect"])
@pytest.mark.parametrize("kind", ["group", "rms", ""])
def test_a_border_is_what_padding_afterwards_adds(kind: str, mode: str, layout: torch.memory_format):
    x = drawn(2, 20, 2, 6, 7, dtype=torch.bfloat16).contiguous(memory_format=layout)
    weight, pads = drawn(20, seed=1, dtype=torch.bfloat16), (2, 1, 0, 3)

    def written(space_pad: tuple[int, ...]) -> Tensor:
        left, right, top, bottom = space_pad
        size = (2, 20, 2, 6 + top + bottom, 7 + left + right)
        out = torch.full(size, torch.nan, dtype=x.dtype).contiguous(memory_format=layout)
        if kind == "rms":
            cpu_norms.apply_rms_norm(x, weight, None, 1e-12, True, out, space_pad, mode)
        else:
            moments = cpu_norms.group_moments(x, 4, 1e-6, False, None) if kind else None
            cpu_norms.apply_group_norm(x, moments, weight if kind else None, None, True, out, space_pad, mode)
        return out

    plain = written((0, 0, 0, 0))
    expected = F.pad(plain.flatten(0, 1).float(), pads, mode="constant" if mode == "zeros" else mode).to(x.dtype)
    assert torch.equal(written(pads), expected.unflatten(0, (2, 20)))


@pytest.mark.parametrize("kind", ["group", "rms"])
def test_the_sides_of_a_long_row_wait_for_its_pixels(kind: str):
    x, before = drawn(1, 64, 1, 3, 600), torch.get_num_threads()  # three spans of a row, cut between two threads

    def padded() -> Tensor:
        out = torch.full((1, 64, 1, 5, 602), torch.nan)
        if kind == "rms":
            cpu_norms.apply_rms_norm(x, None, None, 1e-12, True, out, (1, 1, 1, 1), "replicate")
        else:
            cpu_norms.apply_group_norm(x, None, None, None, True, out, (1, 1, 1, 1), "replicate")
        return out

    torch.set_num_threads(1)
    expected = padded()
    torch.set_num_threads(2)
    found = [padded() for _ in range(30)]
    torch.set_num_threads(before)
    assert all(torch.equal(each, expected) for each in found)


@pytest.mark.parametrize("op", [group_norm_silu, rms_norm_silu])
def test_windows_that_overlap_and_empty_clips_are_taken(op: Callable[..., Tensor]):
    options = {"num_groups": 2} if op is group_norm_silu else {}
    overlapping = drawn(64).as_strided((1, 4, 2, 3, 4), (0, 1, 16, 4, 1))
    empty = drawn(2, 4, 1, 3, 4).contiguous(memory_format=torch.channels_last_3d)[:, :, :0]
    for x in (overlapping, empty):
        with use(group_norm_silu="cpu", rms_norm_silu="cpu"):
            found = op(x, **options)
        with use("reference"):
            torch.testing.assert_close(found, op(x, **options))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("kind", ["group", "rms"])
def test_chunks_give_the_bits_of_the_whole_clip(kind: str, layout: torch.memory_format):
    x = drawn(1, 16, 7, 33, 31, dtype=torch.bfloat16).contiguous(memory_format=layout)
    weight, scale = drawn(16, 16, 3, 3, 3, seed=1, dtype=torch.bfloat16), drawn(16, seed=2, dtype=torch.bfloat16)
    norm = Norm(kind, scale, None, 4, per_frame=kind == "group")
    options = {"norm": norm, "activation": "silu", "time_padding": "replicate", "return_state": True}
    with torch.no_grad(), use(causal_conv3d="library"):
        whole, _ = causal_conv3d(x, weight, space_padding="replicate", return_statistics=False, **options)
        state, parts = None, []
        for part in x.split([2, 1, 4], 2):
            out, state = causal_conv3d(part, weight, space_padding="replicate", state=state, **options)
            parts.append(out)
    assert torch.equal(torch.cat(parts, 2), whole)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_state_may_have_another_order_of_axes(layout: torch.memory_format):
    x = drawn(1, 4, 3, 5, 6).contiguous(memory_format=layout)
    other = LAYOUTS[1 - LAYOUTS.index(layout)]
    state, weight = drawn(1, 4, 2, 5, 6, seed=1).contiguous(memory_format=other), drawn(4, 4, 3, 3, 3, seed=2)
    with torch.no_grad(), use(causal_conv3d="library"):
        out = causal_conv3d(x, weight, state=state, activation="silu", space_padding="replicate")
    with torch.no_grad(), use(causal_conv3d="reference"):
        expected = causal_conv3d(x, weight, state=state, activation="silu", space_padding="replicate")
    torch.testing.assert_close(out, expected)


def test_tensors_that_do_not_fit_are_refused_in_words():
    x, out = drawn(1, 4, 1, 4, 4), torch.empty(1, 4, 1, 4, 5)
    with pytest.raises(RuntimeError, match="group_norm_silu: out must have x's dtype, order of axes and sizes"):
        cpu_norms.apply_group_norm(x, None, None, None, True, out)
    with pytest.raises(RuntimeError, match="group_norm_silu: x must be float32 or bfloat16"):
        cpu_norms.frame_statistics(x.half())
