"""Every Triton kernel compiles for every target on a machine without a GPU, without a spill and with its wgmma."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from opensora_kernels import _triton, backends
from tests.ops.contract import OPS

pytestmark = pytest.mark.skipif(_triton.why_not_installed() is not None, reason="triton is not installed")


def ahead_of_time(*options: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.ahead_of_time", *options]
    return subprocess.run(command, cwd=Path(__file__).parents[1], env=environment, capture_output=True, text=True)


def test_kernels_of_all_small_cases_are_lowered():
    ran = ahead_of_time("--lower")
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kernels_compile_for_every_target():
    ran = ahead_of_time("--first", "--jobs", "2")
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-3000:]
    rows = [line.split("|") for line in ran.stdout.splitlines() if line.startswith("| ")]
    assert {row[1].strip() for row in rows[1:]} == {op for op in OPS if "triton" in backends.backends_of(op)}
    assert [name.strip() for name in rows[0][4:-1]] == ["sm_80", "sm_90, wgmma", "sm_100", "gfx942"]
    assert all(cell.strip() for row in rows for cell in row[1:-1])
