"""Diffusion transformers, one file per upstream system."""

from opensora.models.stdit3 import STDiT3

__all__ = ["STDiT3"]
