"""`opensora reconstruct` with each kind of VAE and each way to run it."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from opensora.checkpoints import save_model
from opensora.cli import main
from opensora.data.reading import probe, read_frames
from opensora.metrics import psnr
from opensora.presets import open_sora_plan_v1_1
from opensora.reconstruction import load_any_vae
from opensora.vae import CausalVideoVAE, VideoVAE
from opensora.video import write_mp4
from tests.tiny_models import VAE

KINDS = ("open_sora", "open_sora_plan", "diffusers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A video, and a VAE of each kind with random weights."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("reconstruction")
    from diffusers import AutoencoderKL, AutoencoderKLWan

    save_model(folder / "open_sora", VideoVAE(VAE), VAE)
    config = replace(open_sora_plan_v1_1.vae(), hidden_size=32)
    save_model(folder / "open_sora_plan", CausalVideoVAE(config), config)
    wan = AutoencoderKLWan(base_dim=8, z_dim=4, latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    wan.save_pretrained(folder / "diffusers")
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    image = AutoencoderKL(block_out_channels=(8, 8, 16), norm_num_groups=4, **blocks)
    image.save_pretrained(folder / "image")
    frames = torch.randint(0, 256, (12, 3, 40, 36), dtype=torch.uint8)
    write_mp4(folder / "clip.mp4", frames, fps=8)
    return folder


def reconstruct(folder: Path, kind: str, output: Path, *options: str) -> int:
    return main(["reconstruct", str(folder / "clip.mp4"), str(output), "--vae", str(folder / kind), *options])


@pytest.mark.parametrize("kind", KINDS)
def test_a_video_goes_through_each_vae_the_same_whichever_way(kind: str, folder: Path, tmp_path: Path, capsys):
    # tiled: one tile, no seam, the same frames
    ways = {name: ["--strategy", name] for name in ("whole", "streaming", "tiled")}
    ways["budget"] = ["--memory", "1GiB"]
    for name, options in ways.items():
        assert reconstruct(folder, kind, tmp_path / f"{name}.mp4", *options) == 0
    printed = capsys.readouterr().out
    info = probe(tmp_path / "whole.mp4")
    assert (info.num_frames, info.fps) == (12 if kind == "open_sora" else 9, 8.0)
    assert (info.height, info.width) == ((40, 36) if kind == "open_sora" else (40, 32))
    whole = read_frames(tmp_path / "whole.mp4")
    for name in ways:
        assert (
            psnr(whole, read_frames(tmp_path / f"{name}.mp4")).min() > 40
        )  # a level here and there, which the codec makes larger
    scores = re.findall(r"PSNR +([\d.]+) dB\nSSIM +([-\d.]+)", printed)
    assert len(scores) == len(ways)
    assert len({score for score, _ in scores}) == 1
    assert "LPIPS" in printed
    assert "peak memory" in printed


def test_streaming_prints_the_steps_of_a_vae_that_takes_its_own(folder: Path, tmp_path: Path, capsys):
    own = "streaming: the model steps through the clip by itself"
    for kind, printed in (("diffusers", own), ("open_sora_plan", "of the clip at a time")):
        assert reconstruct(folder, kind, tmp_path / f"{kind}.mp4", "--strategy", "streaming") == 0
        ways = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("encode: ", "decode: "))]
        assert len(ways) == 2
        assert all(printed in way for way in ways)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num-frames", "7"], "num_frames: must be from 1 to 12 of 4 n + 1"),
        (["--num-frames", "13"], "num_frames: must be from 1 to 12"),
        (["--image-size", "20", "32"], "image_size: must be multiples of 8"),
        (["--memory", "1MiB"], "budget must be at least"),
        (["--memory", "much"], "got 'much'"),
        (["--memory", "1GiB", "--strategy", "whole"], "strategy: must not be given beside a memory budget"),
        (["--strategy", "guess"], "got 'guess'"),
    ],
)
def test_what_cannot_be_done_is_refused_and_leaves_no_file(options, message, folder: Path, tmp_path: Path, capsys):
    assert reconstruct(folder, "open_sora_plan", tmp_path / "out.mp4", *options) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["open_sora", "image", "cosmos", "kvae", "kandinsky_6"])
def test_a_vae_that_has_no_tiles_gets_ours(name: str, folder: Path, tmp_path: Path, capsys, monkeypatch):
    """Cosmos and KVAE have diffusers' switch, but do not look at it."""
    from bench.families import FAMILIES

    if name in FAMILIES:
        arguments = FAMILIES[name].arguments | ({"ch_mult": (1, 1, 1, 1)} if name == "kvae" else {})
        replace(FAMILIES[name], arguments=arguments).build().save_pretrained(folder / name)
    monkeypatch.setattr("opensora.reconstruction.TILE", 32)
    found = {}
    for way in ("whole", "tiled"):
        size = ("--image-size", "64", "64", "--num-frames", "9")
        assert reconstruct(folder, name, tmp_path / f"{way}.mp4", "--strategy", way, *size) == 0
        found[way] = capsys.readouterr().out
    assert "encode: tiled: 32 x 32 of the clip, all frames (not exact)" in found["tiled"]
    whole, tiled = (read_frames(tmp_path / f"{way}.mp4") for way in found)
    assert whole.shape == tiled.shape
    assert not torch.equal(whole, tiled)  # other frames than one tile as large as the clip


