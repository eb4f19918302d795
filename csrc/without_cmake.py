"""Compiles csrc/ where there is no CMake, as on a GPU machine without network: same flags, every file at once.

setup.py calls it. CMakeLists.txt is what everybody else uses; tests/test_build.py compares the two.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent
_HOST = ["-fPIC", "-fvisibility=hidden", f"-ffile-prefix-map={ROOT}/="]
_KERNEL = ["-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]

_CUDA = ["arch=compute_80,code=[sm_80]", "arch=compute_90,code=[compute_90,sm_90]"]
_SM90A = ["arch=compute_90a,code=[sm_90a]"]
_AVX2 = ["-mavx2", "-mfma"]
_AVX512 = [*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]
_CAPABILITIES = {"generic": []}
if platform.machine() in ("x86_64", "AMD64"):
    _CAPABILITIES |= {"avx2": _AVX2, "avx512": _AVX512, "avx512_bf16": [*_AVX512, "-mavx512bf16"]}


def build_cpu(folder: Path, torch: Path) -> None:
    """Make `folder`/_cpu_library.so. Raises CalledProcessError."""
    _link(_compile(cpu_commands(folder, torch)), [torch / "lib/libtorch_cpu.so"], folder / "_cpu_library.so")


def build_cuda(folder: Path, torch: Path, nvcc: Path) -> None:
    """Make `folder`/_cuda_library.so. Raises CalledProcessError."""
    objects = _compile(cuda_commands(folder, torch, nvcc))
    torch_cuda = torch / "lib/libtorch_cuda.so"
    if not torch_cuda.exists():  # a CPU build of torch: an empty library of that name is enough to link against
        torch_cuda = folder / "libtorch_cuda.so"
        _link(["-x", "c++", os.devnull], [f"-Wl,-soname,{torch_cuda.name}"], torch_cuda)
    runtime = next(path.parent for path in nvcc.resolve().parents[1].glob("**/libcudart_static.a"))
    others = [f"-L{runtime}", "-lcudadevrt", "-lcudart_static", "-lrt", "-lpthread", "-ldl"]
    _link(objects, [torch / "lib/libtorch_cpu.so", torch_cuda, *others], folder / "_cuda_library.so")


def cpu_commands(folder: Path, torch: Path) -> dict[Path, list[str]]:
    """What makes each object."""
    found = {}
    for source in sorted(FOLDER.glob("*.cpp")):
        host = [_compiler(), "-std=gnu++20", *_HOST, *_common(source, torch)]
        if not source.stem.endswith("_kernels"):
            found[folder / f"{source.name}.o"] = host
            continue
        for capability, flags in _CAPABILITIES.items():
            flags = [*flags, *_KERNEL, f"-DOPENSORA_CAPABILITY={capability}"]
            found[folder / f"{source.name}.{capability}.o"] = [*host, *flags]
    return found


def cuda_commands(folder: Path, torch: Path, nvcc: Path) -> dict[Path, list[str]]:
    """What makes each object."""
    found = {}
    for source in sorted(FOLDER.glob("*.cu")):
        architectures = _SM90A if source.stem.endswith("_sm90a") else _CUDA
        device = [str(nvcc), "-std=c++20", "-DUSE_CUDA", *(f"--generate-code={each}" for each in architectures)]
        host = [f"-Xcompiler={flag}" for flag in _HOST]
        found[folder / f"{source.name}.o"] = [*device, *host, *_common(source, torch)]
    return found


def _common(source: Path, torch: Path) -> list[str]:
    flags = ["-O3", "-DNDEBUG", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-isystem", str(torch / "include")]
    if source.stem == "build_facts":
        version = re.search('"(.+)"', (ROOT / "opensora_kernels/_version.py").read_text())[1]
        flags += [f'-DOPENSORA_VERSION="{version}"', '-DOPENSORA_ARCHITECTURES="80-real 90 and 90a-real"']
    return [*flags, "-c", str(source)]


def _compiler() -> str:
    return os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")))


def _compile(commands: dict[Path, list[str]]) -> list[str]:
    """Objects of all commands, which run at once."""
    for path in commands:
        path.parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(int(os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", os.cpu_count() or 1))) as pool:
        list(pool.map(lambda path: subprocess.run([*commands[path], "-o", str(path)], check=True), commands))
    return [str(path) for path in commands]


def _link(objects: list[str], others: list[Path | str], library: Path) -> None:
    command = [_compiler(), "-shared", *objects, "-Wl,--no-as-needed", *map(str, others), "-o", str(library)]
    subprocess.run(command, check=True)
