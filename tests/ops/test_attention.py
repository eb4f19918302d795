"""What is special about attention: lengths of padded and packed keys, samples without keys, memory."""

from __future__ import annotations

from collections import defaultdict
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from opensora_kernels import _triton, attention, backends, use
from tests.ops.properties import DTYPES as SHORT_DTYPES
from tests.ops.properties import LEADING, MEMORY, Numbers, assert_triton_is_accurate, heads, interpreted

_CAN_RUN_TRITON = _triton.why_not(torch.device("cpu")) is None
# Those of `cuda` take neither fp32 nor small heads, see tests/csrc/test_attention_sm90a.py.
_RUNNING = [name for name in backends.backends_of("attention") if name not in ("cuda", "triton")]
BACKENDS = pytest.mark.parametrize("backend", [*_RUNNING, *(["triton"] if _CAN_RUN_TRITON else [])])
# All kernels compute in fp32.
DTYPES = defaultdict(lambda: torch.float32, reference=torch.float64, library=torch.float64)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def one_query_at_a_time(q_LND: Tensor, k_KND: Tensor, v_KND: Tensor, scale: float) -> Tensor:
    out = torch.zeros_like(q_LND)
    for i in range(q_LND.shape[0]):
        for n in range(q_LND.shape[1]):
            exponentials = [torch.exp(scale * torch.dot(q_LND[i, n], k_LD)) for k_LD in k_KND[:, n]]
            for weight, value in zip(exponentials, v_KND[:, n], strict=True):
                out[i, n] += weight / sum(exponentials) * value
    return out


@BACKENDS
def test_equals_sums_over_keys_written_out(backend: str):
    dtype = DTYPES[backend]
    q, k, v = (draw(size, 2, 6, seed=seed, dtype=dtype) for seed, size in enumerate((4, 5, 5)))
    with use(attention=backend):
        torch.testing.assert_close(attention(q, k, v), one_query_at_a_time(q, k, v, 6**-0.5))
        torch.testing.assert_close(attention(q, k, v, scale=0.3), one_query_at_a_time(q, k, v, 0.3))


@BACKENDS
def test_padded_and_packed_keys_equal_each_sample_alone(backend: str):
    lengths, dtype = [3, 5, 1], DTYPES[backend]
    q, k, v = (draw(3, size, 2, 6, seed=seed, dtype=dtype) for seed, size in enumerate((4, 5, 5)))
    keys = [k[index, :length] for index, length in enumerate(lengths)]
    values = [v[index, :length] for index, length in enumerate(lengths)]
    want = torch.stack([one_query_at_a_time(*sample, 6**-0.5) for sample in zip(q, keys, values, strict=True)])
    with use(attention=backend):
        torch.testing.assert_close(attention(q, k, v, key_lengths=torch.tensor(lengths)), want)
        packed = attention(q, torch.cat(keys), torch.cat(values), key_lengths=torch.tensor(lengths))
    torch.testing.assert_close(packed, want)


@BACKENDS
@pytest.mark.parametrize("is_packed", [False, True])
def test_a_sample_without_keys_gives_zeros_and_finite_gradients(backend: str, is_packed: bool):
    lengths, dtype = [0, 3], DTYPES[backend]
    q = draw(2, 4, 2, 6, seed=1, dtype=dtype).requires_grad_()
    shape = (3, 2, 6) if is_packed else (2, 4, 2, 6)
    k, v = (draw(*shape, seed=seed, dtype=dtype).requires_grad_() for seed in (2, 3))
    with use(attention=backend):
        out = attention(q, k, v, key_lengths=torch.tensor(lengths))
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    grads = torch.autograd.grad(out.square().sum(), (q, k, v))
    assert all(grad.isfinite().all() for grad in grads)
    assert not grads[0][0].any()
    if not is_packed:
        assert not grads[1][0].any()
        assert not grads[2][0].any()


@BACKENDS
def test_keys_beyond_the_lengths_have_no_influence(backend: str):
    dtype = DTYPES[backend]
    q, k, v = (draw(2, size, 2, 6, seed=seed, dtype=dtype) for seed, size in enumerate((4, 5, 5)))
    lengths = torch.tensor([2, 4])
    with use(attention=backend):
        before = attention(q, k, v, key_lengths=lengths)
        for index, length in enumerate(lengths.tolist()):
            k[index, length:], v[index, length:] = 100.0, -100.0
        assert torch.equal(attention(q, k, v, key_lengths=lengths), before)


@BACKENDS
def test_packed_rows_after_the_sum_of_lengths_have_no_influence(backend: str):
    dtype = DTYPES[backend]
    q, k, v = draw(2, 4, 2, 6, seed=1, dtype=dtype), *(draw(7, 2, 6, seed=seed, dtype=dtype) for seed in (2, 3))
    lengths = torch.tensor([2, 3])
    with use(attention=backend):
        have, want = (attention(q, k[:end], v[:end], key_lengths=lengths) for end in (7, 5))
    torch.testing.assert_close(have, want)


