"""How noise becomes a clip: training losses and samplers, one file per upstream system."""

from opensora.schedulers.rectified_flow import RectifiedFlow

__all__ = ["RectifiedFlow"]
