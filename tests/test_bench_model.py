"""Steps of whole models are measured only when they are right."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import model, models
from bench.__main__ import main
from opensora_kernels import backends
from opensora_kernels.backends import Implementation
from opensora_kernels.ops.causal_conv3d import reference

CLIP = (17, 16, 16)


@pytest.fixture(autouse=True)
def _one_small_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    scale = replace(models.SCALES["tiny"], clips=(CLIP,), clips_trained=(CLIP,))
    monkeypatch.setitem(models.SCALES, "tiny", scale)
    monkeypatch.setattr(model, "QUICK_SECONDS", 0.0)
    monkeypatch.setattr(model, "measure_ceilings", lambda device, dtype: model.Ceilings(1e10, 1e11))


def rows_of(folder: Path, *arguments: str) -> list[dict]:
    path = folder / "new" / "out.json"
    fixed = ("--device", "cpu", "--dtype", "fp32", "--quick", "--no-compile", "--models", "open_sora_1.2")
    main(["model", *arguments, *fixed, "--json", str(path)])
    return json.loads(path.read_text())["rows"]


def test_every_step_is_measured_with_its_memory_and_operations(tmp_path: Path):
    rows = rows_of(tmp_path, "--what", ",".join(models.WHAT))
    measured = [row for row in rows if "median" in row]
    assert {(row["op"], row["backend"]) for row in measured} == {
        (what, build) for what in models.WHAT for build in ("reference", "automatic")
    }
    for row in measured:
        assert row["floor"] > 0
        assert row["flops"] > 0
        assert row["peak_bytes"] >= 0
    assert all("GPU" in row["skipped"] for row in rows if row["backend"] == "triton")


def plant_a_wrong_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_its_last_row(*arguments):
        first, *others = reference.causal_conv3d(*arguments)
        first[..., -1, :] = 0
        return [first, *others]

    wrong = Implementation(without_its_last_row, is_plain=True)
    table = {"cpu": wrong, **backends._implementations["causal_conv3d"]}
    monkeypatch.setitem(backends._implementations, "causal_conv3d", table)


def test_a_model_with_a_wrong_operator_gets_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    plant_a_wrong_convolution(monkeypatch)
    rows = {row["backend"]: row for row in rows_of(tmp_path, "--what", "vae_decode")}
    assert "median" in rows["reference"]
    assert "error" in rows["automatic"]["wrong"]
    assert "median" not in rows["automatic"]


def test_random_weights_leave_no_layer_without_effect():
    step = models.WHAT["train"](models.SCALES["tiny"], (17, 16, 16), torch.float32, torch.float32, "cpu", 1)
    _, *gradients = step.run()
    reached = [gradient for gradient in gradients if gradient.abs().max() > 0]
    assert len(reached) == len(gradients)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--what", "denoise,sing"], "'sing'"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--json", "."], "must name a file"),
    ],
)
def test_bad_options_are_refused_before_anything_is_measured(arguments: list[str], message: str, capsys):
    with pytest.raises(SystemExit):
        main(["model", *arguments])
    assert message in capsys.readouterr().err
