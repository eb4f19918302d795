"""STDiT3, the diffusion transformer of Open-Sora 1.2.

Behaviour matched: hpcaitech/Open-Sora, tag v1.2.0, opensora/models/stdit/stdit3.py.

Axes as in layers.py: B batch, C latent channels, T frames, S sites, L tokens, D hidden, G timestep sets.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn

from opensora.config import STDiT3Config
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
    unpack_tokens,
)
from opensora.models.patches import PatchEmbed3D, Sites, unpatchify
from opensora.models.stdit_base import AnySizeSTDiT, first
from opensora_kernels import SequenceShards


class STDiT3(AnySizeSTDiT):
    """Predicts, from noisy latents, the flow's velocity and (second half of the channels) an unused variance.

    `config` carries upstream's constructor arguments; state-dict keys and shapes are upstream's. Works in fp32, with
    bf16 weights, and under autocast; the output is always fp32.
    """

    def __init__(self, config: STDiT3Config | None = None) -> None:
        super().__init__()
        self.config = config = config or STDiT3Config()
        dim, depth = config.hidden_size, config.depth
        self.out_channels = config.in_channels * 2 if config.pred_sigma else config.in_channels

        self.pos_embed = PositionEmbedding2D(dim)
        self.rope = RotaryEmbedding(dim // config.num_heads, exact_dtype=config.exact_rope_dtype)
        self.x_embedder = PatchEmbed3D(config.patch_size, config.in_channels, dim)
        self.t_embedder = TimestepEmbedder(dim)
        self.fps_embedder = SizeEmbedder(dim)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.y_embedder = CaptionEmbedder(
            config.caption_channels, dim, config.class_dropout_prob, config.model_max_length
        )
        drop_paths = [config.drop_path * i / max(depth - 1, 1) for i in range(depth)]
        self.spatial_blocks = nn.ModuleList(STDiT3Block(config, "space", rate) for rate in drop_paths)
        self.temporal_blocks = nn.ModuleList(STDiT3Block(config, "time", rate) for rate in drop_paths)
        pt, ph, pw = config.patch_size
        self.final_layer = FinalLayer(dim, pt * ph * pw, self.out_channels)

        self.initialize_weights()
        if config.only_train_temporal:
            self.requires_grad_(False)
            self.temporal_blocks.requires_grad_(True)
        if config.freeze_y_embedder:
            self.y_embedder.requires_grad_(False)

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        y: Tensor | TextContext,
        mask: Tensor | None = None,
        x_mask: Tensor | None = None,
        fps: Tensor | None = None,
        height: Tensor | float | None = None,
        width: Tensor | float | None = None,
        *,
        with_variance: bool = True,
        generator: Generator | None = None,
        sequence: SequenceShards | None = None,
        **ignored: Any,
    ) -> Tensor:
        """One evaluation of the network.

        Shapes: x (B, C, T, H, W) latents; timestep (B,) in [0, 1000]; y (B, 1, L, caption_channels) with mask (B, L)
        or fewer rows that are tiled (no mask: all tokens), or a `TextContext` from `prepare_text`; x_mask (B, T) bool,
        True where a frame is noised, False where it is given clean; fps (B,) frames per second; height and width in
        pixels, of which sample 0 counts. y may have k*B rows: x, timestep and x_mask then serve each of its k parts.
        Returns fp32 (rows of y, 2C or C, T, H, W): C without pred_sigma or `with_variance`.
        Other keyword arguments (num_frames, ar) are ignored as upstream does. `generator` draws caption dropout.
        `sequence` spreads the sites of each frame over ranks, which are given and return the same: see `Sites`.
        Errors: ValueError when fps, height or width is missing, or the mask does not fit y.
        """
        self.require({"fps": fps, "height": height, "width": width})
        dtype = self.x_embedder.proj.weight.dtype
        text = y if isinstance(y, TextContext) else self.embed_text(y, mask, generator=generator)
        grid = self.x_embedder.grid(x)
        sites = Sites(*grid[1:], sequence)
        table_1SD = sites.cut(self.position_table(grid, first(height), first(width)), dim=1)
        tokens = self.x_embedder(x.to(dtype), sites) + table_1SD
        tokens, timestep, x_mask = self.for_each_text(text, tokens, timestep, x_mask)

        rate_BD = self.fps_embedder(fps, timestep.shape[0])
        t_GBD = self.embed_timestep(timestep.to(dtype), with_zero=x_mask is not None) + rate_BD
        t6_GB6D = self.t_block(t_GBD).unflatten(-1, (6, -1))
        tokens = self.run_blocks(tokens, text, t6_GB6D, x_mask, sites)
        num_channels = None if with_variance else self.config.in_channels
        out = self.final_layer(tokens.flatten(1, 2), t_GBD, x_mask, num_channels=num_channels)
        return unpatchify(out, sites, grid, self.config.patch_size, tuple(x.shape[2:]))

    def run_blocks(
        self, x_BTSD: Tensor, text: TextContext, t6_GB6D: Tensor, frame_mask: Tensor | None, sites: Sites
    ) -> Tensor:
        """Spatial block i, then temporal block i."""
        rope = self.rope(x_BTSD.shape[1])
        for i, pair in enumerate(zip(self.spatial_blocks, self.temporal_blocks, strict=True)):
            for j, block in enumerate(pair):
                x_BTSD = self.run_block(
                    block, x_BTSD, text.for_block(2 * i + j), text.key_lengths, t6_GB6D, frame_mask, rope, sites
                )
        return x_BTSD

    def constants(self, arguments: dict[str, Any]) -> dict[str, Any]:
        clip = {name: arguments.get(name) for name in ("fps", "height", "width")}
        self.require(clip)
        return {**clip, "height": first(clip["height"]), "width": first(clip["width"])}

    def text_readers(self) -> list[CrossAttention]:
        pairs = zip(self.spatial_blocks, self.temporal_blocks, strict=True)
        return [block.cross_attn for pair in pairs for block in pair]

    def embed_text(self, y: Tensor, mask: Tensor | None = None, *, generator: Generator | None = None) -> TextContext:
        """Captions to hidden size, selected tokens first. With `skip_y_embedder`, y is already embedded and packed
        (1, sum of lengths, D) and mask holds the lengths."""
        if self.config.skip_y_embedder:
            lengths = mask.tolist() if isinstance(mask, Tensor) else list(mask)
            return unpack_tokens(y.to(self.x_embedder.proj.weight.dtype), lengths)
        return super().embed_text(y, mask, generator=generator)

    def initialize_weights(self) -> None:
        """Xavier for linear layers; temporal blocks and the frame rate start without effect."""
        super().initialize_weights()
        nn.init.normal_(self.fps_embedder.mlp[0].weight, std=0.02)
        nn.init.zeros_(self.fps_embedder.mlp[2].weight)
        for block in self.temporal_blocks:
            for layer in (block.attn.proj, block.cross_attn.proj, block.mlp.fc2):
                nn.init.zeros_(layer.weight)


class STDiT3Block(nn.Module):
    """Self-attention along one axis, cross-attention to the text, MLP; the first and last gated by the timestep."""

    def __init__(self, config: STDiT3Config, axis: Literal["space", "time"], drop_path: float) -> None:
        super().__init__()
        dim = config.hidden_size
        self.axis, self.drop_path = axis, drop_path
        self.attn = SelfAttention(dim, config.num_heads, axis=axis, qk_norm=config.qk_norm)
        self.cross_attn = CrossAttention(dim, config.num_heads)
        self.mlp = Mlp(dim, int(dim * config.mlp_ratio))
        self.scale_shift_table = nn.Parameter(torch.randn(6, dim) / dim**0.5)

    def forward(
        self,
        x_BTSD: Tensor,
        text: Tensor | tuple[Tensor, Tensor],
        key_lengths: Tensor | None,
        t6_GB6D: Tensor,
        frame_mask: Tensor | None = None,
        rope: RotaryTable | None = None,
        sites: Sites | None = None,
    ) -> Tensor:
        axes, drop_path = x_BTSD.shape[1:3], self.drop_path if self.training else 0.0
        conditions = timestep_sets(self.scale_shift_table, t6_GB6D)
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = conditions

        x = x_BTSD.flatten(1, 2)
        h = modulated(x, shift_attn, scale_attn, frame_mask).unflatten(1, axes)
        h = self.attn(h, rope) if self.axis == "time" else self.attn(h, sites=sites)
        x = gated(x, h.flatten(1, 2), thinned(gate_attn, drop_path), frame_mask)
        x = x + self.cross_attn(x, text, key_lengths)
        h = self.mlp(modulated(x, shift_mlp, scale_mlp, frame_mask))
        x = gated(x, h, thinned(gate_mlp, drop_path), frame_mask)
        return x.unflatten(1, axes)
