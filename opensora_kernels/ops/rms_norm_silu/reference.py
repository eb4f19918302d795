"""RMS over channels and SiLU in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from opensora_kernels.norms import like, rms_norm_channels


def rms_norm_silu(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, activation: str) -> Tensor:
    out = rms_norm_channels(x, weight, bias, eps)
    if activation == "silu":
        out = F.silu(out, inplace=not torch.is_grad_enabled())
    return like(x, out)
