"""Fused operators for video VAEs and video diffusion transformers."""

from typing import Any

from ._version import __version__
from .backends import BackendError, explain, meta_as, use
from .integrations import apply_opensora_kernels
from .norms import Norm
from .ops.attention import attention
from .ops.blend_tiles import blend_tiles
from .ops.causal_conv3d import causal_conv3d
from .ops.gate_residual import gate_residual
from .ops.group_norm_silu import group_norm_silu
from .ops.guided_euler_step import guided_euler_step
from .ops.modulate import modulate
from .ops.pack_shards import pack_shards
from .ops.qk_norm_attention import qk_norm_attention
from .ops.qk_norm_rope import qk_norm_rope
from .ops.rms_norm import rms_norm
from .ops.rms_norm_silu import rms_norm_silu
from .ops.unpack_shards import unpack_shards
from .ops.upsample_conv3d import upsample_conv3d
from .sequence_parallel import (
    SequenceShards,
    gather_sequence,
    release_peer_buffers,
    sequence_all_to_all,
    split_sequence,
    ulysses_attention,
    why_not_peer_to_peer,
)

__all__ = [
    "BackendError",
    "Norm",
    "SequenceShards",
    "__version__",
    "apply_opensora_kernels",
    "attention",
    "blend_tiles",
    "causal_conv3d",
    "explain",
    "gate_residual",
    "gather_sequence",
    "group_norm_silu",
    "guided_euler_step",
    "meta_as",
    "modulate",
    "pack_shards",
    "qk_norm_attention",
    "qk_norm_rope",
    "release_peer_buffers",
    "rms_norm",
    "rms_norm_silu",
    "sequence_all_to_all",
    "split_sequence",
    "ulysses_attention",
    "unpack_shards",
    "upsample_conv3d",
    "use",
    "vae",
    "why_not_peer_to_peer",
]


def __getattr__(name: str) -> Any:
    if name == "vae":  # imported when asked for: only who decodes needs it
        from importlib import import_module

        return import_module("opensora_kernels.vae")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
