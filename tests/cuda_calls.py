"""Which operators of the CUDA library a call reaches, and whether it fits their schemas, on a machine without CUDA."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class _Reached(Exception):
    """Ends a call at an operator whose results it would need."""


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = function.name().partition("::")
        if namespace != "opensora_kernels" or "_cuda" not in name:
            return function(*args, **(kwargs or {}))
        self.names.append(name)
        if function._schema.returns:
            raise _Reached
        return None  # it writes into its arguments


def reached_operators(call: Callable[[], Any]) -> list[str]:
    """Operators of the CUDA library that `call` reaches with arguments that fit, up to the first that returns tensors.

    TypeError or RuntimeError for arguments that do not fit. Tensors may be on the CPU or on the meta device, since no
    kernel runs.
    """
    with _Recorder() as recorder, suppress(_Reached):
        call()
    return recorder.names
