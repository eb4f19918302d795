"""Drawn calls of the operators that modulate tokens: memory orders, tables, masks, and kernels of small tiles."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.properties import DTYPES, Numbers

# one channel has no LayerNorm; 3 and 5 have a tail, 8 has none, 7 has padding
CHANNELS = st.sampled_from([3, 5, 7, 8, 24])
TILES = st.fixed_dictionaries(
    {"BLOCK_S": st.sampled_from([1, 2, 4]), "NUM_BLOCKS": st.sampled_from([1, 3]), "num_programs": st.integers(1, 20)}
)


@st.composite
def tokens_and_tables(draw: st.DrawFn, names: list[str], num_tokens: int) -> dict[str, Any]:
    """x, and y if `num_tokens` is 2, and tables called `names`; perhaps a mask and the tables of frames with False."""
    numbers = Numbers(draw(st.integers(0, 2**16)), draw(DTYPES))
    num_channels = draw(CHANNELS)
    batch, num_frames, num_sites = (draw(st.integers(low, high)) for low, high in ((0, 2), (1, 3), (1, 5)))
    shape = (batch, num_frames * num_sites, num_channels)
    call: dict[str, Any] = {name: _in_memory(draw, numbers, shape) for name in "xy"[:num_tokens]}
    has_mask, has_other_dtypes = draw(st.booleans()), draw(st.booleans())
    for name in (*names, *(f"{name}0" for name in names if has_mask)):
        call[name] = _table(draw, numbers, batch, num_channels, draw(DTYPES) if has_other_dtypes else numbers.dtype)
    if has_mask:
        frames = draw(st.lists(st.booleans(), min_size=batch * num_frames, max_size=batch * num_frames))
        call["frame_mask"] = torch.tensor(frames, dtype=torch.bool).view(batch, num_frames)
    return call


@contextmanager
def small_tiles(tile: dict[str, int]) -> Iterator[None]:
    """Programs that take several blocks, and frames that take several programs, of the few tokens of a drawn call."""
    from opensora_kernels._triton import modulation

    def configured(op: str, key: str, default: dict[str, int], device: torch.device) -> dict[str, int]:
        return default | {name: value for name, value in tile.items() if name in default}

    with (
        mock.patch.object(modulation, "configuration", configured),
        mock.patch.object(modulation, "_SMALLEST_SUMMING_CHUNK", 1),
    ):
        yield


def _in_memory(draw: st.DrawFn, numbers: Numbers, shape: tuple[int, int, int]) -> Tensor:
    batch, num_tokens, num_channels = shape
    match draw(st.sampled_from(["dense", "dense", "part_of_wider", "tokens_first", "channels_first", "gaps"])):
        case "part_of_wider":
            return numbers(batch, num_tokens, 3 * num_channels)[..., num_channels : 2 * num_channels]
        case "tokens_first":
            return numbers(num_tokens, batch, num_channels).transpose(0, 1)
        case "channels_first":
            return numbers(batch, num_channels, num_tokens).transpose(1, 2)
        case "gaps":
            return numbers(batch, num_tokens, 2 * num_channels)[..., ::2]
    return numbers(*shape)


def _table(draw: st.DrawFn, numbers: Numbers, batch: int, num_channels: int, dtype: torch.dtype) -> Tensor:
    match draw(st.sampled_from(["dense", "row_of_six", "gaps", "one_for_all"])):
        case "row_of_six":
            return numbers(batch, 6, num_channels, dtype=dtype)[:, 2]
        case "gaps":
            return numbers(batch, 2 * num_channels, dtype=dtype)[:, ::2]
        case "one_for_all":
            return numbers(1, num_channels, dtype=dtype).expand(batch, -1)
    return numbers(batch, num_channels, dtype=dtype)
