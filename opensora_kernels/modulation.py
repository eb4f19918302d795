"""Scale and shift of tokens by tables of their frames, in plain PyTorch: what the references of `modulate` and of
`gate_residual` share. Axes: B batch, L = T*S tokens of T frames, C channels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def modulated(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    normalize: bool,
    eps: float,
    frame_mask: Tensor | None,
    shift0: Tensor | None,
    scale0: Tensor | None,
) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift, or x in place of LayerNorm(x)."""
    normed = F.layer_norm(x, x.shape[-1:], eps=eps) if normalize else x
    shift_BTSC, scale_BTSC = of_frames(shift, shift0, frame_mask), of_frames(scale, scale0, frame_mask)
    out_BTSC = by_frames(normed, frame_mask) * (1 + scale_BTSC) + shift_BTSC
    return out_BTSC.flatten(1, 2).to(x.dtype).contiguous()


def by_frames(x: Tensor, frame_mask: Tensor | None) -> Tensor:
    """x (B, L, C) as (B, T, S, C), with T = 1 where there is no mask."""
    num_frames = 1 if frame_mask is None else frame_mask.shape[1]
    return x.unflatten(1, (num_frames, x.shape[1] // num_frames))


def of_frames(table: Tensor, table0: Tensor | None, frame_mask: Tensor | None) -> Tensor:
    """(B, T, 1, C): rows of table (B, C) for frames with True, of table0 for the others; T = 1 without a mask."""
    if frame_mask is None:
        return table[:, None, None]
    # Choosing among (B, T, C) tables instead of two modulated copies of x: the same bits, a third of the traffic.
    return torch.where(frame_mask[:, :, None], table[:, None], table0[:, None])[:, :, None]
