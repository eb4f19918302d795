"""The list of rivals, and what adapters share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

Arguments = Mapping[str, Any]
Bind = Callable[[Arguments], Callable[[], Any]]
WhyNot = Callable[[Arguments], str | None]

# What `--peers` takes -> the module that must be importable.
PACKAGES = {
    "torch": "torch",
    "sdpa": "torch",
    "diffusers": "diffusers",
    "liger": "liger_kernel",
    "sageattention": "sageattention",
    "fa3": "flash_attn_interface",
    "fa3-fwd": "fa3_fwd_interface",
    "flash-attn": "flash_attn",
    "apex": "apex",
    "cudnn": "cudnn",
}
_ONLY_CUDA = {"liger", "sageattention", "fa3", "fa3-fwd", "flash-attn", "apex", "cudnn"}


MOST_LETTERS = 26  # of a name; a picture has no room for more


@dataclass(frozen=True)
class Peer:
    """`name` as tables and pictures show it, which says alone what it is, in MOST_LETTERS. `computes_not`: None, or why
    it does not compute what these arguments ask for."""

    op: str
    package: str
    name: str
    bind: Bind
    computes_not: WhyNot
    has_gradient: bool = True

    def why_not(self, arguments: Arguments, direction: str) -> str | None:
        if find_spec(PACKAGES[self.package]) is None:
            return f"{self.package} is not installed"
        if self.package in _ONLY_CUDA and device_of(arguments) != "cuda":
            return f"{self.package} runs on CUDA devices alone"
        if direction == "backward" and not self.has_gradient:
            return f"{self.name} has no gradient"
        return self.computes_not(arguments)


_peers: list[Peer] = []


def peer(
    op: str, package: str, name: str, why_not: WhyNot = lambda arguments: None, *, has_gradient: bool = True
) -> Callable[[Bind], Bind]:
    """Register the decorated `bind` as what `package` offers in place of `op`."""

    def register(bind: Bind) -> Bind:
        _peers.append(Peer(op, package, name, bind, why_not, has_gradient))
        return bind

    return register


def peers_of(op: str, packages: list[str] | None = None) -> list[Peer]:
    """Those of `packages` (None: all) that stand beside `op`."""
    return [one for one in _peers if one.op == op and (packages is None or one.package in packages)]


def device_of(arguments: Arguments) -> str:
    return next(leaf.device.type for leaf in pytree.tree_leaves(dict(arguments)) if isinstance(leaf, Tensor))


def dtype_of(arguments: Arguments) -> torch.dtype:
    return next(leaf.dtype for leaf in pytree.tree_leaves(dict(arguments)) if isinstance(leaf, Tensor))


def is_given(arguments: Arguments, *names: str) -> bool:
    return any(arguments.get(name) is not None for name in names)


def holding(module: nn.Module, **tensors: Tensor | None) -> nn.Module:
    """`module` computing with `tensors` themselves, so that their gradients are the ones that are asked for."""
    for name, tensor in tensors.items():
        module._parameters.pop(name, None)
        setattr(module, name, tensor)
    return module


def first_reason(*reasons: WhyNot) -> WhyNot:
    def why_not(arguments: Arguments) -> str | None:
        return next((reason for reason in (one(arguments) for one in reasons) if reason is not None), None)

    return why_not


def refuses(names: str, sentence: str) -> WhyNot:
    """`sentence` where any of the arguments `names`, separated by blanks, is given."""
    return lambda arguments: sentence if is_given(arguments, *names.split()) else None


def bf16_only(arguments: Arguments) -> str | None:
    dtype = dtype_of(arguments)
    return None if dtype == torch.bfloat16 else f"it takes bf16, got {dtype}"


def half_only(arguments: Arguments) -> str | None:
    dtype = dtype_of(arguments)
    return None if dtype in (torch.bfloat16, torch.float16) else f"it takes bf16 and fp16, got {dtype}"
