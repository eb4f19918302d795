"""What each operator costs here: every backend, beside the reference, torch.compile of it, and what else could be used.

Accuracy comes first, and again after the timing on other values: a wrong result gets no time. Floors come from a copy
and a matrix product measured in the same run. Ctrl-C keeps what is finished.

  python -m bench all --quick                               everything at small sizes, in minutes
  python -m bench rms_norm --cases stdit3_720p_4s           one case of one operator
  python -m bench attention --peers sdpa fa3 --plot plots   beside these alone, with pictures
  python -m bench all --json out.json --base main           and how much faster than revision `main`
  python -m bench all --backends cpu,reference,compile      the compiled CPU library beside PyTorch alone
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any, get_args

import torch

from bench import measure
from bench.about import about_this_run, check_device, json_file, output_folder
from bench.base import Base
from bench.cases import DTYPES, chosen_cases
from bench.measure import Ceilings, measure_ceilings
from bench.peers import PACKAGES, peers_of
from bench.record import Record, failure
from bench.table import LEGEND, header, line
from bench.workload import MOST_COPIES, Contender, Direction, Workload, compiled_reference, of_backend
from opensora_kernels import backends
from opensora_kernels.cases import Case

QUICK_SECONDS = 0.05
# The memory-bound operators that are to reach 85 % of the measured copy, and those that decide a plan.
GOALS = {"rms_norm", "rms_norm_silu", "group_norm_silu", "qk_norm_rope", "modulate", "gate_residual"}
GOALS |= {"guided_euler_step", "attention", "causal_conv3d"}


def main(arguments: Sequence[str]) -> int:
    """The exit status of `Record.collect`."""
    options = read_options(arguments)
    torch.backends.cudnn.benchmark = options.device == "cuda"  # the library gets its best shot
    ceilings = measure_ceilings(options.device, DTYPES[options.dtype])
    record = Record(describe(options, ceilings), options.json, options.plot)
    print("\n".join([", ".join(f"{name} {value}" for name, value in record.about.items()), LEGEND]))

    def run_beside_the_base() -> None:
        with options.base or nullcontext() as base:
            run(options, ceilings, base, record)

    return record.collect(run_beside_the_base)


def run(options: argparse.Namespace, ceilings: Ceilings, base: Base | None, record: Record) -> None:
    """Measure case by case, and print each when it is finished."""
    directions = ("forward", "backward") if options.direction == "both" else (options.direction,)
    end = time.monotonic() + options.seconds_in_all
    told: set[tuple[str, str, str]] = set()
    shown = None
    for op, case, is_compiled in ordered(options):
        if op != shown:
            print(f"\n{op}\n{header(has_base=base is not None)}", flush=True)
            shown = op
        for direction in directions:
            if time.monotonic() > end:
                print("\nthe time is up: what is finished follows", flush=True)
                return
            of_case: list[dict[str, Any]] = []
            try:
                for row in measure_case(op, case, direction, ceilings, base, options, is_compiled):
                    of_case.append(row)
            except Exception as error:  # the next case is not its fault
                of_case.append(_row(op, case, direction, "reference", "backend") | failure(error, options.device))
            finally:
                record.add(of_case)
                show(of_case, told, has_base=base is not None)


def ordered(options: argparse.Namespace) -> list[tuple[str, Case, bool]]:
    """Operators, cases and whether torch.compile's share is measured. On a GPU each operator's first case comes before
    any second one, those with goals in front, in case the time is short."""
    found = []
    for op in backends.ops() if options.op == "all" else [options.op]:
        cases = chosen_cases(op, options.cases, options.device)
        compiles_all = not options.quick or options.device != "cpu"
        found += [(op, case, compiles_all or case is cases[-1], index) for index, case in enumerate(cases)]
    if options.op == "all" and options.device == "cuda":
        found.sort(key=lambda each: (each[3] > 0, each[0] not in GOALS))  # and otherwise as they are
    return [each[:3] for each in found]


def show(rows: list[dict[str, Any]], told: set[tuple[str, str, str]], *, has_base: bool) -> None:
    """A reason why someone is not there is told once for each operator."""
    for row in rows:
        reason = (row["op"], row["backend"], row.get("skipped", ""))
        if "skipped" not in row or reason not in told:
            print(line(row, has_base=has_base), flush=True)
        if "median" in row and "median" not in (row.get("base") or {"median": 0}):
            print(f"{'':<30}at the base: " + " ".join(f"{key}: {value}" for key, value in row["base"].items()))
        told.add(reason)


def measure_case(
    op: str,
    case: Case,
    direction: Direction,
    ceilings: Ceilings,
    base: Base | None,
    options: argparse.Namespace,
    is_compiled: bool,
) -> Iterator[dict[str, Any]]:
    """A row for each contender, the reference first, with its times, or `skipped`, `wrong` or `failed` and a reason."""
    try:
        dtype = DTYPES[options.dtype]
        workload = Workload(op, case, dtype, options.device, direction, most_copies=options.copies)
    except torch.OutOfMemoryError:
        yield _row(op, case, direction, "reference", "backend") | {"skipped": "no memory to find out what is right"}
        return
    if workload.is_empty():
        return
    first: dict[str, Any] = {}
    for row, contender in contenders(workload, options, is_compiled):
        row |= {"truth_by": workload.truth_by, "bandwidth": ceilings.bandwidth, "flops_ceiling": ceilings.rate}
        if contender is not None:
            row |= attempt(workload, contender, ceilings, options.seconds)
            if base is not None and row["kind"] == "backend" and "median" in row:
                asked = {key: row[key] for key in ("op", "case", "backend", "direction", "bytes")}
                row["base"] = base.measure(**asked)
        first = first or row
        yield row
    if "median" in first:
        again = attempt(workload, of_backend(op, "reference"), ceilings, options.seconds)
        first["again"] = again.get("median", first["median"])


def contenders(
    workload: Workload, options: argparse.Namespace, is_compiled: bool
) -> Iterator[tuple[dict[str, Any], Contender | None]]:
    """The row of each, and None in place of those who can't run."""
    op = workload.op
    others = [name for name in options.backends or backends.backends_of(op) if name not in ("reference", "compile")]
    chosen = workload.chosen()
    for name in ["reference", *others]:
        row = _row(op, workload.case, workload.direction, name, "backend") | {"is_chosen": name == chosen}
        reason = workload.why_not(name)
        yield row | ({"skipped": reason} if reason else {}), None if reason else of_backend(op, name)
    if not options.no_compile:
        row = _row(op, workload.case, workload.direction, "torch.compile", "compile")
        reason = None if is_compiled else "with --quick on a CPU, of the largest case alone"
        yield row | ({"skipped": reason} if reason else {}), None if reason else compiled_reference(op)
    for peer in peers_of(op, options.peers):
        row = _row(op, workload.case, workload.direction, peer.name, "peer") | {"package": peer.package}
        reason = peer.why_not(workload.copies[0], workload.direction)
        contender = Contender(peer.name, peer.bind, "peer", is_partial=True)
        yield row | ({"skipped": reason} if reason else {}), None if reason else contender


