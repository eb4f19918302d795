"""Importing opensora_kernels does nothing: no device, no Triton, no output, no time; the doctor reports."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from opensora_kernels import backends
from opensora_kernels.__main__ import backend_table, small_calls
from tests.ops.contract import OPS

ROOT = Path(__file__).parents[1]
# The whole import may take 1.5 s with torch in the file cache; torch itself is not ours to hurry.
MAX_SECONDS_BESIDE_TORCH = 0.5

PROGRAM = """
import contextlib, io, json, sys, time
start = time.process_time()
import torch
torch_done = time.process_time()
def settings():
    return torch.are_deterministic_algorithms_enabled(), torch.get_default_dtype(), torch.get_num_threads()
modules, before, printed = set(sys.modules), settings(), io.StringIO()
with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
    import opensora_kernels
print(json.dumps({
    "torch": torch_done - start, "ours": time.process_time() - torch_done, "printed": printed.getvalue(),
    "modules": sorted(set(sys.modules) - modules), "settings_kept": settings() == before,
    "cuda": torch.cuda.is_initialized(),
}))
"""


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=True)


@pytest.fixture(scope="module")
def imported() -> dict:
    python("-c", "import opensora_kernels")  # compiles the byte code
    return json.loads(python("-c", PROGRAM).stdout)


def test_import_takes_next_to_no_time(imported: dict):
    print(f"torch {imported['torch']:.2f} s, opensora_kernels {imported['ours']:.2f} s more")
    assert imported["ours"] < MAX_SECONDS_BESIDE_TORCH


def test_import_touches_no_device_and_prints_nothing(imported: dict):
    assert not imported["cuda"]
    assert imported["printed"] == ""
    assert imported["settings_kept"]


def test_import_needs_neither_triton_nor_the_models(imported: dict):
    loaded = {name.split(".")[0] for name in imported["modules"]}
    assert not loaded & {"triton", "opensora", "diffusers", "transformers", "flash_attn", "apex", "torch_npu"}


def test_doctor_reports_every_operator_and_succeeds():
    report = python("-m", "opensora_kernels").stdout
    for op in OPS:
        assert f"  {op} " in report
    for part in ("cpu library", "cuda library", "triton kernels", "Known hazards"):
        assert part in report


def test_doctor_says_of_every_backend_whether_it_runs_here():
    told = small_calls()
    assert len(told) == sum(len(backends.backends_of(op)) for op in OPS)
    assert sum("chosen" in line for line in told) == len(OPS)


def test_doctor_lists_backends_in_the_order_of_each_device():
    table = {line.split()[0]: re.split("  +", line)[1:] for line in backend_table()}
    assert table.pop("operator") == ["cuda", "npu", "cpu"]
    for op in OPS:
        assert table.pop(op) == [" > ".join(backends.order_of(op, device)) for device in ("cuda", "npu", "cpu")]
    assert not table
