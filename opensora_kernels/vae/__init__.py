"""Running video VAEs on clips that do not fit into memory at once."""

from .tiled import Tiling, iterate_tiled, run_tiled

__all__ = ["Tiling", "iterate_tiled", "run_tiled"]
