"""The sm_90a convolution without a GPU: its index maps, and its tiles replayed on the CPU under its Python backend.

The replay takes the place of the compiled kernel behind the same schema, so that what Python prepares, what the maps
say and what the epilogue computes are compared with the reference operator together. Triton's kernels around it run in
its interpreter. What the sm_90a kernel leaves to the mma.sync kernels (other GPUs, strides, the weight's gradient) is
replayed as well.
"""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from opensora_kernels import _extension, _triton, backends, causal_conv3d, use
from opensora_kernels.cases import Case
from opensora_kernels.norms import Norm
from opensora_kernels.ops.causal_conv3d import cuda_forms
from opensora_kernels.ops.causal_conv3d.cases import _make
from tests.csrc import host
from tests.csrc.sm80_replay import Replay
from tests.ops.accuracy import assert_accurate
from tests.ops.contract import draw, gradients

_REPLICATED = {"time_padding": "replicate", "space_padding": "replicate"}
CASES = [
    Case("plain", _make((2, 8, 3, 5, 19), 16)),
    Case(
        "norm", _make((1, 16, 2, 17, 18), 24, norm="group", channels_last=True, **_REPLICATED, return_statistics=True)
    ),
    Case("many_channels", _make((1, 72, 3, 4, 5), 96, has_residual=True, time_padding="replicate", channels_last=True)),
    Case("state", _make((2, 32, 2, 9, 3), 40, num_state=2, return_state=True, return_statistics=True)),
    Case("wide", _make((1, 16, 1, 33, 17), 136, (1, 3, 3), has_residual=True, return_statistics=True)),
    Case("in_time", _make((1, 136, 4, 3, 5), 192, (3, 1, 1), return_state=True, has_bias=False)),
    Case("dilated", _make((1, 8, 5, 7, 6), 8, dilation=2, time_padding="replicate", has_residual=True)),
    Case("even_kernel", _make((1, 8, 3, 6, 19), 8, (2, 4, 2), space_pad=(0, 1, 1, 2), time_padding="none")),
    Case("pointwise", _make((1, 64, 1, 9, 21), 8, (1, 1, 1), norm="rms", space_padding="reflect")),
    Case("strided", _make((1, 8, 5, 7, 8), 16, stride=2, time_padding="replicate", time_pad=2)),
    Case("reflected", _make((1, 8, 2, 5, 6), 8, num_state=1, space_padding="reflect", space_pad=(2, 0, 1, 1))),
]
# of the widths of the releases' layers, too large for the replay
_BLOCK = {"norm": "group", "has_residual": True, "channels_last": True, "return_statistics": True}
LAYERS = [
    Case("wan_96", _make((1, 96, 3, 60, 104), 96, norm="rms", has_residual=True, num_state=2, return_state=True)),
    Case("open_sora_128", _make((1, 128, 5, 45, 80), 128, **_BLOCK)),
    Case("plan_256", _make((2, 256, 3, 32, 32), 256, time_padding="replicate", **_BLOCK)),
    Case("wan_192", _make((1, 192, 3, 30, 52), 192, channels_last=True)),
    Case("open_sora_512", _make((1, 512, 2, 23, 40), 512, **_BLOCK)),
]


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The replay of the kernel."""
    if (reason := host.why_not()) is not None:
        pytest.skip(reason)
    return host.library("causal_conv3d_replay.cpp", tmp_path_factory.mktemp("causal_conv3d"))


@pytest.fixture(params=["sm_90", "sm_80"])
def replayed(
    request: pytest.FixtureRequest, compiled: Path, sm80_replay: Replay, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Make the cuda backend of causal_conv3d serve CPU tensors, as if on an H100, by the replay, or on another GPU."""
    for reason in (_extension.why_not_loaded("cpu"), _triton.why_not_installed()):
        if reason is not None:
            pytest.skip(reason)
    from opensora_kernels.ops.causal_conv3d import cuda_kernel

    replay = ctypes.CDLL(str(compiled)).causal_conv3d_replay

    def forward(*values: Any) -> None:
        has_steps = max(values[6]) > 1
        if request.param == "sm_90" and not has_steps:
            _replay(replay, *values)
        else:
            sm80_replay.forward(*values)

    monkeypatch.setattr(_extension, "_why_not_here", lambda library, values: None)
    monkeypatch.setattr(cuda_kernel, "_has_copy_engine", lambda device: request.param == "sm_90")
    with torch.library._scoped_library("opensora_kernels", "IMPL") as library:
        library.impl("causal_conv3d_cuda_forward", forward, "CPU")
        weight_gradient = partial(sm80_replay.weight_gradient, is_wide=request.param == "sm_90")
        library.impl("causal_conv3d_cuda_weight_gradient", weight_gradient, "CPU")
        yield


