"""`opensora pack`: finished runs become a model folder that samples, with a record of how it was made."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from opensora.cli import main
from opensora.sampler import Sampler
from tests.training.small_models import train_small, write_clips


def test_packed_runs_sample_and_say_how_they_were_made(tmp_path: Path):
    write_clips(tmp_path)
    vae = train_small("vae", tmp_path, tmp_path / "vae")
    flow = train_small("flow", tmp_path, tmp_path / "flow", vae=str(vae.model / "vae"), train_text_encoder=True)
    out = tmp_path / "packed"

    assert main(["pack", str(out), "--vae", f"{tmp_path}/vae", "--transformer", f"{tmp_path}/flow"]) == 0

    recipe = json.loads((out / "recipe.json").read_text())
    assert recipe["vae"][0]["steps"] == vae.step
    assert recipe["transformer"][0]["steps"] == flow.step
    clips = (tmp_path / "clips.csv").read_bytes()
    expected = {"manifest": "clips.csv", "clips": 6, "sha256": hashlib.sha256(clips).hexdigest()}
    assert recipe["vae"][0]["data"] == recipe["transformer"][0]["data"] == expected
    assert str(tmp_path) not in json.dumps(recipe)
    parts = {name: out / name for name in ("vae", "transformer", "text_encoder")}
    sampler = Sampler.from_preset("tiny", **parts)
    assert sampler.transformer.config.hidden_size == 16


def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = ["pack", str(tmp_path / "out"), "--vae", str(tmp_path), "--transformer", str(tmp_path)]
    assert main(arguments) == 2
    assert "has no checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
