"""Bytes of a model's weights and of what training keeps beside them, on each rank.

Sharding is that of `ParallelContext.wrap`: FSDP2 cuts the first axis of each weight, keeps fp32 shards, and gathers a
block at a time in the precision that it computes in.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from torch import nn

FP32 = 4


@dataclass(frozen=True)
class WeightMemory:
    """Bytes on the rank that holds most.

    parameters: trained and frozen. gradients: of the trained ones. optimizer: AdamW's two moments. averages: EMA.
    unsharded: while a block computes, its whole weights, those of the next block, which are gathered meanwhile, those
    outside of blocks, and the block's gradients in both precisions.
    """

    parameters: int
    gradients: int
    optimizer: int
    averages: int
    unsharded: int

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.averages + self.unsharded


def weight_memory(
    module: nn.Module, *, num_ranks: int = 1, sharding: Literal["none", "full"] = "full", itemsize: int = 2
) -> WeightMemory:
    """Of a module, on meta or not, that trains on `num_ranks` and computes with numbers of `itemsize` bytes.

    One rank has nothing to shard: it keeps fp32 weights for the optimizer beside those that it computes with.
    """
    parameters = list(module.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if num_ranks == 1 or sharding == "none":
        return _on_each_rank(parameters, trained, itemsize)
    share = sum(FP32 * _share(parameter, num_ranks) for parameter in trained)
    frozen = sum(FP32 * _share(parameter, num_ranks) for parameter in parameters if not parameter.requires_grad)
    blocks = [sum(p.numel() for p in block.parameters()) for block in _blocks(module)]
    largest, outside = max(blocks, default=0), sum(p.numel() for p in parameters) - sum(blocks)
    unsharded = itemsize * (outside + 2 * largest) + (itemsize + FP32) * largest
    return WeightMemory(share + frozen, share, 2 * share, share, unsharded)


def num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def frozen_bytes(module: nn.Module, dtype: torch.dtype) -> int:
    """Of a module that is not trained: parameters, whole on each rank."""
    return num_parameters(module) * dtype.itemsize


def _on_each_rank(parameters: list[nn.Parameter], trained: list[nn.Parameter], itemsize: int) -> WeightMemory:
    whole = sum(parameter.numel() for parameter in parameters)
    masters = FP32 * sum(parameter.numel() for parameter in trained)
    copies = whole * itemsize if itemsize != FP32 else FP32 * whole - masters
    return WeightMemory(copies + masters, masters, 2 * masters, masters, 0)


def _share(parameter: nn.Parameter, num_ranks: int) -> int:
    """Elements on the first rank: rows are dealt out in equal parts, the last of which may be short or empty."""
    rows, *others = parameter.shape or (1,)
    return -(-rows // num_ranks) * prod(others)


def _blocks(module: nn.Module) -> list[nn.Module]:
    lists = [child for child in module.children() if isinstance(child, nn.ModuleList)]
    return [block for blocks in lists for block in blocks]
