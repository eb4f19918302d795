"""LayerNorm and adaptive scale and shift in plain PyTorch."""

from __future__ import annotations

from opensora_kernels.modulation import modulated as modulate

__all__ = ["modulate"]
