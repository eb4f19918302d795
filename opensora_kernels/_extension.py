"""The one door to the compiled libraries: loading them, why one can't be loaded, an operator's kernels as a backend.

Importing the package loads neither; `ops/<op>/cpu.py` and `ops/<op>/cuda_kernel.py` are imported at the first call.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from opensora_kernels import backends
from opensora_kernels.backends import Implementation

NOT_MEASURED = "it has not been measured on a GPU yet"
"""What `why_slower` of a CUDA kernel answers until a GPU has run it: it serves those alone who ask for it by name."""

_FOLDER = Path(__file__).resolve().parent
_MODULES = {"cpu": "cpu", "cuda": "cuda_kernel"}


def register(
    op: str,
    library: Literal["cpu", "cuda"],
    *,
    why_not: Callable[..., str | None] | None = None,
    why_slower: Callable[..., str | None] | None = None,
    saved_like: Callable[..., list[Tensor]] | None = None,
    passes: Callable[..., list[int]] | None = None,
) -> None:
    """Make `forward` and `backward` of `opensora_kernels.ops.<op>.cpu` or `.cuda_kernel` a backend of `op`.

    Both are as those of `_triton.register`, and so are the options. `why_not` is asked only about tensors on the
    library's device, and where the library is loaded.
    """

    def kernels() -> ModuleType:
        return importlib.import_module(f"opensora_kernels.ops.{op}.{_MODULES[library]}")

    def forward(*values: Any) -> Any:
        return kernels().forward(*values)

    def backward(*values: Any) -> Any:
        return kernels().backward(*values)

    def reason(*values: Any) -> str | None:
        return _why_not_here(library, values) or (None if why_not is None else why_not(*values))

    implementation = Implementation(
        forward, backward, reason, why_slower=why_slower, saved_like=saved_like, passes=passes
    )
    backends.register(op, library, implementation)


def why_not_loaded(library: Literal["cpu", "cuda"]) -> str | None:
    """Load the compiled library once. None when its operators are there, else a sentence that says why not."""
    if library not in _reasons:
        _reasons[library] = _load(library)
    return _reasons[library]


# What torch.compiler.assume_constant_result sets, without importing the compiler: a trace takes the answer as it is.
why_not_loaded._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _why_not_here(library: Literal["cpu", "cuda"], values: tuple[Any, ...]) -> str | None:
    if (reason := why_not_loaded(library)) is not None:
        return reason
    device_type = backends.device_type(values)
    if device_type == library:
        return None
    return f"the compiled {library} library needs a tensor on {library}, got one on {device_type}"


def _load(library: Literal["cpu", "cuda"]) -> str | None:
    path = _FOLDER / f"_{library}_library.so"
    if not path.exists():
        return (
            f"the compiled {library} library was not built (install says why; OPENSORA_BUILD_CUDA=auto|on|off decides)"
        )
    if library == "cuda" and torch.version.cuda is None:
        return "this torch is a CPU build, which lacks the symbols the compiled CUDA library needs"
    if library == "cuda" and (reason := why_not_loaded("cpu")) is not None:
        return reason  # the schemas are defined there
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"the compiled {library} library does not load: {error}"
    return None


_reasons: dict[str, str | None] = {}  # of libraries that were asked for
