"""Embedders, attention and blocks of LatteT2V, with upstream's parameter names.

Axes: B batch, C latent channels, T frames, S sites of a frame (rows x columns of patches), L tokens, D hidden size,
N heads, K head size.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opensora.config import LatteT2VConfig
from opensora.models.layers import RotaryTable, linear_gelu, sinusoid
from opensora.models.patches import PatchEmbed3D, Sites
from opensora.models.token_masks import KeptTokens
from opensora_kernels import attention, gate_residual, modulate, qk_norm_attention, qk_norm_rope

Kept = KeptTokens | Tensor  # which keys attention reads; where sites are spread over ranks, a mask of all of them


class FramePatchEmbed(PatchEmbed3D):
    """Patches of single frames: `proj` is a Conv2d, whose weights lie as those of a Conv3d over one frame."""

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int) -> None:
        super().__init__((1, patch_size, patch_size), in_channels, hidden_size)
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)


class TimestepProjection(nn.Module):
    """Timesteps in [0, 1000], fractions allowed, (B,) -> (B, D)."""

    frequency_size = 256

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(self.frequency_size, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, timestep_B: Tensor) -> Tensor:
        features = sinusoid(timestep_B, self.frequency_size).to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(features)))


class TimestepModulation(nn.Module):
    """The timestep's embedding (B, D), which the output reads, and what all blocks add to their tables (B, 6, D)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.emb = nn.ModuleDict({"timestep_embedder": TimestepProjection(dim)})
        self.linear = nn.Linear(dim, 6 * dim)

    def forward(self, timestep_B: Tensor) -> tuple[Tensor, Tensor]:
        embedding_BD = self.emb["timestep_embedder"](timestep_B)
        return embedding_BD, self.linear(F.silu(embedding_BD)).unflatten(-1, (6, -1))


class CaptionProjection(nn.Module):
    """Text features to hidden size. `y_embedding` is saved with every released model and read by none."""

    def __init__(self, caption_channels: int, dim: int, num_tokens: int = 120) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(caption_channels, dim)
        self.linear_2 = nn.Linear(dim, dim)
        self.register_buffer("y_embedding", torch.randn(num_tokens, caption_channels) / caption_channels**0.5)

    def forward(self, y: Tensor) -> Tensor:
        return self.linear_2(linear_gelu(self.linear_1, y))


class FeedForward(nn.Module):
    """Linear, GELU (tanh form), linear."""

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        widen = nn.ModuleDict({"proj": nn.Linear(dim, 4 * dim)})
        self.net = nn.ModuleList([widen, nn.Dropout(dropout), nn.Linear(4 * dim, dim)])

    def forward(self, x: Tensor) -> Tensor:
        widen, dropout, narrow = self.net
        return narrow(dropout(linear_gelu(widen["proj"], x)))


