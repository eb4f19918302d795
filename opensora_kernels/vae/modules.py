"""The modules behind a model, which may be a function that calls them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd


def modules_of(model: Any) -> list[nn.Module]:
    """A module itself, the owner of a bound method, and what a function was made with or finds by name."""
    return list(_found(model, set()))


def dtypes_of(model: Any) -> list[torch.dtype]:
    """Those of the weights, each once."""
    weights = (weight for module in modules_of(model) for weight in module.parameters())
    return list(dict.fromkeys(weight.dtype for weight in weights if weight.is_floating_point()))


def is_on_meta(model: Any) -> bool:
    """Whether the weights have no data, and no hook that brings them when they are needed."""
    modules = modules_of(model)
    weights = [next(module.parameters(), None) for module in modules]
    if not any(weight is not None and weight.is_meta for weight in weights):
        return False
    return not any(hasattr(part, "_hf_hook") for module in modules for part in module.modules())


def drops_at_random(model: Any) -> bool:
    """Whether a dropout is at work, as in training."""
    parts = (part for module in modules_of(model) for part in module.modules())
    return any(isinstance(part, _DropoutNd) and part.training and part.p > 0 for part in parts)


def _found(model: Any, seen: set[int]) -> Iterator[nn.Module]:
    if id(model) in seen:
        return
    seen.add(id(model))
    if isinstance(model, nn.Module):
        yield model
    elif isinstance(model, FunctionType):
        named = (model.__globals__.get(name) for name in model.__code__.co_names)
        yield from (each for each in named if isinstance(each, nn.Module))
        for cell in model.__closure__ or ():
            yield from _found(_content(cell), seen)
    elif isinstance(model, MethodType):
        yield from _found(model.__self__, seen)
    elif isinstance(model, partial):
        for each in (model.func, *model.args, *model.keywords.values()):
            yield from _found(each, seen)
    elif hasattr(model, "whole"):  # a loop
        yield from _found(model.whole, seen)


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a variable that has no value yet
        return None
