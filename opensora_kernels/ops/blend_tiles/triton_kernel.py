"""Tiles joined by linear cross-fades in Triton: one launch for each tile, which writes what is kept of it.

Where four tiles meet, a pixel comes from four of them: the tile's own, the one above and the one to the left, both of
which were faded over the one at the corner first. Nothing faded is ever written for the next tile to read.

Axes: A and D the leading axes, N = A * D, H and W height and width, E the elements of a row: its pixels or, in tiles
with channels last, its pixels times channels.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from opensora_kernels._triton import launch
from opensora_kernels.tuning import configuration

from .reference import empty_picture, picture_format


def forward(tiles: list[Tensor], num_columns: int, overlap: list[int], stride: list[int]) -> Tensor:
    return fill(empty_picture(tiles, num_columns, stride), tiles, num_columns, overlap, stride)


def fill(out: Tensor, tiles: list[Tensor], num_columns: int, overlap: list[int], stride: list[int]) -> Tensor:
    """Write the joined tiles into `out`, which may be some frames of a longer clip."""
    memory_format = picture_format(tiles[0])
    out_ADHE = _lines(out, memory_format)
    if out_ADHE is None:
        return out.copy_(forward(tiles, num_columns, overlap, stride))
    tiles_NHE = [_dense_lines(tile, memory_format) for tile in tiles]
    inner = _num_inner(tiles[0], memory_format)
    rows, columns = _axes(tiles, num_columns, overlap, stride)
    tile = _tile("forward", tiles[0])
    for index, tile_NHE in enumerate(tiles_NHE):
        i, j = divmod(index, num_columns)
        above, left = index - num_columns if i else index, index - 1 if j else index
        corner = above - 1 if j else above
        row, column = rows[i], columns[j]
        num_planes = tile_NHE.shape[0]
        launch(
            _blend_tiles_forward_kernel,
            (num_planes * triton.cdiv(row.kept, tile["BLOCK_H"]) * triton.cdiv(column.kept * inner, tile["BLOCK_E"]),),
            tile_NHE, tiles_NHE[above], tiles_NHE[left], tiles_NHE[corner], out_ADHE,
            row.size, column.size * inner, rows[max(i - 1, 0)].size, columns[max(j - 1, 0)].size * inner,
            row.fade, column.fade * inner, row.kept, column.kept * inner, row.start, column.start * inner,
            out_ADHE.shape[1], *out_ADHE.stride()[:3],
            INNER=inner, **tile,
        )  # fmt: skip
    return out


def backward(
    grads: list[Tensor | None],
    wanted: list[bool],
    saved: list[Tensor],
    tiles: list[Tensor],
    num_columns: int,
    overlap: list[int],
    stride: list[int],
) -> list[Any]:
    memory_format = picture_format(tiles[0])
    grad_ADHE = _lines(grads[0], memory_format)
    if grad_ADHE is None:
        grad_ADHE = _lines(grads[0].contiguous(memory_format=memory_format), memory_format)
    inner = _num_inner(tiles[0], memory_format)
    rows, columns = _axes(tiles, num_columns, overlap, stride)
    nothing = Along(0, 0, 0, 0)  # beyond the last row and column
    rows, columns = [*rows, nothing], [*columns, nothing]
    tile = _tile("backward", tiles[0])
    found = []
    for index, value in enumerate(tiles):
        i, j = divmod(index, num_columns)
        found.append(torch.empty(value.shape, dtype=value.dtype, device=value.device, memory_format=memory_format))
        grad_NHE = _dense_lines(found[-1], memory_format)
        num_planes, height, width = grad_NHE.shape
        launch(
            _blend_tiles_backward_kernel,
            (num_planes * triton.cdiv(height, tile["BLOCK_H"]) * triton.cdiv(width, tile["BLOCK_E"]),),
            grad_ADHE, grad_NHE, height, width,
            rows[i].fade, columns[j].fade * inner, rows[i + 1].fade, columns[j + 1].fade * inner,
            rows[i].kept, columns[j].kept * inner, rows[i + 1].kept, columns[j + 1].kept * inner,
            rows[i].start, columns[j].start * inner, grad_ADHE.shape[1], *grad_ADHE.stride()[:3],
            INNER=inner, **tile,
        )  # fmt: skip
    return [found, None, None, None]


class Along(NamedTuple):
    """One row or column of tiles along its axis, in pixels: its size, how much of it is faded over the one before, how
    much is kept, and where that starts in the picture."""

    size: int
    fade: int
    kept: int
    start: int


def _axes(
    tiles: list[Tensor], num_columns: int, overlap: list[int], stride: list[int]
) -> tuple[list[Along], list[Along]]:
    """Rows and columns."""
    sizes = [tile.shape[-2] for tile in tiles[::num_columns]], [tile.shape[-1] for tile in tiles[:num_columns]]
    return tuple(_along(*axis) for axis in zip(sizes, overlap, stride, strict=True))


def _along(sizes: list[int], overlap: int, stride: int) -> list[Along]:
    fades = [0, *(min(before, size, overlap) for before, size in pairwise(sizes))]
    kept = [min(size, stride) for size in sizes]
    starts = [sum(kept[:index]) for index in range(len(sizes))]
    return [Along(*values) for values in zip(sizes, fades, kept, starts, strict=True)]


def _lines(picture: Tensor, memory_format: torch.memory_format) -> Tensor | None:
    """picture (..., H, W) as a view (A, D, H, E) with the elements of a line side by side, None if it has none."""
    is_last = memory_format is torch.channels_last_3d
    x = picture.permute(0, 2, 3, 4, 1) if is_last else picture[..., None]  # (..., H, W, 1 or C)
    *leading, height, width, inner = x.shape
    shape = (math.prod(leading[:-1]), leading[-1] if leading else 1, height, width * inner)
    try:
        lines = x.view(shape)
    except RuntimeError:
        return None
    return lines if lines.stride(3) == 1 or lines.shape[3] == 1 else None


def _dense_lines(tile: Tensor, memory_format: torch.memory_format) -> Tensor:
    """tile (..., H, W) as (N, H, E) without gaps: a view of tiles in `memory_format`, else of a copy."""
    return _lines(tile.contiguous(memory_format=memory_format), memory_format).flatten(0, 1)


def _num_inner(tile: Tensor, memory_format: torch.memory_format) -> int:
    """Elements of a pixel that lie side by side."""
    return int(tile.shape[1]) if memory_format is torch.channels_last_3d else 1


def _tile(direction: str, x: Tensor) -> dict[str, Any]:
    # Cache lines of bf16, and a divisor of the 192 lines that tilings by 256 and 64 keep
    default = {"BLOCK_H": 32, "BLOCK_E": 64, "num_warps": 4}
    return configuration("blend_tiles", f"{direction} {x.dtype}", default, x.device)


@triton.jit
def _blend_tiles_forward_kernel(
    tile_ptr, above_ptr, left_ptr, corner_ptr, out_ptr,
    height, width, height_above, width_left, fade_h, fade_e, kept_h, kept_e, top, left, num_inner_planes,
    stride_oa, stride_od, stride_oh,
    INNER: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    plane, first_h, first_e = _locate(kept_h, kept_e, BLOCK_H, BLOCK_E)
    offs_h, offs_e = first_h + tl.arange(0, BLOCK_H)[:, None], first_e + tl.arange(0, BLOCK_E)[None, :]
    mask = (offs_h < kept_h) & (offs_e < kept_e)
    out = tl.load(tile_ptr + (plane * height + offs_h) * width + offs_e, mask=mask, other=0.0)
    above_h, left_e = plane * height_above + height_above - fade_h + offs_h, width_left - fade_e + offs_e
    is_below, is_beside = offs_h < fade_h, offs_e < fade_e
    corner_ptrs, mask_corner = corner_ptr + above_h * width_left + left_e, mask & is_below & is_beside
    pixel, fade_w = offs_e // INNER, fade_e // INNER
    # Blocks without a fade read one tile, those with one fade two; only those with both read the corner (twice).
    if first_h < fade_h:
        above = tl.load(above_ptr + above_h * width + offs_e, mask=mask & is_below, other=0.0)
        if first_e < fade_e:
            corner = tl.load(corner_ptrs, mask=mask_corner, other=0.0)
            above = tl.where(is_beside, _faded(corner, above, pixel, fade_w), above)
        out = tl.where(is_below, _faded(above, out, offs_h, fade_h), out)
    if first_e < fade_e:
        left_ptrs = left_ptr + (plane * height + offs_h) * width_left + left_e
        beside = tl.load(left_ptrs, mask=mask & is_beside, other=0.0)
        if first_h < fade_h:
            corner = tl.load(corner_ptrs, mask=mask_corner, other=0.0)
            beside = tl.where(is_below, _faded(corner, beside, offs_h, fade_h), beside)
        out = tl.where(is_beside, _faded(beside, out, pixel, fade_w), out)
    out_ptr += plane // num_inner_planes * stride_oa + plane % num_inner_planes * stride_od
    tl.store(out_ptr + (top + offs_h).to(tl.int64) * stride_oh + left + offs_e, out, mask=mask)


@triton.jit
def _blend_tiles_backward_kernel(
    grad_ptr, grad_tile_ptr, height, width, fade_h, fade_e, fade_below, fade_right, kept_h, kept_e, kept_below,
    kept_right, top, left, num_inner_planes, stride_ga, stride_gd, stride_gh,
    INNER: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """A pixel's gradient is the sum of what it gave its own tile and those below, to the right and at that corner, each
    weighted as in the forward pass. Over the tile below it was itself faded first: in the columns of its own fade its
    weight counts twice."""
    plane, first_h, first_e = _locate(height, width, BLOCK_H, BLOCK_E)
    offs_h, offs_e = first_h + tl.arange(0, BLOCK_H)[:, None], first_e + tl.arange(0, BLOCK_E)[None, :]
    grad_ptr += plane // num_inner_planes * stride_ga + plane % num_inner_planes * stride_gd
    share_h = tl.where(offs_h < fade_h, _share(offs_h, fade_h), 1.0)
    share_e = tl.where(offs_e < fade_e, _share(offs_e // INNER, fade_e // INNER), 1.0)
    is_kept_h, is_kept_e = offs_h < kept_h, offs_e < kept_e
    lines = (top + offs_h).to(tl.int64) * stride_gh + left
    total = tl.load(grad_ptr + lines + offs_e, mask=is_kept_h & is_kept_e, other=0.0).to(tl.float32) * share_h * share_e

    offs_below, offs_right = offs_h - (height - fade_below), offs_e - (width - fade_right)
    is_below = (offs_below >= 0) & (offs_below < kept_below)
    is_right = (offs_right >= 0) & (offs_right < kept_right)
    rest_h = 1.0 - _share(offs_below, fade_below)
    share_right = _share(offs_right // INNER, fade_right // INNER)
    lines_below = (top + kept_h + offs_below).to(tl.int64) * stride_gh + left
    below = tl.load(grad_ptr + lines_below + offs_e, mask=is_below & is_kept_e, other=0.0).to(tl.float32)
    right = tl.load(grad_ptr + lines + kept_e + offs_right, mask=is_right & is_kept_h, other=0.0).to(tl.float32)
    corner = tl.load(grad_ptr + lines_below + kept_e + offs_right, mask=is_below & is_right, other=0.0).to(tl.float32)
    total += below * rest_h * share_e * share_e
    total += right * (1.0 - share_right) * share_h
    total += corner * rest_h * (1.0 - share_right) * (1.0 + share_right)
    mask = (offs_h < height) & (offs_e < width)
    grad_tile_ptrs = grad_tile_ptr + (plane * height + offs_h) * width + offs_e
    tl.store(grad_tile_ptrs, total.to(grad_tile_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _locate(num_lines, num_elements, BLOCK_H: tl.constexpr, BLOCK_E: tl.constexpr):
    """This program's plane, its first line and its first element of a line."""
    num_blocks_e = tl.cdiv(num_elements, BLOCK_E)
    num_blocks = tl.cdiv(num_lines, BLOCK_H) * num_blocks_e
    block = tl.program_id(0) % num_blocks
    plane = (tl.program_id(0) // num_blocks).to(tl.int64)
    return plane, block // num_blocks_e * BLOCK_H, block % num_blocks_e * BLOCK_E


@triton.jit
def _faded(old, new, line, num_lines):
    """old (1 - line/num_lines) + new line/num_lines; each product is rounded, then the sum."""
    old_part = (old.to(tl.float32) * _share(num_lines - line, num_lines)).to(old.dtype)
    new_part = (new.to(tl.float32) * _share(line, num_lines)).to(old.dtype)
    return (old_part.to(tl.float32) + new_part.to(tl.float32)).to(old.dtype)


@triton.jit
def _share(line, num_lines):
    """line / num_lines, correctly rounded as the reference's is; of no lines at all, any number."""
    return tl.div_rn(line.to(tl.float32), tl.maximum(num_lines, 1).to(tl.float32))