class Attention(nn.Module):
    """The projections that attention of either kind has."""

    def __init__(self, config: LatteT2VConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        dim, bias = self.num_heads * config.attention_head_dim, config.attention_bias
        self.to_q = nn.Linear(dim, dim, bias=bias)
        self.to_k = nn.Linear(dim, dim, bias=bias)
        self.to_v = nn.Linear(dim, dim, bias=bias)
        self.to_out = nn.Sequential(nn.Linear(dim, dim), nn.Dropout(config.dropout))

    def heads(self, linear: nn.Linear, x: Tensor) -> Tensor:
        """(*, D) -> (*, N, K)."""
        return linear(x).unflatten(-1, (self.num_heads, -1))


class TextAttention(Attention):
    """Every token of a clip attends to the text of its own sample: no norm, no gate."""

    def keys_values(self, tokens_BLD: Tensor) -> tuple[Tensor, Tensor]:
        """Projected text, each (B, L, N, K)."""
        return self.heads(self.to_k, tokens_BLD), self.heads(self.to_v, tokens_BLD)

    def forward(self, x_BLD: Tensor, text: Tensor | tuple[Tensor, Tensor], key_lengths: Tensor | None) -> Tensor:
        """`text` is (B, L', D), or what `keys_values` made of it."""
        k, v = text if isinstance(text, tuple) else self.keys_values(text)
        return self.to_out(attention(self.heads(self.to_q, x_BLD), k, v, key_lengths=key_lengths).flatten(-2))


class SelfAttention(Attention):
    """Attention along one axis of (B, T, S, D), which is read through strides and never permuted in memory.

    `axis="space"` attends among the sites of a frame, `axis="time"` among the frames of a site. With `compress` > 1,
    keys and values come from a strided depthwise convolution along that axis, normalised with weights.
    """

    def __init__(self, config: LatteT2VConfig, axis: Literal["space", "time"], compress: int) -> None:
        super().__init__(config)
        self.axis, self.compress = axis, compress
        if compress > 1:
            dim = self.to_q.in_features
            convolution, num_taps = (nn.Conv2d, compress**2) if axis == "space" else (nn.Conv1d, compress)
            self.sr = convolution(dim, dim, kernel_size=compress, stride=compress, groups=dim)
            nn.init.constant_(self.sr.weight, 1 / num_taps)
            nn.init.zeros_(self.sr.bias)
            self.norm = nn.LayerNorm(dim)

    def forward(self, x_BTSD: Tensor, sites: Sites, kept: Kept | None, rope: RotaryTable | None) -> Tensor:
        """`kept` selects among the keys of each frame, of all B*T frames; `rope` turns the attended axis."""
        sources = x_BTSD if self.compress == 1 else self.norm(self._compressed(x_BTSD, sites))
        q, k, v = self.heads(self.to_q, x_BTSD), self.heads(self.to_k, sources), self.heads(self.to_v, sources)
        if self.axis == "time":
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        elif rope is not None:
            q, k = _row_before_column(q), _row_before_column(k)
        if self.axis == "time" or sites.are_here:
            out = self._attend(q, k, v, kept, rope)
        else:
            out = self._attend_among_ranks(q, k, v, sites, kept, rope)
        if self.axis == "time":
            out = out.transpose(1, 2)
        # Contiguous, or the bias is added in a pass of its own.
        return self.to_out(out.flatten(-2).contiguous())

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, kept: KeptTokens | None, rope: RotaryTable | None) -> Tensor:
        """Attention over the third axis of (B, T, S, N, K) or (B, S, T, N, K)."""
        cos, sin = rope if rope is not None else (None, None)
        if kept is None and self.compress == 1:
            return qk_norm_attention(q, k, v, cos=cos, sin=sin, rope_layout="half")
        q, k = qk_norm_rope(q, k, cos=cos, sin=sin, rope_layout="half")
        if kept is None:
            return attention(q, k, v)
        k, v = (kept.of(x.flatten(0, 1)).unflatten(0, x.shape[:2]) for x in (k, v))
        key_lengths = None if kept.lengths is None else kept.lengths.unflatten(0, q.shape[:2])
        return attention(q, k, v, key_lengths=key_lengths)

    def _attend_among_ranks(
        self, q: Tensor, k: Tensor, v: Tensor, sites: Sites, mask: Tensor | None, rope: RotaryTable | None
    ) -> Tensor:
        cos, sin = rope if rope is not None else (None, None)
        key_mask = None if mask is None else mask.unflatten(0, q.shape[:2])
        num_keys = sites.num_windows(self.compress)
        rotation = {"cos": cos, "sin": sin, "rope_layout": "half"}
        return sites.shards.attention(
            q, k, v, sequence_length=sites.num, num_keys=num_keys, key_mask=key_mask, **rotation
        )

    def _compressed(self, x_BTSD: Tensor, sites: Sites) -> Tensor:
        """(B, T, S', D) or (B, T', S, D): convolutions over a view whose channels lie last in memory."""
        factor = self.compress
        if self.axis == "space":
            if sites.are_here:
                return self._windows(x_BTSD, sites.rows, self.sr.bias)
            # Each rank takes its own sites' part of every window: a windows' sum is less to send than its sites.
            lines, before, after = sites.padding_to_windows(factor)
            out_BTSD = self._windows(F.pad(x_BTSD, (0, 0, before, after)), lines, None)
            out_BTSD = F.pad(out_BTSD, (0, 0, *sites.padding_of_windows(factor)))
            return sites.shards.sum(out_BTSD, dim=2) + self.sr.bias.to(out_BTSD.dtype)
        if x_BTSD.shape[1] % 2:
            x_BTSD = torch.cat([x_BTSD[:, :1].expand(-1, factor - 1, -1, -1), x_BTSD], dim=1)
        out_BDTS = F.conv2d(
            x_BTSD.permute(0, 3, 1, 2),
            self.sr.weight[..., None],
            self.sr.bias,
            stride=(factor, 1),
            groups=self.sr.groups,
        )
        return out_BDTS.permute(0, 2, 3, 1)

    def _windows(self, x_BTSD: Tensor, rows: int, bias: Tensor | None) -> Tensor:
        x_BHWD = x_BTSD.flatten(0, 1).unflatten(1, (rows, -1))
        out_BDHW = F.conv2d(
            x_BHWD.permute(0, 3, 1, 2), self.sr.weight, bias, stride=self.compress, groups=self.sr.groups
        )
        return out_BDHW.permute(0, 2, 3, 1).flatten(1, 2).unflatten(0, x_BTSD.shape[:2])


