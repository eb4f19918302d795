"""LayerNorm and adaptive scale and shift in plain PyTorch. Axes: B batch, L = T*S tokens of T frames, C channels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def modulate(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    normalize: bool,
    eps: float,
    frame_mask: Tensor | None,
    shift0: Tensor | None,
    scale0: Tensor | None,
) -> Tensor:
    normed = F.layer_norm(x, x.shape[-1:], eps=eps) if normalize else x
    if frame_mask is None:
        return (normed * (1 + scale)[:, None] + shift[:, None]).to(x.dtype)
    num_frames = frame_mask.shape[1]
    # Choosing among (B, T, C) tables instead of two modulated copies of x: the same bits, a third of the traffic.
    mask_BT1 = frame_mask[:, :, None]
    shift_BTC = torch.where(mask_BT1, shift[:, None], shift0[:, None])
    scale_BTC = torch.where(mask_BT1, scale[:, None], scale0[:, None])
    normed_BTSC = normed.unflatten(1, (num_frames, normed.shape[1] // num_frames))
    return (normed_BTSC * (1 + scale_BTC)[:, :, None] + shift_BTC[:, :, None]).flatten(1, 2).to(x.dtype)
