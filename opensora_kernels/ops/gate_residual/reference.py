"""Gated residual sum in plain PyTorch. Axes: B batch, L = T*S tokens of T frames, C channels."""

from __future__ import annotations

import torch
from torch import Tensor


def gate_residual(x: Tensor, y: Tensor, gate: Tensor, frame_mask: Tensor | None, gate0: Tensor | None) -> Tensor:
    if frame_mask is None:
        return (x + gate[:, None] * y).to(x.dtype)
    # Choosing among (B, T, C) gates instead of two gated copies of y: the same bits, a third of the traffic.
    gate_BTC = torch.where(frame_mask[:, :, None], gate[:, None], gate0[:, None])
    num_frames = frame_mask.shape[1]
    y_BTSC = y.unflatten(1, (num_frames, y.shape[1] // num_frames))
    return (x + (gate_BTC[:, :, None] * y_BTSC).flatten(1, 2)).to(x.dtype)
