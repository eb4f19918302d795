"""Where each stored tensor goes in a model: rules for names and shapes, before anything is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

Shape = tuple[int, ...]

# Computed by the model, never loaded. (The patch embedding of other models is called pos_embed.proj: no table.)
POSITION_TABLES = ("pos_embed", "pos_embed_temporal")
# diffusers before 0.18 -> since, of the attention in AutoencoderKL.
_OLD_ATTENTION_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


@dataclass(frozen=True)
class LoadReport:
    """Keys that did not find their place: model keys without weights, weights without a key, and wrong shapes."""

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mis_shaped: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.mis_shaped)

    def __str__(self) -> str:
        parts = []
        for title, keys in (
            ("missing", self.missing),
            ("unexpected", self.unexpected),
            ("mis-shaped", self.mis_shaped),
        ):
            if keys:
                parts.append(f"{len(keys)} {title} ({some(keys)})")
        return "; ".join(parts) or "every key found its place"


def some(keys: Iterable[str], most: int = 12) -> str:
    """The first keys, and how many more there are."""
    keys = list(keys)
    return ", ".join(keys[:most]) + (f", and {len(keys) - most} more" if len(keys) > most else "")


@dataclass(frozen=True)
class Placement:
    """Where a stored tensor goes, and how it must be changed on the way."""

    target: str
    shape: Shape
    change: Callable[[Tensor], Tensor] = field(default=lambda tensor: tensor)


def plan(stored: Mapping[str, Shape], wanted: Mapping[str, Shape]) -> tuple[dict[str, Placement], LoadReport]:
    """Places for the stored tensors that have one, and a report of the others."""
    placements: dict[str, Placement] = {}
    unexpected, mis_shaped = [], []
    for name, shape in stored.items():
        if name in POSITION_TABLES:
            continue
        placement = _place(name, shape, wanted)
        if placement.target not in wanted:
            unexpected.append(name)
        elif placement.shape != wanted[placement.target]:
            mis_shaped.append(f"{name} {list(shape)} for {list(wanted[placement.target])}")
        else:
            placements[name] = placement
    found = {placement.target for placement in placements.values()} | set(POSITION_TABLES)
    bad = {entry.split(" ")[0] for entry in mis_shaped}
    missing = [name for name in wanted if name not in found and name not in bad]
    return placements, LoadReport(tuple(missing), tuple(unexpected), tuple(mis_shaped))


def _place(name: str, shape: Shape, wanted: Mapping[str, Shape]) -> Placement:
    """Upstream's rules: the null caption's length, PixArt's 2-D patch embedding, PixArt's block names. And diffusers':
    old names of attention."""
    target = name
    if name not in wanted:
        if name.startswith("blocks."):
            target = f"spatial_{name}"
        for old, new in _OLD_ATTENTION_NAMES.items():
            target = target.replace(old, new) if name.replace(old, new) in wanted else target
    goal = wanted.get(target)
    if goal is None or goal == shape:
        return Placement(target, shape)
    if name.endswith("y_embedder.y_embedding") and len(shape) == 2 and shape[1:] == goal[1:]:
        return Placement(target, goal, lambda tensor: _with_length(tensor, goal[0]))
    if name.endswith("x_embedder.proj.weight") and (*shape[:2], 1, *shape[2:]) == goal:
        return Placement(target, goal, lambda tensor: tensor.unsqueeze(2))
    return Placement(target, shape)


def _with_length(table_LC: Tensor, length: int) -> Tensor:
    """Cut to `length` rows, or repeat the last row up to it."""
    extra = max(0, length - table_LC.shape[0])
    return torch.cat([table_LC[:length], table_LC[-1:].expand(extra, -1)])