@pytest.mark.skipif(host.why_not() is not None, reason=str(host.why_not()))
def test_maps_are_what_the_hardware_and_the_schedule_need(tmp_path: Path):
    found = subprocess.run([host.program("causal_conv3d_maps.cpp", tmp_path)], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_replayed_kernel_is_as_accurate_as_pytorch(case: Case, dtype: torch.dtype, replayed: None):
    arguments = draw(case, dtype)
    with use(causal_conv3d="reference"):
        truth, plain = causal_conv3d(**draw(case, torch.float64)), causal_conv3d(**arguments)
    with use(causal_conv3d="cuda"):
        actual = causal_conv3d(**arguments)
    assert_accurate(actual, plain, truth, case.name)
    for have, want in zip(_results(actual), _results(plain), strict=True):
        assert have.stride() == want.stride()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gradients_by_the_replayed_kernel_are_as_accurate_as_pytorch(case: Case, replayed: None):
    arguments = draw(case, torch.bfloat16)
    with use(causal_conv3d="reference"):
        truth, plain = gradients("causal_conv3d", draw(case, torch.float64)), gradients("causal_conv3d", arguments)
    with use(causal_conv3d="cuda"):
        actual = gradients("causal_conv3d", arguments)
    assert_accurate(actual, plain, truth, case.name, coarsest=torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*CASES, *LAYERS], ids=lambda case: case.name)
def test_compiled_kernels_are_as_accurate_as_pytorch(case: Case):
    arguments = draw(case, torch.bfloat16, "cuda")
    values = backends.flat_arguments("causal_conv3d", **arguments)
    if (reason := backends.why_not("causal_conv3d", "cuda", *values)) is not None:
        pytest.skip(reason)
    exact = draw(case, torch.float64, "cuda")
    with use(causal_conv3d="reference"):
        truth, plain = causal_conv3d(**exact), causal_conv3d(**arguments)
        true_gradients, plain_gradients = gradients("causal_conv3d", exact), gradients("causal_conv3d", arguments)
    with use(causal_conv3d="cuda"):
        actual, found = causal_conv3d(**arguments), gradients("causal_conv3d", arguments)
    assert_accurate(actual, plain, truth, case.name)
    assert_accurate(found, plain_gradients, true_gradients, f"gradients of {case.name}", coarsest=torch.bfloat16)


