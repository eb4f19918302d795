"""GroupNorm and SiLU in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from opensora_kernels.norms import group_norm, like


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    per_frame: bool,
    activation: str,
    statistics: Tensor | None,
) -> Tensor:
    out = group_norm(x, num_groups, weight, bias, eps, per_frame, statistics)
    if activation == "silu":
        out = F.silu(out, inplace=not torch.is_grad_enabled())
    return like(x, out)
