"""Diffusion transformers, one file per upstream system."""

from opensora.models.latte import LatteT2V
from opensora.models.stdit import STDiT
from opensora.models.stdit2 import STDiT2
from opensora.models.stdit3 import STDiT3

__all__ = ["LatteT2V", "STDiT", "STDiT2", "STDiT3"]