def test_misaligned_and_expanded_clips_are_copied(replayed: None):
    whole = torch.randn(1, 2, 5, 6, 17, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    x = whole[..., 1:].permute(0, 4, 1, 2, 3).expand(3, -1, -1, -1, -1)  # 2 bytes behind an aligned address
    weight = torch.ones(8, 16, 1, 1, 1, dtype=torch.bfloat16)
    with use(causal_conv3d="cuda"):
        out = causal_conv3d(x, weight)
    assert torch.equal(out, causal_conv3d(x.contiguous(), weight))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda a: a | {key: value.float() for key, value in a.items()}, "got torch.float32"),
        (lambda a: a | {"x": torch.cat([a["x"]] * 2, 1), "groups": 2}, "one group, got 2"),
        (lambda a: a | {"x": a["x"][:, :12], "weight": a["weight"][:, :12]}, "multiples of 8, got 12 and 8"),
        (lambda a: a | {"weight": a["weight"][:3]}, "multiples of 8, got 16 and 3"),
        (lambda a: a | {"x": a["x"][:0]}, "no empty tensor, got x"),
        (lambda a: a | {"weight": a["weight"].repeat(1, 1, 6, 1, 1)}, "at most 15 taps along an axis, got (18, 3, 3)"),
    ],
)
def test_what_the_kernels_do_not_serve_has_a_sentence(change: Any, reason: str):
    if (missing := _triton.why_not_installed()) is not None:
        pytest.skip(missing)
    given = {"x": torch.zeros(1, 16, 2, 3, 3), "weight": torch.zeros(8, 16, 3, 3, 3)}
    given = {key: value.to(torch.bfloat16) for key, value in given.items()}
    assert cuda_forms.why_not(*backends.flat_arguments("causal_conv3d", **given)) is None
    found = cuda_forms.why_not(*backends.flat_arguments("causal_conv3d", **change(given)))
    assert reason in str(found)


def test_norm_takes_statistics_of_the_replayed_kernel(replayed: None):
    generator = torch.Generator().manual_seed(1)
    x, weight = (torch.randn(*shape, generator=generator) for shape in ((1, 8, 2, 6, 20), (16, 8, 3, 3, 3)))
    x, weight = x.to(torch.bfloat16) + 30, weight.to(torch.bfloat16)  # a mean that sums of squares would drown in
    with use(causal_conv3d="cuda"):
        out, statistics = causal_conv3d(x, weight, return_statistics=True)
        following = {"weight": weight.new_ones(8, 16, 1, 1, 1), "activation": "silu"}
        given = causal_conv3d(out, norm=Norm("group", num_groups=4, statistics=statistics), **following)
        found = causal_conv3d(out, norm=Norm("group", num_groups=4), **following)
    assert (given - found).abs().max() <= 2 * torch.finfo(torch.bfloat16).eps * found.abs().max()


def _results(results: Any) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


def _replay(
    replay: Any, x: Tensor, state: Tensor | None, weight: Tensor, bias: Tensor | None, residual: Tensor | None,
    kernel: list[int], step: list[int], dilation: list[int], start: list[int], replicates_front: bool,
    space_padding: int, out: Tensor, statistics: Tensor | None,
) -> None:  # fmt: skip
    """The checks of the binding, then the replay."""
    assert (step, space_padding) == ([1, 1, 1], 0)
    assert weight.shape == (kernel[0] * kernel[1] * kernel[2], out.shape[4], x.shape[4])
    assert residual is None or residual.shape == out.shape
    for dense in (weight, bias, residual, out, statistics):
        assert dense is None or (dense.is_contiguous(), dense.data_ptr() % 16) == (True, 0)
    clips = []
    for clip in (x, state):
        if clip is None:
            clips += [0, 0, 0]
            continue
        assert (clip[0, 0].is_contiguous(), clip.data_ptr() % 16) == (True, 0)
        assert all(clip.shape[axis] == 1 or clip.stride(axis) % 8 == 0 for axis in (0, 1))
        clips += [clip.shape[1], *clip.stride()[:2]]
    is_bfloat16 = x.dtype is torch.bfloat16
    sizes = [x.shape[0], x.shape[4], out.shape[4], *x.shape[2:4], *out.shape[1:4], *kernel, *dilation, *start]
    sizes += [replicates_front, is_bfloat16, *clips]
    tensors = (x, state, weight, bias, residual, out, statistics)
    pointers = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    replay((ctypes.c_int64 * len(sizes))(*sizes), (ctypes.c_void_p * len(pointers))(*pointers))
