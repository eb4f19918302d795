"""What is special about blend_tiles: the line-by-line blending of tiled decoders, and pictures cut and joined again."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from opensora_kernels import backends, blend_tiles, use
from tests.ops.accuracy import assert_accurate
from tests.ops.contract import gradients
from tests.ops.properties import DTYPES, Numbers, interpreted

BLOCKS = st.sampled_from([(2, 4), (4, 2), (8, 16)])


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


def small_blocks(block: tuple[int, int]) -> mock._patch:
    from opensora_kernels.ops.blend_tiles import triton_kernel

    constants = {"BLOCK_H": block[0], "BLOCK_E": block[1], "num_warps": 4}
    return mock.patch.object(triton_kernel, "configuration", return_value=constants)


@st.composite
def tilings(draw: st.DrawFn) -> dict[str, Any]:
    """Rows and columns of any sizes, also smaller than the overlap; any stride, or that of tiles cut from a picture."""
    numbers = Numbers(draw(st.integers(0, 2**16)), draw(DTYPES))
    heights, widths = (draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)) for _ in range(2))
    leading = draw(st.sampled_from([(), (2,), (0, 3), (2, 1), (1, 2, 2), (1, 3, 1)]))
    form = draw(st.sampled_from(["dense", "channels_last", "later_frames", "transposed"]))

    def tile(height: int, width: int) -> Tensor:
        if form == "channels_last" and len(leading) == 3:
            return numbers(*leading, height, width).contiguous(memory_format=torch.channels_last_3d)
        if form == "later_frames" and leading:
            return numbers(*leading[:-1], leading[-1] + 1, height, width)[..., 1:, :, :]
        return numbers(*leading, width, height).mT if form == "transposed" else numbers(*leading, height, width)

    overlap = (draw(st.integers(0, min(5, heights[0] - 1))), draw(st.integers(0, min(5, widths[0] - 1))))
    stride = draw(st.one_of(st.none(), st.tuples(st.integers(1, 9), st.integers(1, 9))))
    return {"tiles": [[tile(h, w) for w in widths] for h in heights], "overlap": overlap, "stride": stride}


def is_served(call: dict[str, Any]) -> bool:
    """Whether the kernel serves the call: not where both neighbours of a tile fade into the same pixels of it."""
    reason = backends.why_not("blend_tiles", "triton", *backends.flat_arguments("blend_tiles", **call))
    assert reason is None or "overlaps both neighbours" in reason
    return reason is None


@interpreted
@given(tilings(), BLOCKS, st.booleans())
def test_triton_has_the_bits_of_the_reference(call: dict[str, Any], block: tuple[int, int], has_out: bool):
    with use(blend_tiles="reference"):
        expected = blend_tiles(**call)
    with small_blocks(block), use("triton"):  # preferred, not ordered
        actual = blend_tiles(**call)
        if has_out:
            clip = torch.full((*expected.shape[:-2], expected.shape[-2] + 1, 2 * expected.shape[-1]), torch.nan)
            out = clip.to(expected.dtype)[..., 1:, : expected.shape[-1]]
            assert blend_tiles(**call, out=out) is out
            assert torch.equal(out, expected)
    assert torch.equal(actual, expected)
    axes = [axis for axis in range(actual.dim()) if actual.shape[axis] > 1 and actual.numel()]
    assert [actual.stride(axis) for axis in axes] == [expected.stride(axis) for axis in axes]


@interpreted
@given(tilings(), BLOCKS)
def test_triton_gradients_are_as_accurate_as_those_of_pytorch(call: dict[str, Any], block: tuple[int, int]):
    assume(is_served(call))
    wide = call | {"tiles": [[tile.double() for tile in row] for row in call["tiles"]]}
    with use(blend_tiles="reference"):
        truth, at_same_dtype = gradients("blend_tiles", wide), gradients("blend_tiles", call)
    with small_blocks(block), use(blend_tiles="triton"):
        assert_accurate(gradients("blend_tiles", call), at_same_dtype, truth, "gradients of blend_tiles")


@interpreted
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_out_may_be_frames_of_a_clip_with_channels_last(backend: str):
    tiles = [[tile.contiguous(memory_format=torch.channels_last_3d) for tile in row] for row in cut(
        drawn(2, 3, 2, 14, 11), 8, 6
    )]  # fmt: skip
    expected = blend_tiles(tiles, overlap=(2, 2), stride=(6, 6))
    assert expected.is_contiguous(memory_format=torch.channels_last_3d)
    clip = torch.full((2, 3, 5, 14, 11), torch.nan).contiguous(memory_format=torch.channels_last_3d)
    with use(blend_tiles=backend):
        blend_tiles(tiles, overlap=(2, 2), stride=(6, 6), out=clip[:, :, 1:3])
    assert torch.equal(clip[:, :, 1:3], expected)
    assert clip[:, :, [0, 3, 4]].isnan().all()