def test_an_image_vae_codes_a_video_frame_by_frame(folder: Path, tmp_path: Path, capsys):
    for way in ("whole", "streaming"):
        assert reconstruct(folder, "image", tmp_path / f"{way}.mp4", "--strategy", way) == 0
    whole, streamed = (read_frames(tmp_path / f"{way}.mp4") for way in ("whole", "streaming"))
    assert whole.shape == (12, 3, 40, 36)
    assert psnr(whole, streamed).min() > 40


def test_a_vae_whose_tiling_is_on_when_it_is_loaded_runs_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from diffusers import AutoencoderKLMiniMaxH3

    from bench.families import FAMILIES

    FAMILIES["minimax_h3"].build().save_pretrained(tmp_path / "vae")
    place = {"dtype": torch.float32, "device": torch.device("cpu")}
    monkeypatch.setattr("opensora.reconstruction.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="loads AutoencoderKLMiniMaxH3 with the package accelerate alone"):
        load_any_vae(tmp_path / "vae", **place)
    monkeypatch.setattr(AutoencoderKLMiniMaxH3, "_keep_in_fp32_modules", None)
    vae = load_any_vae(tmp_path / "vae", **place)
    assert not vae.module.use_tiling
    vae.tile()
    assert vae.module.use_tiling


def test_scores_are_taken_frame_by_frame(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    seen = []
    monkeypatch.setattr("opensora.metrics.ssim", lambda *sides: seen.append(sides[0].shape) or torch.ones(1))
    assert reconstruct(folder, "open_sora", tmp_path / "out.mp4", "--strategy", "whole") == 0
    assert seen == [(1, 3, 40, 36)] * 12


def test_other_folders_are_refused(tmp_path: Path, folder: Path, capsys):
    (tmp_path / "config.json").write_text('{"_class_name": "UNet"}')
    assert main(["reconstruct", str(folder / "clip.mp4"), str(tmp_path / "out.mp4"), "--vae", str(tmp_path)]) == 2
    assert "got UNet" in capsys.readouterr().err
    assert main(["reconstruct", str(folder / "clip.mp4"), str(tmp_path / "out.gif")]) == 2
    assert "must end in .mp4" in capsys.readouterr().err


def test_half_a_decode_leaves_no_file(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from opensora import reconstruction

    def stopped(vae, z, num_frames, *ways):
        chunks, plan = real(vae, z, num_frames, *ways)

        def some():
            yield next(chunks)
            raise KeyboardInterrupt

        return some(), plan

    real = reconstruction.decode_clip
    monkeypatch.setattr(reconstruction, "decode_clip", stopped)
    assert reconstruct(folder, "open_sora", tmp_path / "out.mp4", "--strategy", "streaming") == 130
    assert not list(tmp_path.iterdir())


def test_a_vae_of_diffusers_gets_our_operators(folder: Path):
    vae = load_any_vae(folder / "diffusers", dtype=torch.float32, device=torch.device("cpu"))
    assert (vae.space_factor, vae.time_factor) == (8, 4)
    assert any("forward" in module.__dict__ for module in vae.module.modules())


@pytest.mark.parametrize("name", ["ltx_0.9.5", "kandinsky_6"])
def test_vaes_of_diffusers_with_ways_of_their_own_are_taken(name: str, folder: Path, tmp_path: Path, capsys):
    from bench.families import FAMILIES

    FAMILIES[name].build().save_pretrained(tmp_path / name)
    size = ("--image-size", "64", "64", "--num-frames", "9")
    output = tmp_path / "out.mp4"
    assert main(["reconstruct", str(folder / "clip.mp4"), str(output), "--vae", str(tmp_path / name), *size]) == 0
    assert probe(output).num_frames == int(size[-1])


def test_allegro_takes_clips_of_whole_tiles(tmp_path: Path, capsys):
    from bench.families import FAMILIES

    allegro = replace(FAMILIES["allegro"], arguments=FAMILIES["allegro"].arguments | {"sample_size": 128})
    allegro.build().save_pretrained(tmp_path / "vae")
    write_mp4(tmp_path / "clip.mp4", torch.randint(0, 256, (30, 3, 140, 130), dtype=torch.uint8), fps=8)
    command = ["reconstruct", str(tmp_path / "clip.mp4"), str(tmp_path / "out.mp4"), "--vae", str(tmp_path / "vae")]
    refused = {
        ("--num-frames", "8"): "from 1 to 30 of 16 n + 24 for this video and VAE, got 8",
        ("--image-size", "64", "64"): "must be of 8 n + 128 and 48 n + 128 pixels, which is whole tiles of this VAE",
        ("--memory", "1GiB"): "memory: must not be given for this VAE, which runs its clips in tiles of its own",
        ("--strategy", "streaming"): "streaming is not there in this VAE, which runs its clips in tiles of its own",
    }
    for options, message in refused.items():
        assert main([*command, *options]) == 2
        assert message in capsys.readouterr().err
    assert main(command) == 0
    assert "24 frames of 136 x 128" in capsys.readouterr().out
    assert read_frames(tmp_path / "out.mp4").float().std() > 1  # what lies beside all tiles is grey


def test_a_clip_too_small_for_the_measures_is_refused_before_work(folder: Path, tmp_path: Path, capsys):
    assert reconstruct(folder, "open_sora", tmp_path / "out.mp4", "--image-size", "8", "8") == 2
    assert "must be at least 11 x 11 pixels" in capsys.readouterr().err


def test_zero_is_not_a_number_that_was_left_out(folder: Path, tmp_path: Path, capsys):
    for option in ("--num-frames", "--fps"):
        assert reconstruct(folder, "open_sora", tmp_path / "out.mp4", option, "0") == 2
        assert "got 0" in capsys.readouterr().err
    clip = str(folder / "clip.mp4")
    assert main(["reconstruct", clip, clip, "--vae", str(folder / "open_sora")]) == 2
    assert "must be another file" in capsys.readouterr().err


def test_a_terminated_run_leaves_no_file(folder: Path, tmp_path: Path):
    code = (
        "import os, signal, sys, opensora.video as video; from opensora.cli import main\n"
        "def chunks(of): yield next(of); os.kill(os.getpid(), signal.SIGTERM); yield from of\n"
        "write = video.write_mp4\n"
        "video.write_mp4 = lambda path, frames, **options: write(path, chunks(frames), **options)\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    command = ["reconstruct", folder / "clip.mp4", tmp_path / "out.mp4", "--vae", folder / "diffusers"]
    done = subprocess.run([sys.executable, "-c", code, *map(str, command), "--strategy", "streaming"])
    assert done.returncode == 143
    assert not list(tmp_path.iterdir())
