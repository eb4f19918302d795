"""This package's operators inside other people's video models."""

from .apply import apply_opensora_kernels
from .report import Entry, Report

__all__ = ["Entry", "Report", "apply_opensora_kernels"]
