"""The pages of results say what their JSON says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import page


def test_the_pages_of_results_agree_with_their_json():
    for path, text in page.pages().items():
        assert path.read_text() == text, f"{path.name} is out of date: python -m bench page"


def test_a_page_shows_losses_faults_and_what_was_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def row(backend: str, kind: str, **found) -> dict:
        return {"op": "rms_norm", "case": "small", "direction": "forward", "backend": backend, "kind": kind, **found}

    def seconds(median: float, **found) -> dict:
        return {"median": median, "floor": 1e-3, "bytes": 8, "flops": 0, "bandwidth": 1e9, "flops_ceiling": 1e9} | found

    ratios = {"reference": 2.0, "best peer": 0.5}
    rows = [
        row("reference", "backend", is_chosen=False, **seconds(4e-3, again=4.4e-3, times_as_fast_as={})),
        row("library", "backend", is_chosen=True, **seconds(2e-3, times_as_fast_as=ratios)),
        row("quick", "peer", **seconds(1e-3, times_as_fast_as={})),
        row("careless", "peer", wrong="error 3"),
    ]
    about = {"device": "Some CPU", "torch": "2", "triton": None, "cuda": None, "date": "2026-01-02T", "commit": "abc"}
    folder = tmp_path / "bench" / "results" / "some-cpu"
    folder.mkdir(parents=True)
    (folder / "bench.json").write_text(json.dumps({**about, "dtype": "fp32", "rows": rows}))
    (tmp_path / "README.md").write_text(f"above\n{page.BEGIN}old\n{page.END}below\n")
    monkeypatch.setattr(page, "ROOT", tmp_path)
    pages = page.pages(folder.parent, tmp_path / "README.md")
    readme = pages[tmp_path / "README.md"]
    assert readme.startswith("above\n")
    assert readme.endswith("below\n")
    assert "| `rms_norm` | small | library | 50 | 2.00 | - | **0.50** (quick) |" in readme
    assert "NVIDIA H200: not measured." in readme
    assert "2026-01-02" in readme
    assert "`rms_norm`, small, careless: error 3" in pages[folder / "README.md"]
    assert " ms" not in readme


def test_what_make_gpu_left_is_taken_under_the_name_of_its_device(tmp_path: Path):
    source = tmp_path / "outputs"
    source.mkdir()
    (source / "bench.json").write_text(json.dumps({"device": "NVIDIA H200", "rows": []}))
    (source / "roofline.png").write_bytes(b"picture")
    (source / "tests.log").write_text("log")
    folder = page.take(source, tmp_path / "results")
    assert folder.name == "nvidia-h200"
    assert {path.name for path in folder.iterdir()} == {"bench.json", "roofline.png"}
