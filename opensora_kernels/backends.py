"""Which implementation runs an operator: register, choose, use, explain.

Every operator has a `reference` in plain PyTorch and may have others. `choose` takes the first one, in the order of the
tensor's device, whose `why_not` and `why_slower` give no reason against it. `use` and the environment variable
`OPENSORA_KERNELS_BACKEND` ("triton", or "causal_conv3d=cuda,attention=library") change the order or give an order.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

Backend = Literal["cuda", "triton", "npu", "cpu", "library", "reference"]

_ORDER: dict[str, tuple[str, ...]] = {
    "cuda": ("cuda", "triton", "library", "reference"),
    "npu": ("npu", "reference"),
    "cpu": ("cpu", "library", "reference"),
}
_DEFAULT_ORDER = ("library", "reference")
_EVERY_OP = "*"


@dataclass(frozen=True)
class Implementation:
    """One way to run an operator, taking the operator's arguments without the trailing backend name.

    A plain implementation is ordinary PyTorch: autograd, `torch.compile` and `torch_npu` see through it. The others run
    inside the registered operator and may bring `backward`; without one, gradients recompute the reference.
    why_not: why it can't serve these arguments. why_slower: why another is thought faster for them, so that it runs
    only for those who ask for it. saved_like: empty tensors like those that `forward` returns, in a list after the
    result, for `backward`; its operator must be registered with `saves`. passes: positions of arguments whose gradient
    is the first result's itself, such as a residual's; `backward` is not asked for them, and nothing is copied.
    """

    forward: Callable[..., Any]
    backward: Callable[..., Any] | None = None
    why_not: Callable[..., str | None] | None = None
    is_plain: bool = False
    why_slower: Callable[..., str | None] | None = None
    saved_like: Callable[..., list[Tensor]] | None = None
    passes: Callable[..., list[int]] | None = None


class BackendError(RuntimeError):
    """A backend was asked for by name and can't serve this call; the message lists every candidate and its reason."""


_implementations: dict[str, dict[str, Implementation]] = {}


def register(op: str, backend: Backend, implementation: Implementation) -> None:
    """Make `implementation` a candidate for `op`."""
    _check_backend("register", backend)
    _implementations.setdefault(op, {})[backend] = implementation


def register_module(
    op: str,
    backend: Backend,
    module: str,
    why_not_here: Callable[[tuple[Any, ...]], str | None],
    *,
    why_not: Callable[..., str | None] | None = None,
    why_slower: Callable[..., str | None] | None = None,
    saved_like: Callable[..., list[Tensor]] | None = None,
    passes: Callable[..., list[int]] | None = None,
) -> None:
    """Make `forward` and `backward` of `opensora_kernels.ops.<op>.<module>`, imported at the first call, a backend.

    forward(*values): the operator's result for its flat arguments; with `saved_like`, a list of the result and of what
    the backward pass needs. backward(grads, wanted, saved, *values): one gradient or None for each of `values`; those
    with False in `wanted` are not needed. `why_not_here` is asked first, whether the backend runs at all for these
    values; `why_not`, `why_slower`, `saved_like`, `passes`: see `Implementation`.
    """

    def kernels() -> ModuleType:
        return importlib.import_module(f"opensora_kernels.ops.{op}.{module}")

    def forward(*values: Any) -> Any:
        return kernels().forward(*values)

    def backward(*values: Any) -> Any:
        return kernels().backward(*values)

    def reason(*values: Any) -> str | None:
        return why_not_here(values) or (None if why_not is None else why_not(*values))

    implementation = Implementation(
        forward, backward, reason, why_slower=why_slower, saved_like=saved_like, passes=passes
    )
    register(op, backend, implementation)


def ops() -> list[str]:
    """Names of all registered operators, sorted."""
    return sorted(_implementations)


def backends_of(op: str) -> list[str]:
    """Names of the backends that `op` has, in the order in which a GPU would try them."""
    return [backend for backend in get_args(Backend) if backend in _implementations[op]]


def order_of(op: str, device_type: str) -> list[str]:
    """The backends that `op` has, in the order in which tensors on `device_type` try them."""
    return [backend for backend in _ORDER.get(device_type, _DEFAULT_ORDER) if backend in _implementations[op]]


