"""STDiT2, the diffusion transformer of Open-Sora 1.1.

Behaviour matched: hpcaitech/Open-Sora, tag v1.1.0 with `qk_norm_legacy`, v1.2.0 with and without,
opensora/models/stdit/stdit2.py.

Axes as in layers.py: B batch, C latent channels, T frames, S sites, L tokens, D hidden, G timestep sets.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn

from opensora.config import STDiT2Config
from opensora.models.layers import (
    CaptionEmbedder,
    CrossAttention,
    FinalLayer,
    Mlp,
    PositionEmbedding2D,
    RotaryEmbedding,
    RotaryTable,
    SelfAttention,
    SizeEmbedder,
    TextContext,
    TimestepEmbedder,
    gated,
    modulated,
    thinned,
    timestep_sets,
)
from opensora.models.patches import PatchEmbed3D, Sites, unpatchify
from opensora.models.stdit_base import AnySizeSTDiT, OneStackSTDiT, first
from opensora_kernels import SequenceShards


class Conditions(NamedTuple):
    """Timestep, picture size and clip length as each part of the network reads them."""

    space_GB6D: Tensor
    time_GB3D: Tensor
    final_GBD: Tensor


class STDiT2(OneStackSTDiT, AnySizeSTDiT):
    """Predicts, from noisy latents, the noise and (second half of the channels) the place of the variance in its range.

    `config` carries upstream's constructor arguments; state-dict keys and shapes are upstream's. Works in fp32, with
    bf16 weights, and under autocast; the output is always fp32.
    """

    def __init__(self, config: STDiT2Config | None = None) -> None:
        super().__init__()
        self.config = config = config or STDiT2Config()
        dim, depth = config.hidden_size, config.depth
        if dim % 3:
            raise ValueError(f"STDiT2: hidden_size must be a multiple of 3 (height, width and aspect ratio), got {dim}")
        self.out_channels = config.in_channels * 2 if config.pred_sigma else config.in_channels

        self.pos_embed = PositionEmbedding2D(dim)
        self.rope = RotaryEmbedding(dim // config.num_heads, exact_dtype=config.exact_rope_dtype)
        self.x_embedder = PatchEmbed3D(config.patch_size, config.in_channels, dim)
        self.t_embedder = TimestepEmbedder(dim)
        self.csize_embedder = SizeEmbedder(dim // 3)
        self.ar_embedder = SizeEmbedder(dim // 3)
        self.fl_embedder = SizeEmbedder(dim)
        self.fps_embedder = SizeEmbedder(dim)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.t_block_temp = nn.Sequential(nn.SiLU(), nn.Linear(dim, 3 * dim))
        self.y_embedder = CaptionEmbedder(
            config.caption_channels, dim, config.class_dropout_prob, config.model_max_length
        )
        self.blocks = nn.ModuleList(STDiT2Block(config, config.drop_path * i / max(depth - 1, 1)) for i in range(depth))
        pt, ph, pw = config.patch_size
        self.final_layer = FinalLayer(dim, pt * ph * pw, self.out_channels)

        self.initialize_weights()
        self.freeze(config.freeze)

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        y: Tensor | TextContext,
        mask: Tensor | None = None,
        x_mask: Tensor | None = None,
        num_frames: Tensor | None = None,
        height: Tensor | None = None,
        width: Tensor | None = None,
        ar: Tensor | None = None,
        fps: Tensor | None = None,
        *,
        with_variance: bool = True,
        pixels: tuple[float, float] | None = None,
        generator: Generator | None = None,
        sequence: SequenceShards | None = None,
    ) -> Tensor:
        """One evaluation of the network.

        Shapes: x (B, C, T, H, W) latents; timestep (B,) in [0, 1000]; y (B, 1, L, caption_channels) with mask (B, L)
        or fewer rows that are tiled (no mask: all tokens), or a `TextContext` from `prepare_text`; x_mask (B, T) bool,
        True where a frame is noised, False where it is given clean. Of the clip, all (B,): num_frames in frames, not
        latents; height and width in pixels, of which sample 0's place the patches; ar = height / width; fps, 120 for
        an image. y may have k*B rows: all else then serves each of its k parts.
        Returns fp32 (rows of y, 2C or C, T, H, W): C without pred_sigma or `with_variance`.
        `pixels` is sample 0's (height, width) on the host, which spares a device the wait. `generator` draws caption
        dropout. `sequence` spreads the sites of each frame over ranks, which are given and return the same: see
        `Sites`.
        Errors: ValueError when a number of the clip is missing, or the mask does not fit y.
        """
        clip = {"num_frames": num_frames, "height": height, "width": width, "ar": ar, "fps": fps}
        self.require(clip)
        dtype = self.x_embedder.proj.weight.dtype
        text = y if isinstance(y, TextContext) else self.embed_text(y, mask, generator=generator)
        grid = self.x_embedder.grid(x)
        sites = Sites(*grid[1:], sequence)
        table_1SD = self.position_table(grid, *(pixels or (first(height), first(width))))
        tokens = self.x_embedder(x.to(dtype), sites) + sites.cut(table_1SD, dim=1)
        tokens, timestep, x_mask = self.for_each_text(text, tokens, timestep, x_mask)

        conditions = self.embed_conditions(timestep.to(dtype), clip, with_zero=x_mask is not None)
        rope = self.rope(tokens.shape[1])
        for i, block in enumerate(self.blocks):
            tokens = self.run_block(block, tokens, text.for_block(i), text.key_lengths, conditions, x_mask, rope, sites)
        num_channels = None if with_variance else self.config.in_channels
        out = self.final_layer(tokens.flatten(1, 2), conditions.final_GBD, x_mask, num_channels=num_channels)
        return unpatchify(out, sites, grid, self.config.patch_size, tuple(x.shape[2:]))

    def embed_conditions(self, timestep: Tensor, clip: dict[str, Tensor], *, with_zero: bool) -> Conditions:
        """The picture's size goes to the spatial half of a block, the clip's length to temporal attention.

        The final layer reads the timestep alone, except for frames that are given clean, where it reads timestep 0 and
        the picture's size: the released weights were trained with this.
        """
        batch = timestep.shape[0]
        t_GBD = self.embed_timestep(timestep, with_zero=with_zero)
        size = self.csize_embedder(torch.stack([clip["height"], clip["width"]], dim=1), batch)
        size_BD = torch.cat([size, self.ar_embedder(clip["ar"], batch)], dim=1)
        length_BD = self.fl_embedder(clip["num_frames"], batch) + self.fps_embedder(clip["fps"], batch)
        space_GBD = t_GBD + size_BD
        return Conditions(
            self.t_block(space_GBD).unflatten(-1, (6, -1)),
            self.t_block_temp(t_GBD + length_BD).unflatten(-1, (3, -1)),
            torch.cat([t_GBD[:1], space_GBD[1:]]),
        )

    def constants(self, arguments: dict[str, Any]) -> dict[str, Any]:
        clip = {name: arguments.get(name) for name in ("num_frames", "height", "width", "ar", "fps")}
        self.require(clip)
        return {**clip, "pixels": (first(clip["height"]), first(clip["width"]))}

    def initialize_weights(self) -> None:
        """As STDiT's, with a small layer for the conditions of temporal attention."""
        super().initialize_weights()
        nn.init.normal_(self.t_block_temp[1].weight, std=0.02)


