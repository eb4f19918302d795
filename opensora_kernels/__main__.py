"""`python -m opensora_kernels`: what is installed here, which backend serves each operator, and known hazards."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
import sys

import torch

from . import __version__, _extension, _triton, backends
from .cases import Maker

_OPTIONAL = ("triton", "flash-attn", "apex", "diffusers", "torch-npu")


def main() -> int:
    """Print the report; always succeeds, since a machine without a GPU is a supported machine."""
    print(f"opensora_kernels {__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    print(f"\nDevices\n  {_devices()}")
    print("\nCompiled and optional parts")
    for name, reason in _parts():
        print(f"  {name:<18}{reason}")
    print("\nBackends, in the order in which they are tried; the first that can serve a call runs it")
    for line in backend_table():
        print(f"  {line}")
    print(f"\nHere, in bf16 on {_device()}: what each backend says to a small call")
    for line in small_calls():
        print(f"  {line}")
    print("\nKnown hazards")
    for hazard in hazards() or ["none found"]:
        print(f"  {hazard}")
    return 0


def backend_table() -> list[str]:
    """One line per operator and device type: the backends registered for it."""
    lines = [f"{'operator':<22}{'cuda':<30}{'npu':<16}cpu"]
    for op in backends.ops():
        columns = [" > ".join(backends.order_of(op, device)) for device in ("cuda", "npu", "cpu")]
        lines.append(f"{op:<22}{columns[0]:<30}{columns[1]:<16}{columns[2]}")
    return lines


def small_calls() -> list[str]:
    """For every operator, and every backend that could run its first case: chosen, available, or the reason why not."""
    lines = []
    for op in backends.ops():
        case = importlib.import_module(f"{__package__}.ops.{op}.cases").CASES[0]
        told = backends.explain(op, **case.make(Maker(dtype=torch.bfloat16, device=str(_device()))))
        for index, (backend, verdict) in enumerate(told.items()):
            lines.append(f"{op if index == 0 else '':<22}{backend:<11}{verdict}")
    return lines


def hazards() -> list[str]:
    """Facts about the installed versions that cost users time or memory."""
    found = []
    major_minor = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if major_minor == (2, 9):
        found.append(
            "torch 2.9 runs bf16 conv3d on CUDA without cuDNN: 3-17 times the memory (pytorch issues 166643, 177406);"
            " use torch 2.8 or >= 2.10"
        )
    if major_minor < (2, 10):
        found.append(
            f"torch {torch.__version__} is older than 2.10, the oldest version the compiled libraries load into"
        )
    if torch.cuda.is_available() and not torch.backends.cudnn.is_available():
        found.append("cuDNN is not available: 3-D convolutions fall back to a slow path with much more memory")
    return found


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _devices() -> str:
    if torch.cuda.is_available():
        return ", ".join(
            f"cuda:{index} {torch.cuda.get_device_name(index)}" for index in range(torch.cuda.device_count())
        )
    return f"no CUDA device; CPU with {torch.get_num_threads()} threads"


def _parts() -> list[tuple[str, str]]:
    parts = [(f"{name} library", _extension.why_not_loaded(name) or "loaded") for name in ("cpu", "cuda")]
    parts.append(("triton kernels", _triton.why_not(_device()) or "run"))
    for name in _OPTIONAL:
        try:
            parts.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            parts.append((name, "not installed"))
    return parts


if __name__ == "__main__":
    sys.exit(main())
