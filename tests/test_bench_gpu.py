"""The command for a machine with a GPU: it refuses where there is none, and its parts stand alone."""

from __future__ import annotations

import json
import os
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from bench import gpu
from bench.__main__ import main


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_refuses_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["gpu", "--output", str(tmp_path / "out")]) == 2
    assert "there is no CUDA device here" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_part_that_fails_hangs_or_is_missing_stops_no_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    hangs = (
        "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('begun', flush=True); time.sleep(60)"
    )
    wanted = [
        gpu.Part("fails", python("print('half'); raise SystemExit(3)"), 20),
        gpu.Part("hangs", python(hangs), 2),
        gpu.Part("missing", [str(tmp_path / "absent")], 20),
        gpu.Part("works", python("print('all')"), 20),
    ]
    outcomes = gpu.run_all(wanted, tmp_path, 60, dict(os.environ))
    assert [outcome.status.split(":")[0] for outcome in outcomes] == ["failed", "stopped after 2 s", "failed", "done"]
    assert (tmp_path / "hangs.log").read_text() == "begun\n"
    assert "== works: done\nall" in capsys.readouterr().out


def test_parts_for_which_no_time_is_left_say_so(tmp_path: Path):
    (outcome,) = gpu.run_all([gpu.Part("late", python(""), 20)], tmp_path, 1, dict(os.environ))
    assert outcome == gpu.Outcome("late", "not begun: no time left", 0.0)


def test_wheels_are_unpacked_to_where_python_finds_them(tmp_path: Path):
    (tmp_path / "wheels").mkdir()
    with zipfile.ZipFile(tmp_path / "wheels" / "some-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("some.py", "VALUE = 1")
    site = gpu.unpack(tmp_path / "wheels", tmp_path / "site")
    outcomes = gpu.run_all(
        [gpu.Part("imports", python("import some; print(some.VALUE)"), 20)], tmp_path, 60, {"PYTHONPATH": str(site)}
    )
    assert outcomes[0].status == "done"


def test_the_library_s_convolution_is_timed_both_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from bench import convolution, measure

    monkeypatch.setattr(convolution, "LAYERS", {8: (3, 16, 16)})
    monkeypatch.setattr(measure, "SECONDS", 0.0)
    for name, size in {"FLUSHED_BYTES": 1 << 16, "COPIED_BYTES": 1 << 20, "MATRIX_SIDE": 64}.items():
        monkeypatch.setattr(measure, name, {"cpu": size, "cuda": size})
    assert main(["convolution", "--json", str(tmp_path / "out.json")]) == 0
    (row,) = json.loads((tmp_path / "out.json").read_text())["rows"]
    frames, height, width = row["clip"]
    assert row["flops"] == 2 * 27 * 8 * 8 * frames * height * width
    assert row["forward"] > 0
    assert row["backward"] > 0
