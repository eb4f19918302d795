"""Which normalisation a module computes, as a `Norm` that a convolution applies to its input.

Axes: B batch, C channels, T frames, H height, W width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opensora_kernels.norms import Norm
from opensora_kernels.ops.group_norm_silu import group_norm_silu
from opensora_kernels.ops.rms_norm import rms_norm
from opensora_kernels.ops.rms_norm_silu import rms_norm_silu

from .steps import frame_steps

# F.normalize's least length, which WanRMS_norm and its kin leave as it is.
_LEAST_LENGTH = 1e-12


def norm_of(module: nn.Module) -> Norm | None:
    """The `Norm` of x (B, C, T, H, W) that `module` computes with its present parameters, by its attributes; or None.

    gamma and scale: RMS over channels (Wan, Qwen-Image, HunyuanVideo 1.5, Kandinsky 6). nn.GroupNorm: over the clip; a
    subclass with a forward of its own: frame by frame (MiniMax-H3). A GroupNorm in `norm_layer` with `chunk_size`:
    frame by frame (Mochi), without: over the clip (KVAE). A GroupNorm in `norm`: frame by frame if it has one group
    (Cosmos). What a block computes with it is compared with the block itself before anything is replaced.
    """
    gamma = getattr(module, "gamma", None)
    if isinstance(gamma, Tensor) and hasattr(module, "scale"):
        if not getattr(module, "channel_first", True):
            return None
        bias = getattr(module, "bias", None)
        return Norm("rms", gamma.flatten(), bias.flatten() if isinstance(bias, Tensor) else None, eps=_LEAST_LENGTH)
    if isinstance(module, nn.GroupNorm):
        return _group(module, per_frame=type(module).forward is not nn.GroupNorm.forward)
    if hasattr(module, "conv_y"):  # modulated by the latent between norm and SiLU
        return None
    if isinstance(getattr(module, "norm_layer", None), nn.GroupNorm):
        return _group(module.norm_layer, per_frame=hasattr(module, "chunk_size"))
    if isinstance(getattr(module, "norm", None), nn.GroupNorm) and hasattr(module, "num_groups"):
        return _group(module.norm, per_frame=module.num_groups == 1)
    return None


def _group(norm: nn.GroupNorm, per_frame: bool) -> Norm:
    return Norm("group", norm.weight, norm.bias, norm.num_groups, norm.eps, per_frame)


def apply_norm(norm: Norm | None, x: Tensor, activation: str | None) -> Tensor:
    """The norm and the activation, if any, of x (B, C, T, H, W) or (B, C, H, W), as one operator."""
    if norm is None:
        return x if activation is None else F.silu(x)
    if norm.kind == "rms":
        return rms_norm_silu(x, norm.weight, norm.bias, eps=norm.eps, activation=activation)
    return group_norm_silu(
        x, norm.num_groups, norm.weight, norm.bias, eps=norm.eps, per_frame=norm.per_frame, activation=activation
    )


def norm_silu_forward(self: nn.Module, x: Tensor) -> Tensor:
    return apply_norm(norm_of(self), x, "silu")


def norm_of_last_axis_forward(self: nn.Module, x: Tensor) -> Tensor:
    """LTX: RMS over the last axis; of clips (B, T, H, W, C) on a CPU a few frames at a time, for what fp32 takes."""
    steps = frame_steps(x.movedim(-1, 1), 1) if x.dim() == 5 else []
    if len(steps) < 2:
        return rms_norm(x, self.weight, eps=self.eps)
    out = torch.empty_like(x)
    for frames in steps:
        out[:, frames] = rms_norm(x[:, frames], self.weight, eps=self.eps)
    return out


def identity_forward(self: nn.Module, x: Tensor) -> Tensor:
    return x
