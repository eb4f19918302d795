"""Tiles and windows: the arithmetic of Open-Sora-Plan's rollback, blending into given memory, and what is run."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from opensora_kernels.vae import Tiling, iterate_tiled, run_tiled

# Pixels to latents, four times smaller in space and every fourth frame; and back.
PIXELS = Tiling(tile=(16, 16), stride=(12, 12), overlap=(1, 1), keep=(3, 3), window=9)
LATENTS = Tiling(tile=(4, 4), stride=(3, 3), overlap=(4, 4), keep=(12, 12), window=3)


def encode(x: Tensor) -> Tensor:
    """Depends on everything that is in x, as a model with norms does."""
    small = x[:, :, ::4, : x.shape[3] // 4 * 4, : x.shape[4] // 4 * 4]
    return small.unflatten(3, (-1, 4)).unflatten(5, (-1, 4)).mean((4, 6)) * (1 + x.mean())


def decode(z: Tensor) -> Tensor:
    frames = torch.cat([z[:, :, :1], z[:, :, 1:].repeat_interleave(4, 2)], 2)
    return frames.repeat_interleave(4, 3).repeat_interleave(4, 4) * (1 + z.mean())


def encoded_size(size: tuple[int, int, int]) -> tuple[int, int, int]:
    return -(-size[0] // 4), size[1] // 4, size[2] // 4


def decoded_size(size: tuple[int, int, int]) -> tuple[int, int, int]:
    return 4 * size[0] - 3, 4 * size[1], 4 * size[2]


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def as_upstream(run, x: Tensor, tiling: Tiling) -> Tensor:
    """Window by window, tile by tile, line by line, as the original does: in place, then crop and concatenate."""
    num_frames, window = x.shape[2], tiling.window
    starts = list(range(0, num_frames, window - 1))
    if len(starts) == 1:
        spans = [(0, num_frames)]
    else:
        spans = [(starts[i], starts[i + 1] + 1) for i in range(len(starts) - 1)]
        if spans[-1][1] < num_frames:
            spans.append((starts[-1], num_frames))
    clips = []
    for start, stop in spans:
        tiles = [
            [
                run(x[:, :, start:stop, i : i + tiling.tile[0], j : j + tiling.tile[1]]).clone()
                for j in range(0, x.shape[4], tiling.stride[1])
            ]
            for i in range(0, x.shape[3], tiling.stride[0])
        ]
        rows = []
        for i, row in enumerate(tiles):
            for j, tile in enumerate(row):
                if i:
                    above = tiles[i - 1][j]
                    extent = min(above.shape[3], tile.shape[3], tiling.overlap[0])
                    for y in range(extent):
                        old = above[..., y - extent, :]
                        tile[..., y, :] = old * (1 - y / extent) + tile[..., y, :] * (y / extent)
                if j:
                    extent = min(row[j - 1].shape[4], tile.shape[4], tiling.overlap[1])
                    for c in range(extent):
                        old = row[j - 1][..., c - extent]
                        tile[..., c] = old * (1 - c / extent) + tile[..., c] * (c / extent)
            rows.append(torch.cat([tile[..., : tiling.keep[0], : tiling.keep[1]] for tile in row], 4))
        clips.append(torch.cat(rows, 3)[:, :, 1 if start else 0 :])
    return torch.cat(clips, 2)


@pytest.mark.parametrize(
    ("num_frames", "windows"),
    [
        (1, [(0, 1)]),
        (16, [(0, 16)]),
        (17, [(0, 17)]),  # the start at 16 opens no window: the first one reaches the end
        (18, [(0, 17), (16, 18)]),
        (33, [(0, 17), (16, 33)]),
        (40, [(0, 17), (16, 33), (32, 40)]),
    ],
)
def test_windows_share_one_frame_and_end_with_the_clip(num_frames: int, windows: list[tuple[int, int]]):
    assert replace(LATENTS, window=17).windows(num_frames) == windows


def test_windows_that_share_nothing_are_chunks():
    chunks = replace(PIXELS, window=17, shared_frames=0, dropped_frames=0)
    assert chunks.windows(40) == [(0, 17), (17, 34), (34, 40)]
    assert replace(PIXELS, window=None).windows(40) == [(0, 40)]


@pytest.mark.parametrize(
    "size", [(5, 17, 16), (9, 30, 21), (13, 28, 40), (25, 16, 16), (11, 29, 20), (10, 12, 8)], ids=str
)
def test_encoding_equals_the_original_way(size: tuple[int, int, int]):
    x = drawn(2, 3, *size)
    actual = run_tiled(encode, x, PIXELS, result_size=encoded_size)
    assert torch.equal(actual, as_upstream(encode, x, PIXELS))
    assert actual.shape[2:] == encoded_size(size)


@pytest.mark.parametrize("size", [(2, 5, 4), (3, 9, 7), (4, 8, 11), (7, 4, 4), (6, 3, 2)], ids=str)
def test_decoding_equals_the_original_way(size: tuple[int, int, int]):
    z = drawn(2, 3, *size)
    actual = run_tiled(decode, z, LATENTS, result_size=decoded_size)
    assert torch.equal(actual, as_upstream(decode, z, LATENTS))
    assert actual.shape[2:] == decoded_size(size)


def test_a_clip_within_one_tile_and_window_is_run_whole():
    x = drawn(1, 3, 9, 16, 16)
    assert not PIXELS.is_needed((9, 16, 16))
    for tiling in (PIXELS, None):
        assert torch.equal(run_tiled(encode, x, tiling, result_size=encoded_size), encode(x))


def test_tiles_that_give_nothing_are_not_run():
    """26 rows: tiles at 0, 12 and 24, the last of 2 rows, which is no latent. 11 frames: the last window adds none."""
    x, sizes = drawn(1, 3, 11, 26, 16), []

    def run(part: Tensor) -> Tensor:
        sizes.append(tuple(part.shape[2:4]))
        return encode(part)

    assert run_tiled(run, x, PIXELS, result_size=encoded_size).shape[2:] == (3, 6, 4)
    assert set(sizes) == {(9, 16), (9, 14)}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_out_is_filled_completely_and_decides_the_device(layout: torch.memory_format):
    z = drawn(1, 3, 6, 5, 7).contiguous(memory_format=layout)
    expected = run_tiled(decode, z, LATENTS, result_size=decoded_size)
    out = torch.full((1, 5, *expected.shape[2:]), torch.nan, dtype=z.dtype)[:, 1:4]
    assert run_tiled(decode, z, LATENTS, result_size=decoded_size, out=out) is out
    assert torch.equal(out, expected)
    whole = torch.full(decode(z).shape, torch.nan, dtype=z.dtype)
    assert torch.equal(run_tiled(decode, z, None, result_size=decoded_size, out=whole), decode(z))


def test_windows_come_one_by_one():
    z, done = drawn(1, 3, 7, 5, 4), []
    parts = iterate_tiled(decode, z, LATENTS, result_size=decoded_size, progress=lambda *counts: done.append(counts))
    first = next(parts)
    assert done == [(1, 12), (2, 12), (3, 12), (4, 12)]
    joined = torch.cat([first, *parts], 2)
    assert done[-1] == (12, 12)
    assert torch.equal(joined, run_tiled(decode, z, LATENTS, result_size=decoded_size))


def test_gradients_are_those_of_the_original_way():
    z = drawn(1, 2, 5, 5, 4)
    probe = drawn(1, 2, 17, 20, 16)
    gradients = []
    for tile_run in (lambda leaf: run_tiled(decode, leaf, LATENTS, result_size=decoded_size), None):
        leaf = z.clone().requires_grad_()
        y = tile_run(leaf) if tile_run else as_upstream(decode, leaf, LATENTS)
        gradients.append(torch.autograd.grad((y * probe).sum(), leaf)[0])
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tile": (0, 4)}, r"tile must be at least 1, got \(0, 4\)"),
        ({"stride": (5, 3)}, r"stride must be at most the tile \(4, 4\), got \(5, 3\)"),
        ({"overlap": (-1, 0)}, "must be at least 0"),
        ({"window": 1}, "window must be above 1 shared frames, got 1"),
    ],
)
def test_a_tiling_that_covers_nothing_is_refused(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        replace(LATENTS, **changes)


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (drawn(1, 3, 5, 5), {}, r"x must have shape \(B, C, T, H, W\), got \(1, 3, 5, 5\)"),
        (drawn(1, 3, 0, 5, 5), {}, "x must be large enough"),
        (drawn(1, 3, 2, 5, 5), {"out": drawn(1, 3, 5, 20, 21)}, r"out must have shape \(1, C, 5, 20, 20\)"),
        (drawn(1, 3, 2, 5, 5), {"result_size": lambda size: size}, r"result_size must give what run returns"),
    ],
)
def test_errors_name_argument_rule_and_value(x: Tensor, options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        run_tiled(decode, x, LATENTS, **{"result_size": decoded_size, **options})
