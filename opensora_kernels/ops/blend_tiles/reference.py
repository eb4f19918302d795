"""Linear cross-fade of overlapping tiles in plain PyTorch: each output pixel is written once."""

from __future__ import annotations

import torch
from torch import Tensor

from opensora_kernels.norms import memory_format


def blend_tiles(tiles: list[Tensor], num_columns: int, overlap: list[int], stride: list[int]) -> Tensor:
    return fill(empty_picture(tiles, num_columns, stride), tiles, num_columns, overlap, stride)


def empty_picture(tiles: list[Tensor], num_columns: int, stride: list[int]) -> Tensor:
    """What the joined tiles fill, in the memory format of the first."""
    first = tiles[0]
    shape = (*first.shape[:-2], *blended_size(tiles, num_columns, stride))
    return torch.empty(shape, dtype=first.dtype, device=first.device, memory_format=picture_format(first))


def picture_format(tile: Tensor) -> torch.memory_format:
    """Channels last for tiles (B, C, T, h, w) with their channels side by side, else contiguous."""
    return memory_format(tile) if tile.dim() == 5 else torch.contiguous_format


def blended_size(tiles: list[Tensor], num_columns: int, stride: list[int]) -> tuple[int, int]:
    """Height and width of the result: every tile gives at most `stride` rows and columns."""
    height = sum(min(tile.shape[-2], stride[0]) for tile in tiles[::num_columns])
    width = sum(min(tile.shape[-1], stride[1]) for tile in tiles[:num_columns])
    return height, width


def fill(out: Tensor, tiles: list[Tensor], num_columns: int, overlap: list[int], stride: list[int]) -> Tensor:
    row_above: list[Tensor] = []
    top = 0
    for first in range(0, len(tiles), num_columns):
        row: list[Tensor] = []
        left = 0
        for tile in tiles[first : first + num_columns]:
            # neighbours are blended before they are used: where four tiles meet, all four count
            if row_above:
                tile = _fade(row_above[len(row)], tile, overlap[0], -2)
            if row:
                tile = _fade(row[-1], tile, overlap[1], -1)
            row.append(tile)
            kept = tile[..., : stride[0], : stride[1]]
            out[..., top : top + kept.shape[-2], left : left + kept.shape[-1]] = kept
            left += kept.shape[-1]
        row_above = row
        top += min(row[0].shape[-2], stride[0])
    return out


def _fade(before: Tensor, tile: Tensor, overlap: int, axis: int) -> Tensor:
    """`tile` with its first lines faded in over the last lines of `before`."""
    num_lines = min(before.shape[axis], tile.shape[axis], overlap)
    if num_lines == 0:
        return tile
    wide = torch.promote_types(tile.dtype, torch.float32)
    shape = (num_lines, 1) if axis == -2 else (num_lines,)
    share = torch.tensor([line / num_lines for line in range(num_lines)], dtype=wide, device=tile.device).view(shape)
    rest = torch.tensor([1 - line / num_lines for line in range(num_lines)], dtype=wide, device=tile.device).view(shape)
    old = before.narrow(axis, before.shape[axis] - num_lines, num_lines)
    new = tile.narrow(axis, 0, num_lines)
    # each product is rounded to the tiles' dtype, as in the chain that blends line by line
    faded = (old * rest).to(tile.dtype) + (new * share).to(tile.dtype)
    return torch.cat([faded, tile.narrow(axis, num_lines, tile.shape[axis] - num_lines)], axis)
