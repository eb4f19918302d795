"""The table that `python -m bench` prints: one line for each contender, and what to know about all of them below."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

Row = Mapping[str, Any]

_RATIOS = {"reference": "x ref.", "torch.compile": "x comp.", "best peer": "x peer", "base": "x base"}
_HEAD = f"{'case':<30}{'backend or peer':<27}{'median ms':>10}{'p20':>9}{'p80':>9}{'rate':>16}{'% floor':>9}{'MB':>8}"

LEGEND = """\
*: what runs unless another backend is asked for. ~: somewhat less accurate than the rule allows. x: how many times as
fast as the reference, torch.compile of it, the best other peer. rate: GB/s where memory limits, else TFLOP/s. % floor:
the least time that the measured copy and matrix product allow, over the median. MB: peak memory beyond the inputs.
g: replayed as a CUDA graph. B: the backward pass alone. Before each call 128 MB (CPU) or 256 MB (GPU) of other memory
are written."""


def header(*, has_base: bool) -> str:
    return _HEAD + "".join(f"{title:>8}" for name, title in _RATIOS.items() if has_base or name != "base")


def line(row: Row, *, has_base: bool) -> str:
    case = row["case"] + (" B" if row["direction"] == "backward" else "")
    marks = " *" * row.get("is_chosen", False) + " ~" * ("less_accurate" in row)
    head = f"{case:<30}{row['backend'] + marks:<27}"
    if "median" not in row:
        return head + "  " + " ".join(f"{key}: {row[key]}" for key in ("skipped", "wrong", "failed") if key in row)
    peak = row["peak_bytes"]
    ratios = (row["times_as_fast_as"].get(name) for name in _RATIOS if has_base or name != "base")
    median, p20, p80 = (milliseconds(row[key]) for key in ("median", "p20", "p80"))
    return (
        f"{head}{median:>9}{'g' if row['is_replayed'] else ' '}{p20:>9}{p80:>9}"
        f"{rate(row):>16}{100 * row['floor'] / row['median']:9.1f}"
        + ("       -" if peak is None else f"{peak / 1e6:8.1f}")
        + "".join(f"{'-':>8}" if ratio is None else f"{ratio:8.2f}" for ratio in ratios)
    )


def milliseconds(seconds: float) -> str:
    """Five digits, four of them after the point at most."""
    value = seconds * 1e3
    return f"{value:.{max(0, 4 - int(math.log10(max(value, 1))))}f}"


def rate(row: Row) -> str:
    """Bytes or operations per second, whichever sets the floor."""
    if is_memory_bound(row):
        return f"{_digits(row['bytes'] / row['median'] / 1e9)} GB/s"
    return f"{_digits(row['flops'] / row['median'] / 1e12)} TFLOP/s"


def _digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}" if value >= 0.001 else f"{value:.4f}"


def is_memory_bound(row: Row) -> bool:
    return row["bytes"] / row["bandwidth"] >= row["flops"] / row["flops_ceiling"]


def compare(rows: Sequence[dict[str, Any]]) -> None:
    """Give the measured rows of one case, which have the same floor, their `times_as_fast_as`."""
    medians = {row["backend"]: row["median"] for row in rows if "median" in row}
    peers = {row["backend"]: row["median"] for row in rows if "median" in row and row["kind"] == "peer"}
    for row in rows:
        if "median" in row:
            others = dict(medians)
            # a peer is compared with the best of the others
            rivals = [seconds for name, seconds in peers.items() if name != row["backend"]]
            others |= {"best peer": min(rivals)} if rivals else {}
            others |= {"base": row["base"]["median"]} if "median" in row.get("base", {}) else {}
            row["times_as_fast_as"] = {name: seconds / row["median"] for name, seconds in others.items()}


def spread(rows: Iterable[Row]) -> str:
    """What differences mean nothing: the reference timed at the begin and at the end of each case."""
    differences = _differences(rows)
    if not differences:
        return "spread: the reference was not timed twice"
    return (
        f"spread: the same version timed twice differs by {100 * median(differences):.1f} % in the median of "
        f"{len(differences)} cases, by {100 * max(differences):.1f} % at most; less than that means nothing"
    )


def relative_spread(rows: Iterable[Row]) -> float:
    """The median of it."""
    return median(_differences(rows) or [0.0])


def _differences(rows: Iterable[Row]) -> list[float]:
    return [abs(row["again"] / row["median"] - 1) for row in rows if "again" in row]


def tally(rows: Sequence[Row]) -> str:
    """How many were measured, and how many not."""
    counts = {key: sum(key in row for row in rows) for key in ("median", "skipped", "wrong", "failed")}
    return f"{counts.pop('median')} measured, " + ", ".join(f"{count} {key}" for key, count in counts.items())
