"""Parts shared by the STDiT family: embedders, attention, MLP and final layer, with upstream's parameter names.

Axes: B batch, C latent channels, T frames, S sites of a frame (rows x columns of patches), L tokens, D hidden size,
N heads, K head size, G timestep sets (the sample's own t, and t = 0 for frames that are given clean).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from opensora.models.patches import Sites
from opensora.models.tables import TableCache
from opensora.models.token_masks import kept_tokens
from opensora_kernels import attention, gate_residual, modulate, qk_norm_attention, rms_norm

RopeOrder = Literal["norm_rope", "rope_norm"]


class RMSNorm(nn.Module):
    """Holder of a per-head RMS weight; `opensora_kernels.rms_norm` when called by itself."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, eps=self.eps)


class RotaryTable(NamedTuple):
    """cos and sin of every position, both (T, K/2); their dtype is the precision of the rotation."""

    cos: Tensor
    sin: Tensor


class RotaryEmbedding(nn.Module):
    """Frequencies 10000^(-2k/K) of interleaved pairs over the whole head, a state-dict entry as upstream.

    With `exact_dtype`, angles are computed in the dtype of `freqs`: a model moved to bf16 then has the angles its
    weights were trained with (off by 0.08 rad at frame 30, K = 72). Without, they come from the closed form in fp32.
    """

    def __init__(self, dim: int, *, exact_dtype: bool = True, theta: float = 10000.0) -> None:
        super().__init__()
        self.dim, self.theta, self.exact_dtype = dim, theta, exact_dtype
        self.freqs = nn.Parameter(self._frequencies(None), requires_grad=False)

    def _frequencies(self, device: torch.device | None) -> Tensor:
        return 1.0 / self.theta ** (torch.arange(0, self.dim, 2, dtype=torch.float32, device=device) / self.dim)

    def forward(self, num_positions: int) -> RotaryTable:
        freqs = self.freqs if self.exact_dtype else self._frequencies(self.freqs.device)
        angles = torch.arange(num_positions, device=freqs.device, dtype=freqs.dtype)[:, None] * freqs
        return RotaryTable(angles.cos(), angles.sin())


class PositionEmbedding2D(nn.Module):
    """Sine-cosine table of the patch grid, scaled to the pixel size: column half first, sine before cosine.

    Has no parameters or buffers. Tables are kept per (grid, scale, dtype, device) in the instance.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        if dim % 4:
            raise ValueError(f"PositionEmbedding2D: dim must be a multiple of 4, got {dim}")
        self.dim = dim
        self._tables = TableCache()

    def forward(
        self, x: Tensor, rows: int, columns: int, *, scale: float = 1.0, base_size: int | None = None
    ) -> Tensor:
        """(1, rows*columns, dim) in the dtype and on the device of `x`."""
        key = (rows, columns, scale, base_size, x.dtype, x.device)
        return self._tables.get(key, lambda: self._table(x.dtype, x.device, rows, columns, scale, base_size))

    def _table(
        self, dtype: torch.dtype, device: torch.device, rows: int, columns: int, scale: float, base_size: int | None
    ) -> Tensor:
        half = self.dim // 2
        exponents = torch.arange(0, half, 2, dtype=torch.float32, device=device) / half
        # Upstream keeps these in a buffer that follows the model's dtype, so they are rounded to it.
        frequencies = (1.0 / 10000**exponents).to(dtype)

        def positions(count: int) -> Tensor:
            places = torch.arange(count, dtype=torch.float32, device=device) / scale
            return places if base_size is None else places * (base_size / count)

        return grid_table(positions(rows), positions(columns), frequencies).to(dtype)


def sine_table(positions_L: Tensor, frequencies: Tensor) -> Tensor:
    """[sin(p f) | cos(p f)] of every position: (L,), (D/2,) -> (L, D)."""
    angles = positions_L[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def grid_table(rows_R: Tensor, columns_C: Tensor, frequencies: Tensor) -> Tensor:
    """Every site's column, then its row, as `sine_table`: (R,), (C,), (D/4,) -> (1, R*C, D)."""
    by_column = sine_table(columns_C, frequencies)[None].expand(len(rows_R), -1, -1)
    by_row = sine_table(rows_R, frequencies)[:, None].expand(-1, len(columns_C), -1)
    return torch.cat([by_column, by_row], dim=-1).flatten(0, 1)[None]


