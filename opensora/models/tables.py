"""Tables of positions: kept once made, since their sizes repeat from step to step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

Table = TypeVar("Table")


class TableCache:
    """Tables by key, made when first asked for; no part of a model's state, so loading can't lose them."""

    max_tables = 32

    def __init__(self) -> None:
        self._tables: dict[tuple, Any] = {}

    def get(self, key: tuple, make: Callable[[], Table]) -> Table:
        if key not in self._tables:
            if len(self._tables) >= self.max_tables:
                self._tables.clear()
            # A table first made while sampling must remain usable by autograd.
            with torch.inference_mode(False), torch.no_grad():
                self._tables[key] = make()
        return self._tables[key]
