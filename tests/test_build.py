"""setup.py says what it decides, and csrc/ is compiled with the same flags with and without CMake."""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import cuda_library

ROOT = Path(__file__).parents[1]
TORCH = Path(torch.__file__).parent


@pytest.mark.parametrize(("environment", "message"), [
    ({"OPENSORA_BUILD_CUDA": "maybe"}, "OPENSORA_BUILD_CUDA must be auto, on or off, got 'maybe'"),
    ({"OPENSORA_BUILD_CUDA": "on", "CXX": "", "PATH": ""}, "OPENSORA_BUILD_CUDA=on, but no C++ compiler was found"),
    ({"OPENSORA_BUILD_CUDA": "on", "CXX": "c++", "CUDA_HOME": "/no"}, "CUDA=on, but nvcc is not in /no/bin"),
    ({"OPENSORA_BUILD_CUDA": "on", "CXX": "c++", "CUDA_HOME": "{old}"}, "is of CUDA 11.8; 12.5 or newer is needed"),
    ({"OPENSORA_BUILD_CUDA": "auto", "CXX": "c++", "CUDA_HOME": "/no"}, "building CPU library only, because nvcc"),
    ({"OPENSORA_BUILD_CUDA": "off", "CXX": "c++"}, "building CPU library only, because OPENSORA_BUILD_CUDA=off"),
    ({"OPENSORA_BUILD_CUDA": "off", "CXX": "", "PATH": ""}, "building pure Python, because no C++ compiler was found"),
])  # fmt: skip
def test_setup_says_what_it_decides_and_refuses_what_it_can_not_do(
    environment: dict[str, str], message: str, tmp_path: Path
):
    (tmp_path / "bin").mkdir()
    nvcc = tmp_path / "bin/nvcc"
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 11.8, V11.8.89'\n")
    nvcc.chmod(0o755)
    changed = {name: value.format(old=tmp_path) for name, value in environment.items()}
    # --help: decide, and build nothing
    command = [sys.executable, "setup.py", "build_ext", "--help"]
    ran = subprocess.run(command, cwd=ROOT, env=os.environ | changed, capture_output=True, text=True)
    assert message in ran.stdout + ran.stderr
    assert (ran.returncode == 0) == ("building" in message)


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_files_are_compiled_with_the_same_flags_without_cmake(tmp_path: Path):
    if not cuda_library.has_cmake():
        pytest.skip("cmake and ninja are not installed")
    nvcc = None if cuda_library.why_not_buildable() else cuda_library.find_nvcc()
    configure = ["cmake", "-S", str(ROOT), "-B", str(tmp_path), "-G", "Ninja", f"-DOPENSORA_TORCH={TORCH}"]
    configure += ["-DOPENSORA_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc}"] if nvcc else []
    subprocess.run(configure, check=True, env=cuda_library.environment(), capture_output=True)
    by_cmake = {}
    for entry in json.loads((tmp_path / "compile_commands.json").read_text()):
        if Path(entry["file"]).parent == ROOT / "csrc":
            by_cmake[_place(shlex.split(entry["command"]))] = _flags(shlex.split(entry["command"]))
    build = runpy.run_path(str(ROOT / "csrc/without_cmake.py"))
    commands = list(build["cpu_commands"](tmp_path, TORCH).values())
    commands += build["cuda_commands"](tmp_path, TORCH, Path(nvcc)).values() if nvcc else []
    without = {_place(command): _flags(command) for command in commands}
    assert without == by_cmake
    assert len(without) >= len(list((ROOT / "csrc").glob("*.cpp")))


def _place(command: list[str]) -> tuple[str, str]:
    """Source file, and which capability of a CPU it is compiled for."""
    capability = [flag for flag in command if flag.startswith("-DOPENSORA_CAPABILITY=")]
    return Path(command[command.index("-c") + 1]).name, "".join(capability)


def _flags(command: list[str]) -> list[str]:
    """Without the compiler, names of files, and what CMake adds for itself."""
    flags = list(command[1:])
    for option in ("-o", "-c", "-x"):
        while option in flags:
            del flags[flags.index(option) : flags.index(option) + 2]
    ignored = r"-D\w+_EXPORTS|-forward-unknown-to-host-compiler|-M[DTF]"
    return sorted({flag for flag in flags if not re.fullmatch(ignored, flag)})
