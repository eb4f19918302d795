"""Whether Triton kernels can run, asked lazily; importing the package never imports Triton."""

from __future__ import annotations

import importlib.util
import os
from functools import cache

import torch


@cache
def why_not_installed() -> str | None:
    """None where Triton can be imported, else a sentence."""
    return None if importlib.util.find_spec("triton") else "triton is not installed"


def is_interpreted() -> bool:
    """True where TRITON_INTERPRET=1 makes Triton run kernels in Python on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_not(device: torch.device) -> str | None:
    """None where Triton kernels can run on tensors of `device`, else a sentence."""
    if (reason := why_not_installed()) is not None:
        return reason
    if device.type == "cuda" or is_interpreted():
        return None
    return f"Triton needs a CUDA tensor, got one on {device.type} (TRITON_INTERPRET=1 runs kernels on the CPU)"