class STDiT2Block(nn.Module):
    """Attention among the sites of a frame, then among the frames of a site, cross-attention to the text, MLP.

    All but the cross-attention are gated; temporal attention has a table and conditions of its own.
    """

    def __init__(self, config: STDiT2Config, drop_path: float) -> None:
        super().__init__()
        dim, num_heads = config.hidden_size, config.num_heads
        self.drop_path = drop_path
        self.attn = SelfAttention(dim, num_heads, axis="space", qk_norm=config.qk_norm)
        self.attn_temp = SelfAttention(
            dim,
            num_heads,
            axis="time",
            qk_norm=config.qk_norm,
            order="rope_norm" if config.qk_norm_legacy else "norm_rope",
        )
        self.cross_attn = CrossAttention(dim, num_heads)
        self.mlp = Mlp(dim, int(dim * config.mlp_ratio))
        self.scale_shift_table = nn.Parameter(torch.randn(6, dim) / dim**0.5)
        self.scale_shift_table_temporal = nn.Parameter(torch.randn(3, dim) / dim**0.5)

    def forward(
        self,
        x_BTSD: Tensor,
        text: Tensor | tuple[Tensor, Tensor],
        key_lengths: Tensor | None,
        conditions: Conditions,
        frame_mask: Tensor | None = None,
        rope: RotaryTable | None = None,
        sites: Sites | None = None,
    ) -> Tensor:
        axes, drop_path = x_BTSD.shape[1:3], self.drop_path if self.training else 0.0
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = timestep_sets(
            self.scale_shift_table, conditions.space_GB6D
        )
        shift_time, scale_time, gate_time = timestep_sets(self.scale_shift_table_temporal, conditions.time_GB3D)

        x = x_BTSD.flatten(1, 2)
        h = self.attn(modulated(x, shift_attn, scale_attn, frame_mask).unflatten(1, axes), sites=sites)
        x = gated(x, h.flatten(1, 2), thinned(gate_attn, drop_path), frame_mask)
        h = self.attn_temp(modulated(x, shift_time, scale_time, frame_mask).unflatten(1, axes), rope)
        x = gated(x, h.flatten(1, 2), thinned(gate_time, drop_path), frame_mask)
        x = x + self.cross_attn(x, text, key_lengths)
        h = self.mlp(modulated(x, shift_mlp, scale_mlp, frame_mask))
        x = gated(x, h, thinned(gate_mlp, drop_path), frame_mask)
        return x.unflatten(1, axes)
