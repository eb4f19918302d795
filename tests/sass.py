"""Reads the machine code of the compiled CUDA library's kernels and tables it, on a machine without a GPU.

python -m tests.sass [--library _cuda_library.so] [--output table.md]

Without --library it compiles csrc/ into build/tests-cuda/ first. A kernel of sm_90a that lacks Hopper's instructions
fails, and so do a stack, local memory in a loop, and more registers or shared memory than there are.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from opensora_kernels import _extension
from tests import cuda_library
from tests.sass_loops import Instruction, in_loops

COUNTED = ("HGMMA", "HMMA", "TMA", "LDGSTS", "SYNCS", "LDL", "STL")
HOPPER = ("HGMMA", "TMA", "SYNCS")  # products of warpgroups, bulk copies, barriers in shared memory
# Of a block, with the kilobyte that sm_90 keeps for itself and counts as static.
_MOST_SHARED_BYTES = {"sm_80": 163 * 1024, "sm_90": 228 * 1024, "sm_90a": 228 * 1024}
_REGISTERS = 65536  # of a multiprocessor

# What kernels must hold: a pattern of "file kernel" and instructions; the first pattern that is found counts. Without
# any, HOPPER on sm_90a.
EXPECTED: tuple[tuple[str, tuple[str, ...]], ...] = (
    # it gathers positions, which boxes can't
    (r"^causal_conv3d_weight_gradient_sm90a\.cu ", ("HGMMA", "LDGSTS")),
    (r"^causal_conv3d\w*_sm80\.cu (forward|weight_gradient)_kernel<", ("HMMA", "LDGSTS")),
)


@dataclass(frozen=True)
class Kernel:
    file: str
    name: str
    architecture: str
    num_threads: int | None  # at most, of a block; None where the kernel doesn't say
    registers: int
    stack_bytes: int  # where spilled registers and indexed arrays lie
    static_shared_bytes: int
    dynamic_shared_bytes: int | None  # None where it asks for none beyond 48 KiB
    counts: dict[str, int]
    num_local_in_loops: int  # that hold products, or in any of a kernel without
    has_products_outside_loops_alone: bool

    @property
    def row(self) -> str:
        shared = str(self.static_shared_bytes)
        if self.dynamic_shared_bytes is not None:
            shared += f" + {self.dynamic_shared_bytes}"
        counts = [str(self.counts[opcode]) for opcode in COUNTED[:5]]
        local = f"{self.counts['LDL'] + self.counts['STL']} / {self.num_local_in_loops}"
        threads = "-" if self.num_threads is None else str(self.num_threads)
        head = [self.file, f"`{self.name}`", self.architecture, threads, str(self.registers), shared]
        return f"| {' | '.join([*head, str(self.stack_bytes), *counts, local])} |"


def kernels_of(library: Path) -> list[Kernel]:
    """Of every architecture, sorted."""
    usage, threads, shared = resource_usage(library), most_threads(library), dynamic_shared_bytes(library)
    found = []
    for (architecture, symbol), instructions in machine_code(library).items():
        file, name = names_of(symbol)
        counts = Counter(instruction.opcode.split(".")[0] for instruction in instructions)
        counts["TMA"] = counts["UTMALDG"] + counts["UBLKCP"]
        has_products = counts["HGMMA"] + counts["HMMA"] > 0
        looping = in_loops(instructions, with_any_of=("HGMMA", "HMMA") if has_products else None)
        registers, stack, static = usage[architecture, symbol]
        found.append(
            Kernel(
                file,
                name,
                architecture,
                threads.get((architecture, symbol)),
                registers,
                stack,
                static,
                shared.get((file, name)),
                {opcode: counts[opcode] for opcode in COUNTED},
                sum(instruction.opcode.startswith(("LDL", "STL")) for instruction in looping),
                has_products and not looping,
            )
        )
    return sorted(found, key=lambda kernel: (kernel.file, kernel.name, kernel.architecture))


def faults(kernel: Kernel) -> list[str]:
    """What fails the build, as sentences."""
    by_default = HOPPER if kernel.architecture == "sm_90a" else ()
    declared = (opcodes for pattern, opcodes in EXPECTED if re.search(pattern, f"{kernel.file} {kernel.name}"))
    found = [f"has no {opcode}" for opcode in next(declared, by_default) if kernel.counts[opcode] == 0]
    if kernel.stack_bytes:
        found.append(f"has a stack of {kernel.stack_bytes} bytes")
    if kernel.num_local_in_loops:
        found.append(f"reaches for local memory in {kernel.num_local_in_loops} places of its loops")
    if kernel.has_products_outside_loops_alone:
        found.append("multiplies matrices in no loop that this reader finds")
    shared = kernel.static_shared_bytes + (kernel.dynamic_shared_bytes or 0)
    if shared > (most := _MOST_SHARED_BYTES[kernel.architecture]):
        found.append(f"takes {shared} bytes of shared memory, there are {most}")
    # registers are given to warps in eights
    if kernel.num_threads and kernel.num_threads * (-(-kernel.registers // 8) * 8) > _REGISTERS:
        found.append(f"takes {kernel.registers} registers for each of {kernel.num_threads} threads")
    return [f"{kernel.file} {kernel.name} on {kernel.architecture} {fault}" for fault in found]


def machine_code(library: Path) -> dict[tuple[str, str], list[Instruction]]:
    """Instructions of each kernel, by architecture and symbol."""
    found: dict[tuple[str, str], list[Instruction]] = {}
    line_of_code = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
    for architecture, line in _by_architecture(library, "-sass"):
        if (function := re.match(r"\s*Function : (\S+)", line)) is not None:
            instructions = found.setdefault((architecture, function[1]), [])
        elif (code := line_of_code.match(line)) is not None:
            address, predicate, opcode, operands = code.groups()
            instructions.append(Instruction(int(address, 16), predicate is not None, opcode, operands.strip()))
    return found


def resource_usage(library: Path) -> dict[tuple[str, str], tuple[int, int, int]]:
    """Registers, bytes of stack and of static shared memory."""
    found, symbol = {}, ""
    for architecture, line in _by_architecture(library, "-res-usage"):
        if (function := re.match(r"\s*Function (\S+):", line)) is not None:
            symbol = function[1]
        elif "REG:" in line:
            fields = {name: int(value) for name, value in re.findall(r"(\w+)(?:\[\d\])?:(\d+)", line)}
            stack = fields["STACK"] + fields["LOCAL"]
            found[architecture, symbol] = (fields["REG"], stack, fields["SHARED"])
    return found


def most_threads(library: Path) -> dict[tuple[str, str], int]:
    """Of kernels with __launch_bounds__."""
    found, symbol, is_next = {}, "", False
    for architecture, line in _by_architecture(library, "-elf"):
        if line.startswith("."):
            symbol = line.strip().removeprefix(".nv.info.")
        elif "Attribute:" in line:
            is_next = "EIATTR_MAX_THREADS" in line
        elif is_next and "Value:" in line:
            x, y, z = (int(number, 16) for number in line.split()[1:4])
            found[architecture, symbol], is_next = x * y * z, False
    return found


def dynamic_shared_bytes(library: Path) -> dict[tuple[str, str], int]:
    """By file and name: template arguments of csrc/shared_memory.h's function, which are part of its symbol."""
    found = {}
    for line in _run(["nm", str(library)]).splitlines():
        symbol = line.split()[-1]
        if "allow_shared_memory" in symbol:
            plain = _demangled(symbol)
            kernel, size = re.search(r"allow_shared_memory<&?(.*), (\d+)>\(\)$", plain).groups()
            found[_file_of(symbol), _short(kernel.removeprefix("(").removesuffix(")"))] = int(size)
    return found


