"""The same cases under pytest-benchmark, for comparing two commits: `pytest bench --benchmark-autosave`."""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from opensora_kernels import backends, use
from opensora_kernels.cases import Case
from tests.ops.contract import OPS, cases_of, draw, public

# Large cases on a GPU, small ones on a CPU, as in `python -m bench`.
DEVICE, DTYPE = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
CASES = [
    pytest.param(op, backend, case, id=f"{op}-{backend}-{case.name}")
    for op in OPS
    for backend in backends.backends_of(op)
    for case in cases_of(op)
    if case.is_large == (DEVICE == "cuda")
]


@pytest.mark.parametrize(("op", "backend", "case"), CASES)
def test_op(benchmark: BenchmarkFixture, op: str, backend: str, case: Case) -> None:
    arguments = draw(case, DTYPE, DEVICE)
    reason = backends.why_not(op, backend, *backends.flat_arguments(op, **arguments))
    if reason is not None:
        pytest.skip(reason)
    benchmark.group = f"{op} {case.name}"

    def call() -> None:
        public(op)(**arguments)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    with torch.no_grad(), use(**{op: backend}):
        benchmark(call)
