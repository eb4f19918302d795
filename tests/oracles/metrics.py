"""Replays the recorded measures of likeness."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from opensora.metrics import psnr, ssim
from tests.oracles.registry import Case, Check, adapter

# The original's mean squared error is a sum of fp32 numbers.
DECIBEL_LIMIT = 1e-5
SSIM_LIMIT = 1e-9


@adapter("eval-metrics")
def likeness(case: Case) -> Iterator[Check]:
    for name, measure, limit in (("psnr", psnr, DECIBEL_LIMIT), ("ssim", ssim, SSIM_LIMIT)):
        values_BT = measure(case.inputs["real"], case.inputs["generated"])
        expected = torch.tensor(case.config[f"{name}_per_frame"], dtype=torch.float64)
        yield Check(f"{name}_per_frame", values_BT.mean(0), expected, max_abs=limit)
        expected = torch.tensor(case.config[f"{name}_std"], dtype=torch.float64)
        yield Check(f"{name}_std", values_BT.std(0, correction=0), expected, max_abs=limit)