def test_the_eager_chain_of_upstream_is_reproduced_bit_for_bit_in_bf16():
    q, k, v = (draw(3, 10, 4, 72, seed=s, dtype=torch.bfloat16) for s in (1, 2, 3))
    q_NLD, k_NLD, v_NLD = (x.permute(0, 2, 1, 3) for x in (q, k, v))
    scores = (q_NLD * 72**-0.5) @ k_NLD.transpose(-2, -1)
    want = (scores.to(torch.float32).softmax(dim=-1).to(torch.bfloat16) @ v_NLD).transpose(1, 2)
    with use(attention="reference"):
        assert torch.equal(attention(q, k, v), want)


def test_packed_keys_compile_to_one_graph():
    q, k, v = draw(2, 4, 2, 6, seed=1), draw(5, 2, 6, seed=2), draw(5, 2, 6, seed=3)
    lengths = torch.tensor([2, 3])
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v, key_lengths=lengths), attention(q, k, v, key_lengths=lengths))


def test_the_cpu_takes_the_library_and_says_why_it_sometimes_cannot():
    q, lengths = draw(2, 4, 2, 6), torch.tensor([2, 3])
    assert backends.choose("attention", q, q, q, 1.0, None) == "library"
    assert backends.choose("attention", q, q[0], q[0], 1.0, lengths) == "library"
    no_keys = q[:, :0]
    assert "empty tensors" in backends.why_not("attention", "library", q, no_keys, no_keys, 1.0, None)
    assert "read on the host" in backends.why_not("attention", "library", q, q[0], q[0], 1.0, lengths.to("meta"))
    with use(attention="library"), pytest.raises(backends.BackendError, match="empty tensors"):
        attention(q, no_keys, no_keys)


def test_the_library_never_holds_the_scores():
    """1 x 16 heads x 2048 x 2048 scores would be 268 MB in fp32; q, k, v and the output are 17 MB."""
    q = draw(1, 2048, 16, 32, dtype=torch.float32)
    with torch.profiler.profile(profile_memory=True) as profile:
        attention(q, q, q)
    largest = max(event.self_cpu_memory_usage for event in profile.key_averages())
    assert largest < 64e6, f"one operator allocated {largest / 1e6:.0f} MB"


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    numbers = Numbers(draw(st.integers(0, 2**16)), draw(SHORT_DTYPES))
    is_packed = draw(st.booleans())
    leading = (draw(st.integers(0, 3)),) if is_packed else draw(LEADING)
    num_queries, num_keys, num_heads = draw(st.integers(1, 40)), draw(st.integers(0, 40)), draw(st.integers(1, 3))
    head_size = draw(st.sampled_from([1, 8, 18, 40, 72, 96, 128]))
    sizes = (num_heads, head_size)
    (q,) = heads(numbers, draw(MEMORY), 1, leading, num_queries, *sizes)
    k, v = heads(numbers, draw(MEMORY), 2, () if is_packed else leading, num_keys, *sizes)
    arguments: dict[str, Any] = {"q": q, "k": k, "v": v, "scale": draw(st.sampled_from([None, 0.3]))}
    if is_packed:
        cuts = sorted(draw(st.lists(st.integers(0, num_keys), min_size=leading[0], max_size=leading[0])))
        arguments["key_lengths"] = torch.tensor(cuts, dtype=torch.int64).diff(prepend=torch.tensor([0]))
    elif draw(st.booleans()):
        arguments["key_lengths"] = numbers.integers(num_keys + 1, *leading)
    return arguments


@interpreted
@given(calls(), st.data(), st.sampled_from([(16, 16), (32, 16), (16, 64)]), st.sampled_from([1, 1000]))
def test_triton_is_as_accurate_as_pytorch(call: dict[str, Any], data: st.DataObject, block: tuple, programs: int):
    from opensora_kernels.ops.attention import triton_kernel

    # a single key has weight 1 whatever its score: PyTorch's gradients of scores are exactly 0, tested below
    lengths = call.get("key_lengths", torch.tensor(call["k"].shape[-3]))
    assume(not lengths.numel() or lengths.max() != 1)
    wanted = data.draw(st.lists(st.sampled_from(["q", "k", "v"]), unique=True))
    tile = {"BLOCK_L": block[0], "BLOCK_K": block[1], "num_warps": 4, "num_stages": 2}
    with (
        mock.patch.object(triton_kernel, "configuration", return_value=tile),
        mock.patch.object(triton_kernel, "_QUERIES_OF_SPLIT", 16),
        mock.patch.object(triton_kernel, "_FEWEST_PROGRAMS", programs),
    ):
        assert_triton_is_accurate("attention", call, wanted)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_the_scores_of_a_single_key_cancel_up_to_rounding(dtype: torch.dtype):
    """g v^T - sum(g out), with out = v: two sums of D products in different order, the error of each below D eps."""
    q, k, v = (draw(2, size, 3, 40, seed=seed, dtype=dtype).requires_grad_() for seed, size in enumerate((6, 1, 1)))
    grad = draw(2, 6, 3, 40, seed=4, dtype=dtype)
    with use(attention="triton"):
        out = attention(q, k, v)
    grad_q, grad_k = torch.autograd.grad(out, (q, k), grad)
    largest = (grad.abs() * v.abs()).float().sum(-1).max() * 40 * 2 * torch.finfo(torch.float32).eps * 40**-0.5
    assert grad_q.abs().max() <= largest * k.abs().max()
    assert grad_k.abs().max() <= largest * q.abs().sum(1).max()
