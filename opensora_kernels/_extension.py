"""The one door to the compiled libraries: loading them, why one can't be loaded, an operator's kernels as a backend.

Importing the package loads neither; `ops/<op>/cpu.py` and `ops/<op>/cuda_kernel.py` are imported at the first call.
"""

from __future__ import annotations

import ctypes
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any, Literal

import torch

from opensora_kernels import backends

NOT_MEASURED = "it has not been measured on a GPU yet"
"""What `why_slower` of a CUDA kernel answers until a GPU has run it: it serves those alone who ask for it by name."""

OLDEST_CAPABILITY = (8, 0)

_FOLDER = Path(__file__).resolve().parent
_MODULES = {"cpu": "cpu", "cuda": "cuda_kernel"}
_FACTS = b"opensora_kernels build facts: "  # csrc/build_facts.h


def register(op: str, library: Literal["cpu", "cuda"], **options: Any) -> None:
    """Make `opensora_kernels.ops.<op>.cpu` or `.cuda_kernel` a backend of `op`: see `backends.register_module`.

    Its `why_not` is asked only about tensors on the library's device, and where the library is loaded.
    """
    backends.register_module(op, library, _MODULES[library], lambda values: _why_not_here(library, values), **options)


def why_not_loaded(library: Literal["cpu", "cuda"]) -> str | None:
    """Load the compiled library once. None when its operators are there, else a sentence that says why not."""
    if library not in _reasons:
        _reasons[library] = _load(library)
    return _reasons[library]


def compute_capability(index: int | None) -> tuple[int, int]:
    """Of a CUDA device, or of the current one; asked of the driver once."""
    if index not in _capabilities:
        _capabilities[index] = torch.cuda.get_device_capability(index)
    return _capabilities[index]


def why_not_this_gpu(device: torch.device) -> str | None:
    """Why the compiled CUDA library has no machine code for a CUDA device, or None."""
    if compute_capability(device.index) >= OLDEST_CAPABILITY:
        return None
    capability = ".".join(str(number) for number in compute_capability(device.index))
    return f"the compiled cuda library needs compute capability 8.0, {device} has {capability}"


# What torch.compiler.assume_constant_result sets, without importing the compiler: a trace takes the answers as given.
why_not_loaded._dynamo_marked_constant = True  # type: ignore[attr-defined]
compute_capability._dynamo_marked_constant = True  # type: ignore[attr-defined]


def library_file(library: Literal["cpu", "cuda"]) -> Path:
    """Where the build puts it; it need not exist."""
    return _FOLDER / f"_{library}_library.so"


def build_facts(library: Literal["cpu", "cuda"]) -> dict[str, str]:
    """What the library was built with, whether it loads or not; empty without a file."""
    path = library_file(library)
    return read_facts(path) if path.exists() else {}


def read_facts(path: Path) -> dict[str, str]:
    """What csrc/build_facts.h puts into the file of a library; empty for other files."""
    with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as content:
        start = content.find(_FACTS)
        if start < 0:
            return {}
        text = content[start + len(_FACTS) : content.find(b"\0", start)].decode()
    facts = dict(fact.split("=", 1) for fact in text.split("; "))
    target = int(facts["torch ABI"], 16)
    return facts | {"torch ABI": f"{target >> 56}.{target >> 48 & 255}"}


def _why_not_here(library: Literal["cpu", "cuda"], values: tuple[Any, ...]) -> str | None:
    if (reason := why_not_loaded(library)) is not None:
        return reason
    device = backends.device_of(values)
    if backends.device_type(device) != library:
        return f"the compiled {library} library needs a tensor on {library}, got one on {device.type}"
    return why_not_this_gpu(device) if device.type == "cuda" else None


def _load(library: Literal["cpu", "cuda"]) -> str | None:
    path = library_file(library)
    if not path.exists():
        return (
            f"the compiled {library} library was not built (install says why; OPENSORA_BUILD_CUDA=auto|on|off decides)"
        )
    if library == "cuda" and (reason := _why_not_cuda()) is not None:
        return reason
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        return f"the compiled {library} library does not load: {error}"
    return None


def _why_not_cuda() -> str | None:
    if torch.version.cuda is None:
        return "this torch is a CPU build, which lacks the symbols the compiled CUDA library needs"
    if (reason := why_not_loaded("cpu")) is not None:
        return reason  # the schemas are defined there
    nvcc, driver = build_facts("cuda").get("nvcc", "0"), _driver_version()
    # within a major version, newer programs run with older drivers
    if driver is not None and driver[0] < int(nvcc.split(".")[0]):
        return f"the compiled cuda library is of CUDA {nvcc}, and the driver knows CUDA {driver[0]}.{driver[1]} at most"
    return None


def _driver_version() -> tuple[int, int] | None:
    """The newest CUDA that the driver knows; None without a driver. No device is touched."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    number = ctypes.c_int()
    if driver.cuDriverGetVersion(ctypes.byref(number)) != 0:
        return None
    return number.value // 1000, number.value % 1000 // 10


_reasons: dict[str, str | None] = {}  # of libraries that were asked for
_capabilities: dict[int | None, tuple[int, int]] = {}