def implementation(op: str, backend: str) -> Implementation:
    """The implementation of `op` called `backend`."""
    return _implementations[op][backend]


def choose(op: str, *arguments: Any) -> str:
    """Name of the backend that serves `op` for these arguments (the first tensor's device sets the order).

    Raises BackendError when a backend was asked for this very operator and can't serve it.
    """
    if _on_choose is not None:
        _on_choose(op, arguments)
    candidates = _implementations[op]
    demanded = _overrides.get(op)
    if demanded is not None:
        if _reason(op, demanded, arguments) is not None:
            raise BackendError(_refusal(op, demanded, arguments))
        return demanded
    preferred = _overrides.get(_EVERY_OP)
    if preferred in candidates and _reason(op, preferred, arguments) is None:
        return preferred
    for backend in _ORDER.get(device_type(device_of(arguments)), _DEFAULT_ORDER):
        if backend not in candidates or _reason(op, backend, arguments) is not None:
            continue
        if _reason_to_pass_over(op, backend, arguments) is None:
            return backend
    raise BackendError(_refusal(op, "any backend", arguments))


def why_not(op: str, backend: str, *arguments: Any) -> str | None:
    """The reason why `backend` can't serve `op` for these arguments, as a sentence, or None."""
    return _reason(op, backend, arguments)


def explain(op: str, *arguments: Any, **options: Any) -> dict[str, str]:
    """For the call `op(*arguments, **options)` and each backend: "chosen", "available" or the reason against it.

    Takes what the public function takes and computes nothing. Raises ValueError for an unknown operator, and what the
    public function raises for arguments that it refuses.
    """
    flat = flat_arguments(op, *arguments, **options)
    try:
        chosen = choose(op, *flat)
    except BackendError:
        chosen = None  # the sentence of the backend that was ordered says why
    shown = {}
    for backend, reason in _reasons(op, flat).items():
        available = "available"
        if reason is None and (slower := _reason_to_pass_over(op, backend, flat)) is not None:
            available = f"available, but {slower}"
        shown[backend] = "chosen" if backend == chosen else reason or available
    return shown


def flat_arguments(op: str, *arguments: Any, **options: Any) -> tuple[Any, ...]:
    """What the public function `op`, called like this, hands to the registered operator; nothing is computed."""
    global _on_choose
    _check_op("explain", op)

    def stop(reached: str, flat: tuple[Any, ...]) -> None:
        if reached == op:
            raise _Reached(flat)

    previous, _on_choose = _on_choose, stop
    try:
        getattr(importlib.import_module(f"opensora_kernels.ops.{op}"), op)(*arguments, **options)
    except _Reached as reached:
        return reached.args[0]
    finally:
        _on_choose = previous
    raise ValueError(f"explain: {op} serves this call without a choice of backends")


class _Reached(Exception):
    """Leaves the public function where it would choose a backend; the argument is what it would choose for."""


class use:
    """Prefer a backend, or order one for single operators; as a statement for good, as a context manager for a while.

    `use("triton")` means "triton where possible". `use(causal_conv3d="cuda")` is an order: calls that it can't serve
    raise BackendError. `use()` alone changes nothing. Unknown names raise ValueError.
    """

    def __init__(self, preferred: Backend | None = None, /, **demanded: Backend) -> None:
        table = {**({} if preferred is None else {_EVERY_OP: preferred}), **demanded}
        for op, backend in table.items():
            if op != _EVERY_OP:
                _check_op("use", op)
            _check_backend("use", backend)
        self._previous = dict(_overrides)
        _overrides.update(table)

    def __enter__(self) -> use:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _overrides.clear()
        _overrides.update(self._previous)


@contextmanager
def meta_as(device_type: str) -> Iterator[None]:
    """Meanwhile tensors on the meta device choose backends as those on `device_type` do, "cuda" or "npu" say.

    So a run without data, on a machine without that device, shows which tensors would be made and kept for the backward
    pass there. Where Triton serves "cuda" it need not be installed for this: nothing is launched.
    """
    global _meta_device_type
    previous, _meta_device_type = _meta_device_type, device_type
    try:
        yield
    finally:
        _meta_device_type = previous


