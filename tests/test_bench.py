"""The bench measures accurate calls and refuses to time wrong ones. Its figures are not judged here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import measure
from bench.__main__ import main
from opensora_kernels import backends
from opensora_kernels.backends import Implementation


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "SECONDS", 0.0)
    monkeypatch.setattr(measure, "FLUSHED_BYTES", {"cpu": 1 << 16})
    monkeypatch.setattr(measure, "COPIED_BYTES", {"cpu": 1 << 20})
    monkeypatch.setattr(measure, "MATRIX_SIDE", {"cpu": 64})


def bench(*arguments: str) -> int:
    return main([*arguments, "--device", "cpu", "--dtype", "fp32", "--no-compile"])


def test_every_backend_of_an_operator_is_measured_beside_the_reference(tmp_path: Path, capsys):
    assert bench("attention", "--cases", "small", "--json", str(tmp_path / "out.json")) == 0
    record = json.loads((tmp_path / "out.json").read_text())
    assert {"device", "torch", "commit", "date", "GB/s", "TFLOP/s"} <= set(record)
    assert {row["backend"] for row in record["rows"]} == set(backends.backends_of("attention"))
    measured = [row for row in record["rows"] if "median" in row]
    for row in measured:
        assert 0 < row["p20"] <= row["median"] <= row["p80"]
        assert row["num_runs"] >= measure.MIN_RUNS
        assert row["floor"] > 0
        assert row["times_as_fast_as"][row["backend"]] == 1
    skipped = [row["skipped"] for row in record["rows"] if "skipped" in row]
    assert skipped == ["scaled_dot_product_attention has no gradient for empty tensors"]
    assert f"{measured[0]['median'] * 1e3:.4f}" in capsys.readouterr().out


def test_a_wrong_result_is_named_and_not_timed(monkeypatch: pytest.MonkeyPatch, capsys):
    table = backends._implementations["rms_norm"]
    wrong = Implementation(lambda x, weight, eps: torch.zeros_like(x), is_plain=True)
    monkeypatch.setitem(backends._implementations, "rms_norm", {**table, "library": wrong})
    assert bench("rms_norm", "--cases", "odd") == 1
    lines = capsys.readouterr().out.splitlines()
    assert "wrong: result[0]: max error" in lines[-1]


def test_unknown_cases_and_backends_are_refused(capsys):
    with pytest.raises(SystemExit, match="rms_norm has no case 'absent'"):
        bench("rms_norm", "--cases", "absent")
    with pytest.raises(SystemExit):
        bench("rms_norm", "--backends", "fast")
    assert "invalid choice: 'fast'" in capsys.readouterr().err
