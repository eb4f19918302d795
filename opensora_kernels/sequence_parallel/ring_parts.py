"""Attention to a part of the keys, and what it adds to the gradients.

Axes: B samples, L queries, K keys of the part, N heads, D head size. On CUDA, bf16 and fp16 without lengths go through
PyTorch's flash attention, which never holds the (L, K) scores (not measured); all else is plain PyTorch in fp32, or in
fp64 for fp64, since the rounding of parts would add up.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams

flash_attention = torch.ops.aten._scaled_dot_product_flash_attention
flash_attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_backward


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, key_lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """Attention (B, N, L, D) of q (B, N, L, D) to these k, v (B, N, K, D) alone, and the logarithm of the sum of
    exponentials of each query's scores, (B, N, L) in fp32 or fp64: zeros and -inf for queries without keys."""
    if why_not_flash(q, k, key_lengths) is None:
        out, lse, *_ = flash_attention(q, k, v, 0.0, False, False, scale=scale)
        return out, lse
    scores = _scores(q, k, scale, key_lengths)
    lse = torch.logsumexp(scores, -1)
    return _weights(scores, lse) @ v.to(lse.dtype), lse


def gradients(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    key_lengths: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What these keys add to the gradients of q, and those of k and v, for `grad` of attention to all keys, whose
    result was `out` and whose scores had `lse`."""
    if why_not_flash(q, k, key_lengths) is None:
        # Without dropout nothing is read from the generator's state, which these two stand for.
        state = torch.empty(2, dtype=torch.uint64, device=q.device), torch.empty(0, dtype=torch.uint64, device=q.device)
        sizes = None, None, q.shape[2], k.shape[2]
        return flash_attention_backward(grad, q, k, v, out, lse, *sizes, 0.0, False, *state, scale=scale)
    grad, k, v, out = (x.to(lse.dtype) for x in (grad, k, v, out))
    weights = _weights(_scores(q, k, scale, key_lengths), lse)
    grad_scores = scale * weights * (grad @ v.transpose(-1, -2) - (grad * out).sum(-1, keepdim=True))
    return grad_scores @ k, grad_scores.transpose(-1, -2) @ q.to(lse.dtype), weights.transpose(-1, -2) @ grad


def why_not_flash(q: Tensor, k: Tensor, key_lengths: Tensor | None) -> str | None:
    """A sentence that says why PyTorch's flash attention can't serve, or None."""
    if 0 in (*q.shape, *k.shape):
        return f"flash attention takes no empty tensors, got {tuple(q.shape)} and {tuple(k.shape)}"
    if q.device.type != "cuda":
        return f"flash attention runs on CUDA, got {q.device.type}"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"flash attention takes bf16 and fp16, got {q.dtype}"
    if key_lengths is not None:
        return "flash attention takes no lengths of keys"
    if q.shape[-1] % 8:  # PyTorch pads them, but above the operator that gives the lse
        return f"flash attention takes heads of a multiple of 8 elements, got {q.shape[-1]}"
    if not torch.backends.cuda.can_use_flash_attention(SDPAParams(q, k, k, None, 0.0, False, False)):
        return f"PyTorch has no flash attention for this device or shape, {q.device} and {tuple(q.shape)}"
    return None


def _scores(q: Tensor, k: Tensor, scale: float, key_lengths: Tensor | None) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = scale * q.to(wide) @ k.to(wide).transpose(-1, -2)
    if key_lengths is None:
        return scores
    mask = torch.arange(k.shape[-2], device=k.device) < key_lengths[:, None]
    return torch.where(mask[:, None, None], scores, -torch.inf)


def _weights(scores: Tensor, lse: Tensor) -> Tensor:
    """exp(scores - lse), 0 for queries without keys."""
    return torch.exp(scores - lse.clamp(min=torch.finfo(lse.dtype).min).unsqueeze(-1))
