"""Forwards of other people's decoders: the levels that keep the number of frames run a few frames at a time.

These are the largest, and beside its caches a level then holds what one step makes, not what a whole chunk does.

Axes: B batch, C channels, T frames, H height, W width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .convolutions import run_padding_tuple
from .report import why_untouchable
from .steps import cpu_slices, is_on_cpu, may_take_steps


def forward_feature_list(
    self: nn.Module,
    x: Tensor,
    feat_cache: list[Any] | None = None,
    feat_idx: list[int] | None = None,
    first_chunk: bool | None = None,
) -> Tensor:
    """Wan, Qwen-Image: `feat_cache[feat_idx[0]]` holds the earlier frames of the convolution that comes next.

    Levels are told of `first_chunk` where the decoder is: those of Wan 2.2 then drop frames of their shortcut.
    """
    feat_idx = [0] if feat_idx is None else feat_idx
    places: dict[str, Any] = {"feat_cache": feat_cache, "feat_idx": feat_idx}
    options = {} if first_chunk is None else {"first_chunk": first_chunk}
    if feat_cache is None or not may_take_steps(x) or not is_on_cpu(x) or _needs_whole_chunks(self):
        return type(self).forward(self, x, **places, **options)
    x = _convolve(self.conv_in, x, feat_cache, feat_idx)
    x = self.mid_block(x, **places)
    blocks = list(self.up_blocks)
    num_in_time = num_levels_in_time(self)
    for block in blocks[:num_in_time]:
        x = block(x, **places, **options)

    first_place, made = feat_idx[0], []
    for frames in cpu_slices(x, 1):
        feat_idx[0] = first_place
        hidden = x[:, :, frames]
        for block in blocks[num_in_time:]:
            hidden = block(hidden, **places, **options)
        hidden = self.nonlinearity(self.norm_out(hidden))
        made.append(_convolve(self.conv_out, hidden, feat_cache, feat_idx))
    return torch.cat(made, 2)


def _needs_whole_chunks(decoder: nn.Module) -> bool:
    """Whether somebody looks into a part, or a part draws random numbers: either would show that there are steps."""
    parts = [part for part in decoder.modules() if part is not decoder]
    has_dropout = any(isinstance(part, nn.Dropout) and part.training and part.p > 0 for part in parts)
    return has_dropout or any(why_untouchable(part) is not None for part in parts)


def num_levels_in_time(decoder: nn.Module) -> int:
    """Levels up to the last one that doubles the frames of a chunk."""
    levels = enumerate(decoder.up_blocks, start=1)
    return max(
        (number for number, level in levels if any(hasattr(part, "time_conv") for part in level.modules())), default=0
    )


def _convolve(conv: nn.Module, x: Tensor, feat_cache: list[Any], feat_idx: list[int]) -> Tensor:
    place = feat_idx[0]
    x, feat_cache[place] = run_padding_tuple(conv, x, feat_cache[place])
    feat_idx[0] += 1
    return x
