"""Overlapping tiles joined by linear cross-fades."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from opensora_kernels import _triton, backends
from opensora_kernels.checks import check_float, check_same_device, check_shape
from opensora_kernels.registration import call, register_op

from . import reference

__all__ = ["blend_tiles"]


def blend_tiles(
    tiles: Sequence[Sequence[Tensor]],
    *,
    overlap: tuple[int, int],
    stride: tuple[int, int] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Rows of tiles joined into one picture, b[y] = a[y - e] (1 - y/e) + b[y] y/e over the e lines where they overlap.

    e is `overlap` or the size of the smaller tile. A tile is faded over the tile above it, then over the tile to its
    left, both already faded themselves; then its first `stride` rows and columns are kept.
    Shapes: every tile (..., h, w), the leading axes the same in all, h the same along a row and w along a column;
    returns (..., sum of min(h, stride), sum of min(w, stride)) in the tiles' dtype, channels_last_3d if the first tile
    is, else contiguous.
    Units: `overlap` and `stride` (rows, columns) in the tiles' own pixels (or latents); stride is the distance between
    neighbouring tiles, None the first tile's size less the overlap.
    `out` receives the result (no gradient then); without it, gradients flow to all tiles.
    Numbers: each product is rounded to the tiles' dtype, then the sum; in fp32, GPUs may round both at once.
    Errors: TypeError for a dtype that is not floating-point or differs; ValueError for rows of different lengths,
    tiles that do not line up, another device, a negative overlap, a stride below 1, an `out` of another shape or one
    for tiles that want gradients.
    Source: AutoencoderKL.tiled_decode of diffusers 0.42 and of Open-Sora-Plan v1.1.0 (modeling_causalvae.py).
    """
    op = "blend_tiles"
    flat = _check_tiles(tiles)
    if min(overlap) < 0:
        raise ValueError(f"{op}: overlap must be at least 0, got {tuple(overlap)}")
    first = flat[0]
    steps = [first.shape[-2] - overlap[0], first.shape[-1] - overlap[1]] if stride is None else list(stride)
    if min(steps) < 1:
        raise ValueError(f"{op}: stride must be at least 1, got {tuple(steps)} for overlap {tuple(overlap)}")
    arguments = (flat, len(tiles[0]), list(overlap), steps)
    if out is None:
        return call(op, *arguments)

    size = reference.blended_size(flat, len(tiles[0]), steps)
    check_shape(op, "out", out, (*first.shape[:-2], *size), "(..., H, W)")
    if out.dtype != first.dtype:
        raise TypeError(f"{op}: out must have the tiles' dtype {first.dtype}, got {out.dtype}")
    check_same_device(op, tile=first, out=out)
    if torch.is_grad_enabled() and any(tile.requires_grad for tile in flat):
        raise ValueError(f"{op}: out must be None for tiles that want gradients, got a tensor")
    # torch.compile traces PyTorch's own operations into a given tensor, but no launch outside a registered operator
    if backends.choose(op, *arguments) == "triton" and not torch.compiler.is_compiling():
        from . import triton_kernel  # imports Triton

        return triton_kernel.fill(out, *arguments)
    return reference.fill(out, *arguments)


def _why_not_triton(tiles: list[Tensor], num_columns: int, overlap: list[int], stride: list[int]) -> str | None:
    sizes = {"height": [tile.shape[-2] for tile in tiles[::num_columns]]}
    sizes["width"] = [tile.shape[-1] for tile in tiles[:num_columns]]
    for (axis, of_tiles), lines in zip(sizes.items(), overlap, strict=True):
        for before, size, after in zip(of_tiles, of_tiles[1:], of_tiles[2:], strict=False):
            if size < min(before, size, lines) + min(size, after, lines):
                return f"a tile of {axis} {size} overlaps both neighbours by {lines}, and the kernel blends four tiles"
    return None


def _check_tiles(tiles: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    op = "blend_tiles"
    if not tiles or not tiles[0] or any(len(row) != len(tiles[0]) for row in tiles):
        raise ValueError(f"{op}: tiles must be rows of one length >= 1, got rows of {[len(row) for row in tiles]}")
    first = tiles[0][0]
    check_float(op, "tiles", first)
    if first.dim() < 2:
        raise ValueError(f"{op}: tiles must have shape (..., h, w), got {tuple(first.shape)}")
    for index, row in enumerate(tiles):
        for column, tile in enumerate(row):
            name = f"tiles[{index}][{column}]"
            shape = (*first.shape[:-2], row[0].shape[-2], tiles[0][column].shape[-1])
            check_shape(op, name, tile, shape, "(..., h, w)")
            if tile.dtype != first.dtype:
                raise TypeError(f"{op}: {name} must have the first tile's dtype {first.dtype}, got {tile.dtype}")
            check_same_device(op, **{"tiles[0][0]": first, name: tile})
    return [tile for row in tiles for tile in row]


register_op(
    "blend_tiles",
    "(Tensor[] tiles, int num_columns, int[] overlap, int[] stride) -> Tensor",
    reference.blend_tiles,
)
_triton.register("blend_tiles", why_not=_why_not_triton)
