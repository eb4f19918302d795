"""Video VAEs over clips of any length, inside a memory budget: exactly, where the budget allows."""

from .autoencoders import decoder_of, encoder_of
from .plan import TilePlan, parse_bytes, plan_tiles, show_bytes
from .running import decode, encode, gather
from .strategies import Strategy, Streaming, Whole
from .tiled import Tiling, iterate_tiled, run_tiled
from .tiled_strategy import Tiled

__all__ = [
    "Strategy",
    "Streaming",
    "TilePlan",
    "Tiled",
    "Tiling",
    "Whole",
    "decode",
    "decoder_of",
    "encode",
    "encoder_of",
    "gather",
    "iterate_tiled",
    "parse_bytes",
    "plan_tiles",
    "run_tiled",
    "show_bytes",
]
