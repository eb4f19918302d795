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


@dataclass(frozen=True)
class LatteT2VConfig:
    """Open-Sora-Plan's diffusion transformer, with upstream's argument names and the values of its released models.

    Upstream's own defaults describe an image model that it never builds. `version` is ours: no key and no other field
    tells the releases apart. In "1.0" positions of frames are divided by video_length // 5 and attention among patches
    takes a mask of patches; in "1.1" they are divided by `interpolation_scale_1d` (None: video_length // 16) and the
    mask is one of latents.

    `sample_size` is (height, width) and `video_length` frames, both of latents; the height is what the coordinates of
    other sizes are stretched to. `compress_kv_factor` > 1 thins keys and values of the second half of the layers,
    `use_rope` rotates queries and keys; both came with 1.1, and never together. Upstream's LatteT2V-XL/122 has 16 heads
    of 72, its D64 variant 18 of 64. Without effect: `norm_num_groups`, `num_embeds_ada_norm`, `use_linear_projection`,
    `attention_mode` (kernels are chosen per call), `model_max_length` and, having one value, `rope_scaling_type`.
    """

    num_attention_heads: int = 16
    attention_head_dim: int = 72
    in_channels: int = 4
    out_channels: int = 8
    num_layers: int = 28
    dropout: float = 0.0
    norm_num_groups: int = 32
    cross_attention_dim: int = 1152
    attention_bias: bool = True
    sample_size: tuple[int, int] = (64, 64)
    num_vector_embeds: int | None = None
    patch_size: int = 2
    patch_size_t: int = 1
    activation_fn: str = "gelu-approximate"
    num_embeds_ada_norm: int | None = 1000
    use_linear_projection: bool = False
    only_cross_attention: bool = False
    double_self_attention: bool = False
    upcast_attention: bool = False
    norm_type: str = "ada_norm_single"
    norm_elementwise_affine: bool = False
    norm_eps: float = 1e-6
    attention_type: str = "default"
    caption_channels: int = 4096
    video_length: int = 17
    attention_mode: Literal["xformers", "math", "flash"] = "xformers"
    use_rope: bool = False
    model_max_length: int = 300
    rope_scaling_type: Literal["linear"] = "linear"
    compress_kv_factor: int = 1
    interpolation_scale_1d: float | None = None
    version: Literal["1.0", "1.1"] = "1.1"


TransformerConfig = STDiTConfig | STDiT2Config | STDiT3Config | LatteT2VConfig
