"""CogVideoX' norm that the latent modulates: GroupNorm over the clip, times a convolution of the latent, plus another.

The latent is stretched to the clip by repeating its pixels, and the convolutions have one tap: of repeated pixels they
give the repeated result. So both run on the latent, and are broadcast over the clip: neither is ever as large as it.
Axes: B batch, C channels, T frames, H height, W width; lower case those of the latent.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .norms import apply_norm, norm_of
from .steps import may_write


def is_latent_norm(module: nn.Module) -> bool:
    """A GroupNorm and two convolutions that see one pixel of one frame each."""
    convs = [getattr(getattr(module, name, None), "conv", None) for name in ("conv_y", "conv_b")]
    return (
        type(getattr(module, "norm_layer", None)) is nn.GroupNorm
        and all(isinstance(conv, nn.Conv3d) for conv in convs)
        and all(conv.kernel_size == conv.stride == (1, 1, 1) and not any(conv.padding) for conv in convs)
        and all(conv.groups == 1 for conv in convs)
    )


def forward_latent_norm(
    self: nn.Module, f: Tensor, zq: Tensor, conv_cache: dict[str, Any] | None = None
) -> tuple[Tensor, dict[str, Any]]:
    """f (B, C, T, H, W), zq (B, c, t, h, w): of an odd number of frames the first one belongs to zq's first."""
    hidden = apply_norm(norm_of(self.norm_layer), f, None)
    scale, shift = (F.conv3d(zq, conv.weight, conv.bias) for conv in (self.conv_y.conv, self.conv_b.conv))
    has_first = f.shape[2] > 1 and f.shape[2] % 2 == 1
    parts = [(slice(0, 1), slice(0, 1)), (slice(1, None), slice(1, None))] if has_first else [(slice(None),) * 2]
    if may_write(hidden):
        for frames, latents in parts:
            _modulate_in_place(hidden[:, :, frames], scale[:, :, latents], shift[:, :, latents])
        return hidden, dict.fromkeys(("conv_y", "conv_b"))
    scale, shift = (_stretched(small, hidden, parts) for small in (scale, shift))
    return hidden * scale + shift, dict.fromkeys(("conv_y", "conv_b"))


def _modulate_in_place(x: Tensor, scale: Tensor, shift: Tensor) -> None:
    size, small = x.shape[2:], scale.shape[2:]
    if any(large % few for large, few in zip(size, small, strict=True)):
        x.mul_(F.interpolate(scale, size=size)).add_(F.interpolate(shift, size=size))
        return
    view = x
    for axis in (4, 3, 2):
        view = view.unflatten(axis, (small[axis - 2], -1))
    scale, shift = (small[:, :, :, None, :, None, :, None] for small in (scale, shift))
    view.mul_(scale).add_(shift)


def _stretched(small: Tensor, x: Tensor, parts: list[tuple[slice, slice]]) -> Tensor:
    height, width = x.shape[3:]
    stretched = []
    for frames, latents in parts:
        num_frames = len(range(*frames.indices(x.shape[2])))
        stretched.append(F.interpolate(small[:, :, latents], size=(num_frames, height, width)))
    return stretched[0] if len(stretched) == 1 else torch.cat(stretched, 2)
