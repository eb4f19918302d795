"""Softmax attention in plain PyTorch. Axes: L queries, K keys, N heads, D head size."""

from __future__ import annotations

import torch
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, key_lengths: Tensor | None) -> Tensor:
    q_NLD, k_NKD, v_NKD = (x.transpose(-3, -2) for x in (q, k, v))
    scores = (q_NLD * scale) @ k_NKD.transpose(-1, -2)
    scores = scores.to(torch.promote_types(q.dtype, torch.float32))  # fp32, or fp64 for the truth of the tests
    if key_lengths is None:
        weights = torch.softmax(scores, -1)
    else:
        mask = key_mask(q, k, key_lengths)[..., None, None, :]
        weights = torch.softmax(torch.where(mask, scores, torch.finfo(scores.dtype).min), -1)
        weights = torch.where(mask, weights, 0.0)  # only matters to samples without any key: they give zeros
    return (weights.to(q.dtype) @ v_NKD).transpose(-3, -2).contiguous()


def key_mask(q: Tensor, k: Tensor, key_lengths: Tensor) -> Tensor:
    """(*, K) booleans: the keys that a sample attends to. Computed without reading `key_lengths` on the host."""
    index = torch.arange(k.shape[-3], device=k.device)
    lengths = key_lengths.to(k.device)[..., None]
    if not is_packed(q, k):
        return index < lengths
    ends = lengths.cumsum(0)
    return (index >= ends - lengths) & (index < ends)


def is_packed(q: Tensor, k: Tensor) -> bool:
    """Whether the keys of all samples follow one another in one (sum of lengths, N, D)."""
    return q.dim() == 4 and k.dim() == 3
