"""STDiT, the diffusion transformer of Open-Sora 1.0.

Behaviour matched: hpcaitech/Open-Sora, tags v1.0.0 and v1.2.0, opensora/models/stdit/stdit.py.

Axes as in layers.py: B batch, C latent channels, T frames, S sites, L tokens, D hidden, G timestep sets.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor, nn

from opensora.config import STDiTConfig
from opensora.models.layers import (
    CaptionEmbedder,
    CrossAttention,
    FinalLayer,
    Mlp,
    SelfAttention,
    TextContext,
    TimestepEmbedder,
    gated,
    grid_table,
    modulated,
    sine_table,
    thinned,
    timestep_sets,
)
from opensora.models.patches import PatchEmbed3D, Sites, unpatchify
from opensora.models.stdit_base import OneStackSTDiT
from opensora_kernels import SequenceShards


class STDiT(OneStackSTDiT):
    """Predicts, from noisy latents, the noise and (second half of the channels) the place of the variance in its range.

    `config` carries upstream's constructor arguments; state-dict keys and shapes are upstream's. The position tables
    are in the state dict, as upstream, and always computed: `opensora.checkpoints` fills them from no file. Works in
    fp32, with bf16 weights, and under autocast; the output is always fp32.
    """

    def __init__(self, config: STDiTConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or STDiTConfig()
        dim, depth = config.hidden_size, config.depth
        if dim % 4:
            raise ValueError(f"STDiT: hidden_size must be a multiple of 4 (sine and cosine of two axes), got {dim}")
        self.out_channels = config.in_channels * 2 if config.pred_sigma else config.in_channels

        self.x_embedder = PatchEmbed3D(config.patch_size, config.in_channels, dim)
        self.t_embedder = TimestepEmbedder(dim)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.y_embedder = CaptionEmbedder(
            config.caption_channels, dim, config.class_dropout_prob, config.model_max_length
        )
        self.blocks = nn.ModuleList(STDiTBlock(config, config.drop_path * i / max(depth - 1, 1)) for i in range(depth))
        pt, ph, pw = config.patch_size
        self.final_layer = FinalLayer(dim, pt * ph * pw, self.out_channels)

        self._stored_grid = tuple(
            -(-size // patch) for size, patch in zip(config.input_size, config.patch_size, strict=True)
        )
        self._other_tables: dict[tuple, tuple[Tensor, Tensor]] = {}
        space_1SD, time_1TD = position_tables(config, self._stored_grid)
        device = torch.get_default_device()
        self.register_buffer("pos_embed", space_1SD.to(device, torch.float32))
        self.register_buffer("pos_embed_temporal", time_1TD.to(device, torch.float32))

        self.initialize_weights()
        self.freeze(config.freeze)

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        y: Tensor | TextContext,
        mask: Tensor | None = None,
        x_mask: Tensor | None = None,
        *,
        with_variance: bool = True,
        generator: Generator | None = None,
        sequence: SequenceShards | None = None,
        **ignored: Any,
    ) -> Tensor:
        """One evaluation of the network.

        Shapes: x (B, C, T, H, W) latents; timestep (B,) in [0, 1000]; y (B, 1, L, caption_channels) with mask (B, L)
        or fewer rows that are tiled (no mask: all tokens), or a `TextContext` from `prepare_text`; x_mask (B, T) bool,
        True where a frame is noised, False where it is given clean. y may have k*B rows: all else then serves each of
        its k parts. x may be of any size; positions beyond those of config.input_size go on at the same distance,
        which upstream refuses.
        Returns fp32 (rows of y, 2C or C, T, H, W): C without pred_sigma or `with_variance`.
        Other keyword arguments (fps, height, width, ...) are ignored. `generator` draws caption dropout. `sequence`
        spreads the sites of each frame over ranks, which are given and return the same: see `Sites`.
        Errors: ValueError when the mask does not fit y.
        """
        dtype = self.x_embedder.proj.weight.dtype
        text = y if isinstance(y, TextContext) else self.embed_text(y, mask, generator=generator)
        grid = self.x_embedder.grid(x)
        space_1SD, time_1TD = self.position_tables(grid)
        sites = Sites(*grid[1:], sequence)
        tokens = self.x_embedder(x.to(dtype), sites) + sites.cut(space_1SD, dim=1)
        tokens, timestep, x_mask = self.for_each_text(text, tokens, timestep, x_mask)

        t_GBD = self.embed_timestep(timestep.to(dtype), with_zero=x_mask is not None)
        t6_GB6D = self.t_block(t_GBD).unflatten(-1, (6, -1))
        for i, block in enumerate(self.blocks):
            time_table = time_1TD if i == 0 else None
            tokens = self.run_block(
                block, tokens, text.for_block(i), text.key_lengths, t6_GB6D, x_mask, sites, time_table
            )
        num_channels = None if with_variance else self.config.in_channels
        out = self.final_layer(tokens.flatten(1, 2), t_GBD, x_mask, num_channels=num_channels)
        return unpatchify(out, sites, grid, self.config.patch_size, tuple(x.shape[2:]))

    def position_tables(self, grid: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
        """(1, S, D) and (1, T, D) for a grid of patches: the stored ones, or those of another size."""
        if grid == self._stored_grid:
            return self.pos_embed, self.pos_embed_temporal
        key = (grid, self.pos_embed.dtype, self.pos_embed.device)
        if key not in self._other_tables:
            self._other_tables.clear()
            # A table first made while sampling must remain usable by autograd.
            with torch.inference_mode(False):
                space, time = position_tables(self.config, grid)
                self._other_tables[key] = (space.to(self.pos_embed), time.to(self.pos_embed))
        return self._other_tables[key]


def position_tables(config: STDiTConfig, grid: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Sine-cosine tables (1, S, D) of the sites and (1, T, D) of the frames, fp64 on the CPU as upstream makes them."""
    frames, rows, columns = (torch.arange(size, dtype=torch.float64, device="cpu") for size in grid)

    def frequencies(dim: int) -> Tensor:
        return 1.0 / 10000 ** (torch.arange(0, dim, 2, dtype=torch.float64, device="cpu") / dim)

    space = grid_table(rows / config.space_scale, columns / config.space_scale, frequencies(config.hidden_size // 2))
    return space, sine_table(frames / config.time_scale, frequencies(config.hidden_size))[None]


class STDiTBlock(nn.Module):
    """Attention among the sites of a frame, then among the frames of a site, cross-attention to the text, MLP.

    Temporal attention reads the tokens as they are, without norm or modulation, and shares the gate of the spatial one.
    """

    def __init__(self, config: STDiTConfig, drop_path: float) -> None:
        super().__init__()
        dim, num_heads = config.hidden_size, config.num_heads
        self.drop_path = drop_path
        self.attn = SelfAttention(dim, num_heads, axis="space", qk_norm=False)
        self.attn_temp = SelfAttention(dim, num_heads, axis="time", qk_norm=False)
        self.cross_attn = CrossAttention(dim, num_heads)
        self.mlp = Mlp(dim, int(dim * config.mlp_ratio))
        self.scale_shift_table = nn.Parameter(torch.randn(6, dim) / dim**0.5)

    def forward(
        self,
        x_BTSD: Tensor,
        text: Tensor | tuple[Tensor, Tensor],
        key_lengths: Tensor | None,
        t6_GB6D: Tensor,
        frame_mask: Tensor | None = None,
        sites: Sites | None = None,
        time_table_1TD: Tensor | None = None,
    ) -> Tensor:
        """`time_table_1TD` is added to what temporal attention reads, and not to the tokens themselves."""
        axes, drop_path = x_BTSD.shape[1:3], self.drop_path if self.training else 0.0
        conditions = timestep_sets(self.scale_shift_table, t6_GB6D)
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = conditions

        x = x_BTSD.flatten(1, 2)
        h = self.attn(modulated(x, shift_attn, scale_attn, frame_mask).unflatten(1, axes), sites=sites)
        x = gated(x, h.flatten(1, 2), thinned(gate_attn, drop_path), frame_mask)
        u = x.unflatten(1, axes)
        h = self.attn_temp(u if time_table_1TD is None else u + time_table_1TD[:, :, None])
        # Frames given clean have the gate of the noised ones here, as in the released weights' training code.
        x = gated(x, h.flatten(1, 2), thinned(gate_attn[:1], drop_path), None)
        x = x + self.cross_attn(x, text, key_lengths)
        h = self.mlp(modulated(x, shift_mlp, scale_mlp, frame_mask))
        x = gated(x, h, thinned(gate_mlp, drop_path), frame_mask)
        return x.unflatten(1, axes)