def names_of(symbol: str) -> tuple[str, str]:
    """Source file ("-" unless the kernel is in an anonymous namespace) and name of a kernel."""
    return _file_of(symbol), _short(_demangled(symbol))


def table(kernels: list[Kernel], facts: dict[str, str]) -> str:
    """With what made it, in Markdown."""
    heads = ["file", "kernel", "for", "threads", "registers", "shared bytes", "stack", *COUNTED[:5]]
    heads.append("LDL + STL / in loops")
    text = (
        f"Compiled by nvcc {facts['nvcc']} for {facts['architectures']}; nothing here has been measured on a GPU."
        " `make sass` writes this page. Threads: of a block, at most. Shared bytes: of a block, static + dynamic. Then"
        " instructions: HGMMA and HMMA multiply matrices, TMA are bulk copies (UTMALDG, UBLKCP), LDGSTS asynchronous"
        " ones, SYNCS barriers in shared memory; LDL and STL reach for local memory, in all / in loops with products,"
        " or in any loop of kernels without."
    )
    rows = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}", *(kernel.row for kernel in kernels)]
    return "\n".join([*textwrap.wrap(text, 120), "", *rows, ""])


def cuobjdump() -> str | None:
    """CUDA's own, or the one that comes with Triton."""
    if (found := shutil.which("cuobjdump")) is not None:
        return found
    for folder in sys.path:
        path = Path(folder) / "triton/backends/nvidia/bin/cuobjdump"
        if path.exists():
            return str(path)
    return None


def _by_architecture(library: Path, option: str) -> Iterator[tuple[str, str]]:
    """Lines of cuobjdump, each with the architecture that it is about."""
    architecture = ""
    for line in _run([cuobjdump(), option, str(library)]).splitlines():
        if line.startswith("arch = "):
            architecture = line.removeprefix("arch = ")
        yield architecture, line


def _file_of(symbol: str) -> str:
    """nvcc puts it into the names of anonymous namespaces."""
    found = re.search(r"_GLOBAL__N__[0-9a-f]{8}_\d+_(.+?)_cu_[0-9a-f]{8}", symbol)
    return f"{found[1]}.cu" if found else "-"


def _demangled(symbol: str) -> str:
    return _run(["c++filt", symbol]).strip()


def _short(name: str) -> str:
    """Without return type, arguments and namespaces."""
    name = name.removeprefix("void ").replace("(anonymous namespace)::", "").replace("opensora::", "")
    return re.sub(r"\((?:int|bool|long|unsigned int)\)", "", name).split("(")[0]


def _run(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sass", description=__doc__.split("\n")[0])
    parser.add_argument("--library", type=Path, help="default: compile csrc/ first")
    parser.add_argument("--output", type=Path, help="a file for the table; default: the screen")
    options = parser.parse_args()
    library = options.library or cuda_library.build() / "_cuda_library.so"
    kernels = kernels_of(library)
    text = table(kernels, _extension.read_facts(library))
    if options.output:
        options.output.write_text(text)
    else:
        print(text)
    found = [fault for kernel in kernels for fault in faults(kernel)]
    for fault in found:
        print(fault, file=sys.stderr)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
