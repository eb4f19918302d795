"""Compiles the CUDA library for tests, once for each state of csrc/, into build/tests-cuda/."""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from shutil import which

import torch

ROOT = Path(__file__).parents[1]
_FOLDER = ROOT / "build/tests-cuda"


def find_nvcc() -> str | None:
    """As setup.py finds it."""
    if home := os.environ.get("CUDA_HOME"):
        return which("nvcc", path=f"{home}/bin")
    return which("nvcc") or which("nvcc", path="/usr/local/cuda/bin")


def why_not_buildable() -> str | None:
    """None where csrc/ can be compiled for CUDA, else a sentence."""
    if sys.platform != "linux":
        return "the libraries are built on Linux alone"
    if find_nvcc() is None:
        return "nvcc is not installed"
    return None if which(os.environ.get("CXX", "c++")) else "there is no C++ compiler"


def build() -> Path:
    """The folder that holds opensora_kernels/_cpu_library.so, _cuda_library.so, temp/ and build.log.

    By setup.py, as an installation does it. Processes that ask at the same time wait for the first.
    """
    folder = _FOLDER / _key()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "done").exists():
            _compile(folder)
            (folder / "done").touch()
    return folder


def _compile(folder: Path) -> None:
    command = [
        sys.executable,
        "setup.py",
        "build_ext",
        "--build-temp",
        str(folder / "temp"),
        "--build-lib",
        str(folder),
    ]
    programs = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    environment = {"CMAKE_BUILD_PARALLEL_LEVEL": "2"} | os.environ | {"OPENSORA_BUILD_CUDA": "on", "PATH": programs}
    ran = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    (folder / "build.log").write_text(ran.stdout)
    if ran.returncode != 0:
        raise RuntimeError(f"csrc/ does not compile:\n{ran.stdout[-6000:]}")


def _key() -> str:
    """Of all that the libraries are made from."""
    digest = hashlib.sha256(f"{torch.__version__} {find_nvcc()} {sys.version}".encode())
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    for path in sorted([*sources, ROOT / "CMakeLists.txt", ROOT / "setup.py", ROOT / "opensora_kernels/_version.py"]):
        digest.update(str(path.relative_to(ROOT)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
