"""Diffusion transformers, under the argument names of their upstreams."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class STDiTConfig:
    """Open-Sora 1.0's diffusion transformer, with upstream's argument names and defaults.

    `input_size` is in latents: its patches decide the stored position tables. Positions are divided by `space_scale`
    (0.5 for 256 x 256 pixels, 1 for 512 x 512) and `time_scale` (1 for 16 frames, 2/3 for 64). `freeze` as in
    `STDiT2Config`. `no_temporal_pos_emb` has no effect.
    """

    input_size: tuple[int, int, int] = (1, 32, 32)
    in_channels: int = 4
    patch_size: tuple[int, int, int] = (1, 2, 2)
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    class_dropout_prob: float = 0.1
    pred_sigma: bool = True
    drop_path: float = 0.0
    no_temporal_pos_emb: bool = False
    caption_channels: int = 4096
    model_max_length: int = 120
    space_scale: float = 1.0
    time_scale: float = 1.0
    freeze: Literal["not_temporal", "text"] | None = None


@dataclass(frozen=True)
class STDiT2Config:
    """Open-Sora 1.1's diffusion transformer, with upstream's argument names and defaults.

    The released weights were trained with input_sq_size 512, model_max_length 200, and qk_norm and qk_norm_legacy on.
    `qk_norm_legacy` rotates queries and keys of temporal attention before they are normalised, not after. `freeze`
    leaves only temporal attention trainable, or all but the attention to the text. `no_temporal_pos_emb` has no effect.
    """

    input_size: tuple[int | None, int | None, int | None] = (None, None, None)
    input_sq_size: int = 32
    in_channels: int = 4
    patch_size: tuple[int, int, int] = (1, 2, 2)
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    class_dropout_prob: float = 0.1
    pred_sigma: bool = True
    drop_path: float = 0.0
    no_temporal_pos_emb: bool = False
    caption_channels: int = 4096
    model_max_length: int = 120
    freeze: Literal["not_temporal", "text"] | None = None
    qk_norm: bool = False
    qk_norm_legacy: bool = False
    exact_rope_dtype: bool = True


@dataclass(frozen=True)
class STDiT3Config:
    """Open-Sora 1.2's diffusion transformer, with upstream's argument names and defaults."""

    input_size: tuple[int | None, int | None, int | None] = (None, None, None)
    input_sq_size: int = 512
    in_channels: int = 4
    patch_size: tuple[int, int, int] = (1, 2, 2)
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    class_dropout_prob: float = 0.1
    pred_sigma: bool = True
    drop_path: float = 0.0
    caption_channels: int = 4096
    model_max_length: int = 300
    qk_norm: bool = True
    only_train_temporal: bool = False
    freeze_y_embedder: bool = False
    skip_y_embedder: bool = False
    exact_rope_dtype: bool = True
