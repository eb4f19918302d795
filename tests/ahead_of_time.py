"""Compiles every Triton kernel for every target without a GPU, and tables what the compilers report.

python -m tests.ahead_of_time [--op OP] [--targets sm_90 gfx942] [--first] [--jobs N] [--output table.md]

Launches are recorded on meta tensors, with the shapes of the releases and in bf16, forward and backward; each kernel is
then compiled once per target, signature and constants. A spill fails, as do more shared or tensor memory than there is
and, on sm_90, a product of matrices of 64 or more rows without wgmma. This process must not have TRITON_INTERPRET set.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import date
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from torch.utils import _pytree as pytree
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

import opensora_kernels
from opensora_kernels import _triton, backends, registration
from opensora_kernels.cases import Case, Maker
from tests.ops.contract import OPS, cases_of

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_MOST_SHARED_BYTES = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
_MOST_TENSOR_COLUMNS = 512
_TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64", torch.bool: "i1",
    torch.uint8: "u8", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip
_COMPILER_OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg")


@dataclass(frozen=True)
class Launch:
    """One way in which a kernel is called: what decides its machine code."""

    kernel: Any
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[str, ...]  # by 16: pointers and whole numbers that the compiler may vectorise by
    options: tuple[tuple[str, int], ...]

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__.strip("_").removesuffix("_kernel")

    @property
    def shown(self) -> str:
        """The constants that a tuner may change or that switch code on."""
        values = [
            (name, value) for name, value in (*self.constants, *self.options) if name.isupper() or "num_w" in name
        ]
        return " ".join(f"{name}={int(value) if isinstance(value, bool) else value}" for name, value in values)


@dataclass(frozen=True)
class Report:
    registers: int
    spilled_bytes: int
    shared_bytes: int
    num_wgmma: int
    has_tall_product: bool = False  # of 16-bit matrices, the first of at least the 64 rows that one wgmma takes
    num_tensor_columns: int = 0  # of sm_100's tensor memory

    def shown(self, target: str) -> str:
        figures = f"{self.registers} / {self.spilled_bytes} / {self.shared_bytes}"
        return f"{figures} / {self.num_wgmma}" if target == "sm_90" else figures


def launches(op: str, case: Case) -> list[Launch]:
    """The different launches of one call and of its backward pass, in bf16."""
    found: dict[Launch, None] = {}
    with _triton.recorded_launches(lambda *launch: found.setdefault(_described(*launch))):
        _run_on_meta(op, case)
    return list(found)


def compile_for(launch: Launch, target: GPUTarget) -> Report:
    """Down to machine code. Raises what the compiler raises."""
    compiled = triton.compile(_source(launch), target=target, options=dict(launch.options))
    if target.backend == "hip":
        return _report_of_amd(compiled)
    return _report_of_nvidia(compiled, target.arch)


def lower(launch: Launch) -> None:
    """As far as Triton's own language goes, where sizes of 1 are constants, unlike in the interpreter."""
    backend = make_backend(TARGETS["sm_90"])
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    options = backend.parse_options(dict(launch.options))
    _source(launch).make_ir(TARGETS["sm_90"], options, backend.get_codegen_implementation(options),
                            backend.get_module_map(), context)  # fmt: skip


def _source(launch: Launch) -> ASTSource:
    names = launch.kernel.arg_names
    constants = {(names.index(name),): value for name, value in launch.constants}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in launch.divisible}
    return ASTSource(launch.kernel, dict(launch.signature), constants, attributes)


def different_launches(op: str, *, only_first: bool = False) -> list[Launch]:
    """Those of the large cases that Triton serves of `op`, or of the first of them, without repetition."""
    cases = [case for case in cases_of(op) if case.is_large and _is_served(op, case)]
    return list(dict.fromkeys(launch for case in cases[: 1 if only_first else None] for launch in launches(op, case)))


