"""Compiles csrc/ where there is no CMake, as on a GPU machine without network: same flags, every file at once.

setup.py calls `build`. CMakeLists.txt is what everybody else uses; tests/test_build.py compares the two.
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

_CUDA = ["arch=compute_80,code=[sm_80]", "arch=compute_90,code=[compute_90,sm_90]"]
_SM90A = ["arch=compute_90a,code=[sm_90a]"]
_AVX2 = ["-mavx2", "-mfma"]
_AVX512 = [*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]
_CAPABILITIES = {"generic": []}
if platform.machine() in ("x86_64", "AMD64"):
    _CAPABILITIES |= {"avx2": _AVX2, "avx512": _AVX512, "avx512_bf16": [*_AVX512, "-mavx512bf16"]}


def build(folder: Path, torch: Path, nvcc: str | None) -> None:
    """Make `folder`/_cpu_library.so and, with an nvcc, `folder`/_cuda_library.so. Raises CalledProcessError."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = commands(folder, torch, nvcc)
    with ThreadPoolExecutor(int(os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", os.cpu_count() or 1))) as pool:
        list(pool.map(_run, wanted.values()))
    objects = {kind: [str(folder / path) for path in wanted if path.startswith(f"{kind}/")] for kind in ("cpu", "cuda")}
    compiler = _compiler()
    libraries = ["-Wl,--no-as-needed", str(torch / "lib/libtorch_cpu.so")]
    _run([compiler, "-shared", *objects["cpu"], *libraries, "-o", str(folder / "_cpu_library.so")])
    if nvcc is None:
        return
    torch_cuda = torch / "lib/libtorch_cuda.so"
    if not torch_cuda.exists():  # a CPU build of torch: an empty library of that name is enough to link against
        torch_cuda = folder / "libtorch_cuda.so"
        name = f"-Wl,-soname,{torch_cuda.name}"
        _run([compiler, "-shared", name, "-x", "c++", os.devnull, "-o", str(torch_cuda)])
    toolkit = Path(nvcc).resolve().parents[1]
    runtime = next(path.parent for path in toolkit.glob("**/libcudart_static.a"))
    libraries += [str(torch_cuda), f"-L{runtime}", "-lcudadevrt", "-lcudart_static", "-lrt", "-lpthread", "-ldl"]
    _run([compiler, "-shared", *objects["cuda"], *libraries, "-o", str(folder / "_cuda_library.so")])


def commands(folder: Path, torch: Path, nvcc: str | None) -> dict[str, list[str]]:
    """The command that makes each object, by its path below `folder`."""
    found = {}
    for source in sorted(FOLDER.glob("*.cpp")):
        is_kernel = source.stem.endswith("_kernels")
        for capability, flags in _CAPABILITIES.items() if is_kernel else [("host", [])]:
            if is_kernel:
                flags = [*flags, "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]
                flags.append(f"-DOPENSORA_CAPABILITY={capability}")
            host = [_compiler(), "-std=gnu++20", "-fPIC", "-fvisibility=hidden", _prefix_map(), *flags]
            found[f"cpu/{capability}/{source.name}.o"] = [*host, *_common(source, torch)]
    for source in sorted(FOLDER.glob("*.cu")) if nvcc else []:
        architectures = _SM90A if source.stem.endswith("_sm90a") else _CUDA
        device = [nvcc, "-std=c++20", "-DUSE_CUDA"]
        device += [f"--generate-code={architecture}" for architecture in architectures]
        device += [f"-Xcompiler={flag}" for flag in ("-fPIC", "-fvisibility=hidden", _prefix_map())]
        found[f"cuda/{source.name}.o"] = [*device, *_common(source, torch)]
    return {path: [*command, "-o", str(folder / path)] for path, command in found.items()}


def _common(source: Path, torch: Path) -> list[str]:
    flags = ["-O3", "-DNDEBUG", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-isystem", str(torch / "include")]
    if source.stem == "build_facts":
        version = re.search('"(.+)"', (ROOT / "opensora_kernels/_version.py").read_text())[1]
        flags += [f'-DOPENSORA_VERSION="{version}"', '-DOPENSORA_ARCHITECTURES="80-real 90 and 90a-real"']
    return [*flags, "-c", str(source)]


def _prefix_map() -> str:
    return f"-ffile-prefix-map={ROOT}/="


def _compiler() -> str:
    return os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")))


def _run(command: list[str]) -> None:
    Path(command[-1]).parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(command, check=True)
