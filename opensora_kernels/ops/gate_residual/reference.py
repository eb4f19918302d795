"""Gated residual sum, and the next branch's modulation of it, in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from opensora_kernels.modulation import by_frames, modulated, of_frames


def gate_residual(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    frame_mask: Tensor | None,
    gate0: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    shift0: Tensor | None,
    scale0: Tensor | None,
    eps: float,
) -> list[Tensor]:
    product = (of_frames(gate, gate0, frame_mask) * by_frames(y, frame_mask)).flatten(1, 2)
    total = (x + product).to(x.dtype).contiguous()
    return [total, *([] if shift is None else [modulated(total, shift, scale, True, eps, frame_mask, shift0, scale0)])]
