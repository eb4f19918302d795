"""`python -m opensora_kernels`: what is installed here, which backend serves each operator, and known hazards."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
import sys
from pathlib import Path
from typing import Literal

import torch

from . import __version__, _extension, _triton, backends
from .cases import Maker
from .sequence_parallel.peers import why_not_here

_OPTIONAL = ("triton", "flash-attn", "apex", "diffusers", "torch-npu")


def main() -> int:
    """Print the report; always succeeds, since a machine without a GPU is a supported machine."""
    print(f"opensora_kernels {__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    print(f"\nDevices\n  {_devices()}")
    print("\nCompiled and optional parts")
    for name, reason in _parts():
        print(f"  {name:<18}{reason}")
    print("\nBackends, in the order in which they are tried: the first that can serve a call and is not thought slower")
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
    rows = [("operator", "cuda", "npu", "cpu")]
    for op in backends.ops():
        rows.append((op, *(" > ".join(backends.order_of(op, device)) for device in rows[0][1:])))
    widths = [max(map(len, column)) + 2 for column in zip(*rows, strict=True)]
    return ["".join(map(str.ljust, row, widths)).rstrip() for row in rows]


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
    """Facts about the installed versions and the GPU that cost users time, memory or kernels."""
    found = []
    release = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if release == (2, 9):
        found.append(
            "torch 2.9 runs bf16 conv3d on CUDA without cuDNN: 3-17 times the memory (pytorch issues 166643, 177406);"
            " use torch 2.8 or >= 2.10"
        )
    if release < (2, 10):
        found.append(
            f"torch {torch.__version__} is older than 2.10, the oldest version the compiled libraries load into"
        )
    if torch.cuda.is_available():
        found += cudnn_hazards(release, torch.backends.cudnn.version())
        capabilities = [_extension.compute_capability(index) for index in range(torch.cuda.device_count())]
        found += [f"cuda:{index} {text}" for index, one in enumerate(capabilities) for text in device_hazards(one)]
    return found + [hazard for library in ("cpu", "cuda") for hazard in library_hazards(library)]


def cudnn_hazards(release: tuple[int, ...], cudnn: int | None) -> list[str]:
    """For a version of torch, (2, 10) say, and of cuDNN, 91500 say, or None where there is none."""
    if cudnn is None:
        return ["cuDNN is not available: 3-D convolutions fall back to a slow path with much more memory"]
    if release >= (2, 9) and 90800 <= cudnn < 91500:
        return [
            f"cuDNN {cudnn // 10000}.{cudnn // 100 % 100} is wrong for 3-D convolutions in bf16 and fp16, so torch"
            f" {release[0]}.{release[1]} computes those of contiguous tensors without it, with several times the memory"
            " (pytorch issues 163539, 166643); use cuDNN >= 9.15, or channels_last_3d"
        ]
    return []


def device_hazards(capability: tuple[int, int]) -> list[str]:
    """For the compute capability of a GPU."""
    shown = f"has compute capability {capability[0]}.{capability[1]}"
    if capability < _extension.OLDEST_CAPABILITY:
        return [f"{shown}: the compiled CUDA kernels need 8.0"]
    if capability != (9, 0):
        return [f"{shown}: the kernels for Hopper (TMA, wgmma) run on 9.0 alone, so the portable ones serve"]
    return []


def library_hazards(library: Literal["cpu", "cuda"]) -> list[str]:
    """What is wrong with the file of a compiled library beside its sources, as in an editable installation."""
    path, sources = _extension.library_file(library), Path(__file__).parents[1] / "csrc"
    if not path.exists():
        return []
    version = _extension.build_facts(library).get("version", "unknown")
    if version != __version__:
        return [f"{path.name} was built from version {version}, this is {__version__}: install again"]
    suffixes = {".h", ".cpp"} if library == "cpu" else {".h", ".cuh", ".cu"}
    of_library = [source for source in sources.glob("*") if source.suffix in suffixes]
    newer = [source.name for source in sorted(of_library) if source.stat().st_mtime > path.stat().st_mtime]
    return [f"{path.name} is older than csrc/{newer[0]}: install again"] if newer else []


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _devices() -> str:
    if torch.cuda.is_available():
        return ", ".join(
            f"cuda:{index} {torch.cuda.get_device_name(index)}" for index in range(torch.cuda.device_count())
        )
    return f"no CUDA device; CPU with {torch.get_num_threads()} threads"


def _build(facts: dict[str, str]) -> list[str]:
    """Of a library, in the doctor's words."""
    if not facts:
        return []
    host = f"version {facts['version']} by {facts['compiler']} for torch >= {facts['torch ABI']}"
    lines = [f"{host}, with headers of {facts['torch headers']}"]
    if "nvcc" in facts:
        lines.append(f"and by nvcc {facts['nvcc']} for {facts['architectures']}")
    return lines


def _parts() -> list[tuple[str, str]]:
    parts = []
    for name in ("cpu", "cuda"):
        parts.append((f"{name} library", _extension.why_not_loaded(name) or "loaded"))
        parts += [("", line) for line in _build(_extension.build_facts(name))]
    parts.append(("triton kernels", _triton.why_not(_device()) or "run"))
    parts.append(("peer to peer", why_not_here(_device()) or f'for route="peer"; {_extension.NOT_MEASURED}'))
    for name in _OPTIONAL:
        try:
            parts.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            parts.append((name, "not installed"))
    return parts


if __name__ == "__main__":
    sys.exit(main())
