"""Where patches and frames are, as LatteT2V adds it to tokens and, on request, rotates queries and keys by it.

Axes: T frames, S sites (rows x columns of patches), P positions, D hidden size, K head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from opensora.config import LatteT2VConfig
from opensora.models.layers import RotaryTable
from opensora.models.tables import TableCache


class LattePositions:
    """Tables for one configuration and any size of frames. Sines are taken in fp64 on the CPU, as upstream's.

    A grid of patches is stretched to `sample_size[0] / patch_size` along both axes, whatever its shape: upstream's
    stored table for a `sample_size` that is not square has the wrong size, ours is the one it makes for other sizes.
    Source: PKU-YuanGroup/Open-Sora-Plan v1.1.0, opensora/models/diffusion/latte/pos_embed.py.
    """

    def __init__(self, config: LatteT2VConfig) -> None:
        self.dim = config.num_attention_heads * config.attention_head_dim
        self.head_dim, self.num_frames = config.attention_head_dim, config.video_length
        self.base_size = config.sample_size[0] // config.patch_size
        self.space_scale = max(config.sample_size[0] // 64, 1)
        self.time_scale = _time_scale(config)
        self._tables = TableCache()

    def in_space(self, rows: int, columns: int, like: Tensor) -> Tensor:
        """(1, 1, S, D) in the dtype and on the device of `like`: the column's half first, sines before cosines."""

        def make() -> Tensor:
            by_row, by_column = (
                _sine_cosine(_positions(count, count / self.base_size) / self.space_scale, self.dim // 2)
                for count in (rows, columns)
            )
            return _on_grid(by_column[None], by_row[:, None], rows, columns)[None, None].to(like)

        return self._tables.get(("in_space", rows, columns, like.dtype, like.device), make)

    def in_time(self, like: Tensor) -> Tensor:
        """(1, T, 1, D) in the dtype and on the device of `like`, for `video_length` frames and no other number."""

        def make() -> Tensor:
            return _sine_cosine(_positions(self.num_frames, self.time_scale), self.dim)[None, :, None].to(like)

        return self._tables.get(("in_time", like.dtype, like.device), make)

    def rotation_in_space(self, rows: int, columns: int, device: torch.device) -> RotaryTable:
        """Angles (S, K/2) in fp32 of pairs, those of the row before those of the column."""

        def make() -> RotaryTable:
            by_row, by_column = (_angles(count, self.space_scale, self.head_dim // 2) for count in (rows, columns))
            return _rotary_table(_on_grid(by_row[:, None], by_column[None], rows, columns), device)

        return self._tables.get(("rotation_in_space", rows, columns, device), make)

    def rotation_in_time(self, num_frames: int, device: torch.device) -> RotaryTable:
        """Angles (T, K/2) in fp32 of pairs."""

        def make() -> RotaryTable:
            return _rotary_table(_angles(num_frames, self.time_scale, self.head_dim), device)

        return self._tables.get(("rotation_in_time", num_frames, device), make)


def _time_scale(config: LatteT2VConfig) -> float:
    if config.version == "1.0":
        return max(config.video_length // 5, 1)
    if config.interpolation_scale_1d is not None:
        return config.interpolation_scale_1d
    return max(config.video_length // 16, 1)


def _positions(count: int, scale: float) -> Tensor:
    # fp32, as upstream: in fp64 the last digit of a stretched coordinate would differ.
    return torch.arange(count, dtype=torch.float32, device="cpu") / scale


def _sine_cosine(positions_P: Tensor, dim: int) -> Tensor:
    """[sin(p f) | cos(p f)] with f_k = 10000^(-k / (dim/2)), (P,) -> (P, dim) in fp32."""
    exponents = torch.arange(dim // 2, dtype=torch.float64, device="cpu") / (dim / 2)
    angles = positions_P.double()[:, None] / 10000**exponents
    return torch.cat([angles.sin(), angles.cos()], dim=-1).float()


def _angles(count: int, scale: float, dim: int) -> Tensor:
    """floor(p / scale) * 10000^(-2k / dim), (P, dim/2): upstream's scaled positions become whole numbers again, so that
    neighbours share one."""
    frequencies = 1.0 / 10000 ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim)
    return _positions(count, scale).floor()[:, None] * frequencies


def _rotary_table(angles: Tensor, device: torch.device) -> RotaryTable:
    return RotaryTable(angles.cos().to(device), angles.sin().to(device))


def _on_grid(first: Tensor, second: Tensor, rows: int, columns: int) -> Tensor:
    """Two tables, each of rows (rows, 1, F) or columns (1, columns, F), side by side for every site: (S, 2F)."""
    parts = [part.expand(rows, columns, -1) for part in (first, second)]
    return torch.cat(parts, dim=-1).flatten(0, 1)