def is_cuda(device: torch.device) -> bool:
    """Whether tensors there are on a CUDA device, or stand for some: see `meta_as`."""
    return device_type(device) == "cuda"


def is_seen_through(*arguments: Any) -> bool:
    """Whether torch.func maps or differentiates a call with these, or they carry forward-mode derivatives: operators of
    our own have no rule for either, and the latter would be lost without a word."""
    if torch._C._are_functorch_transforms_active():
        return True
    if torch.compiler.is_compiling():
        return False
    lists = (argument if isinstance(argument, (list, tuple)) else (argument,) for argument in arguments)
    return any(isinstance(each, Tensor) and unpack_dual(each).tangent is not None for part in lists for each in part)


def device_of(arguments: tuple[Any, ...]) -> torch.device:
    """Of the first tensor of a call, where its backends are looked for; the CPU without any."""
    for argument in arguments:
        if isinstance(argument, Tensor):
            return argument.device
        if isinstance(argument, (list, tuple)) and argument and isinstance(argument[0], Tensor):
            return argument[0].device
    return torch.device("cpu")


def device_type(device: torch.device) -> str:
    """Of the backends that tensors there try: "cuda" also for meta tensors that stand for some, see `meta_as`."""
    return _meta_device_type if device.type == "meta" else device.type


def _read_environment(text: str) -> dict[str, str]:
    variable, table = "OPENSORA_KERNELS_BACKEND", {}
    for entry in filter(None, (part.strip() for part in text.split(","))):
        op, _, backend = (word.strip() for word in entry.rpartition("="))
        # read before any operator has registered itself
        if op and not (Path(__file__).parent / "ops" / op / "__init__.py").exists():
            raise ValueError(f"{variable}: there is no operator {op!r}")
        _check_backend(variable, backend)
        table[op or _EVERY_OP] = backend
    return table


def _check_op(caller: str, op: str) -> None:
    if op not in _implementations:
        raise ValueError(f"{caller}: there is no operator {op!r}; the operators are {', '.join(ops())}")


def _check_backend(caller: str, backend: str) -> None:
    if backend not in get_args(Backend):
        raise ValueError(f"{caller}: backend must be one of {', '.join(get_args(Backend))}, got {backend!r}")


def _reason(op: str, backend: str, arguments: tuple[Any, ...]) -> str | None:
    candidate = _implementations[op].get(backend)
    if candidate is None:
        return f"{op} has no {backend} implementation"
    if not candidate.is_plain and is_seen_through(*arguments):
        return "torch.func and forward-mode derivatives see through plain PyTorch alone"
    return None if candidate.why_not is None else candidate.why_not(*arguments)


def _reason_to_pass_over(op: str, backend: str, arguments: tuple[Any, ...]) -> str | None:
    why_slower = _implementations[op][backend].why_slower
    return None if why_slower is None else why_slower(*arguments)


def _reasons(op: str, arguments: tuple[Any, ...]) -> dict[str, str | None]:
    """The reason against each backend that `op` has, and against the one that was asked for."""
    wanted = _overrides.get(op) or _overrides.get(_EVERY_OP)
    names = dict.fromkeys([*([wanted] if wanted else []), *backends_of(op)])
    return {backend: _reason(op, backend, arguments) for backend in names}


def _refusal(op: str, wanted: str, arguments: tuple[Any, ...]) -> str:
    lines = [f"  {backend}: {reason or 'available'}" for backend, reason in _reasons(op, arguments).items()]
    return "\n".join([f"{op}: {wanted} was asked for and can't serve this call", *lines])


# What the user asked for: operator name (or "*") -> backend. A plain dict, so that torch.compile guards on it.
_overrides: dict[str, str] = _read_environment(os.environ.get("OPENSORA_KERNELS_BACKEND", ""))

# What tensors on the meta device stand for.
_meta_device_type = "meta"

# Told of every choice while `explain` looks for the one it wants.
_on_choose: Callable[[str, tuple[Any, ...]], None] | None = None
