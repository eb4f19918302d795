"""The sm_90a convolution without a GPU: its index maps, and its tiles replayed on the CPU under its Python backend.

The replay takes the place of the compiled kernel behind the same schema, so that what Python prepares, what the maps
say and what the epilogue computes are compared with the reference operator together. Triton's kernels around it run in
its interpreter; the weight's gradient, which has a kernel of its own, is plain PyTorch here.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Iterator
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
from tests.ops.accuracy import assert_accurate
from tests.ops.contract import draw, gradients

CSRC = Path(__file__).parents[2] / "csrc"
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
    Case("pointwise", _make((1, 64, 1, 9, 21), 8, (1, 1, 1), norm="rms")),
    Case("reflected", _make((1, 8, 2, 5, 6), 8, num_state=1, space_padding="reflect", space_pad=(2, 0, 1, 1))),
]


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the host tests of the maps and the replay."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler was found")
    folder = tmp_path_factory.mktemp("causal_conv3d")
    common = [compiler, "-std=c++20", "-Wall", "-Wextra", "-Werror"]
    maps, replay = CSRC / "tests/causal_conv3d_maps.cpp", CSRC / "tests/causal_conv3d_replay.cpp"
    subprocess.run([*common, "-O1", maps, "-o", folder / "maps"], check=True)
    subprocess.run([*common, "-O2", "-fPIC", "-shared", replay, "-o", folder / "replay.so"], check=True)
    return folder


@pytest.fixture
def replayed(compiled: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make the cuda backend of causal_conv3d serve CPU tensors by the replay, as if on an H100."""
    for reason in (_extension.why_not_loaded("cpu"), _triton.why_not_installed()):
        if reason is not None:
            pytest.skip(reason)
    from opensora_kernels.ops.causal_conv3d import cuda_kernel

    replay = ctypes.CDLL(str(compiled / "replay.so")).causal_conv3d_replay

    def forward(*values: Any) -> None:
        _replay(replay, *values)

    monkeypatch.setattr(_extension, "_why_not_here", lambda library, values: None)
    monkeypatch.setattr(cuda_kernel, "_has_copy_engine", lambda device: True)
    with torch.library._scoped_library("opensora_kernels", "IMPL") as library:
        library.impl("causal_conv3d_cuda_forward", forward, "CPU")
        library.impl("causal_conv3d_cuda_weight_gradient", _weight_gradient, "CPU")
        yield


def test_maps_are_what_the_hardware_and_the_schedule_need(compiled: Path):
    found = subprocess.run([compiled / "maps"], capture_output=True, text=True)
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
        (lambda a: a | {"x": a["x"][:0]}, "no empty tensor"),
    ],
)
def test_what_the_kernels_do_not_serve_has_a_sentence(change: Any, reason: str):
    if (missing := _triton.why_not_installed()) is not None:
        pytest.skip(missing)
    given = {"x": torch.zeros(1, 16, 2, 3, 3), "weight": torch.zeros(8, 16, 3, 3, 3)}
    given = {key: value.to(torch.bfloat16) for key, value in given.items()}
    assert cuda_forms.why_not(*backends.flat_arguments("causal_conv3d", **given)) is None
    found = cuda_forms.why_not(*backends.flat_arguments("causal_conv3d", **change(given)))
    assert found is not None and reason in found


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
    assert step == [1, 1, 1] and space_padding == 0
    assert weight.shape == (kernel[0] * kernel[1] * kernel[2], out.shape[4], x.shape[4])
    assert residual is None or residual.shape == out.shape
    for dense in (weight, bias, residual, out, statistics):
        assert dense is None or (dense.is_contiguous() and dense.data_ptr() % 16 == 0)
    clips = []
    for clip in (x, state):
        if clip is None:
            clips += [0, 0, 0]
            continue
        assert clip[0, 0].is_contiguous() and clip.data_ptr() % 16 == 0
        assert all(clip.shape[axis] == 1 or clip.stride(axis) % 8 == 0 for axis in (0, 1))
        clips += [clip.shape[1], *clip.stride()[:2]]
    is_bfloat16 = x.dtype is torch.bfloat16
    sizes = [x.shape[0], x.shape[4], out.shape[4], *x.shape[2:4], *out.shape[1:4], *kernel, *dilation, *start]
    sizes += [replicates_front, is_bfloat16, *clips]
    tensors = (x, state, weight, bias, residual, out, statistics)
    pointers = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    replay((ctypes.c_int64 * len(sizes))(*sizes), (ctypes.c_void_p * len(pointers))(*pointers))


def _weight_gradient(
    x: Tensor, state: Tensor | None, grad: Tensor, kernel: list[int], step: list[int], dilation: list[int],
    start: list[int], replicates_front: bool, space_padding: int, grad_weight: Tensor,
) -> None:  # fmt: skip
    """Tap by tap: what each reads, by an index along every axis, times the gradient."""
    assert step == [1, 1, 1] and space_padding == 0 and grad.is_contiguous() and grad_weight.is_contiguous()
    frames = x if state is None else torch.cat([state, x], 1)
    for tap, (i, j, k) in enumerate(
        torch.cartesian_prod(*(torch.arange(size) for size in kernel)).view(-1, 3).tolist()
    ):
        read = frames.float()
        for axis, number in ((1, i), (2, j), (3, k)):
            index = torch.arange(grad.shape[axis]) + start[axis - 1] + number * dilation[axis - 1]
            if axis == 1 and replicates_front:
                index = index.clamp_min(0)
            is_inside = (index >= 0) & (index < read.shape[axis])
            read = read.index_select(axis, index.clamp(0, read.shape[axis] - 1))
            read = read * is_inside.view(-1, *(1,) * (4 - axis))
        grad_weight[tap] = torch.einsum("bthwo,bthwc->oc", grad.float(), read)
