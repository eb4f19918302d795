"""torch.compile's graphs hold the Triton kernels themselves, forward and backward, for its code generator to see."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from opensora_kernels import _triton, backends
from tests.ops.contract import OPS


@pytest.mark.skipif(_triton.why_not_installed() is not None, reason="triton is not installed")
def test_graphs_hold_the_kernels_of_every_operator():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, "-m", "tests.ops.traced"],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    counts = {line.split()[0]: [int(count) for count in line.split()[1:]] for line in ran.stdout.splitlines()}
    assert sorted(counts) == sorted(op for op in OPS if "triton" in backends.backends_of(op))
    assert all(all(count > 0 for count in of_op) for of_op in counts.values()), counts
