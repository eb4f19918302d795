"""Replays recorded answers of the original systems: `python -m tests.oracles DIR [--filter NAME]`.

Prints one line per compared tensor: case, tensor, largest absolute and relative difference, PASS or FAIL. Exits with
1 when anything with an adapter fails; cases without adapter are listed and counted apart.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import tests.oracles
from tests.oracles.registry import Case, Check, find_adapter


class Result(NamedTuple):
    """What one check found. Differences are NaN for values that are not tensors."""

    max_abs: float
    max_rel: float
    is_pass: bool
    reason: str = ""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.oracles", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="a folder of cases, or of folders of cases")
    parser.add_argument("--filter", default="", metavar="NAME", help="only cases whose name contains NAME")
    options = parser.parse_args(arguments)
    cases = [case for case in find_cases(options.folder) if options.filter in case.name]
    if not cases:
        print(f"no cases in {options.folder}" + f" with {options.filter!r} in their name")
        return 1
    load_adapters()
    num_checks = num_failures = 0
    without_adapter: list[str] = []
    for case in cases:
        if find_adapter(case.name) is None:
            without_adapter.append(case.name)
            print_row(case.name, "-", "-", "-", "NO ADAPTER")
            continue
        for tensor, result in replay(case):
            num_checks += 1
            num_failures += not result.is_pass
            verdict = "PASS" if result.is_pass else f"FAIL {result.reason}".rstrip()
            print_row(case.name, tensor, f"{result.max_abs:.2e}", f"{result.max_rel:.2e}", verdict)
    print(
        f"{len(cases) - len(without_adapter)} cases: {num_checks - num_failures} of {num_checks} checks passed; "
        f"{len(without_adapter)} cases without adapter"
    )
    return 1 if num_failures else 0


def find_cases(folder: Path) -> list[Case]:
    """Every folder at or below `folder` that holds a config.json or cases.json, by name."""
    paths = {file.parent for name in ("config.json", "cases.json") for file in folder.rglob(name)}
    return [Case(path) for path in sorted(paths, key=lambda path: (str(path.parent), path.name))]


def load_adapters() -> None:
    """Import every module of this package; importing registers its adapters."""
    for module in pkgutil.iter_modules(tests.oracles.__path__):
        if not module.name.startswith("_"):
            importlib.import_module(f"tests.oracles.{module.name}")


def replay(case: Case) -> Iterator[tuple[str, Result]]:
    """Run a case's adapter. An error in it fails the case, shows its traceback and does not end the run."""
    run = find_adapter(case.name)
    assert run is not None
    try:
        for check in run(case):
            yield check.tensor, compare(check)
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        yield "(adapter)", Result(float("nan"), float("nan"), False, f"{type(error).__name__}: {error}")


def compare(check: Check) -> Result:
    """Apply a check's rule; NaN must stand exactly where the original has NaN."""
    if not (isinstance(check.actual, Tensor) and isinstance(check.expected, Tensor)):
        is_equal = is_same(check.actual, check.expected)
        return Result(float("nan"), float("nan"), is_equal, "" if is_equal else differing(check))
    if check.actual.shape != check.expected.shape:
        reason = f"shape {tuple(check.actual.shape)}, expected {tuple(check.expected.shape)}"
        return Result(float("nan"), float("nan"), False, reason)
    actual, expected = check.actual.detach().cpu().double(), check.expected.detach().cpu().double()
    if expected.numel() == 0:
        return Result(0.0, 0.0, True)
    nan_agrees = torch.equal(actual.isnan(), expected.isnan())
    # Infinities of the same sign are equal; their difference would be NaN.
    difference = torch.where(actual == expected, 0.0, (actual - expected).abs())
    difference = torch.where(expected.isnan(), 0.0, difference)
    max_abs = float(difference.max())
    max_rel = max_abs / max(float(expected.nan_to_num(posinf=0, neginf=0).abs().max()), 1e-30)
    is_pass = nan_agrees and max_abs <= (0.0 if check.exact else check.max_abs)
    reason = "" if nan_agrees else "NaN in other places"
    if check.mean_abs is not None and not float(difference.mean()) <= check.mean_abs:
        is_pass, reason = False, f"mean {float(difference.mean()):.2e} > {check.mean_abs:.2e}"
    elif not is_pass and nan_agrees:
        reason = f"limit {0.0 if check.exact else check.max_abs:.2e}"
    return Result(max_abs, max_rel, is_pass, reason)


def is_same(actual: Any, expected: Any) -> bool:
    """Equality of nested Python values, in which NaN equals NaN and tuples equal lists."""
    if isinstance(actual, (list, tuple)) and isinstance(expected, (list, tuple)):
        return len(actual) == len(expected) and all(map(is_same, actual, expected))
    if isinstance(actual, dict) and isinstance(expected, dict):
        return actual.keys() == expected.keys() and all(is_same(actual[key], expected[key]) for key in actual)
    if isinstance(actual, float) and isinstance(expected, float) and actual != actual:
        return expected != expected
    return bool(actual == expected)


def differing(check: Check) -> str:
    actual, expected = (
        text if len(text) < 80 else text[:77] + "..." for text in map(repr, (check.actual, check.expected))
    )
    return f"got {actual}, expected {expected}"


def print_row(case: str, tensor: str, max_abs: str, max_rel: str, verdict: str) -> None:
    print(f"{case:<40} {tensor:<44} {max_abs:>9} {max_rel:>9}  {verdict}")


if __name__ == "__main__":
    sys.exit(main())
