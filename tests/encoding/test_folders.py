"""Encoded folders: whole after a kill and of many ranks, refused where they do not fit, named where damaged."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet
import pytest
import torch

from opensora.checkpoints import load_model
from opensora.cli import main
from opensora.config import (
    DataConfig,
    VideoVAEConfig,
)
from opensora.data.encoded import EncodedDataset
from opensora.data.loader import make_loader
from opensora.encoding import check_encoded, run_encode
from opensora.text.tiny import build_tiny_text_encoder
from opensora.vae import VideoVAE
from tests.encoding.clips import LENGTH, NUM_CLIPS, NUM_FRAMES, config, rows_of, training_on, write_list
from tests.tiny_models import CAPTIONS, TRANSFORMER


def tensors_of(folder: str | Path) -> Iterator[tuple]:
    dataset = EncodedDataset(folder)
    for epoch in range(dataset.num_windows):
        for index in range(len(dataset)):
            sample = dataset[epoch, index]
            yield sample["path"], sample["frames"], sample["latents"], sample["y"], sample["mask"]


def assert_same_folders(first: str | Path, second: str | Path) -> None:
    for one, other in zip(tensors_of(first), tensors_of(second), strict=True):
        assert one[:2] == other[:2]
        assert all(torch.equal(a, b) for a, b in zip(one[2:], other[2:], strict=True))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")
@pytest.mark.parametrize("calls", [1, 4, 9])
def test_a_killed_run_leaves_whole_shards_and_goes_on_after_them(folder, vae, text, tmp_path, calls):
    encoding = config(folder, tmp_path / "killed", windows=2, shard_bytes=8000)
    child = os.fork()
    if child == 0:
        left = [calls]

        def kill(*_: int) -> None:
            left[0] -= 1
            if left[0] == 0:
                for name in (".0000-00099-abcdef.safetensors.writing", "0000-00098-abcdef.safetensors"):
                    path = tmp_path / "killed/shards" / name
                    path.write_bytes(b"half")
                    os.utime(path, (0, 0))
                os.kill(os.getpid(), signal.SIGKILL)

        run_encode(encoding, vae, text, progress=kill)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    with pytest.raises(ValueError, match=r"folder must be finished, got .*killed, which holds \d clips"):
        EncodedDataset(encoding.output)
    shards = tmp_path / "killed/shards"
    there = {path: path.read_bytes() for path in shards.glob("*.safetensors") if "00098" not in path.name}
    seen = []
    result = run_encode(encoding, vae, text, progress=lambda done, total, unread: seen.append(done))
    assert result.is_finished
    assert len(seen) < 10 or not there
    assert all(path.read_bytes() == content for path, content in there.items())
    assert not [path for path in shards.iterdir() if "00098" in path.name or "00099" in path.name]
    run_encode(replace(encoding, output=str(tmp_path / "whole")), vae, text)
    assert_same_folders(tmp_path / "killed", tmp_path / "whole")


def test_ranks_share_the_clips_and_another_number_of_them_finishes(folder, vae, text, tmp_path):
    encoding = config(folder, tmp_path / "ranks", windows=2)
    first = run_encode(encoding, vae, text, rank=1, world_size=3)
    assert (first.num_encoded, first.is_finished) == (3, False)
    calls = []
    results = [
        run_encode(encoding, vae, text, rank=rank, world_size=2, progress=lambda *numbers: calls.append(numbers))
        for rank in range(2)
    ]
    assert [result.is_finished for result in results] == [False, True]
    assert len(calls) == 7
    run_encode(replace(encoding, output=str(tmp_path / "alone")), vae, text)
    assert_same_folders(tmp_path / "ranks", tmp_path / "alone")
    run_encode(encoding, vae, text, progress=lambda *_: pytest.fail("everything is there"))


def test_the_index_has_the_manifest_and_where_each_clip_lies(folder, vae, text, tmp_path):
    run_encode(config(folder, tmp_path / "out", windows=2), vae, text)
    rows = pyarrow.parquet.read_table(tmp_path / "out/index.parquet").to_pylist()
    assert [(row["row"], row["window"]) for row in rows] == [(i, w) for i in range(NUM_CLIPS) for w in range(2)]
    row = rows[3]
    assert (row["path"], row["text"], row["aes"], row["camera_motion"]) == (
        str(folder / "1.mp4"),
        CAPTIONS[1],
        6.0,
        "pan left",
    )
    assert (row["num_frames"], row["clip_frames"], row["clip_height"], row["clip_width"]) == (NUM_FRAMES, 5, 16, 16)
    assert row["last_frame"] - row["first_frame"] == 4
    assert (tmp_path / "out/shards" / row["shard"]).exists()
    settings = json.loads((tmp_path / "out/encoding.json").read_text())
    assert (settings["latent_channels"], settings["caption_channels"], settings["windows"]) == (4, 64, 2)


def test_unreadable_clips_and_empty_captions_are_skipped_counted_and_named(folder, vae, text, tmp_path):
    (folder / "cut.mp4").write_bytes((folder / "1.mp4").read_bytes()[:-300])
    rows = rows_of(range(NUM_CLIPS))
    rows[1] = ("cut.mp4", *rows[1][1:])
    rows[2] = (rows[2][0], " ", *rows[2][2:])
    rows[3] = ("absent.mp4", *rows[3][1:])
    options = {"num_frames": NUM_FRAMES, "image_size": (16, 16), "num_workers": 1}
    data = DataConfig(manifest=write_list(folder / "bad.csv", rows), **options)
    encoding = config(folder, tmp_path / "out", data=data)
    result = run_encode(encoding, vae, text)
    assert result.is_finished
    assert [Path(clip.path).name for clip in result.unread] == ["cut.mp4", "absent.mp4"]
    assert "row 3 2.mp4: has no text" in result.manifest
    assert [sample[0] for sample in tensors_of(encoding.output)] == [str(folder / f"{i}.mp4") for i in (0, 4)]
    (folder / "absent.mp4").write_bytes((folder / "3.mp4").read_bytes())
    assert run_encode(encoding, vae, text).num_encoded == 2
    result = run_encode(replace(encoding, retry_unread=True), vae, text)
    (folder / "absent.mp4").unlink()
    assert [Path(clip.path).name for clip in result.unread] == ["cut.mp4"]
    assert len(EncodedDataset(encoding.output)) == result.num_encoded == 3
    lost = replace(data, manifest=write_list(folder / "lost.csv", [rows[3]]))
    with pytest.raises(ValueError, match=r"at least one clip must be readable, got 1 .*absent\.mp4: No such file"):
        run_encode(config(folder, tmp_path / "lost", data=lost), vae, text)


def test_a_folder_of_other_weights_settings_or_clips_is_refused(folder, vae, text, tmp_path):
    encoding = config(folder, tmp_path / "out")
    run_encode(encoding, vae, text)
    other_vae = load_model(folder / "vae", VideoVAE, VideoVAEConfig)
    with torch.no_grad():
        next(other_vae.parameters())[0] += 0.1
    shorter = config(folder, tmp_path / "out", data=replace(encoding.data, num_frames=3))
    fewer = replace(encoding.data, manifest=write_list(folder / "fewer.csv", rows_of(range(4))))
    for name, changed, models in (
        ("vae", encoding, (other_vae, text)),
        ("text_encoder", encoding, (vae, build_tiny_text_encoder(CAPTIONS, model_max_length=LENGTH, seed=1))),
        ("text_encoder", encoding, (vae, None)),
        ("model_max_length", encoding, (vae, build_tiny_text_encoder(CAPTIONS, model_max_length=8))),
        ("num_frames", shorter, (vae, text)),
        ("store", replace(encoding, store="moments"), (vae, text)),
        ("seed", replace(encoding, seed=1), (vae, text)),
        ("clips", replace(encoding, data=fewer), (vae, text)),
    ):
        with pytest.raises(ValueError, match=f"one made with the same {name}, got .*out, made with"):
            run_encode(changed, *models)
    dataset = EncodedDataset(encoding.output)
    check_encoded(dataset, TRANSFORMER, vae=vae, text=text)
    check_encoded(dataset, TRANSFORMER, vae=load_model(folder / "vae", VideoVAE, VideoVAEConfig, dtype=torch.bfloat16))
    for message, transformer, models in (
        ("vae [0-9a-f]{32}, got", TRANSFORMER, {"vae": other_vae}),
        ("latent_channels 16, got 4", replace(TRANSFORMER, in_channels=16), {}),
        ("model_max_length 300, got 12", replace(TRANSFORMER, model_max_length=300), {}),
        ("text_encoder [0-9a-f-]*, got", TRANSFORMER, {"text": build_tiny_text_encoder(["a"], model_max_length=12)}),
    ):
        with pytest.raises(ValueError, match=f"must have been made with {message}"):
            check_encoded(dataset, transformer, **models)


def test_missing_and_truncated_shards_are_named_and_written_anew(folder, vae, text, tmp_path):
    encoding = config(folder, tmp_path / "out", shard_bytes=1)
    run_encode(encoding, vae, text)
    whole = list(tensors_of(encoding.output))
    shards = sorted((tmp_path / "out/shards").iterdir())
    assert len(shards) == NUM_CLIPS
    shards[0].unlink()
    shards[1].write_bytes(shards[1].read_bytes()[:-5])
    with pytest.raises(
        ValueError, match=rf"got 2 that are not \({shards[0].name} is missing; {shards[1].name} must have"
    ):
        make_loader(training_on(encoding))
    assert run_encode(encoding, vae, text).is_finished
    for one, other in zip(whole, tensors_of(encoding.output), strict=True):
        assert torch.equal(one[2], other[2])
    content = bytearray(shards[2].read_bytes())
    content[:8] = b"\xff" * 8
    shards[2].write_bytes(content)
    with pytest.raises(ValueError, match=f"shard .*{shards[2].name} must hold .*latents of"):
        list(tensors_of(encoding.output))
    for name, message in (("absent", "must be a folder made by `opensora encode`"), (".", "must be a folder made by")):
        with pytest.raises(ValueError, match=message):
            EncodedDataset(tmp_path / name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"windows": 0}, "windows must be at least 1, got 0"),
        ({"output": ""}, "output must name a folder"),
        ({"shard_bytes": 0}, "shard_bytes must be at least 1"),
        ({"data": DataConfig(manifest="x", fit="long_side")}, "one size, got 'long_side'"),
    ],
)
def test_wrong_options_are_refused(folder, vae, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run_encode(replace(config(folder, tmp_path / "out"), **changes), vae, None)
    with pytest.raises(ValueError, match=r"rank must lie in \[0, world_size = 2\), got 2"):
        run_encode(config(folder, tmp_path / "out"), vae, None, rank=2, world_size=2)


def test_the_command_encodes_and_says_what_it_left_out(folder, tmp_path, capsys):
    rows = [*rows_of(range(3)), ("absent.mp4", "gone", NUM_FRAMES, 16, 24, 24, "", "")]
    manifest = write_list(folder / "command.csv", rows)
    arguments = ["encode", "--manifest", manifest, "-o", str(tmp_path / "out"), "--vae", str(folder / "vae")]
    arguments += ["--text-encoder", str(folder / "text_encoder"), "--image-size", "[16, 16]", "--num-frames", "5"]
    arguments += ["--model-max-length", "12", "--storage", "fp32", "--dtype", "fp32", "--device", "cpu"]
    assert main([*arguments, "--rank", "1", "--world-size", "2"]) == 0
    assert "1 of 4 clips so far" in capsys.readouterr().out
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert "1 clips could not be read:" in printed.out
    assert "absent.mp4: No such file" in printed.out
    assert "3 clips encoded, for --data.encoded" in printed.out
    assert "100.0 % encoded, 0:00:00 left" in printed.err
    assert len(EncodedDataset(tmp_path / "out")) == 3
    assert main([*arguments, "--seed", "7"]) == 2
    assert "one made with the same seed" in capsys.readouterr().err
    assert main(["encode", "--preset", "open-sora-v1.2", "-o", "x"]) == 2
    assert "manifest: must be given, got ''" in capsys.readouterr().err
