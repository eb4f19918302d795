"""causal_conv3d in Triton.

Form GEMM: a pass for norm, SiLU and layout where they are needed, then a convolution that folds in the padding and
adds bias, residual and statistics as it writes. Form LIBRARY: a pass that writes the padding and the state too, then
PyTorch's convolution. The gradients follow the same form.
"""

from __future__ import annotations

from .triton_backward import backward
from .triton_forward import forward

__all__ = ["backward", "forward"]
