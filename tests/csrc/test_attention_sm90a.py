"""Attention's Hopper kernel: its index maps and a replay of its loops on the host, and on Hopper the kernel itself."""

from __future__ import annotations

import ctypes
import math
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from opensora_kernels import _extension, _triton, attention, backends, use
from opensora_kernels.ops.attention import reference
from tests.csrc import host
from tests.ops.accuracy import assert_accurate
from tests.ops.properties import Numbers

HEAD_SIZES = (64, 72, 96, 128)
SCALE = 0.11


@pytest.mark.skipif(host.why_not() is not None, reason=str(host.why_not()))
def test_every_index_map_agrees_with_the_hardware(tmp_path: Path):
    ran = subprocess.run([host.program("attention_maps.cpp", tmp_path)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout


class Replay:
    """The operator's kernel on the CPU, by csrc/tests/attention_replay.cpp."""

    num_programs = 1
    consumers_first = False
    copies_at_once = False

    def __init__(self, library: Path) -> None:
        self._run = ctypes.CDLL(str(library)).attention_replay

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lengths: Tensor | None,
        ends: Tensor | None,
        scale: float,
        out: Tensor,
        lse: Tensor,
    ) -> None:
        numbers = (*q.shape, *k.shape[:3], *q.stride(), *k.stride(), *v.stride())
        sizes = (ctypes.c_int64 * len(numbers))(*numbers)
        ended = self._run(
            *(ctypes.c_void_p(None if x is None else x.data_ptr()) for x in (q, k, v, lengths, ends, out, lse)),
            sizes,
            ctypes.byref(sizes, 8 * ctypes.sizeof(ctypes.c_int64)),
            ctypes.c_float(scale * math.log2(math.e)),
            *map(int, (q.dtype is torch.bfloat16, self.num_programs, self.consumers_first, self.copies_at_once)),
        )
        assert ended == 0, "the kernel would hang" if ended == 1 else f"there are no heads of {q.shape[-1]}"


@pytest.fixture(scope="module")
def replay_of_module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replay]:
    if (reason := _extension.why_not_loaded("cpu")) is not None:
        pytest.skip(f"the operator's schema is not there: {reason}")
    if (reason := _triton.why_not_installed() or host.why_not()) is not None:
        pytest.skip(reason)
    replay = Replay(host.library("attention_replay.cpp", tmp_path_factory.mktemp("attention")))
    library = torch.library.Library("opensora_kernels", "IMPL")
    library.impl("attention_cuda_forward", lambda *arguments: replay(*arguments), "CPU")
    yield replay
    library._destroy()


