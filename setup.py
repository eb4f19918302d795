"""Builds csrc/ with CMake and Ninja where that is possible, and says what it decided.

OPENSORA_BUILD_CUDA=auto (default): build the CUDA library if nvcc is found and torch is a CUDA build; on: build it or
fail; off: leave it out. Without a C++ compiler or without torch's headers the package installs in pure Python.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from importlib.machinery import PathFinder
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def find_torch() -> Path | None:
    """torch's folder in the environment that is being installed into.

    pip's isolated build environment hides it, and requiring torch there would download gigabytes, so it is looked up
    by path; only its headers are needed.
    """
    paths = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *sys.path]
    spec = PathFinder.find_spec("torch", paths)
    return Path(spec.origin).parent if spec and spec.origin else None


def torch_is_cuda_build(torch_folder: Path) -> bool:
    version: dict[str, object] = {}
    exec((torch_folder / "version.py").read_text(), version)
    return version.get("cuda") is not None


def find_nvcc() -> str | None:
    cuda_home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=f"{cuda_home}/bin" if cuda_home else None) or shutil.which("nvcc")


def decide(torch_folder: Path | None) -> tuple[bool, bool, str]:
    """Whether to build the CPU library, whether to build the CUDA library, and why, in one sentence."""
    wanted = os.environ.get("OPENSORA_BUILD_CUDA", "auto")
    if wanted not in ("auto", "on", "off"):
        raise SystemExit(f"OPENSORA_BUILD_CUDA must be auto, on or off, got {wanted!r}")
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    missing = []
    if torch_folder is None or not (torch_folder / "include/torch/csrc/stable/library.h").exists():
        missing.append("torch >= 2.10 with its headers is not installed")
    if compiler is None:
        missing.append("no C++ compiler was found")
    if missing:
        if wanted == "on":
            raise SystemExit(f"OPENSORA_BUILD_CUDA=on, but {' and '.join(missing)}")
        return False, False, f"pure Python, because {' and '.join(missing)}"
    if wanted == "off":
        return True, False, "CPU library only, because OPENSORA_BUILD_CUDA=off"
    if find_nvcc() is None:
        if wanted == "on":
            raise SystemExit("OPENSORA_BUILD_CUDA=on, but nvcc is neither in CUDA_HOME/bin nor in PATH")
        return True, False, "CPU library only, because nvcc was not found"
    if wanted == "auto" and not torch_is_cuda_build(torch_folder):
        return True, False, "CPU library only, because torch is a CPU build (OPENSORA_BUILD_CUDA=on compiles anyway)"
    return True, True, "CPU and CUDA libraries"


class BuildWithCMake(build_ext):
    """One CMake build makes every library; setuptools only copies them into place."""

    def get_ext_filename(self, name: str) -> str:
        # the libraries use no Python symbol, so no interpreter tag
        return os.path.join(*name.split(".")) + ".so"

    def run(self) -> None:
        if not self.extensions:
            return
        build = Path(self.build_temp).resolve()
        nvcc = find_nvcc()
        configure = [
            *("cmake", "-S", ROOT, "-B", build, "-G", "Ninja"),
            f"-DOPENSORA_TORCH={find_torch()}",
            f"-DOPENSORA_CUDA={'ON' if BUILD_CUDA else 'OFF'}",
            *([f"-DCMAKE_CUDA_COMPILER={nvcc}"] if BUILD_CUDA else []),
        ]
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", build], check=True)
        for extension in self.extensions:
            target = Path(self.get_ext_fullpath(extension.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(build / f"{extension.name.split('.')[-1]}.so", target)


BUILD_CPU, BUILD_CUDA, REASON = decide(find_torch())
if {"build_ext", "bdist_wheel", "editable_wheel", "develop", "install"} & set(sys.argv):
    print(f"opensora_kernels: building {REASON}")

command_classes: dict[str, type] = {"build_ext": BuildWithCMake}
try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools < 70.1
    from wheel.bdist_wheel import bdist_wheel


class WheelForEveryPython(bdist_wheel):
    """The libraries are tied to a platform but to no Python: py3-none-<platform>."""

    def get_tag(self) -> tuple[str, str, str]:
        platform = super().get_tag()[2]
        return "py3", "none", platform if BUILD_CPU else "any"


command_classes["bdist_wheel"] = WheelForEveryPython

setup(
    ext_modules=[
        *([Extension("opensora_kernels._cpu_library", [])] if BUILD_CPU else []),
        *([Extension("opensora_kernels._cuda_library", [])] if BUILD_CUDA else []),
    ],
    cmdclass=command_classes,
)
