"""Attention by `torch.nn.functional.scaled_dot_product_attention`, which never holds the (L, K) scores in memory."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from . import reference

# Forward and backward of (1024, 5, 6, 32) in bf16 on one core, 2026-11-20: matrix products 14 ms, this call 24 ms.
FEW_KEYS = 32


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, key_lengths: Tensor | None) -> Tensor:
    if key_lengths is None:
        return _attend(q, k, v, scale, None)
    if reference.is_packed(q, k):
        return _attend_packed(q, k, v, scale, key_lengths.tolist())
    # A sample without keys attends to all of its padding, of value 0: the output is 0 and no gradient is NaN.
    has_keys = (key_lengths.to(q.device) > 0)[..., None]
    mask = reference.key_mask(q, k, key_lengths) | ~has_keys
    return _attend(q, k, torch.where(has_keys[..., None, None], v, 0.0), scale, mask)


def why_not(q: Tensor, k: Tensor, v: Tensor, scale: float, key_lengths: Tensor | None) -> str | None:
    if q.numel() == 0 or k.numel() == 0:
        return "scaled_dot_product_attention has no gradient for empty tensors"
    if key_lengths is not None and reference.is_packed(q, k):
        if torch.compiler.is_compiling():
            return "packed keys are split by lengths read on the host, which torch.compile can't trace"
        if type(key_lengths) is not Tensor or key_lengths.is_meta:
            return "packed keys are split by lengths read on the host, and these lengths have no values"
    return None


def why_slower(q: Tensor, k: Tensor, v: Tensor, scale: float, key_lengths: Tensor | None) -> str | None:
    if _is_narrow_on_cpu(q) and k.shape[-3] <= FEW_KEYS:
        return f"on a CPU, matrix products in {q.dtype} are faster for {FEW_KEYS} keys or fewer"
    return None


def _attend_packed(q_BLND: Tensor, k_KND: Tensor, v_KND: Tensor, scale: float, lengths: list[int]) -> Tensor:
    # One call per sample: a block mask over all keys would cost B times the work.
    samples, start = [], 0
    for q_LND, length in zip(q_BLND.unbind(), lengths, strict=True):
        keys = slice(start, start + length)
        attend = _attend if length > 0 else reference.attention  # zeros, with a gradient
        samples.append(attend(q_LND, k_KND[keys], v_KND[keys], scale, None))
        start += length
    return torch.stack(samples)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    if _is_narrow_on_cpu(q):
        # Its backward in bf16 takes three times as long as in fp32: (80, 64, 6, 32) 68 ms against 21 ms, 2026-11-20.
        with torch.autocast("cpu", enabled=False):
            return _attend(q.float(), k.float(), v.float(), scale, mask).to(q.dtype)
    # Its fused kernels want exactly four axes.
    q_BNLD, k_BNKD, v_BNKD = (x.reshape(-1, *x.shape[-3:]).transpose(1, 2) for x in (q, k, v))
    if mask is not None:
        mask = mask.reshape(-1, 1, 1, mask.shape[-1])
    out_BNLD = F.scaled_dot_product_attention(q_BNLD, k_BNKD, v_BNKD, attn_mask=mask, scale=scale)
    return out_BNLD.transpose(1, 2).reshape(q.shape).contiguous()


def _is_narrow_on_cpu(q: Tensor) -> bool:
    return q.device.type == "cpu" and q.dtype in (torch.bfloat16, torch.float16)
