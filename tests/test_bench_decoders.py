"""Decoders are compared with rivals that have the same weights, and only where both are right."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from bench import decoders, measure, model, norm_and_pad, on_paper, page, side_by_side
from bench.__main__ import main
from opensora_kernels._extension import why_not_loaded
from tests.test_bench_model import plant_a_wrong_convolution

_ENCODER = {"encoder_block_out_channels": (8, 8, 16, 16)}  # not run, but drawn
SMALL = {
    "open_sora_plan_1.1": replace(decoders.DECODERS["open_sora_plan_1.1"], tiny=(2, 2, 2), budget=1000.0),
    "cosmos": replace(decoders.DECODERS["cosmos"], tiny=(2, 4, 4), narrowing=32, arguments=_ENCODER),
    "qwen_image": replace(decoders.DECODERS["qwen_image"], tiny=(1, 2, 34), narrowing=12),
}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "FLUSHED_BYTES", {"cpu": 1 << 16})
    monkeypatch.setattr(model, "measure_ceilings", lambda device, dtype: model.Ceilings(1e10, 1e11))
    once = lambda calls, device, **how: measure.time_in_turn(calls, device, seconds=0.0, least=1)  # noqa: E731
    monkeypatch.setattr(side_by_side, "time_in_turn", once)
    for name, decoder in SMALL.items():
        monkeypatch.setitem(decoders.DECODERS, name, decoder)


def record_of(folder: Path, *arguments: str) -> dict:
    path = folder / "out.json"
    fixed = ("--what", "vae_decode", "--device", "cpu", "--dtype", "fp32", "--quick", "--json", str(path))
    main(["model", *arguments, *fixed])
    return json.loads(path.read_text())


def test_open_sora_plan_is_beside_its_plain_form_whole_and_streamed(tmp_path: Path):
    rows = {row["backend"]: row for row in record_of(tmp_path, "--models", "open_sora_plan_1.1")["rows"]}
    assert rows.keys() == {"plain", "automatic", "streamed"}
    for row in rows.values():
        assert row["times_as_fast_as"]["plain"] > 0
        assert row["times_the_memory"] == row["peak_bytes"] / rows["plain"]["peak_bytes"]
    assert rows["plain"]["times_the_memory"] == 1
    assert rows["plain"]["again"] > 0
    assert rows["streamed"]["predicted_bytes"] <= rows["streamed"]["budget"]


@pytest.mark.skipif(not find_spec("diffusers"), reason="the models are those of diffusers")
def test_a_vae_of_diffusers_is_compared_with_and_without_its_tiling_in_pictures_and_pages(tmp_path: Path):
    arguments = ("--models", "qwen_image,cosmos", "--plot", str(tmp_path))
    record = record_of(tmp_path, *arguments)
    rows = {(row["family"], row["mode"], row["backend"]): row for row in record["rows"]}
    for key in (("qwen_image", "whole"), ("qwen_image", "tiled"), ("cosmos", "whole")):
        assert rows[(*key, "diffusers")]["case"].endswith(f" {key[1]}")
        assert rows[(*key, "patched")]["times_as_fast_as"]["diffusers"] > 0
    # nothing but the decode itself fits the memory that so small a clip takes
    assert "budget must be at least" in rows["cosmos", "whole", "streamed"]["skipped"]
    assert "does not tile" in rows["cosmos", "tiled", "diffusers"]["skipped"]
    assert (tmp_path / "vae_decoders_fp32.png").stat().st_size > 10_000
    text = "\n".join(page.decoder_table(record))
    assert "| qwen_image | 1x16x272 tiled | patched against diffusers |" in text
    assert "does not tile" in text
    assert "qwen" not in page.model_table(record)


def test_a_decoder_with_a_wrong_operator_gets_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    plant_a_wrong_convolution(monkeypatch)
    rows = {row["backend"]: row for row in record_of(tmp_path, "--models", "open_sora_plan_1.1")["rows"]}
    assert "median" in rows["plain"]
    assert "error" in rows["automatic"]["wrong"]
    assert "median" not in rows["automatic"]


def test_calls_in_turn_have_times_of_their_own():
    order = []

    def waiting(name: str, seconds: float) -> None:
        order.append(name)
        time.sleep(seconds)

    calls = [lambda: waiting("short", 0.001), lambda: waiting("long", 0.3)]
    short, long = measure.time_in_turn(calls, "cpu", seconds=0.0)
    assert order == ["short", "long"] * measure.QUICK_RUNS
    assert short.median < 0.3 <= long.median


def test_an_unknown_model_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["model", "--models", "wan_2.1,sora"])
    assert "'sora'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["norm_and_pad", "plain_causal_vae", "plain_open_sora_vae"])
def test_modules_of_their_own_explain_themselves(name: str, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr("sys.argv", [name, "--help"])
    with pytest.raises(SystemExit, match="0"):
        import_module(f"bench.{name}").main()
    assert f"python -m bench.{name}" in " ".join(capsys.readouterr().out.split())


@pytest.mark.skipif(why_not_loaded("cpu") is not None, reason=str(why_not_loaded("cpu")))
@pytest.mark.parametrize("layout", norm_and_pad.LAYOUTS.values(), ids=norm_and_pad.LAYOUTS)
def test_norm_and_padding_are_timed_for_the_same_result(layout: torch.memory_format):
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in ((1, 64, 2, 5, 6), (64,), (64,)))
    given = (x.contiguous(memory_format=layout), weight, bias)
    torch.testing.assert_close(norm_and_pad.ours(*given), norm_and_pad.plain(*given))


@pytest.mark.slow
def test_memory_on_paper_shows_what_each_version_takes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys):
    monkeypatch.setattr(on_paper, "of_diffusers", lambda decoder, is_tiny: decoders.of_diffusers(decoder, is_tiny=True))
    # two by two of its tiles of 32 latents, not three by five
    monkeypatch.setitem(
        decoders.DECODERS, "hunyuan_video", replace(decoders.DECODERS["hunyuan_video"], on_gpu=(5, 40, 48))
    )
    path = tmp_path / "memory.json"
    assert main(["memory", "--models", "hunyuan_video", "--dtype", "bf16", "--json", str(path)]) == 0
    whole, tiled = json.loads(path.read_text())["rows"]
    assert whole["rival"] >= whole["ours"] > 0  # of attention over the clip, which is as it was
    assert whole["streamed"] > 0
    assert tiled["rival"] > 1.3 * tiled["ours"]
    assert "hunyuan_video       bf16" in capsys.readouterr().out
    heads, *lines = on_paper.table([whole, tiled])
    assert [len(line) for line in lines] == [len(heads)] * 2
