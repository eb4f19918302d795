"""Guidance and one Euler step in plain PyTorch. Axes: B batch, C channels, T frames, H height, W width."""

from __future__ import annotations

import torch
from torch import Tensor

from opensora_kernels.norms import like


def guided_euler_step(
    z: Tensor, velocity: Tensor, dt: Tensor, guidance_scale: float | None, frame_mask: Tensor | None
) -> Tensor:
    v = velocity[:, : z.shape[1]]
    if guidance_scale is not None:
        v_conditional, v_null = v.chunk(2)
        v = v_null + guidance_scale * (v_conditional - v_null)
    moved = (z + v * dt[:, None, None, None, None]).to(torch.promote_types(z.dtype, velocity.dtype))
    return like(z, moved if frame_mask is None else torch.where(frame_mask[:, None, :, None, None], moved, z))
