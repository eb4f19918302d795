"""The compiled libraries: they load, run, and ask nothing of the system but torch's C shim, libstdc++ and libc."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import opensora_kernels
from opensora_kernels._extension import why_not_loaded

FOLDER = Path(opensora_kernels.__file__).parent
# Python's and PyTorch's C++ symbols, which tie a library to one version of them
FORBIDDEN = ("Py", "_ZN2at", "_ZNK2at", "_ZN3c10", "_ZNK3c10", "_ZN5torch3jit")


def test_cpu_library_runs_its_operator():
    reason = why_not_loaded("cpu")
    if not (FOLDER / "_cpu_library.so").exists():
        pytest.skip(reason)
    assert reason is None
    x = torch.arange(5, dtype=torch.float32)
    assert torch.equal(torch.ops.opensora_kernels.smoke(x), x + 1)
    with pytest.raises(RuntimeError, match="x must be float32"):
        torch.ops.opensora_kernels.smoke(x.double())


@pytest.mark.gpu
def test_cuda_library_runs_its_operator():
    reason = why_not_loaded("cuda")
    if reason is not None:
        pytest.skip(reason)
    x = torch.arange(5, dtype=torch.float32, device="cuda")
    assert torch.equal(torch.ops.opensora_kernels.smoke(x), x + 1)


@pytest.mark.parametrize("library", ["cpu", "cuda"])
def test_library_uses_only_the_stable_interface(library: str):
    path = FOLDER / f"_{library}_library.so"
    if not path.exists() or shutil.which("nm") is None:
        pytest.skip(f"{path.name} was not built" if shutil.which("nm") else "nm is not installed")
    listing = subprocess.run(["nm", "-D", "--undefined-only", path], check=True, capture_output=True, text=True).stdout
    symbols = [line.split()[-1] for line in listing.splitlines()]
    assert any(symbol.startswith("aoti_torch_") or symbol.startswith("torch_") for symbol in symbols)
    assert not [symbol for symbol in symbols if symbol.startswith(FORBIDDEN)]
