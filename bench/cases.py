"""Which cases a command takes, by the names that its options know."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import torch

from bench.sizes import FAMILIES, cases_of_sizes
from opensora_kernels.cases import Case

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def chosen_cases(op: str, choices: str | Sequence[str], device: str = "cpu") -> list[Case]:
    """`small`: those of the tests; `large`: layers of the releases; `sizes`: the family of growing size; or names."""
    choices = [choices] if isinstance(choices, str) else choices
    cases: list[Case] = importlib.import_module(f"opensora_kernels.ops.{op}.cases").CASES
    chosen: list[Case] = []
    for choice in choices:
        if choice in ("small", "large"):
            chosen += [case for case in cases if case.is_large == (choice == "large")]
        elif choice == "sizes":
            chosen += cases_of_sizes(op, device) if op in FAMILIES else []
        else:
            growing = cases_of_sizes(op, device) if "=" in choice and op in FAMILIES else []
            chosen += [case for case in [*cases, *growing] if case.name == choice]
    return list({case.name: case for case in chosen}.values())
