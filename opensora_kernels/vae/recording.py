"""Looking at a model for a shape before it runs, with errors that say which clips it takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from .clip import record
from .graph import Node
from .loops import NUM_LOOKED_AT, Loop, Outlook, foresee
from .modules import drops_at_random, dtypes_of
from .strategies import Model

Shape = tuple[int, ...]
Device = torch.device | str
Looked = TypeVar("Looked")
_NUM_CHANNELS = (*range(1, 33), 48, 64, 96, 128)
_REFUSALS = (ValueError, RuntimeError, IndexError)
_UNKNOWN = (TypeError, AttributeError, KeyError, AssertionError)  # or else the model cannot be recorded


def recorded_for(caller: str, name: str, model: Model, shape: Shape, dtype: torch.dtype, device: Device) -> Node:
    """The recorded model; ValueError with what it takes instead if it does not take the clip called `name`."""
    return look(caller, name, model, lambda *clip: record(model, *clip, device), shape, dtype)


def foreseen_for(
    caller: str,
    name: str,
    loop: Loop,
    shape: Shape,
    dtype: torch.dtype,
    device: Device,
    num_looked_at: int = NUM_LOOKED_AT,
) -> Outlook:
    """What the steps of a loop over a clip of `shape` will take, with the errors of `recorded_for`."""
    device = torch.device(device)
    return look(caller, name, loop, lambda *clip: foresee(loop, *clip, device, num_looked_at), shape, dtype)


def look(
    caller: str,
    name: str,
    model: Model,
    attempt: Callable[[Shape, torch.dtype], Looked],
    shape: Shape,
    dtype: torch.dtype,
) -> Looked:
    """attempt(shape, dtype); where it fails, ValueError with a shape or dtype for which it does not."""
    if drops_at_random(model):
        raise ValueError(
            f"{caller}: the model must be in evaluation mode, got one in training mode that has dropout: call eval()"
        )
    try:
        return attempt(shape, dtype)
    except _REFUSALS as error:
        rule = _rule(name, model, attempt, shape, dtype)
        rule = rule or f"{name} must be a clip that the model takes, got {dtype} of shape {shape}"
        raise ValueError(f"{caller}: {rule}: {error}") from error
    except TypeError as error:
        if rule := _dtype_rule(name, model, attempt, shape, dtype):
            raise ValueError(f"{caller}: {rule}: {error}") from error
        raise


def check_whole(caller: str, name: str, model: Model, shape: Shape, dtype: torch.dtype, device: Device) -> None:
    """ValueError as from `recorded_for` for a model that is to run as it is, whether it can be recorded or not.

    One that fails where it is recorded is refused only if there is a clip with which it does not fail.
    """

    def attempt(*clip: Any) -> Node:
        return record(model, *clip, device)

    try:
        attempt(shape, dtype)
    except (*_REFUSALS, *_UNKNOWN) as error:
        rule_of = _rule if isinstance(error, _REFUSALS) else _dtype_rule
        if rule := rule_of(name, model, attempt, shape, dtype):
            raise ValueError(f"{caller}: {rule}: {error}") from error


def _rule(
    name: str, model: Model, attempt: Callable[[Shape, torch.dtype], Any], shape: Shape, dtype: torch.dtype
) -> str:
    """What the clip called `name` must be, with dtypes, frame counts near that of `shape`, or else channel counts."""

    def is_taken(axis: int, size: int) -> bool:
        return _succeeds(attempt, (*shape[:axis], size, *shape[axis + 1 :]), dtype, is_loop=isinstance(model, Loop))

    if rule := _dtype_rule(name, model, attempt, shape, dtype):
        return rule
    must = f"{name} must be one" if name == "shape" else f"{name} must have a shape"
    must = f"{must} that the model takes"
    near = range(max(1, shape[2] - 9), shape[2] + 10)
    if frames := [size for size in near if is_taken(2, size)]:
        return f"{must} (frames near {shape[2]}: {', '.join(map(str, frames))}), got {shape}"
    if channels := [size for size in _NUM_CHANNELS if is_taken(1, size)]:
        return f"{must} (channels: {', '.join(map(str, channels))}), got {shape}"
    return ""


def _dtype_rule(
    name: str, model: Model, attempt: Callable[[Shape, torch.dtype], Any], shape: Shape, dtype: torch.dtype
) -> str:
    if dtype in (dtypes := dtypes_of(model)):
        return ""
    must = "dtype must be" if name == "shape" else f"{name} must have dtype"
    taken = (other for other in dtypes if _succeeds(attempt, shape, other))
    return next((f"{must} {other}, that of the model's weights, got {dtype}" for other in taken), "")


def _succeeds(
    attempt: Callable[[Shape, torch.dtype], Any], shape: Shape, dtype: torch.dtype, is_loop: bool = False
) -> bool:
    try:
        attempt(shape, dtype)
    except TypeError:
        return is_loop  # steps that cannot be recorded, but that read all frames, which was seen before
    except (*_REFUSALS, *_UNKNOWN):
        return False
    return True
