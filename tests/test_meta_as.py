"""Tensors without data that stand for those of a device that is not there."""

from __future__ import annotations

import torch

from opensora_kernels import attention, gate_residual, meta_as, modulate, qk_norm_attention


def names(x: torch.Tensor) -> str:
    return type(x.grad_fn).__name__


def test_meta_tensors_choose_as_on_the_device_they_stand_for():
    with torch.device("meta"):
        x, table = torch.randn(2, 30, 16, requires_grad=True), torch.randn(2, 16)
        q = torch.randn(2, 30, 2, 16, requires_grad=True)
        assert "opensora_kernels" not in names(modulate(x, table, table))
        with meta_as("cuda"):
            assert "opensora_kernels_modulate" in names(modulate(x, table, table))
            assert "opensora_kernels_gate_residual" in names(gate_residual(x, x, table))
            assert "opensora_kernels_qk_norm_attention" in names(qk_norm_attention(q, q, q))
            assert "opensora_kernels_attention" in names(attention(q, q, q))
        assert "opensora_kernels" not in names(modulate(x, table, table))


def test_long_attention_keeps_no_scores():
    kept = []
    with torch.device("meta"), meta_as("cuda"):
        q, k, v = (torch.randn(1, 5000, 2, 16, requires_grad=True) for _ in range(3))
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
            out = attention(q, k, v)
        out.sum().backward()
    assert sum(x.numel() for x in kept) == 4 * q.numel() + 5000 * 2  # q, k, v, the result, a number for each query
    assert q.grad.shape == q.shape


def test_tensors_on_other_devices_choose_as_before():
    x, table = torch.randn(2, 30, 16, requires_grad=True), torch.randn(2, 16)
    with meta_as("cuda"):
        assert "opensora_kernels" not in names(modulate(x, table, table))
