"""Means of logged numbers over micro-batches and ranks, of which not each has every number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class Sums:
    """Sums scalars on their device, by name, and counts them."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            value = value.detach().float().reshape(())
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def read(self) -> dict[str, tuple[float, int]]:
        """{name: (sum, count)}, waiting for the device once."""
        device = next(iter(self._sums.values())).device
        numbers = torch.stack([value.to(device) for value in self._sums.values()]).tolist()
        return dict(zip(self._sums, zip(numbers, self._counts.values(), strict=True), strict=True))

    @staticmethod
    def mean(of_ranks: Sequence[Mapping[str, tuple[float, int]]]) -> dict[str, float]:
        """{name: mean} over all that was read, names in the order of the first to have them."""
        totals: dict[str, tuple[float, int]] = {}
        for sums in of_ranks:
            for name, (value, count) in sums.items():
                total, number = totals.get(name, (0.0, 0))
                totals[name] = total + value, number + count
        return {name: total / number for name, (total, number) in totals.items()}
