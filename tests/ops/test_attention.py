"""What is special about attention: lengths of padded and packed keys, samples without keys, memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from opensora_kernels import attention, backends, use

BACKENDS = pytest.mark.parametrize("backend", backends.backends_of("attention"))


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
    q, k, v = draw(4, 2, 6, seed=1), draw(5, 2, 6, seed=2), draw(5, 2, 6, seed=3)
    with use(attention=backend):
        torch.testing.assert_close(attention(q, k, v), one_query_at_a_time(q, k, v, 6**-0.5))
        torch.testing.assert_close(attention(q, k, v, scale=0.3), one_query_at_a_time(q, k, v, 0.3))


@BACKENDS
def test_padded_and_packed_keys_equal_each_sample_alone(backend: str):
    lengths = [3, 5, 1]
    q, k, v = draw(3, 4, 2, 6, seed=1), draw(3, 5, 2, 6, seed=2), draw(3, 5, 2, 6, seed=3)
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
    lengths = [0, 3]
    q = draw(2, 4, 2, 6, seed=1).requires_grad_()
    k, v = ((draw(3, 2, 6, seed=s) if is_packed else draw(2, 4, 2, 6, seed=s)).requires_grad_() for s in (2, 3))
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
    q, k, v = draw(2, 4, 2, 6, seed=1), draw(2, 5, 2, 6, seed=2), draw(2, 5, 2, 6, seed=3)
    lengths = torch.tensor([2, 4])
    with use(attention=backend):
        before = attention(q, k, v, key_lengths=lengths)
        for index, length in enumerate(lengths.tolist()):
            k[index, length:], v[index, length:] = 100.0, -100.0
        assert torch.equal(attention(q, k, v, key_lengths=lengths), before)


@BACKENDS
def test_packed_rows_after_the_sum_of_lengths_have_no_influence(backend: str):
    q, k, v = draw(2, 4, 2, 6, seed=1), draw(7, 2, 6, seed=2), draw(7, 2, 6, seed=3)
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