def _row_before_column(x: Tensor) -> Tensor:
    """Heads whose first half turns with the row and whose second with the column, each in pairs half a half apart, as
    heads whose pairs lie half a head apart. Queries and keys in the same new order have the same products."""
    return x.unflatten(-1, (2, 2, -1)).transpose(-3, -2).flatten(-3)


class SpatialBlock(nn.Module):
    """Self-attention in each frame, attention to the text, feed-forward; the first and last gated by the timestep."""

    def __init__(self, config: LatteT2VConfig, compress: int) -> None:
        super().__init__()
        dim, self.eps = config.num_attention_heads * config.attention_head_dim, config.norm_eps
        self.attn1 = SelfAttention(config, "space", compress)
        self.attn2 = TextAttention(config)
        self.ff = FeedForward(dim, config.dropout)
        self.scale_shift_table = nn.Parameter(torch.randn(6, dim) / dim**0.5)

    def forward(
        self,
        x_BTSD: Tensor,
        modulation_B6D: Tensor,
        sites: Sites,
        text: Tensor | tuple[Tensor, Tensor],
        key_lengths: Tensor | None,
        kept: Kept | None = None,
        rope: RotaryTable | None = None,
    ) -> Tensor:
        conditions = (self.scale_shift_table + modulation_B6D).unbind(1)
        shift_attn, scale_attn, gate_attn, shift_ff, scale_ff, gate_ff = conditions
        axes, x = x_BTSD.shape[1:3], x_BTSD.flatten(1, 2)
        h = modulate(x, shift_attn, scale_attn, eps=self.eps).unflatten(1, axes)
        x = gate_residual(x, self.attn1(h, sites, kept, rope).flatten(1, 2), gate_attn)
        x = x + self.attn2(x, text, key_lengths)
        h = self.ff(modulate(x, shift_ff, scale_ff, eps=self.eps))
        return gate_residual(x, h, gate_ff).unflatten(1, axes)


class TemporalBlock(nn.Module):
    """Self-attention at each site among its frames, feed-forward; both gated by the timestep."""

    def __init__(self, config: LatteT2VConfig, compress: int) -> None:
        super().__init__()
        dim, self.eps = config.num_attention_heads * config.attention_head_dim, config.norm_eps
        self.attn1 = SelfAttention(config, "time", compress)
        self.ff = FeedForward(dim, config.dropout)
        self.scale_shift_table = nn.Parameter(torch.randn(6, dim) / dim**0.5)

    def forward(self, x_BTSD: Tensor, modulation_B6D: Tensor, sites: Sites, rope: RotaryTable | None = None) -> Tensor:
        conditions = (self.scale_shift_table + modulation_B6D).unbind(1)
        shift_attn, scale_attn, gate_attn, shift_ff, scale_ff, gate_ff = conditions
        axes, x = x_BTSD.shape[1:3], x_BTSD.flatten(1, 2)
        h = modulate(x, shift_attn, scale_attn, eps=self.eps).unflatten(1, axes)
        h = self.attn1(h, sites, None, rope).flatten(1, 2)
        x, h = gate_residual(x, h, gate_attn, shift=shift_ff, scale=scale_ff, eps=self.eps)
        return gate_residual(x, self.ff(h), gate_ff).unflatten(1, axes)
