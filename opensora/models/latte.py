"""LatteT2V, the diffusion transformer of Open-Sora-Plan 1.0 and 1.1.

Behaviour matched: PKU-YuanGroup/Open-Sora-Plan, tags v1.0.0 and v1.1.0, opensora/models/diffusion/latte.

Axes: B batch, C latent channels, T frames, I images beside a clip, S sites of a frame (rows x columns of patches),
L tokens, D hidden size, R rows of text.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opensora.config import LatteT2VConfig
from opensora.models.base import Denoiser, VideoTransformer
from opensora.models.latte_checks import check_batch, check_captions, check_clip, check_config
from opensora.models.latte_layers import (
    CaptionProjection,
    FramePatchEmbed,
    Kept,
    SpatialBlock,
    TemporalBlock,
    TextAttention,
    TimestepModulation,
)
from opensora.models.latte_positions import LattePositions
from opensora.models.layers import RotaryTable, TextContext, patch_values, select_tokens
from opensora.models.patches import Sites, unpatchify
from opensora.models.token_masks import kept_tokens
from opensora_kernels import SequenceShards, modulate


class LatteT2V(VideoTransformer):
    """Predicts, from noisy latents, their noise and (second half of the channels) where its variance lies.

    `config` carries upstream's constructor arguments and the release; state-dict keys and shapes are upstream's. Works
    in fp32, with bf16 weights, and under autocast; the output is always fp32.
    Where sites are spread over ranks, `dropout` draws for those of each.
    """

    def __init__(self, config: LatteT2VConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or LatteT2VConfig()
        check_config(config)
        self.only_length, self.latent_multiple = config.video_length, config.patch_size
        dim = config.num_attention_heads * config.attention_head_dim
        self.pos_embed = FramePatchEmbed(config.patch_size, config.in_channels, dim)
        self.adaln_single = TimestepModulation(dim)
        self.caption_projection = CaptionProjection(config.caption_channels, dim)
        factors = [1] * (config.num_layers // 2) + [config.compress_kv_factor] * (-(-config.num_layers // 2))
        self.transformer_blocks = nn.ModuleList(SpatialBlock(config, factor) for factor in factors)
        self.temporal_transformer_blocks = nn.ModuleList(TemporalBlock(config, factor) for factor in factors)
        self.scale_shift_table = nn.Parameter(torch.randn(2, dim) / dim**0.5)
        self.proj_out = nn.Linear(dim, config.patch_size**2 * config.out_channels)
        self.positions = LattePositions(config)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        *,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        use_image_num: int = 0,
        enable_temporal_attentions: bool = True,
        sequence: SequenceShards | None = None,
    ) -> Tensor:
        """One evaluation of the network, of clips and of images beside them.

        Shapes: hidden_states (B, C, T + I, H, W) latents, the last I = use_image_num frames being images;
        timestep (B,) in [0, 1000]; encoder_hidden_states (B, L, caption_channels), or (B, 1 + I, L, caption_channels)
        with the clip's text before those of its images; encoder_attention_mask (B, L) or (B, 1 + I, L), nonzero where
        a token counts. attention_mask, nonzero where there is picture and not padding, has the shape (B, T + I, H, W)
        in version 1.1 and, patch by patch, (B * T, S) in 1.0, without images. A row that a mask empties attends
        to all. Returns fp32 (B, out_channels, T + I, H, W).
        Temporal attention, when enabled, is of exactly `video_length` frames; images take no part in it. `sequence`
        spreads the sites of each frame over ranks, which are given and return the same: see `Sites`.
        Upstream's: training on images beside clips without gradient checkpointing leaves out the table of frame
        positions. Not upstream's: images beside clips are allowed in evaluation too, where it adds the table; clips
        of one frame or frames of one patch work; a single frame is not repeated to `video_length` but refused.
        Errors: ValueError for shapes that do not fit.
        """
        num_images, num_frames = use_image_num, hidden_states.shape[2] - use_image_num
        text, text_mask, mask = encoder_hidden_states, encoder_attention_mask, attention_mask
        check_batch(self.config, hidden_states, text, text_mask, mask, num_images)
        if text.ndim == 3:
            text = text[:, None]
        if text_mask is not None and text_mask.ndim == 2:
            text_mask = text_mask[:, None]
        is_without_table = num_images > 0 and self.training and not self.gradient_checkpointing

        noise = self.predict(
            hidden_states[:, :, :num_frames],
            timestep,
            self.embed_text(text[:, :1], _rows(text_mask, 0, 1)),
            is_temporal=enable_temporal_attentions,
            has_frame_table=not is_without_table,
            mask=mask if self.config.version == "1.0" else _rows(mask, 0, num_frames),
            sequence=sequence,
        )
        if num_images == 0:
            return noise
        # An image is a clip of one frame with a text of its own: nothing else of the batch reaches it.
        image_noise = self.predict(
            _rows(hidden_states.transpose(1, 2), num_frames).unsqueeze(2),
            timestep.repeat_interleave(num_images),
            self.embed_text(_rows(text, 1).unsqueeze(1), _rows(text_mask, 1)),
            is_temporal=False,
            mask=_rows(mask, num_frames),
            sequence=sequence,
        )
        return torch.cat([noise, image_noise.squeeze(2).unflatten(0, (-1, num_images)).transpose(1, 2)], dim=2)

    def predict(
        self,
        x_BCTHW: Tensor,
        timestep_B: Tensor,
        text: TextContext,
        *,
        is_temporal: bool,
        has_frame_table: bool = True,
        mask: Tensor | None = None,
        num_channels: int | None = None,
        sequence: SequenceShards | None = None,
    ) -> Tensor:
        """Noise of clips, of which text of k*B rows (conditional and null captions) shares B.

        `is_temporal`: whether frames see each other; `has_frame_table`: whether their positions are added before they
        first do. `mask`: where there is picture, (B*T, H, W) for latents or (B*T, S) for patches. `num_channels`: only
        the first output channels.
        """
        check_clip(self.config, x_BCTHW, timestep_B, text.tokens.shape[0], is_temporal=is_temporal)
        weight, patch_size = self.pos_embed.proj.weight, self.pos_embed.patch_size
        grid = self.pos_embed.grid(x_BCTHW)
        sites = Sites(*grid[1:], sequence)
        positions_11SD = self.positions.in_space(sites.rows, sites.columns, like=weight)
        tokens = self.pos_embed(x_BCTHW.to(weight.dtype), sites) + sites.cut(positions_11SD, dim=2)
        tokens, timestep_B, _ = self.for_each_text(text, tokens, timestep_B, None)
        embedding_BD, modulation_B6D = self.adaln_single(timestep_B)
        tokens = self.run_blocks(
            tokens,
            text,
            modulation_B6D,
            sites,
            self._kept_patches(mask, sites),
            is_temporal=is_temporal,
            has_frame_table=has_frame_table,
        )
        shift, scale = (self.scale_shift_table + embedding_BD[:, None]).unbind(1)
        out = modulate(tokens.flatten(1, 2), shift, scale)
        out = patch_values(self.proj_out, out, patch_size[1] * patch_size[2], num_channels)
        return unpatchify(out, sites, grid, patch_size, tuple(x_BCTHW.shape[2:]))

    def run_blocks(
        self,
        x_BTSD: Tensor,
        text: TextContext,
        modulation_B6D: Tensor,
        sites: Sites,
        kept: tuple[Kept | None, Kept | None],
        *,
        is_temporal: bool,
        has_frame_table: bool,
    ) -> Tensor:
        """Spatial block i, then temporal block i. `kept`: patches that attention in a frame reads, of all and of the
        compressed ones."""
        in_space = in_time = None
        if self.config.use_rope:
            angles = self.positions.rotation_in_space(sites.rows, sites.columns, x_BTSD.device)
            in_space = RotaryTable(*(sites.cut(part, dim=0) for part in angles))
            in_time = self.positions.rotation_in_time(x_BTSD.shape[1], x_BTSD.device)
        pairs = zip(self.transformer_blocks, self.temporal_transformer_blocks, strict=True)
        for i, (in_frames, among_frames) in enumerate(pairs):
            kept_here = kept[in_frames.attn1.compress > 1]
            x_BTSD = self.run_block(
                in_frames, x_BTSD, modulation_B6D, sites, text.for_block(i), text.key_lengths, kept_here, in_space
            )
            if not is_temporal:
                continue
            if i == 0 and has_frame_table:
                x_BTSD = x_BTSD + self.positions.in_time(like=x_BTSD)
            x_BTSD = self.run_block(among_frames, x_BTSD, modulation_B6D, sites, in_time)
        return x_BTSD

    def denoiser(
        self,
        y: Tensor,
        mask: Tensor | None = None,
        *,
        with_variance: bool = False,
        sequence: SequenceShards | None = None,
        **ignored: Any,
    ) -> Denoiser:
        """A function (x, timestep, x_mask=None) -> noise for one sampling run, with all that is constant done once.

        Shapes: y (R, 1, L, caption_channels) with mask (rows dividing R, L); x (B, C, T, H, W), timestep (B,), R a
        multiple of B: x serves each of the R / B parts of the text. Returns fp32 (R, C, T, H, W), or the variance's
        channels too. A clip of one frame is an image, for which temporal attention is off. `sequence` as in `forward`.
        Errors: ValueError for an x_mask, since no frame can be given, and for shapes that do not fit.
        """
        text = self.prepare_text(y, mask)
        num_channels = None if with_variance else self.config.in_channels

        def noise(x: Tensor, timestep: Tensor, x_mask: Tensor | None = None) -> Tensor:
            if x_mask is not None:
                raise ValueError(
                    "LatteT2V: x_mask must be None, the model can't be given frames, "
                    f"got a tensor of shape {tuple(x_mask.shape)}"
                )
            options = {"num_channels": num_channels, "sequence": sequence}
            return self.predict(x, timestep, text, is_temporal=x.shape[2] > 1, **options)

        return noise

    def text_readers(self) -> list[TextAttention]:
        return [block.attn2 for block in self.transformer_blocks]

    def embed_text(self, y: Tensor, mask: Tensor | None = None) -> TextContext:
        """(R, 1, L, caption_channels) to hidden size, selected tokens first."""
        check_captions(self.config, y)
        if mask is not None:
            mask = _all_where_none(mask != 0)
        text = select_tokens(y.squeeze(1).to(self.pos_embed.proj.weight.dtype), mask)
        return replace(text, tokens=self.caption_projection(text.tokens))

    def _kept_patches(self, mask: Tensor | None, sites: Sites) -> tuple[Kept | None, Kept | None]:
        """A patch counts if any of its latents does, and a compressed one if any of its patches does."""
        if mask is None:
            return None, None
        if mask.ndim == 2:
            return _kept(mask, sites), None
        patches = F.max_pool2d((mask != 0).float(), self.config.patch_size)
        kept, factor = _kept(patches.flatten(1), sites), self.config.compress_kv_factor
        return kept, _kept(F.max_pool2d(patches, factor).flatten(1), sites) if factor > 1 else None


def _rows(tensor: Tensor | None, start: int, stop: int | None = None) -> Tensor | None:
    """Entries start:stop of the second axis, as rows of a batch: (B, *) -> (B * entries, *)."""
    return None if tensor is None else tensor[:, start:stop].flatten(0, 1)


def _kept(mask_RL: Tensor, sites: Sites) -> Kept | None:
    """None where all are kept."""
    mask_RL = _all_where_none(mask_RL != 0)
    kept = kept_tokens(mask_RL)
    if kept.lengths is None and kept.num_tokens == mask_RL.shape[1]:
        return None
    return kept if sites.are_here else mask_RL


def _all_where_none(mask_RL: Tensor) -> Tensor:
    """Upstream lowers masked scores by 10,000, which changes nothing for a row that has no others."""
    return mask_RL | ~mask_RL.any(dim=-1, keepdim=True)
