"""The CUDA library compiles without a GPU; what it asks of the system, and what its machine code holds."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from opensora_kernels import _extension
from tests import cuda_library, sass
from tests.sass_loops import Instruction, in_loops

pytestmark = [pytest.mark.timeout(900), pytest.mark.slow]

TABLE = cuda_library.ROOT / "bench/results/cuda-extension.md"
SYSTEM_LIBRARIES = r"lib(torch_cpu|torch_cuda|stdc\+\+|m|gcc_s|c|dl|rt|pthread)\.so(\.\d+)?|ld-linux-[\w-]+\.so\.\d"
SYSTEM_SYMBOLS = r".+@+(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+|_ITM_(de)?registerTMCloneTable|__gmon_start__"


@pytest.fixture(scope="session")
def built() -> Path:
    if (reason := cuda_library.why_not_buildable()) is not None:
        pytest.skip(reason)
    return cuda_library.build()


@pytest.fixture(scope="session")
def kernels(built: Path) -> list[sass.Kernel]:
    if sass.cuobjdump() is None:
        pytest.skip("cuobjdump is neither in PATH nor beside Triton")
    return sass.kernels_of(built / "_cuda_library.so")


@pytest.mark.parametrize("library", ["cpu", "cuda"])
def test_library_asks_for_torchs_stable_interface_and_the_systems_libraries_alone(
    library: str, request: pytest.FixtureRequest
):
    if shutil.which("nm") is None or shutil.which("readelf") is None:
        pytest.skip("binutils are not installed")
    path = _extension.library_file("cpu") if library == "cpu" else request.getfixturevalue("built") / "_cuda_library.so"
    if not path.exists():
        pytest.skip("the CPU library was not built")
    listing = subprocess.run(["readelf", "-d", path], check=True, capture_output=True, text=True).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", listing)
    assert "libtorch_cpu.so" in needed
    assert [name for name in needed if not re.fullmatch(SYSTEM_LIBRARIES, name)] == []
    listing = subprocess.run(["nm", "-D", "--undefined-only", path], check=True, capture_output=True, text=True).stdout
    symbols = {line.split()[-1] for line in listing.splitlines()}
    others = {symbol for symbol in symbols if not re.fullmatch(SYSTEM_SYMBOLS, symbol)}
    folder = Path(torch.__file__).parent / "include/torch/csrc"
    headers = [*(folder / "stable/c").rglob("*.h"), *(folder / "inductor/aoti_torch/c").rglob("*.h")]
    declared = set(re.findall(r"\b(?:aoti_)?torch_\w+", " ".join(header.read_text() for header in headers)))
    assert "aoti_torch_library_init_impl" in others
    assert others - declared == set()


def test_each_kernel_is_compiled_for_the_architectures_of_its_file(kernels: list[sass.Kernel]):
    found: dict[str, set[str]] = {}
    for kernel in kernels:
        found.setdefault(f"{kernel.file} {kernel.name}", set()).add(kernel.architecture)
    assert {frozenset(architectures) for architectures in found.values()} <= {
        frozenset({"sm_80", "sm_90"}),
        frozenset({"sm_90a"}),
    }
    assert found["smoke.cu smoke_kernel"] == {"sm_80", "sm_90"}
    has_hopper = any("sm_90a" in architectures for architectures in found.values())
    assert has_hopper == bool(list((cuda_library.ROOT / "csrc").glob("*_sm90a.cu")))


def test_kernels_hold_the_instructions_and_keep_the_limits_that_they_should(kernels: list[sass.Kernel]):
    assert [fault for kernel in kernels for fault in sass.faults(kernel)] == []
    names = [f"{kernel.file} {kernel.name}" for kernel in kernels]
    assert [pattern for pattern, _ in sass.EXPECTED if not any(re.search(pattern, name) for name in names)] == []


def test_the_compiler_serialises_no_warpgroup_products(built: Path):
    log = (built / "build.log").read_text()
    assert [line for line in log.splitlines() if "serialized" in line] == []


def test_the_committed_table_is_what_this_compiler_makes(built: Path, kernels: list[sass.Kernel]):
    facts = _extension.read_facts(built / "_cuda_library.so")
    committed = TABLE.read_text()
    if f"nvcc {facts['nvcc']} " not in committed:
        pytest.skip(f"the table is of another nvcc than {facts['nvcc']}")
    assert committed == sass.table(kernels, facts), "run `make sass`"


def test_loops_are_found_also_where_their_blocks_lie_apart():
    """0 -> 1 -> 2 -> 3 -> 1; 2 waits in 5, behind the end, and comes back."""

    def code(opcode: str, operands: str = "", *, is_predicated: bool = False) -> tuple[bool, str, str]:
        return is_predicated, opcode, operands

    lines = [
        code("LDL"),
        code("HGMMA.64x96x16"),
        code("BRA", "0x50", is_predicated=True),
        code("BRA", "0x10", is_predicated=True),
        code("EXIT"),
        code("STL"),
        code("BRA", "0x20"),
        code("BRA", "0x70"),
    ]
    instructions = [Instruction(16 * index, *line) for index, line in enumerate(lines)]
    assert [instruction.address for instruction in in_loops(instructions)] == [0x10, 0x20, 0x30, 0x50, 0x60, 0x70]
    with_products = in_loops(instructions, with_any_of=("HGMMA",))
    assert [instruction.opcode for instruction in with_products] == ["HGMMA.64x96x16", "BRA", "BRA", "STL", "BRA"]


@pytest.mark.skipif(shutil.which("c++filt") is None, reason="binutils are not installed")
def test_symbols_carry_files_names_and_shared_memory(monkeypatch: pytest.MonkeyPatch):
    kernel = "_ZN8opensora55_GLOBAL__N__d7c7b4ea_22_causal_conv3d_sm90a_cu_f721e63618convolution_kernel"
    kernel += "INS_7Float16ELi128EEEvNS0_9ArgumentsE"
    asks = "_ZN8opensora19allow_shared_memoryIXadL_ZNS_55_GLOBAL__N__825274c1_22_causal_conv3d_sm90a_cu_f721e636L"
    asks += "18convolution_kernelINS_7Float16ELi128EEEvNS1_9ArgumentsEEELi201856EEE9cudaErrorv"
    assert sass.names_of(kernel) == ("causal_conv3d_sm90a.cu", "convolution_kernel<Float16, 128>")
    run, listing = sass._run, f"0000000000001150 t {asks}\n                 U other\n"
    monkeypatch.setattr(sass, "_run", lambda command: listing if command[0] == "nm" else run(command))
    assert sass.dynamic_shared_bytes(Path("library")) == {sass.names_of(kernel): 201856}


def test_a_kernel_without_what_it_should_have_is_a_fault():
    counts = dict.fromkeys(sass.COUNTED, 0) | {"HGMMA": 4, "SYNCS": 2}
    kernel = sass.Kernel("-", "k", "sm_90a", 512, 168, 16, 1024, 233024, counts, 3, False)
    assert sass.faults(kernel) == [
        "- k on sm_90a has no TMA",
        "- k on sm_90a has a stack of 16 bytes",
        "- k on sm_90a reaches for local memory in 3 places of its loops",
        "- k on sm_90a takes 234048 bytes of shared memory, there are 233472",
        "- k on sm_90a takes 168 registers for each of 512 threads",
    ]