def table_rows(op: str, only_first: bool, targets: list[str]) -> list[tuple[str, list[str]]]:
    """For each launch of one operator its row of the table, and what fails the build, if anything."""
    rows = []
    for launch in different_launches(op, only_first=only_first):
        cells, faults = [], []
        for target in targets:
            try:
                report: Report | str = compile_for(launch, TARGETS[target])
            except Exception as error:  # every kind of compiler error is a cell of the table
                report = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            if (problem := fault(target, launch, report)) is not None:
                faults.append(f"{launch.name} {launch.shown} on {target}: {problem}")
            cells.append(report if isinstance(report, str) else report.shown(target))
        rows.append((f"| {' | '.join([op, launch.name, launch.shown, *cells])} |", faults))
    return rows


def fault(target: str, launch: Launch, report: Report | str) -> str | None:
    """What fails the build, as a sentence."""
    if isinstance(report, str):
        return report
    if report.spilled_bytes:
        return f"spills {report.spilled_bytes} bytes"
    if report.shared_bytes > _MOST_SHARED_BYTES[target]:
        return f"takes more shared memory than the {_MOST_SHARED_BYTES[target]} bytes there are"
    if report.num_tensor_columns > _MOST_TENSOR_COLUMNS:
        return f"takes more tensor memory than the {_MOST_TENSOR_COLUMNS} columns there are"
    if target == "sm_90" and report.has_tall_product and not report.num_wgmma:
        return "has no wgmma"
    return None


def lower_small_cases() -> int:
    """Sizes of one, odd ones and empty ones are compiled to other code than those of the releases."""
    small = [(op, case) for op in OPS for case in cases_of(op) if not case.is_large and _is_served(op, case)]
    wanted = dict.fromkeys(launch for op, case in small for launch in launches(op, case))
    failed = 0
    for launch in wanted:
        try:
            lower(launch)
        except Exception as error:  # every kind of compiler error is reported
            failed += 1
            print(f"{launch.name} {launch.shown}: {error}")
    print(f"{len(wanted)} kernels lowered, {failed} faults")
    return min(failed, 1)


def _arguments_on_meta(op: str, case: Case) -> tuple[Any, ...]:
    def to_meta(leaf: Any) -> Any:
        return leaf.to("meta") if isinstance(leaf, Tensor) else leaf

    arguments = pytree.tree_map(to_meta, case.make(_MetaMaker(dtype=torch.bfloat16)))
    return backends.flat_arguments(op, **arguments)


def _is_served(op: str, case: Case) -> bool:
    with mock.patch.object(_triton, "why_not", return_value=None):  # the reason against tensors on the meta device
        return backends.why_not(op, "triton", *_arguments_on_meta(op, case)) is None


def _run_on_meta(op: str, case: Case) -> None:
    flat = _arguments_on_meta(op, case)
    leaves = [leaf for leaf in pytree.tree_leaves(flat) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    for leaf in leaves:
        leaf.requires_grad_()
    chosen = backends.implementation(op, "triton")
    with torch.no_grad():
        results = [leaf for leaf in pytree.tree_leaves(chosen.forward(*flat)) if isinstance(leaf, Tensor)]
        saved_like = chosen.saved_like
        saved = registration.saved_of(op, flat, results) if saved_like else []
        grads = [torch.empty_like(out) for out in (results[:1] if saved_like else results)]
        wanted = [
            any(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in pytree.tree_leaves(value))
            for value in flat
        ]
        chosen.backward(grads, wanted, saved, *flat)


class _MetaMaker(Maker):
    """Draws nothing: shapes on the meta device."""

    def normal(self, *shape: int, mean: float = 0.0, std: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device="meta")

    def mask(self, *shape: int, probability: float = 0.5) -> Tensor:
        return torch.empty(shape, dtype=torch.bool, device="meta")


def _described(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], options: dict[str, Any]) -> Launch:
    given = dict(zip(kernel.arg_names, arguments, strict=False)) | options
    compiler_options = tuple((name, given.pop(name)) for name in _COMPILER_OPTIONS if name in given)
    constant_names = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
    signature, constants, divisible = [], [], []
    for name in kernel.arg_names:
        value = given[name]
        if name in constant_names or value is None or (type(value) is int and value == 1):
            signature.append((name, "constexpr"))
            constants.append((name, value))
        elif isinstance(value, Tensor):
            signature.append((name, f"*{_TYPES[value.dtype]}"))
            divisible.append(name)
        elif isinstance(value, (bool, float)):
            signature.append((name, "i1" if isinstance(value, bool) else "fp32"))
        else:
            signature.append((name, "i32" if -(2**31) <= value < 2**31 else "i64"))
            divisible += [name] if value % 16 == 0 else []
    return Launch(kernel, tuple(signature), tuple(constants), tuple(divisible), compiler_options)