def attempt(workload: Workload, contender: Contender, ceilings: Ceilings, seconds: float | None) -> dict[str, Any]:
    try:
        return workload.measure(contender, ceilings, seconds=seconds)
    except torch.OutOfMemoryError:
        return {"skipped": "out of memory"}
    except Exception as error:  # whatever compilers and other people's packages raise: the other rows stand
        return failure(error, workload.device)


def read_options(arguments: Sequence[str]) -> argparse.Namespace:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("op", choices=[*backends.ops(), "all"], metavar="OP|all", help=", ".join(backends.ops()))
    add("--quick", action="store_true", help="growing sizes, few runs; on a CPU one compiled case for each operator")
    add("--cases", nargs="+", metavar="CASE", help="small (those of the tests), large (layers of releases), sizes "
        "(growing: tokens, pixels or frames), or names; default: sizes, and on a GPU large too")  # fmt: skip
    add("--direction", choices=["forward", "backward", "both"], default="forward", help="backward: gradients alone")
    add("--backends", nargs="+", type=_backend_names, metavar="BACKEND",
        help=f"of {', '.join(get_args(backends.Backend))}, compile, with spaces or commas between; default: all that "
        "the operator has. The reference is always there, and torch.compile of it unless --no-compile")  # fmt: skip
    add("--peers", nargs="+", choices=[*PACKAGES, "none"], metavar="PEER",
        help=f"of {', '.join(PACKAGES)}, or none; default: all that apply")  # fmt: skip
    add("--no-compile", action="store_true", help="leave out torch.compile of the reference")
    add("--dtype", choices=DTYPES, default="bf16" if device == "cuda" else "fp32", help="default here: %(default)s")
    add("--device", choices=["cpu", "cuda"], default=device, help="default here: %(default)s")
    add("--seconds-in-all", type=float, default=float("inf"), metavar="N", help="begin no case after so many")
    add("--json", type=json_file, metavar="FILE", help="write every row there, with device, versions and commit")
    add(
        "--plot",
        type=output_folder,
        metavar="DIR",
        help="write pictures there: bars and the roofline, cost against size",
    )
    add("--base", metavar="REF", help="a git revision: measure it in turn, and show the speed-up over it")
    options = parser.parse_args(arguments)
    options.backends = [name for names in options.backends or [] for name in names]
    check_device(parser, options.device)
    ops = backends.ops() if options.op == "all" else [options.op]
    options.cases = options.cases or (["sizes"] if options.quick or options.device == "cpu" else ["large", "sizes"])
    for name in options.cases:
        if not any(chosen_cases(op, [name], options.device) for op in ops):
            parser.error(f"--cases must be small, large, sizes or names of cases of {options.op}, got {name!r}")
    options.seconds = min(QUICK_SECONDS, measure.SECONDS) if options.quick else None
    options.copies = 2 if options.quick else MOST_COPIES
    if options.base is not None:
        try:
            alike = {"device": options.device, "dtype": options.dtype, "seconds": options.seconds}
            options.base = Base(options.base, **alike, copies=options.copies)
        except ValueError as error:
            parser.error(str(error))
    return options


def _backend_names(text: str) -> list[str]:
    known, names = [*get_args(backends.Backend), "compile"], text.split(",")
    for name in names:
        if name not in known:
            raise argparse.ArgumentTypeError(f"BACKEND must be one of {', '.join(known)}, got {name!r}")
    return names


def describe(options: argparse.Namespace, ceilings: Ceilings) -> dict[str, Any]:
    """What a figure needs beside it to be believed later."""
    return {
        **about_this_run(options.device),
        "dtype": options.dtype,
        "GB/s": round(ceilings.bandwidth / 1e9, 1),
        "TFLOP/s": round(ceilings.rate / 1e12, 3),
        **({"base": options.base.commit[:12]} if options.base else {}),
    }


def _row(op: str, case: Case, direction: str, backend: str, kind: str) -> dict[str, Any]:
    axis, _, size = case.name.partition("=")
    of_size = {"axis": axis, "size": int(size)} if size else {}
    return {"op": op, "case": case.name, "direction": direction, "backend": backend, "kind": kind} | of_size
