"""Fused operators for video VAEs and video diffusion transformers."""

from ._version import __version__
from .backends import BackendError, explain, use
from .ops.rms_norm import rms_norm

__all__ = ["BackendError", "__version__", "explain", "rms_norm", "use"]
