"""Predicted against measured peak memory on the CPU, each case in a fresh process: python -m tests.vae.memory

A case is a model, a clip and a budget. The child plans for the budget, runs the plan, and measures the peak of its
resident memory. Every prediction must be within 8 % of what was measured, and no measurement above its budget.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from functools import partial

import torch

from bench import peaks
from opensora.vae import TemporalVAE
from opensora_kernels.vae import decode, plan_tiles
from tests.vae import models

TOLERANCE = 0.08  # of the measured peak


@dataclass(frozen=True)
class Case:
    model: str
    shape: tuple[int, ...]
    budget: float  # in units of what a run over the whole clip is predicted to take
    dtype: str = "float32"


class OpenSora(models.TemporalDecoder):
    """Open-Sora 1.2's decoder over time, wider."""

    def __init__(self, filters: int) -> None:
        torch.nn.Module.__init__(self)
        self.vae = TemporalVAE(filters=filters, num_res_blocks=1, num_groups=8)


MODELS = {
    "wan": partial(models.WanLike, 32),
    "plan": partial(models.PlanLike, 32),
    "torch": partial(models.PlainTorch, 32),
    "by_frame": partial(models.ByFrame, 96),
    "open_sora": partial(OpenSora, 32),
    "encoder": partial(models.Encoder, 32),
}


def measure(case: Case) -> dict[str, object]:
    """In this process, which should be fresh: the plan, its prediction and the peak of a run."""
    dtype = getattr(torch, case.dtype)
    model = models.build(MODELS[case.model], dtype)
    small = (*case.shape[:2], 3, *case.shape[3:])  # what libraries map and compile once
    for _ in decode(model, torch.randn(small, dtype=dtype), plan=plan_tiles(model, small, "1TiB", dtype)):
        pass
    whole = plan_tiles(model, case.shape, "1TiB", dtype).peak_bytes
    plan = plan_tiles(model, case.shape, int(whole * case.budget), dtype)
    x = torch.randn(case.shape, dtype=dtype)
    peak = peaks.peak_of(lambda: decode(model, x, plan=plan), torch.device("cpu"))
    return {"plan": str(plan.strategy), "budget": plan.budget, "predicted": plan.peak_bytes, "measured": peak}


def measure_afresh(case: Case) -> dict[str, object]:
    """`measure` in a process of its own."""
    return peaks.measure_afresh("tests.vae.memory", case)


def is_met(found: dict[str, object]) -> bool:
    error = found["predicted"] / found["measured"] - 1
    return abs(error) <= TOLERANCE and found["measured"] <= found["budget"]


def cases() -> list[Case]:
    """48: six models, two dtypes, four budgets; peaks of 200 MiB and more, beside which libraries are small."""
    sizes = {
        "wan": (1, 4, 5, 80, 96),
        "plan": (1, 4, 9, 100, 100),
        "torch": (1, 4, 9, 88, 88),
        "by_frame": (1, 4, 11, 216, 216),
        "open_sora": (1, 4, 7, 208, 208),
        "encoder": (1, 3, 25, 368, 368),
    }
    found = []
    for dtype in ("float32", "bfloat16"):
        for model, shape in sizes.items():
            larger = (*shape[:3], shape[3] * 3 // 2, shape[4] * 3 // 2) if dtype == "bfloat16" else shape
            found += [Case(model, larger, share, dtype) for share in (1.0, 0.7, 0.5, 0.35)]
    return found


def main() -> int:
    if len(sys.argv) > 1 and sys.argv[1].startswith("{"):
        case = json.loads(sys.argv[1])
        print(json.dumps(measure(Case(**{**case, "shape": tuple(case["shape"])}))))
        return 0
    failures = 0
    chosen = [case for case in cases() if len(sys.argv) < 2 or sys.argv[1] in str(case)]
    for case in chosen:
        try:
            found = measure_afresh(case)
        except RuntimeError as error:
            print(f"FAILS {case}: {str(error).splitlines()[-1]}", flush=True)
            failures += 1
            continue
        error = found["predicted"] / found["measured"] - 1
        failures += not is_met(found)
        print(
            f"{'ok   ' if is_met(found) else 'FAILS'} {case.model:10} {case.dtype:9} {case.shape} of {case.budget}"
            f" predicted {found['predicted'] / 2**20:7.1f} MiB, measured {found['measured'] / 2**20:7.1f} MiB"
            f" ({error:+.1%}) {found['plan']}",
            flush=True,
        )
    print(f"{len(chosen) - failures} of {len(chosen)} cases within {TOLERANCE:.0%} and their budget")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
