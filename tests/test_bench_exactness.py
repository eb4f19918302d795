"""The tables of exactness and of memory against length: what they compare, what they refuse, and their pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import exactness, frames, growth, page, peaks, seams, vaes
from bench.__main__ import main
from opensora_kernels.vae import Tiled, decode, gather, plan_tiles, run_tiled


def rows_of(folder: Path, *arguments: str) -> list[dict[str, Any]]:
    path = folder / "out.json"
    main([*arguments, "--json", str(path)])
    return json.loads(path.read_text())["rows"]


@pytest.fixture
def _short_clips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exactness, "QUICK_NUM_LATENTS", 3)


@pytest.mark.usefixtures("_short_clips")
def test_streaming_is_exact_and_tiles_are_not(tmp_path: Path):
    pytest.importorskip("diffusers", reason="some of the models are those of diffusers")
    models = ["open_sora_1.2", "mochi", "cosmos", "kandinsky_6"]
    rows = rows_of(tmp_path, "exactness", "--quick", "--models", *models)
    assert [row["model"] for row in rows] == models
    for row in rows:
        assert "wrong" not in row
        assert 0 < row["rounding"]["ulp"] < 100
        assert row["tiled"]["relative"] > 1e-3
        assert row["streaming"]["ulp"] <= 3 * row["rounding"]["ulp"] + 4
    found = {row["model"]: row for row in rows}
    assert found["mochi"]["theirs"]["relative"] == pytest.approx(found["mochi"]["tiled"]["relative"], rel=1e-3)
    assert found["mochi"]["streaming"]["chunks"] > 1
    assert found["cosmos"]["theirs"] == {"says": "cuts nothing"}
    assert found["kandinsky_6"]["theirs"] == {"says": "has none"}


@pytest.mark.usefixtures("_short_clips")
def test_a_result_that_is_further_off_than_rounding_is_called_wrong(monkeypatch: pytest.MonkeyPatch):
    subject = vaes.build("open_sora_1.2", 3)
    off = vaes.Subject(**{**vars(subject), "patched": lambda z: subject.patched(z) * 1.001})
    assert exactness.measure(off)["wrong"].startswith("streaming, patched: above ")

    def fails(z: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no such layer")

    row = exactness.measure(vaes.Subject(**{**vars(subject), "patched": fails}))
    assert "patched" in row["wrong"]
    assert "open_sora_1.2, whole, patched: RuntimeError: no such layer" in exactness.remarks([row])


def test_cells_tell_large_differences_in_percent_and_small_ones_in_ulp():
    assert exactness.say({"relative": 0.42, "ulp": 3.5e6, "rms": 0.071}) == "42 %, rms 7.1 %"
    assert exactness.say({"relative": 2.9e-6, "ulp": 24.3, "rms": 1e-7, "chunks": 1}) == "24 ULP, one chunk"
    assert exactness.say({"relative": 0.0, "ulp": 0.0, "rms": 0.0, "chunks": 5}) == "0"
    assert exactness.say({"says": "TypeError: a long sentence"}) == "-"


def test_the_picture_shows_seams_and_flicker_of_tiles_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("matplotlib", reason="draws")
    monkeypatch.setattr(seams, "NUM_LATENTS", 6)
    about = {"device": "Some CPU", "date": "2026-01-02T", "commit": "abc"}
    decoded: list[dict[str, torch.Tensor]] = []
    whole_decode = seams._decode

    def kept() -> Any:
        result = whole_decode()
        decoded.append(result[1])
        return result

    monkeypatch.setattr(seams, "_decode", kept)
    (path,) = seams.plot(about, [], tmp_path)
    assert path.stat().st_size > 10_000
    (ways,) = decoded
    tiled, streamed = (seams._by_frame(ways[name] - ways["whole"]) for name in ("tiled", "streaming"))
    assert tiled.min() > 100 * streamed.max()
    assert tiled[17:].mean() > tiled[1:17].mean()  # the second window lacks what came before


def small(name: str) -> tuple[torch.nn.Module, torch.Tensor]:
    model = peaks.models.build(peaks.DECODERS[name].make)
    return model, torch.randn(1, 4, 3, *peaks.DECODERS[name].size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", peaks.DECODERS)
def test_tiles_as_a_strategy_give_the_frames_of_run_tiled_and_a_prediction(name: str):
    (model, z), decoder = small(name), peaks.DECODERS[name]
    tiles = Tiled(decoder.tiling())
    plan = plan_tiles(model, tuple(z.shape), "1TiB", torch.float32, strategies=[tiles])
    assert plan.strategy is tiles
    assert 1 << 20 < plan.peak_bytes < 1 << 30
    with torch.no_grad():
        expected = run_tiled(
            model, z, decoder.tiling(), result_size=lambda size: model(torch.empty(1, 4, *size)).shape[2:]
        )
    assert torch.equal(gather(decode(model, z, plan=plan)), expected)


def test_memory_is_measured_below_its_prediction_and_what_is_too_large_is_predicted(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(frames, "STRATEGIES", ("whole", "streaming, device"))
    monkeypatch.setattr(frames, "DECODERS", {"wan": peaks.DECODERS["wan"]})
    options = ("--frames", "17", "--jobs", "2", "--most", "90MiB")
    whole, streaming = rows_of(tmp_path, "frames", *options)
    assert "measured" not in whole
    assert whole["predicted"] > 90 * 2**20
    assert 0.8 * streaming["predicted"] < streaming["measured"] <= streaming["predicted"]
    assert frames.say(whole).startswith("~")
    assert not frames.is_above(streaming)


def test_the_picture_and_the_page_hold_every_strategy(tmp_path: Path):
    pytest.importorskip("matplotlib", reason="draws")
    about = {"device": "Some CPU", "torch": "2", "dtype": "fp32", "date": "2026-01-02T", "commit": "abc"}
    about |= {"command": "frames", "budget": 200 * 2**20, "clips": {"wan": "96 x 96"}}
    rows = [
        {"decoder": "wan", "num_frames": length, "strategy": strategy, "predicted": 2**20 * length * 11}
        | ({"measured": 2**20 * length * 10} if strategy != "whole" else {})
        for length in (17, 65)
        for strategy in peaks.STRATEGIES
    ]
    (path,) = growth.plot(about, rows, tmp_path)
    assert path.name == page.OF_SECTIONS["frames"]
    text = "\n".join(page.frames_section({**about, "rows": rows}))
    assert "| MiB at most | 17 frames | 65 frames |" in text
    assert "| whole | ~187 | ~715 |" in text
    assert "| streaming, file | 170 (+10 %) | 650 (+10 %) |" in text


def test_the_page_holds_what_does_not_fit_into_a_cell():
    about = {"device": "Some CPU", "torch": "2", "dtype": "fp32", "date": "2026-01-02T", "commit": "abc", "tiles": "4"}
    exact = {"relative": 0.0, "ulp": 0.0, "rms": 0.0}
    row = {"model": "wan", **dict.fromkeys(exactness.COLUMNS, exact), "theirs": {"says": "gives (1, 2) frames"}}
    text = "\n".join(page.exactness_section({**about, "rows": [row, {"model": "mochi", "skipped": "no diffusers"}]}))
    assert "| wan | 0 | - | 0 | 0 | 0 |" in text
    assert "- wan, tiled, theirs: gives (1, 2) frames" in text
    assert "- mochi: no diffusers" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["exactness", "--models", "wann"], "'wann'"),
        (["frames", "--frames", "16"], "--frames must be 4 n + 1, got 16"),
        (["frames", "--budget", "much"], "--budget: memory budget must be"),
        (["frames", "--jobs", "0"], "--jobs must be at least 1"),
    ],
)
def test_bad_options_are_refused_before_anything_is_measured(arguments: list[str], message: str, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err
