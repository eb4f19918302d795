"""Recorded answers of the original systems: what a case folder holds, and which adapter replays it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One folder: config.json with inputs, weights and outputs in safetensors, or a single JSON of call/answer rows."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @cached_property
    def config(self) -> dict[str, Any]:
        return self.json("config.json")

    @cached_property
    def cases(self) -> dict[str, Any]:
        return self.json("cases.json")

    @cached_property
    def inputs(self) -> dict[str, Tensor]:
        return self._tensors("inputs")

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        return self._tensors("weights")

    @cached_property
    def outputs(self) -> dict[str, Tensor]:
        return self._tensors("outputs")

    def json(self, file: str) -> dict[str, Any]:
        return json.loads((self.path / file).read_text())

    def _tensors(self, stem: str) -> dict[str, Tensor]:
        file = self.path / f"{stem}.safetensors"
        return load_file(file) if file.exists() else {}


@dataclass(frozen=True)
class Check:
    """One comparison. Tensors pass when max |actual - expected| <= max_abs and NaN stands where the original has NaN;
    with `exact`, values (of any type) must be equal."""

    tensor: str
    actual: Any
    expected: Any
    max_abs: float = 0.0
    mean_abs: float | None = None
    exact: bool = False


Adapter = Callable[[Case], Iterator[Check]]
_ADAPTERS: dict[str, Adapter] = {}


def adapter(*prefixes: str) -> Callable[[Adapter], Adapter]:
    """Register a function that replays every case whose folder name starts with one of `prefixes`."""

    def register(function: Adapter) -> Adapter:
        for prefix in prefixes:
            _ADAPTERS[prefix] = function
        return function

    return register


def find_adapter(name: str) -> Adapter | None:
    """The adapter with the longest prefix of `name`, or None."""
    matches = [prefix for prefix in _ADAPTERS if name.startswith(prefix)]
    return _ADAPTERS[max(matches, key=len)] if matches else None
