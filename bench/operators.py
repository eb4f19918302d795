"""`python -m bench OP|all`: accuracy, then time, of every backend beside the reference and torch.compile of it."""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, get_args

import torch

import opensora_kernels
from bench.measure import Ceilings, floor_seconds, measure_ceilings, time_calls, why_wrong
from opensora_kernels import backends, use
from opensora_kernels.cases import Case, Maker, bytes_moved

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
COMPILED = "compile"  # shown among the backends: torch.compile of the reference


def main(arguments: Sequence[str]) -> int:
    """Exit status 1 when a result is not accurate: its time would mean nothing."""
    options = read_options(arguments)
    dtype = DTYPES[options.dtype]
    ceilings = measure_ceilings(options.device, dtype)
    about = describe(options, ceilings)
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    print(f"{'op':<18}{'case':<29}{'backend':<11}{'median ms':>10}{'p20':>9}{'p80':>9}{'GB/s':>8}{'TFLOP/s':>9}"
          f"{'% floor':>9}{'x ref.':>8}{'x comp.':>8}")  # fmt: skip
    rows = []
    for op in backends.ops() if options.op == "all" else [options.op]:
        for case in chosen_cases(op, options.cases):
            for row in measure_case(op, case, dtype, ceilings, options):
                print(line(row), flush=True)
                rows.append(row)
    if not rows:
        raise SystemExit(f"bench: {options.op} has no case {options.cases!r}")
    if options.json:
        options.json.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    return 1 if any(row.get("wrong") for row in rows) else 0


def read_options(arguments: Sequence[str]) -> argparse.Namespace:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("op", choices=[*backends.ops(), "all"])
    parser.add_argument(
        "--backends",
        nargs="+",
        choices=get_args(backends.Backend),
        metavar="BACKEND",
        help="default: all that the operator has",
    )
    parser.add_argument("--cases", default="large" if device == "cuda" else "small", help="small, large or one's name")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16" if device == "cuda" else "fp32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default=device)
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile of the reference")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there too")
    return parser.parse_args(arguments)


def chosen_cases(op: str, choice: str) -> list[Case]:
    cases: list[Case] = importlib.import_module(f"opensora_kernels.ops.{op}.cases").CASES
    if choice in ("small", "large"):
        return [case for case in cases if case.is_large == (choice == "large")]
    return [case for case in cases if case.name == choice]


def measure_case(
    op: str, case: Case, dtype: torch.dtype, ceilings: Ceilings, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """One row per backend, the reference first; each says its times, or `skipped` or `wrong` with the reason."""
    function = getattr(opensora_kernels, op)
    all_reference = dict.fromkeys(backends.ops(), "reference")
    arguments = case.make(Maker(dtype, options.device))
    # fp64 convolutions at the size of a release take minutes; fp32 is still 2^16 times finer than bf16
    exact = torch.float32 if case.is_large and dtype != torch.float32 else torch.float64
    with torch.no_grad(), use(**all_reference):
        truth, plain = function(**case.make(Maker(exact, options.device))), function(**arguments)
    if bytes_moved({}, plain) == 0:
        return []
    floor = {
        "bytes": bytes_moved(arguments, plain),
        "flops": case.flops(arguments),
        "floor": floor_seconds(case, arguments, plain, ceilings),
    }
    flat = backends.flat_arguments(op, **arguments)
    rows = []
    others = [name for name in options.backends or backends.backends_of(op) if name != "reference"]
    for name in ["reference", *([] if options.no_compile else [COMPILED]), *others]:
        row: dict[str, Any] = {"op": op, "case": case.name, "backend": name}
        rows.append(row)
        backend = "reference" if name == COMPILED else name
        reason = backends.why_not(op, backend, *flat)
        if reason is not None:
            row["skipped"] = reason
            continue
        run = function
        if name == COMPILED:
            torch._dynamo.reset()
            run = torch.compile(function, dynamic=False)
        with torch.no_grad(), use(**(all_reference if backend == "reference" else {op: backend})):
            wrong = why_wrong(run(**arguments), plain, truth, dtype, name == "reference")
            if wrong is not None:
                row["wrong"] = wrong
                continue
            row |= asdict(time_calls(lambda run=run: run(**arguments), options.device)) | floor
    medians = {row["backend"]: row["median"] for row in rows if "median" in row}
    for row in rows:
        if "median" in row:
            row["times_as_fast_as"] = {name: median / row["median"] for name, median in medians.items()}
    return rows


def line(row: dict[str, Any]) -> str:
    head = f"{row['op']:<18}{row['case']:<29}{row['backend']:<11}"
    if "median" not in row:
        return head + " ".join(f"{key}: {row[key]}" for key in ("skipped", "wrong") if key in row)
    ratios = (row["times_as_fast_as"].get(name) for name in ("reference", COMPILED))
    return (
        f"{head}{row['median'] * 1e3:10.4f}{row['p20'] * 1e3:9.4f}{row['p80'] * 1e3:9.4f}"
        f"{row['bytes'] / row['median'] / 1e9:8.1f}{row['flops'] / row['median'] / 1e12:9.3f}"
        f"{100 * row['floor'] / row['median']:9.2f}"
        + "".join(f"{'-':>8}" if ratio is None else f"{ratio:8.2f}" for ratio in ratios)
    )


def describe(options: argparse.Namespace, ceilings: Ceilings) -> dict[str, Any]:
    """What a figure needs beside it to be believed later."""
    is_cuda = options.device == "cuda"
    return {
        "device": torch.cuda.get_device_name() if is_cuda else f"{_processor()}, {torch.get_num_threads()} threads",
        "dtype": options.dtype,
        "GB/s": round(ceilings.bandwidth / 1e9, 1),
        "TFLOP/s": round(ceilings.rate / 1e12, 3),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "commit": _git("describe", "--always", "--dirty", "--abbrev=12"),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [text.split(":", 1)[1].strip() for text in lines if text.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _git(*arguments: str) -> str | None:
    ran = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True)
    return ran.stdout.strip() if ran.returncode == 0 else None
