"""Attention to parts of the keys, one after another in one process: what a ring computes, without its ranks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from opensora_kernels.sequence_parallel import ring_parts
from opensora_kernels.sequence_parallel.ring import _merged


def inputs(num_queries: int, num_keys: int, **options) -> tuple[Tensor, ...]:
    """q, k, v and a gradient (B, N, *, D)."""
    torch.manual_seed(0)
    sizes = (num_queries, num_keys, num_keys, num_queries)
    return tuple(torch.randn(2, 3, size, 16).to(**options) for size in sizes)


def by_parts(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, sizes: list[int]) -> list[Tensor]:
    """The result and gradients of q, k and v, put together from those of parts of the keys."""
    parts = list(zip(k.split(sizes, 2), v.split(sizes, 2), strict=True))
    out, lse = torch.zeros_like(q, dtype=torch.float32), torch.full(q.shape[:3], -torch.inf, device=q.device)
    for part in parts:
        out, lse = _merged(out, lse, *ring_parts.attend(q, *part, 0.3, None))
    out = out.to(q.dtype)
    found = [ring_parts.gradients(grad, q, *part, out, lse, 0.3, None) for part in parts]
    of_q, of_k, of_v = zip(*found, strict=True)
    return [out, sum(of_q), torch.cat(of_k, 2), torch.cat(of_v, 2)]


def whole(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> list[Tensor]:
    leaves = [x.float().requires_grad_() for x in (q, k, v)]
    out = torch.softmax(0.3 * leaves[0] @ leaves[1].transpose(-1, -2), -1) @ leaves[2]
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.float())]


@pytest.mark.parametrize("sizes", [[11], [4, 7], [0, 5, 6], [1] * 11])
def test_parts_of_any_size_make_the_whole(sizes: list[int]):
    tensors = inputs(5, 11)
    for found, expected in zip(by_parts(*tensors, sizes), whole(*tensors), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)  # fp32 sums of up to 16 terms of order 1


def test_flash_attention_is_called_by_its_schema(monkeypatch: pytest.MonkeyPatch):
    """Tensors without memory show shapes and types; the numbers wait for a GPU, below."""
    monkeypatch.setattr(ring_parts, "why_not_flash", lambda *arguments: None)
    q, k, v, grad = inputs(5, 11, device="meta", dtype=torch.bfloat16)
    out, lse = ring_parts.attend(q, k, v, 0.3, None)
    assert (out.shape, out.dtype) == (q.shape, q.dtype)
    assert (lse.shape, lse.dtype) == (q.shape[:3], torch.float32)
    found = ring_parts.gradients(grad, q, k, v, out, lse, 0.3, None)
    assert [x.shape for x in found] == [x.shape for x in (q, k, v)]


def test_flash_attention_says_why_it_cannot_serve():
    q, k, *_ = inputs(5, 11)
    assert ring_parts.why_not_flash(q, k, None) == "flash attention runs on CUDA, got cpu"
    q, k, *_ = inputs(5, 0)
    assert ring_parts.why_not_flash(q, k, None) == (
        "flash attention takes no empty tensors, got (2, 3, 5, 16) and (2, 3, 0, 16)"
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_flash_attention_puts_parts_together_as_plain_pytorch_does():
    tensors = inputs(70, 150, device="cuda", dtype=torch.bfloat16)
    assert ring_parts.why_not_flash(*tensors[:2], None) is None
    for found, expected in zip(by_parts(*tensors, [64, 86]), whole(*tensors), strict=True):
        # bf16 rounds parts, weights and gradients of scores: a few units of 2^-8 of the largest entry
        torch.testing.assert_close(found.float(), expected, atol=2e-2 * float(expected.abs().max()), rtol=0)
