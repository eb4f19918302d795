"""The same cases under pytest-benchmark, for comparing two commits: `pytest bench --benchmark-autosave`."""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.cases import chosen_cases
from bench.workload import Direction, Workload, of_backend
from opensora_kernels import backends, use
from opensora_kernels.cases import Case, Maker

# Layers of the releases on a GPU, growing sizes on a CPU, as in `python -m bench`.
DEVICE, DTYPE, CHOICE = (
    ("cuda", torch.bfloat16, "large") if torch.cuda.is_available() else ("cpu", torch.float32, "sizes")
)
CASES = [
    pytest.param(op, backend, case, direction, id=f"{op}-{backend}-{case.name}-{direction}")
    for op in backends.ops()
    for case in chosen_cases(op, CHOICE, DEVICE)
    for direction in ("forward", "backward")
    for backend in backends.backends_of(op)
]


@pytest.mark.parametrize(("op", "backend", "case", "direction"), CASES)
def test_op(benchmark: BenchmarkFixture, op: str, backend: str, case: Case, direction: Direction) -> None:
    arguments = case.make(Maker(DTYPE, DEVICE))
    reason = backends.why_not(op, backend, *backends.flat_arguments(op, **arguments))
    if reason is not None:
        pytest.skip(reason)
    workload, contender = Workload(op, case, DTYPE, DEVICE, direction, most_copies=2), of_backend(op, backend)
    benchmark.group = f"{op} {case.name} {direction}"
    with torch.set_grad_enabled(direction == "backward"), use(**contender.backends):
        assert workload.why_wrong(contender) is None
        run = workload.call(contender, workload.copies[0])

        def call() -> None:
            run()
            if DEVICE == "cuda":
                torch.cuda.synchronize()

        benchmark.pedantic(call, rounds=10 if DEVICE == "cpu" else 50, warmup_rounds=1)
