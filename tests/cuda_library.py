"""Compiles the CUDA library for tests, once for each state of csrc/, into build/tests-cuda/."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
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
    """The folder that holds _cuda_library.so and build.log. Processes that ask at the same time wait for the first.

    The CUDA library alone, by CMake where there is one: installing has built the CPU library.
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
    log = ""
    for command in commands(folder):
        ran = subprocess.run(
            command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        log += ran.stdout
        (folder / "build.log").write_text(log)
        if ran.returncode != 0:
            raise RuntimeError(f"csrc/ does not compile:\n{ran.stdout[-6000:]}")


def commands(folder: Path) -> list[list[str]]:
    """That compile into `folder`, one after the other."""
    torch_folder, nvcc = Path(torch.__file__).parent, str(find_nvcc())
    if not has_cmake():
        places = f"*map(pathlib.Path, {[str(folder), str(torch_folder), nvcc]!r})"
        call = f"runpy.run_path('csrc/without_cmake.py')['build_cuda']({places})"
        return [[sys.executable, "-c", f"import pathlib, runpy; {call}"]]
    configure = ["cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", f"-DOPENSORA_TORCH={torch_folder}"]
    configure += ["-DOPENSORA_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc}"]
    return [configure, ["cmake", "--build", str(folder), "--target", "_cuda_library"]]


def has_cmake() -> bool:
    """Of a version that will do: the environment's own, or the system's."""
    programs = environment()["PATH"]
    if (cmake := which("cmake", path=programs)) is None or which("ninja", path=programs) is None:
        return False
    shown = subprocess.run([cmake, "--version"], check=True, capture_output=True, text=True).stdout
    major, minor = re.search(r"version (\d+)\.(\d+)", shown).groups()
    return (int(major), int(minor)) >= (3, 26)


def environment() -> dict[str, str]:
    """With the programs that pip has installed, and two compilers at a time."""
    programs = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    return {"CMAKE_BUILD_PARALLEL_LEVEL": "2"} | os.environ | {"PATH": programs}


def _key() -> str:
    """Of all that the libraries are made from."""
    digest = hashlib.sha256(f"{torch.__version__} {find_nvcc()} {sys.version}".encode())
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    for path in sorted([*sources, ROOT / "CMakeLists.txt", ROOT / "opensora_kernels/_version.py"]):
        digest.update(str(path.relative_to(ROOT)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