@pytest.fixture
def replay(replay_of_module: Replay) -> Iterator[Replay]:
    yield replay_of_module
    vars(replay_of_module).update(num_programs=1, consumers_first=False, copies_at_once=False)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Where the replay runs, or the kernel."""
    if request.param == "cpu":
        request.getfixturevalue("replay")
    else:
        x = torch.zeros(1, 1, 1, 64, dtype=torch.bfloat16, device="cuda")
        if (reason := backends.why_not("attention", "cuda", x, x, x, SCALE, None)) is not None:
            pytest.skip(reason)
    return request.param


def forward(q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor | None = None) -> list[Tensor]:
    from opensora_kernels.ops.attention import cuda_kernel

    return cuda_kernel.forward(q, k, v, SCALE, key_lengths)


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_extension, "_why_not_here", lambda library, values: None)


def assert_right(q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
    out, lse_BNL = forward(q, k, v, key_lengths)
    truth = reference.attention(q.double(), k.double(), v.double(), SCALE, key_lengths)
    assert_accurate(out, reference.attention(q, k, v, SCALE, key_lengths), truth, "out")
    scores = SCALE * q.double().transpose(-3, -2) @ k.double().transpose(-3, -2).transpose(-1, -2)
    if key_lengths is not None:
        mask = reference.key_mask(q, k, key_lengths)[..., None, None, :]
        scores = torch.where(mask, scores, -math.inf)
        scores = torch.where(mask.any(-1, keepdim=True), scores, math.inf)  # no weight to a query without keys
    want = (torch.logsumexp(scores, -1) / math.log(2)).reshape(lse_BNL.shape)
    # fp32: 128 products of up to 10, and a maximum of up to 50 that is scaled, are off by a few times 2^-24 of these
    torch.testing.assert_close(lse_BNL.double(), want, rtol=1e-5, atol=1e-5)
    return out, lse_BNL


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_a_packed_projection_is_as_accurate_as_with_pytorch(device: str, head_size: int, dtype: torch.dtype):
    # two blocks of queries and three of keys, the last ones of each partly beyond the end
    qkv = Numbers(head_size, dtype)(2, 261, 3, 2, head_size).to(device)
    assert_right(*qkv.unbind(2))


@pytest.mark.parametrize("copies_at_once", [False, True])
@pytest.mark.parametrize("consumers_first", [False, True])
@pytest.mark.parametrize("num_programs", [1, 3])
def test_no_order_of_roles_and_copies_changes_the_replay(
    replay: Replay, num_programs: int, consumers_first: bool, copies_at_once: bool
):
    q, k, v = (Numbers(seed, torch.bfloat16)(3, length, 1, 72) for seed, length in enumerate((200, 700, 700)))
    key_lengths = torch.tensor([700, 0, 513])
    want = forward(q, k, v, key_lengths)
    replay.num_programs, replay.consumers_first, replay.copies_at_once = num_programs, consumers_first, copies_at_once
    out, lse_BNL = assert_right(q, k, v, key_lengths)
    assert torch.equal(out, want[0])
    assert torch.equal(lse_BNL, want[1])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_padded_samples_without_keys_give_zeros(device: str, dtype: torch.dtype):
    numbers = Numbers(0, torch.bfloat16)
    q, k, v = (numbers(4, length, 2, 72).to(device) for length in (70, 150, 150))
    out, lse_BNL = assert_right(q, k, v, torch.tensor([0, 150, 1, 128], dtype=dtype))
    assert not out[0].any()
    assert torch.equal(lse_BNL[0], torch.full_like(lse_BNL[0], math.inf))


def test_packed_keys_are_each_samples_own(device: str):
    numbers = Numbers(0, torch.bfloat16)
    # the last seven rows are of no sample
    q, k, v = (numbers(*leading, 2, 72).to(device) for leading in ((3, 50), (142,), (142,)))
    assert_right(q, k, v, torch.tensor([130, 0, 5]))


def test_tokens_over_time_are_read_where_they_lie(device: str):
    # (B, T, S, 3, N, D) with time and space swapped, and heads that end before the next begin
    qkv = Numbers(0, torch.bfloat16)(2, 131, 2, 3, 1, 80).to(device)
    assert_right(*(x.transpose(1, 2) for x in qkv[..., :72].unbind(3)))
    assert_right(*(x.transpose(1, 2) for x in qkv[..., 4:76].unbind(3)))  # 8 bytes beyond a multiple of 16


def test_the_backward_pass_of_triton_takes_its_log_sum_exp(device: str, as_on_a_gpu: None):
    if device == "cpu" and not _triton.is_interpreted():
        pytest.skip("interprets Triton kernels, with TRITON_INTERPRET=1")
    numbers = Numbers(0, torch.float16)
    q, k, v, grad = (numbers(*leading, 1, 72).to(device) for leading in ((3, 20), (31,), (31,), (3, 20)))
    lengths = torch.tensor([17, 0, 9])
    with use(attention="cuda"):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        found = torch.autograd.grad(attention(*leaves, scale=SCALE, key_lengths=lengths), leaves, grad)

    def gradients(dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        return torch.autograd.grad(reference.attention(*leaves, SCALE, lengths), leaves, grad.to(dtype))

    assert_accurate(found, gradients(torch.float16), gradients(torch.float64), "gradients")


def test_it_is_one_operator_of_a_compiled_graph(device: str, as_on_a_gpu: None):
    q, k, v = (x.to(device) for x in Numbers(0, torch.bfloat16)(1, 10, 3, 2, 64).unbind(2))
    with use(attention="cuda"):
        compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(q, k, v, scale=SCALE), forward(q, k, v)[0])


def _heads(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.zeros(*shape, dtype=dtype)


@pytest.mark.parametrize(
    ("x", "scale", "reason"),
    [
        (_heads(2, 5, 3, 72), 1.0, None),
        (_heads(2, 5, 3, 3, 72).unbind(2)[1], 1.0, None),
        (_heads(1, 5, 3, 72), 1.0, None),
        (_heads(2, 5, 3, 72, dtype=torch.float32), 1.0, "bfloat16 or float16, got torch.float32"),
        (_heads(2, 5, 3, 80), 1.0, "heads of 64, 72, 96, 128 elements, got 80"),
        (_heads(2, 5, 3, 72), 0.0, "scale, which must be positive"),
        (_heads(2, 0, 3, 72), 1.0, "no queries or no keys"),
        (_heads(2, 5, 3, 144)[..., ::2], 1.0, "strides must be multiples of 8 elements and the last one 1"),
        (_heads(2, 5, 3, 76)[..., :72], 1.0, "strides must be multiples of 8 elements"),
        (_heads(1, 5, 3, 72).expand(2, 5, 3, 72), 1.0, "strides must be multiples of 8 elements"),
        (_heads(2, 5, 3, 72).to("meta"), 1.0, None),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_it_says_what_it_can_not_serve(x: Tensor, scale: float, reason: str | None, as_on_a_gpu: None):
    found = backends.why_not("attention", "cuda", x, x, x, scale, None)
    if _triton.why_not_installed() is not None:
        reason = reason or _triton.why_not_installed()
    assert (found is None) if reason is None else reason in found


def test_it_runs_only_for_who_asks_until_a_gpu_has_timed_it():
    x = _heads(1, 300, 2, 72)
    assert backends.implementation("attention", "cuda").why_slower(x, x, x, 1.0, None) == _extension.NOT_MEASURED
