"""Launch configurations: a committed table for each device, and a fixed default where it says nothing.

`opensora_kernels/tuned/<device>.json` maps an operator and a key, such as "forward C=1152 torch.bfloat16", to constants
that replace the kernel's defaults. Nothing is timed at import or at a call; `python -m bench tune` writes the tables.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

TABLES = Path(__file__).parent / "tuned"

# Enough for four programs on each of an H200's 132 multiprocessors, and for the sums they leave behind to stay small.
_MOST_ROW_PROGRAMS = 528


def configuration(op: str, key: str, default: Mapping[str, int], device: torch.device) -> dict[str, int]:
    """`default`, with what the table of `device` says for this operator and key in its place."""
    chosen = {**default, **_table(device).get(op, {}).get(key, {})}
    return chosen if _on_question is None else {**chosen, **_on_question(op, key, chosen)}


@contextmanager
def answered(on_question: Callable[[str, str, dict[str, int]], Mapping[str, int]]) -> Iterator[None]:
    """Meanwhile, tell `on_question` operator, key and chosen constants, and replace these by what it returns."""
    global _on_question
    previous, _on_question = _on_question, on_question
    try:
        yield
    finally:
        _on_question = previous


def num_row_programs(num_rows: int, rows_per_block: int) -> int:
    """How many programs share the blocks of a kernel that keeps a sum over rows."""
    return min(-(-num_rows // rows_per_block), _MOST_ROW_PROGRAMS)


def device_name(device: torch.device) -> str:
    """The name of the table of `device`: "nvidia-h200"; "cpu" and "meta" have none."""
    if device.type != "cuda":
        return device.type
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower())


def _table(device: torch.device) -> dict[str, dict[str, dict[str, int]]]:
    return {} if device.type != "cuda" else _read(device_name(device))


@cache
def _read(name: str) -> dict[str, dict[str, dict[str, int]]]:
    path = TABLES / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


_on_question: Callable[[str, str, dict[str, int]], Mapping[str, int]] | None = None
