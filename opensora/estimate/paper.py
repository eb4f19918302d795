"""Runs on paper: a model on the meta device as it would run on an accelerator, and the memory that it would take.

Every tensor that an operator makes is counted while it is alive, so that what autograd keeps for the backward pass is
what it does keep, not a formula for it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from opensora_kernels import meta_as


@dataclass(frozen=True)
class StepMemory:
    """Bytes beyond weights and inputs: `kept` after the forward pass for the backward pass, and `peak` of both."""

    kept: int
    peak: int


@dataclass(frozen=True)
class Affine:
    """start + slope * n."""

    start: float
    slope: float

    @classmethod
    def through(cls, first: int, second: int, at_first: int, at_second: int) -> Affine:
        slope = (at_second - at_first) / (second - first)
        return cls(at_first - slope * first, slope)

    def __call__(self, number: int) -> int:
        return int(self.start + self.slope * number)


def step_memory(module: nn.Module, forward: Callable[[], Tensor]) -> StepMemory:
    """Memory of forward() and its backward pass, `module` holding the weights.

    A gradient of a weight is counted until it is complete, and is taken away then: that of all weights is not in the
    result. Weights and inputs must be there before. Works on real tensors of the CPU as well as on meta.
    """

    def drop(parameter: Tensor) -> None:
        parameter.grad = None

    hooks = [p.register_post_accumulate_grad_hook(drop) for p in module.parameters() if p.requires_grad]
    meter = LiveBytes()
    try:
        with torch.enable_grad(), meter:
            result = forward()
            kept = meter.live - result.untyped_storage().nbytes()
            result.backward(torch.empty_like(result))
    finally:
        for hook in hooks:
            hook.remove()
    return StepMemory(kept, meter.peak)


def peak_bytes(call: Callable[[], Any]) -> int:
    """The most bytes alive at once in call(), without gradients, beyond what is there before it."""
    meter = LiveBytes()
    with torch.no_grad(), meter:
        call()
    return meter.peak


@contextmanager
def on_paper(device_type: str = "cuda") -> Iterator[None]:
    """Meanwhile new tensors are on meta, and those compute as on `device_type`, with fused attention."""
    with torch.device("meta"), meta_as(device_type), _Accelerator():
        yield


class LiveBytes(TorchDispatchMode):
    """Bytes of tensors that operators made while it is on: alive now, and the most at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        self._meet((args, kwargs), is_new=False)
        results = _results(func, args, kwargs or {})
        self._meet(results, is_new=True)
        self.peak = max(self.peak, self.live)
        return results

    def _meet(self, tree: Any, *, is_new: bool) -> None:
        for leaf in pytree.tree_leaves(tree):
            if not isinstance(leaf, Tensor):
                continue
            storage = leaf.untyped_storage()
            key = storage._cdata
            if key not in self._known:
                num_bytes = storage.nbytes() if is_new else 0
                self._known.add(key)
                self.live += num_bytes
                weakref.finalize(storage, self._forget, key, num_bytes)

    def _forget(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self.live -= num_bytes


def _results(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """func(*args, **kwargs); for meta tensors whose like it has had before, new ones like the results it gave then.

    The rules of shapes are Python, and those of our operators run a whole reference: blocks repeat, and so do frames.
    """
    if not _makes_new_tensors(func):
        return func(*args, **kwargs)
    leaves, structure = pytree.tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if not tensors or not all(tensor.is_meta for tensor in tensors):
        return func(*args, **kwargs)
    key = (func, structure, tuple(_Like.of(leaf) for leaf in leaves))
    try:
        known = _seen.get(key)
    except TypeError:  # an argument that has no hash
        return func(*args, **kwargs)
    if known is None:
        results = func(*args, **kwargs)
        _seen[key] = pytree.tree_map_only(Tensor, _Like.of, results)
        return results
    return pytree.tree_map_only(_Like, _Like.empty, known)


@cache
def _makes_new_tensors(func: Any) -> bool:
    """Whether the schema says that no argument is written to or shared with a result."""
    schema = func._schema
    return all(each.alias_info is None for each in (*schema.arguments, *schema.returns))


@dataclass(frozen=True)
class _Like:
    """A tensor's size in memory and the rest that shapes depend on."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @staticmethod
    def of(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return (type(leaf), leaf) if isinstance(leaf, (bool, int, float)) else leaf  # 1, 1.0 and True are equal
        return _Like(tuple(leaf.shape), leaf.stride(), leaf.dtype)

    def empty(self) -> Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")


_seen: dict[Any, Any] = {}


class _Accelerator(TorchFunctionMode):
    """What accelerators do by kernels that are not there for meta tensors."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and args[0].is_meta:
            return _fused_attention(*args, **kwargs)
        if func is F.gelu and args[0].is_meta and not torch.is_grad_enabled():
            return torch.ops.aten.gelu_(args[0])  # the matrix product before it applies it as it writes
        return func(*args, **kwargs)


def _fused_attention(
    q_BNLD: Tensor, k_BNKD: Tensor, v_BNKD: Tensor, *others: Any, scale: float | None = None, **options: Any
) -> Tensor:
    """Keeps q, k, v, the result and a number for each query, and never holds the scores; a mask is small."""
    q, k, v = (x.transpose(-3, -2) for x in (q_BNLD, k_BNKD, v_BNKD))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return torch.ops.opensora_kernels.attention(q, k, v, scale, None, "triton")[0].transpose(-3, -2)
