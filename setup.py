"""Builds csrc/ with CMake and Ninja where that is possible, and says what it decided.

OPENSORA_BUILD_CUDA=auto (default): build the CUDA library if nvcc is found and torch is a CUDA build; on: build it or
fail; off: leave it out. Without Linux, a C++ compiler or torch's headers the package installs in pure Python. Without
CMake, which pip brings unless told not to, csrc/without_cmake.py compiles the same.
"""

from __future__ import annotations

import os
import re
import runpy
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
    """Of CUDA_HOME where that is set. Never by torch, whose CUDA_HOME is None in a CPU build."""
    if home := os.environ.get("CUDA_HOME"):
        return shutil.which("nvcc", path=f"{home}/bin")
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def why_not_nvcc(nvcc: str | None) -> str | None:
    """None where nvcc can compile csrc/*.cu, else a sentence."""
    if nvcc is None:
        home = os.environ.get("CUDA_HOME")
        return f"nvcc is not in {home}/bin" if home else "nvcc is neither in PATH nor in /usr/local/cuda/bin"
    version = version_of(nvcc, r"release (\d+)\.(\d+)")
    return None if version >= (12, 5) else f"{nvcc} is of CUDA {'.'.join(map(str, version))}; 12.5 or newer is needed"


def version_of(program: str, pattern: str) -> tuple[int, ...]:
    shown = subprocess.run([program, "--version"], check=True, capture_output=True, text=True).stdout
    found = re.search(pattern, shown)
    return tuple(int(part) for part in found.groups()) if found else (0, 0)


def decide(torch_folder: Path | None) -> tuple[bool, bool, str]:
    """Whether to build the CPU library, whether to build the CUDA library, and why, in one sentence."""
    wanted = os.environ.get("OPENSORA_BUILD_CUDA", "auto")
    if wanted not in ("auto", "on", "off"):
        raise SystemExit(f"OPENSORA_BUILD_CUDA must be auto, on or off, got {wanted!r}")
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    missing = []
    if sys.platform != "linux":
        missing.append("the libraries are built on Linux alone")
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
    if (reason := why_not_nvcc(find_nvcc())) is not None:
        if wanted == "on":
            raise SystemExit(f"OPENSORA_BUILD_CUDA=on, but {reason}")
        return True, False, f"CPU library only, because {reason}"
    if wanted == "auto" and not torch_is_cuda_build(torch_folder):
        return True, False, "CPU library only, because torch is a CPU build (OPENSORA_BUILD_CUDA=on compiles anyway)"
    return True, True, "CPU and CUDA libraries"


def why_not_cmake() -> str | None:
    """None where CMake can build, else a sentence."""
    cmake = shutil.which("cmake")
    if cmake is None or shutil.which("ninja") is None:
        return "cmake and ninja are not both in PATH"
    version = version_of(cmake, r"version (\d+)\.(\d+)")
    return None if version >= (3, 26) else f"{cmake} is of version {'.'.join(map(str, version))}; 3.26 is needed"


class BuildLibraries(build_ext):
    """One build makes every library; setuptools only copies them into place."""

    def get_ext_filename(self, name: str) -> str:
        # the libraries use no Python symbol, so no interpreter tag
        return os.path.join(*name.split(".")) + ".so"

    def run(self) -> None:
        if not self.extensions:
            return
        folder, torch, nvcc = Path(self.build_temp).resolve(), find_torch(), find_nvcc() if BUILD_CUDA else None
        if (reason := why_not_cmake()) is None:
            build_with_cmake(folder, torch, nvcc)
        else:
            print(f"opensora_kernels: compiling without CMake, because {reason}", flush=True)
            folder /= "without_cmake"
            build = runpy.run_path(str(ROOT / "csrc/without_cmake.py"))
            build["build_cpu"](folder, torch)
            if nvcc:
                build["build_cuda"](folder, torch, Path(nvcc))
        # of an earlier build one may not be wanted now, and a process may have loaded one: it keeps that
        for name in ("_cpu_library", "_cuda_library"):
            Path(self.get_ext_fullpath(f"opensora_kernels.{name}")).unlink(missing_ok=True)
        for extension in self.extensions:
            target = Path(self.get_ext_fullpath(extension.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / f"{extension.name.split('.')[-1]}.so", target)


def build_with_cmake(folder: Path, torch: Path, nvcc: str | None) -> None:
    configure = [
        # fresh: the cache may name programs of a build environment that pip has removed
        *("cmake", "--fresh", "-S", ROOT, "-B", folder, "-G", "Ninja"),
        f"-DOPENSORA_TORCH={torch}",
        f"-DOPENSORA_CUDA={'ON' if nvcc else 'OFF'}",
        *([f"-DCMAKE_CUDA_COMPILER={nvcc}"] if nvcc else []),
    ]
    subprocess.run(configure, check=True)
    subprocess.run(["cmake", "--build", folder], check=True)


BUILD_CPU, BUILD_CUDA, REASON = decide(find_torch())
if {"build_ext", "bdist_wheel", "editable_wheel", "develop", "install"} & set(sys.argv):
    print(f"opensora_kernels: building {REASON}")

command_classes: dict[str, type] = {"build_ext": BuildLibraries}
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
