"""Named inputs of an operator: what the contract tests run and the benches time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

# Beyond as many, normal numbers repeat: a thread draws 120 million in a second, and the large cases hold 41 billion.
# A prime number, so that no two rows of a tensor begin alike until as many rows have gone by.
DRAWN_ANEW = 1_048_573


@dataclass
class Maker:
    """Draws seeded tensors of one dtype on one device. Draws happen in fp32 on the CPU, so that all dtypes and devices
    see the same numbers."""

    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    seed: int = 0
    _generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self._generator = torch.Generator().manual_seed(self.seed)

    def normal(self, *shape: int, mean: float = 0.0, std: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """Normal numbers of `dtype` (the maker's unless given), rounded to bf16 so that every dtype holds them exactly
        and compares against the same truth. Of more than DRAWN_ANEW, the first as many are repeated."""
        num_elements = math.prod(shape)
        drawn_shape = shape if num_elements <= DRAWN_ANEW else (DRAWN_ANEW,)
        drawn = torch.randn(drawn_shape, generator=self._generator).mul_(std).add_(mean)
        drawn = drawn.to(torch.bfloat16).to(self.device, dtype or self.dtype)
        return drawn if num_elements <= DRAWN_ANEW else _repeated(drawn, shape)

    def mask(self, *shape: int, probability: float = 0.5) -> Tensor:
        """Booleans, True with `probability`."""
        return (torch.rand(shape, generator=self._generator) < probability).to(self.device)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """Whole numbers in [low, high)."""
        return torch.randint(low, high, shape, generator=self._generator).to(self.device)


def _repeated(block: Tensor, shape: tuple[int, ...]) -> Tensor:
    """(*shape), filled with `block` (N,) from its beginning, again and again, on the block's device."""
    out = block.new_empty(shape)
    flat, whole = out.view(-1), out.numel() // len(block) * len(block)
    flat[:whole].view(-1, len(block)).copy_(block)
    flat[whole:].copy_(block[: len(flat) - whole])
    return out


@dataclass(frozen=True)
class Case:
    """One call of a public operator: `make` draws its keyword arguments. Large cases (real layers of a release) are
    for benches and GPUs; `flops` counts the multiply-adds times two that the operator must do."""

    name: str
    make: Callable[[Maker], dict[str, Any]]
    is_large: bool = False
    flops: Callable[[Mapping[str, Any]], int] = lambda arguments: 0
    source: str = ""


@dataclass(frozen=True)
class BadCall:
    """A documented error: `change` makes a call that must raise `error` with `match` of the first case's arguments."""

    name: str
    change: Callable[[dict[str, Any]], dict[str, Any]]
    error: type[Exception]
    match: str


def bytes_moved(arguments: Mapping[str, Any], outputs: Any) -> int:
    """The floor of memory traffic: every input tensor read once, every output tensor written once."""
    leaves = pytree.tree_leaves([dict(arguments), outputs])
    return sum(leaf.numel() * leaf.element_size() for leaf in leaves if isinstance(leaf, Tensor))