def sinusoid(values: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """[cos(v f) | sin(v f)] with f_k = max_period^(-k / (dim/2)), in fp32: (...) -> (..., dim)."""
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=values.device) * (-math.log(max_period) / half)
    angles = values.float()[..., None] * exponents.exp()
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepEmbedder(nn.Module):
    """Timesteps in [0, 1000], fractions allowed, (B,) -> (B, D)."""

    frequency_size = 256

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(self.frequency_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, timestep: Tensor) -> Tensor:
        return self.mlp(sinusoid(timestep, self.frequency_size).to(self.mlp[0].weight.dtype))


class SizeEmbedder(TimestepEmbedder):
    """k scalars per sample, embedded one by one and concatenated: (B, k) -> (B, k*D); fewer rows are tiled."""

    def forward(self, scalars: Tensor, batch: int | None = None) -> Tensor:
        if scalars.ndim == 1:
            scalars = scalars[:, None]
        if batch is not None and scalars.shape[0] != batch:
            scalars = scalars.repeat(batch // scalars.shape[0], 1)
        return super().forward(scalars).flatten(1)


class Mlp(nn.Module):
    """fc1, GELU (tanh form), fc2."""

    def __init__(self, in_features: int, hidden_features: int, out_features: int | None = None) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.fc2 = nn.Linear(hidden_features, out_features or in_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(linear_gelu(self.fc1, x))


def linear_gelu(linear: nn.Linear, x: Tensor) -> Tensor:
    """GELU (tanh form) of linear(x)."""
    if not fuses_gelu(x):
        return F.gelu(linear(x), approximate="tanh")
    hidden = torch._addmm_activation(linear.bias, x.flatten(0, -2), linear.weight.t(), use_gelu=True)
    return hidden.unflatten(0, x.shape[:-1])


def fuses_gelu(x: Tensor) -> bool:
    """Whether the matrix product of x may apply GELU as it writes, which spares a pass over the hidden activation."""
    # The operator has no gradient, autocast does not know it, and on other devices it takes the erf form.
    return x.is_cuda and not torch.is_grad_enabled() and not torch.is_autocast_enabled("cuda")


class CaptionEmbedder(nn.Module):
    """Projects text features; while training, replaces whole captions by the null caption `y_embedding`.

    The null caption is a buffer of unprojected features, so it is saved with the model and never trained.
    """

    def __init__(self, caption_channels: int, hidden_size: int, dropout: float, max_length: int) -> None:
        super().__init__()
        self.y_proj = Mlp(caption_channels, hidden_size, hidden_size)
        self.register_buffer("y_embedding", torch.randn(max_length, caption_channels) / caption_channels**0.5)
        self.dropout = dropout

    def forward(self, y: Tensor, generator: Generator | None = None) -> Tensor:
        """(B, 1, L, channels) -> (B, 1, L, D). The draw for dropout is made on `generator`'s device (default CPU)."""
        if self.training and self.dropout > 0:
            y = self._drop(y, generator)
        return self.y_proj(y)

    def _drop(self, y: Tensor, generator: Generator | None) -> Tensor:
        if y.shape[2] > self.y_embedding.shape[0]:
            raise ValueError(
                f"CaptionEmbedder: y must have at most {self.y_embedding.shape[0]} tokens, got {y.shape[2]}"
            )
        device = generator.device if generator is not None else "cpu"
        is_dropped = torch.rand(y.shape[0], device=device, generator=generator) < self.dropout
        null = self.y_embedding[: y.shape[2]].to(y.dtype)
        return torch.where(is_dropped.to(y.device)[:, None, None, None], null, y)


class SelfAttention(nn.Module):
    """Multi-head attention along one axis of (B, T, S, D), with RMS-normed q and k and optional rotation.

    `axis="space"` attends among the sites of a frame, `axis="time"` among the frames of a site. The packed projection
    (B, T, S, 3, N, K) is read in place through strides; no axis is ever permuted in memory.
    """

    def __init__(
        self, dim: int, num_heads: int, *, axis: Literal["space", "time"], qk_norm: bool, order: RopeOrder = "norm_rope"
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"SelfAttention: dim must be a multiple of num_heads={num_heads}, got {dim}")
        self.num_heads, self.axis, self.order = num_heads, axis, order
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = RMSNorm(dim // num_heads) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(dim // num_heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x_BTSD: Tensor, rope: RotaryTable | None = None, sites: Sites | None = None) -> Tensor:
        """`sites`, for axis "space": what x holds of them; all without."""
        q, k, v = self.qkv(x_BTSD).unflatten(-1, (3, self.num_heads, -1)).unbind(3)  # each (B, T, S, N, K)
        if self.axis == "time":
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        out = self.attend(q, k, v, rope, sites)
        if self.axis == "time":
            out = out.transpose(1, 2)
        # Contiguous, or the bias is added in a pass of its own.
        return self.proj(out.flatten(-2).contiguous())

    def attend(self, q: Tensor, k: Tensor, v: Tensor, rope: RotaryTable | None, sites: Sites | None) -> Tensor:
        """Attention over the third axis of (B, T, S, N, K) or (B, S, T, N, K)."""
        weights = (None, None) if isinstance(self.q_norm, nn.Identity) else (self.q_norm.weight, self.k_norm.weight)
        cos, sin = rope if rope is not None else (None, None)
        if sites is None or sites.are_here:
            return qk_norm_attention(q, k, v, *weights, cos=cos, sin=sin, order=self.order)
        return sites.shards.attention(q, k, v, *weights, sequence_length=sites.num, order=self.order)


@dataclass(frozen=True)
class TextContext:
    """A batch of captions as cross-attention reads them, reusable for every step of a sampling run.

    `tokens` (rows, L, D) holds each caption's selected tokens first; `key_lengths` (rows,) counts them, or is None when
    all rows are full; `keys_values`, when precomputed, holds per block the projected keys and values (rows, L, N, K).
    """

    tokens: Tensor
    key_lengths: Tensor | None
    keys_values: tuple[tuple[Tensor, Tensor], ...] | None = None

    def for_block(self, index: int) -> Tensor | tuple[Tensor, Tensor]:
        return self.tokens if self.keys_values is None else self.keys_values[index]


def select_tokens(y_BLD: Tensor, mask: Tensor | None) -> TextContext:
    """Move the tokens with mask != 0 to the front of each row and cut the common rest.

    `mask` (rows, L) with rows dividing B is tiled over B (classifier-free guidance shares the prompts' mask). The
    mask is read on the host once.
    """
    batch, length = y_BLD.shape[:2]
    if mask is None:
        return TextContext(y_BLD, None)
    if mask.ndim != 2 or mask.shape[1] != length or batch % mask.shape[0]:
        raise ValueError(
            f"select_tokens: mask must have shape (rows, {length}) with rows dividing {batch}, got {tuple(mask.shape)}"
        )
    kept = kept_tokens(mask).repeated(batch // mask.shape[0])
    return TextContext(kept.of(y_BLD), None if kept.lengths is None else kept.lengths.to(y_BLD.device))


def unpack_tokens(packed: Tensor, lengths: list[int]) -> TextContext:
    """Text given as one sequence (1, sum of lengths, D) with the length of each row."""
    rows = packed.reshape(-1, packed.shape[-1]).split(lengths)
    tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    if len(set(lengths)) == 1:
        return TextContext(tokens, None)
    return TextContext(tokens, torch.tensor(lengths, device=packed.device))


class CrossAttention(nn.Module):
    """Every image token attends to the text tokens of its own sample. No norms."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_linear = nn.Linear(dim, dim)
        self.kv_linear = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def keys_values(self, tokens_BLD: Tensor) -> tuple[Tensor, Tensor]:
        """Projected text, each (B, L, N, K)."""
        k, v = self.kv_linear(tokens_BLD).unflatten(-1, (2, self.num_heads, -1)).unbind(2)
        return k, v

    def forward(self, x_BLD: Tensor, text: Tensor | tuple[Tensor, Tensor], key_lengths: Tensor | None) -> Tensor:
        """`text` is (B, L', D), or what `keys_values` made of it."""
        k, v = text if isinstance(text, tuple) else self.keys_values(text)
        q = self.q_linear(x_BLD).unflatten(-1, (self.num_heads, -1))
        return self.proj(attention(q, k, v, key_lengths=key_lengths).flatten(-2))


def timestep_sets(table_KD: Tensor, t_GBKD: Tensor) -> list[tuple[Tensor, ...]]:
    """table + t as K conditions (shift, scale, ...), each a tuple of its G sets (B, D)."""
    # unbind, not indexing: the backward pass then stacks once instead of filling zeros for every part taken.
    return list(zip(*(one_BKD.unbind(1) for one_BKD in (table_KD + t_GBKD).unbind(0)), strict=True))


def modulated(x_BLD: Tensor, shift: tuple[Tensor, ...], scale: tuple[Tensor, ...], frame_mask: Tensor | None) -> Tensor:
    """LayerNorm, then the first set's scale and shift where frame_mask is True and the second's elsewhere."""
    if frame_mask is None:
        return modulate(x_BLD, shift[0], scale[0])
    return modulate(x_BLD, shift[0], scale[0], frame_mask=frame_mask, shift0=shift[1], scale0=scale[1])


def gated(x_BLD: Tensor, y_BLD: Tensor, gate: tuple[Tensor, ...], frame_mask: Tensor | None) -> Tensor:
    """x + gate * y with the gate of the frame's timestep set."""
    if frame_mask is None:
        return gate_residual(x_BLD, y_BLD, gate[0])
    return gate_residual(x_BLD, y_BLD, gate[0], frame_mask=frame_mask, gate0=gate[1])


def thinned(gate: tuple[Tensor, ...], drop_path: float) -> tuple[Tensor, ...]:
    """Drop path: a sample's branch is left out with probability `drop_path`. A gate does it free."""
    if drop_path == 0:
        return gate
    keep = 1 - drop_path
    factor = (torch.rand(len(gate[0]), 1, device=gate[0].device) < keep) / keep
    return tuple(one * factor.to(one.dtype) for one in gate)


class FinalLayer(nn.Module):
    """LayerNorm, modulation by table + t, and the projection to patches.

    Frames with x_mask False are normalised and modulated by t, then normalised again and modulated by t = 0: upstream's
    released weights were trained with this, and undoing it moves outputs by O(1).
    """

    def __init__(self, hidden_size: int, num_patch: int, out_channels: int) -> None:
        super().__init__()
        self.num_patch, self.out_channels = num_patch, out_channels
        self.linear = nn.Linear(hidden_size, num_patch * out_channels)
        self.scale_shift_table = nn.Parameter(torch.randn(2, hidden_size) / hidden_size**0.5)

    def forward(
        self, x_BLD: Tensor, t_GBD: Tensor, frame_mask: Tensor | None, *, num_channels: int | None = None
    ) -> Tensor:
        """(B, L, num_patch * channels), of each patch only the first `num_channels` channels when given."""
        shift, scale = timestep_sets(self.scale_shift_table, t_GBD[:, :, None])
        x = modulate(x_BLD, shift[0], scale[0])
        if frame_mask is not None:
            again = modulate(x, shift[1], scale[1])
            is_noised = frame_mask.repeat_interleave(x.shape[1] // frame_mask.shape[1], dim=1)
            x = torch.where(is_noised[..., None], x, again)
        return patch_values(self.linear, x, self.num_patch, num_channels)


def patch_values(linear: nn.Linear, x_BLD: Tensor, num_patch: int, num_channels: int | None) -> Tensor:
    """linear(x), of each patch's channels only the first `num_channels` when given."""
    weight, bias = linear.weight, linear.bias
    if num_channels is not None and num_patch * num_channels != len(weight):
        weight = weight.unflatten(0, (num_patch, -1))[:, :num_channels].flatten(0, 1)
        bias = bias.unflatten(0, (num_patch, -1))[:, :num_channels].flatten()
    return F.linear(x_BLD.to(weight.dtype), weight, bias)
