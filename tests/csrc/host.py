"""Compiles csrc/tests/*.cpp for the host: programs that try every index map, libraries that replay kernels."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

_SOURCES = Path(__file__).parents[2] / "csrc/tests"
_FLAGS = ["-std=c++20", "-Wall", "-Wextra", "-Werror"]


def why_not() -> str | None:
    return None if _compiler() else "no C++ compiler was found"


def program(source: str, folder: Path) -> Path:
    return _compiled(source, folder / Path(source).stem, "-O1")


def library(source: str, folder: Path, *, level: str = "-O2") -> Path:
    return _compiled(source, folder / f"{Path(source).stem}.so", level, "-shared", "-fPIC")


def _compiled(source: str, target: Path, *options: str) -> Path:
    subprocess.run([_compiler(), *_FLAGS, *options, _SOURCES / source, "-o", target], check=True)
    return target


def _compiler() -> str | None:
    return next(filter(shutil.which, ("c++", "g++", "clang++")), None)
