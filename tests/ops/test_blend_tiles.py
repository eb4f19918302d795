"""What is special about blend_tiles: the line-by-line blending of tiled decoders, and pictures cut and joined again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from opensora_kernels import blend_tiles


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def cut(picture: Tensor, size: int, stride: int) -> list[list[Tensor]]:
    """Tiles as a tiled decoder gets them: one starts at every multiple of the stride."""
    return [
        [picture[..., top : top + size, left : left + size] for left in range(0, picture.shape[-1], stride)]
        for top in range(0, picture.shape[-2], stride)
    ]


def line_by_line(tiles: list[list[Tensor]], overlap: int, stride: int) -> Tensor:
    """Blend in place, line by line, above then left, crop and concatenate."""
    tiles = [[tile.clone() for tile in row] for row in tiles]
    rows = []
    for i, row in enumerate(tiles):
        kept = []
        for j, tile in enumerate(row):
            if i > 0:
                above = tiles[i - 1][j]
                extent = min(above.shape[-2], tile.shape[-2], overlap)
                for y in range(extent):
                    old, new = above[..., y - extent, :], tile[..., y, :]
                    tile[..., y, :] = old * (1 - y / extent) + new * (y / extent)
            if j > 0:
                beside = row[j - 1]
                extent = min(beside.shape[-1], tile.shape[-1], overlap)
                for x in range(extent):
                    old, new = beside[..., x - extent], tile[..., x]
                    tile[..., x] = old * (1 - x / extent) + new * (x / extent)
            kept.append(tile[..., :stride, :stride])
        rows.append(torch.cat(kept, -1))
    return torch.cat(rows, -2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("height", "width"), [(8, 8), (14, 9), (7, 20), (5, 6), (24, 19)])
@pytest.mark.parametrize("overlap", [0, 2, 3, 5])
def test_equals_blending_line_by_line_bit_for_bit(height: int, width: int, overlap: int, dtype: torch.dtype):
    stride = 8 - overlap
    cuts = cut(drawn(1, 2, 3, height, width, dtype=dtype), 8, stride)
    tiles = [
        [tile + drawn(*tile.shape, seed=10 * i + j, dtype=dtype) for j, tile in enumerate(row)]
        for i, row in enumerate(cuts)
    ]
    expected = line_by_line(tiles, overlap, stride)
    actual = blend_tiles(tiles, overlap=(overlap, overlap), stride=(stride, stride))
    assert actual.shape[-2:] == (height, width)
    assert torch.equal(actual, expected)


def test_cut_picture_joins_to_itself():
    picture = drawn(2, 3, 21, 17, dtype=torch.float64)
    joined = blend_tiles(cut(picture, 8, 6), overlap=(2, 2), stride=(6, 6))
    torch.testing.assert_close(joined, picture, rtol=0, atol=1e-15 * 8)  # a (1 - r) + a r, twice


def test_default_stride_is_the_first_tile_less_the_overlap():
    tiles = [[drawn(2, 8, 9, seed=3 * i + j) for j in range(3)] for i in range(2)]
    given = blend_tiles(tiles, overlap=(2, 3), stride=(6, 6))
    assert torch.equal(blend_tiles(tiles, overlap=(2, 3)), given)


def test_out_is_filled_completely_and_returned():
    tiles = cut(drawn(1, 3, 14, 11), 8, 6)
    expected = blend_tiles(tiles, overlap=(2, 2), stride=(6, 6))
    clip = torch.full((1, 5, 14, 11), torch.nan)
    out = clip[:, 1:4]
    assert blend_tiles(tiles, overlap=(2, 2), stride=(6, 6), out=out) is out
    assert torch.equal(clip[:, 1:4], expected)
    assert clip[:, [0, 4]].isnan().all()


def test_out_refuses_tiles_that_want_gradients():
    tiles = [[drawn(1, 4, 4).requires_grad_()]]
    with pytest.raises(ValueError, match="out must be None for tiles that want gradients"):
        blend_tiles(tiles, overlap=(0, 0), out=torch.empty(1, 4, 4))


def test_gradients_are_those_of_blending_line_by_line():
    tiles = [[drawn(1, 6, 6, seed=2 * i + j, dtype=torch.float64).requires_grad_() for j in range(2)] for i in range(2)]
    leaves = [tile for row in tiles for tile in row]
    cotangent = drawn(1, 8, 8, seed=9, dtype=torch.float64)
    expected = torch.autograd.grad(line_by_line(tiles, 2, 4), leaves, cotangent)
    actual = torch.autograd.grad(blend_tiles(tiles, overlap=(2, 2)), leaves, cotangent)
    for have, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(have, want, rtol=0, atol=1e-14)