def _report_of_nvidia(compiled: Any, arch: int) -> Report:
    """What ptxas says of the same PTX: Triton keeps no record of it where no device loads the code."""
    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin" / ("ptxas-blackwell" if arch >= 100 else "ptxas")
    ptx = compiled.asm["ptx"]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        name = f"sm_{arch}a" if arch >= 90 else f"sm_{arch}"
        command = [str(ptxas), "-v", f"--gpu-name={name}", file.name, "-o", "/dev/null"]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = [int(size) for size in re.findall(r"(\d+) bytes spill", log)]
    registers = int(re.search(r"Used (\d+) registers", log)[1])
    num_wgmma = len(re.findall(r"wgmma\.mma_async", ptx))
    rows_of_products = re.findall(r"tt\.dot .* : tensor<(\d+)x\d+x(?:bf16|f16)>", compiled.asm["ttir"])
    has_tall_product = any(int(rows) >= 64 for rows in rows_of_products)
    columns = getattr(compiled.metadata, "tmem_size", None) or 0
    return Report(registers, sum(spills), compiled.metadata.shared, num_wgmma, has_tall_product, columns)


def _report_of_amd(compiled: Any) -> Report:
    text = compiled.asm["amdgcn"]

    def number(key: str) -> int:
        return int(re.search(rf"\.{key}:\s+(\d+)", text)[1])

    return Report(number("vgpr_count"), 4 * number("vgpr_spill_count"), compiled.metadata.shared, num_wgmma=0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", action="append", choices=OPS)
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--first", action="store_true", help="only the first large case of each operator")
    parser.add_argument("--lower", action="store_true", help="instead lower the small cases of all operators")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if _triton.is_interpreted():
        parser.error("TRITON_INTERPRET must not be set: interpreted kernels can't be compiled")
    if options.lower:
        return lower_small_cases()
    targets = [f"{name}, wgmma" if name == "sm_90" else name for name in options.targets]
    lines = [
        f"Compiled {date.today()} by triton {triton.__version__} for opensora_kernels {opensora_kernels.__version__}, "
        "in bf16 and the shapes of the releases, forward and backward.",
        "For each target: registers of a thread / bytes spilled / bytes of shared memory / wgmma instructions.\n",
        f"| op | kernel | constants | {' | '.join(targets)} |",
        f"|---|---|---|{'---|' * len(targets)}",
    ]
    print("\n".join(lines), flush=True)
    faults: list[str] = []
    num_kernels = 0
    ops = options.op or [op for op in OPS if "triton" in backends.backends_of(op)]
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        for rows in pool.map(table_rows, ops, repeat(options.first), repeat(options.targets)):
            for line, faults_of_line in rows:
                lines.append(line)
                faults += faults_of_line
                num_kernels += len(targets)
                print(line, flush=True)
    print("\n".join([*faults, f"{num_kernels} kernels compiled, {len(faults)} faults"]))
    if options.output:
        unfinished = options.output.with_suffix(".unfinished")
        unfinished.write_text("\n".join(lines) + "\n")
        unfinished.replace(options.output)
    return min(len(faults), 1)


if __name__ == "__main__":
    sys.exit(main())
