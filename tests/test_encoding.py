"""Encoded folders: what a training reads from them is what it would encode itself, after kills and of many ranks."""

from __future__ import annotations

import csv
import json
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
from diffusers import AutoencoderKL

from opensora.checkpoints import load_model
from opensora.cli import main
from opensora.config import CausalVideoVAEConfig, DataConfig, EncodeConfig, VideoVAEConfig
from opensora.data.encoded import EncodedDataset
from opensora.data.loader import make_loader
from opensora.data.samplers import ClipRequest
from opensora.data.shapes import generate
from opensora.encoding import check_encoded, run_encode
from opensora.inputs import Encoders, captions_of
from opensora.text.tiny import build_tiny_text_encoder
from opensora.vae import CausalVideoVAE, FrameVAE, VideoVAE
from opensora.video import write_mp4, write_png
from tests.tiny_models import CAPTIONS, TRANSFORMER, VAE, save_tiny_models

NUM_CLIPS, NUM_FRAMES, LENGTH = 5, 12, 12
COLUMNS = ("path", "text", "num_frames", "height", "width", "fps", "aes", "cmotion")


def write_list(path: Path, rows: list[tuple]) -> str:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows(rows)
    return str(path)


def rows_of(indices: range) -> list[tuple]:
    return [(f"{i}.mp4", CAPTIONS[i % 3], NUM_FRAMES, 16, 24, 24, 5.0 + i, "pan left") for i in indices]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    torch.set_num_threads(1)
    folder = save_tiny_models(tmp_path_factory.mktemp("models"))
    for index in range(NUM_CLIPS):
        write_mp4(folder / f"{index}.mp4", generate(7 * index, num_frames=NUM_FRAMES, height=16, width=24)[1], fps=24)
    write_list(folder / "clips.csv", rows_of(range(NUM_CLIPS)))
    return folder


@pytest.fixture(scope="module")
def vae(folder) -> VideoVAE:
    return load_model(folder / "vae", VideoVAE, VideoVAEConfig)


@pytest.fixture(scope="module")
def text():
    return build_tiny_text_encoder(CAPTIONS, model_max_length=LENGTH)


def config(folder: Path, output: Path, **changes) -> EncodeConfig:
    data = DataConfig(manifest=str(folder / "clips.csv"), num_frames=5, image_size=(16, 16), batch_size=2)
    options = {"data": data, "output": str(output), "storage": "fp32", "dtype": "fp32", "text_dtype": "fp32"}
    return EncodeConfig(**(options | changes))


def training_on(encoding: EncodeConfig, **changes) -> DataConfig:
    return replace(encoding.data, encoded=encoding.output, manifest="", **changes)


def assert_same_batches(encoding: EncodeConfig, vae: VideoVAE, text, num_epochs: int) -> int:
    """Batches from the folder against those encoded from the clips; returns how many there were."""
    on_the_fly = make_loader(encoding.data, seed=encoding.seed)
    from_folder = make_loader(training_on(encoding), seed=encoding.seed)
    count = 0
    for _ in range(num_epochs):
        for expected, actual in zip(on_the_fly, from_folder, strict=True):
            assert expected["path"] == actual["path"]
            assert expected["text"] == actual["text"]
            assert expected["frames"] == actual["frames"]
            for name in ("num_frames", "height", "width", "ar", "fps"):
                assert torch.equal(expected[name], actual[name])
            with torch.no_grad():
                latents = [vae.encode(video[None], sample_posterior=False) for video in expected["video"]]
            assert torch.equal(torch.cat(latents), actual["latents"])
            embedded = [text.encode([caption]) for caption in captions_of(expected)]
            y, mask = (torch.cat(part) for part in zip(*embedded, strict=True))
            assert torch.equal(mask, actual["mask"])
            counts = mask[:, None, :, None] if not encoding.keep_padding else 1
            assert torch.equal(y * counts, actual["y"])
            count += 1
    return count


@pytest.mark.parametrize("keep_padding", [True, False])
def test_batches_are_those_that_training_would_encode(folder, vae, text, tmp_path, keep_padding):
    encoding = config(folder, tmp_path / "out", windows=2, keep_padding=keep_padding)
    result = run_encode(encoding, vae, text)
    assert (result.num_encoded, result.num_items, result.unread, result.is_finished) == (10, 10, (), True)
    assert assert_same_batches(encoding, vae, text, 2) == 4
    first, second = (EncodedDataset(encoding.output)[epoch, 1] for epoch in (0, 1))
    assert first["frames"] != second["frames"]
    assert torch.equal(EncodedDataset(encoding.output)[6, 1]["latents"], first["latents"])


class Pooling(torch.nn.Module):
    """A VAE that costs nothing: 144 x 256 pixels are many for one that computes."""

    latent_channels = 3

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def encode(self, x: torch.Tensor, *, sample_posterior: bool) -> torch.Tensor:
        return torch.nn.functional.avg_pool3d(x * self.weight, (1, 8, 8))


def test_bucketed_batches_are_those_that_training_would_encode(folder, text, tmp_path):
    vae = Pooling()
    rows = []
    for index in range(6):
        frames = torch.full((8 if index < 4 else 1, 3, 144, 256), 40 * index, dtype=torch.uint8)
        path = folder / f"wide{index}.{'mp4' if index < 4 else 'png'}"
        write_mp4(path, frames, fps=24) if index < 4 else write_png(path, frames[0])
        rows.append((path.name, CAPTIONS[index % 3], len(frames), 144, 256, 24 if index < 4 else 0, "", ""))
    # A draw for each window decides which length a clip is cut to.
    data = DataConfig(
        manifest=write_list(folder / "wide.csv", rows),
        buckets={"144p": {1: (1.0, 2), 3: (1.0, 1), 5: ((1.0, 0.5), 1)}},
    )
    encoding = config(folder, tmp_path / "out", data=data, windows=2, batch_size=1)
    run_encode(encoding, vae, text)
    assert assert_same_batches(encoding, vae, text, 2) == 2 * (4 + 1)
    shapes = {
        (row.clip_frames, row.aspect) for each in EncodedDataset(encoding.output).windows for row in each.values()
    }
    assert shapes == {(1, "0.56"), (3, "0.56"), (5, "0.56")}
    with pytest.raises(ValueError, match="must have a batch size for 5 frames at 144p"):
        make_loader(training_on(encoding, buckets={"144p": {1: (1.0, 2), 3: (1.0, 1)}}))
    with pytest.raises(ValueError, match="buckets must be set for an encoded folder of buckets"):
        make_loader(training_on(encoding, buckets={}))


def test_a_loader_of_encoded_clips_resumes_with_workers_and_ranks(folder, vae, text, tmp_path):
    encoding = config(folder, tmp_path / "out")
    run_encode(encoding, vae, text)
    data = training_on(encoding, batch_size=1)
    unbroken = list(islice(make_loader(data).forever(), 8))
    loader = make_loader(data)
    list(islice(loader.forever(), 3))
    resumed = make_loader(replace(data, num_workers=1))
    resumed.load_state_dict(loader.state_dict())
    for expected, actual in zip(unbroken[3:], resumed.forever(), strict=False):
        assert torch.equal(expected["latents"], actual["latents"])
    ranks = [list(make_loader(data, rank=rank, num_replicas=2)) for rank in range(2)]
    assert [rank[1]["path"] for rank in ranks] == [batch["path"] for batch in unbroken[2:4]]


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
                (tmp_path / "killed/shards/.0000-00099.safetensors.writing").write_bytes(b"half")
                os.kill(os.getpid(), signal.SIGKILL)

        run_encode(encoding, vae, text, progress=kill)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    with pytest.raises(ValueError, match=r"folder must be finished, got .*killed, which holds \d clips"):
        EncodedDataset(encoding.output)
    there = {path: path.read_bytes() for path in (tmp_path / "killed/shards").glob("*.safetensors")}
    seen = []
    result = run_encode(encoding, vae, text, progress=lambda done, total, unread: seen.append(done))
    assert result.is_finished
    assert len(seen) < 10 or not there
    assert all(path.read_bytes() == content for path, content in there.items())
    assert not list((tmp_path / "killed").rglob("*.writing"))
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


def test_scores_are_part_of_captions_and_captions_may_stay_text(folder, vae, text, tmp_path):
    run_encode(config(folder, tmp_path / "scores"), vae, text)
    y, mask = text.encode([f"{CAPTIONS[0]} aesthetic score: 5.0. camera motion: pan left."])
    sample = EncodedDataset(tmp_path / "scores")[0]
    assert torch.equal(sample["mask"], mask[0])
    assert torch.equal(sample["y"], (y * mask[:, None, :, None])[0])
    encoding = config(folder, tmp_path / "latents")
    run_encode(encoding, vae, None)
    (batch, _) = make_loader(training_on(encoding))
    assert "y" not in batch
    assert batch["text"][0] in CAPTIONS
    assert batch["aes"][0] >= 5.0


def causal_vae() -> CausalVideoVAE:
    from opensora.presets import open_sora_plan_v1_1

    sizes = {"hidden_size": 32, "hidden_size_mult": (1, 1, 1, 1), "num_res_blocks": 1}
    config: CausalVideoVAEConfig = replace(open_sora_plan_v1_1.vae(), **sizes)
    return CausalVideoVAE(config)


def frame_vae() -> FrameVAE:
    types = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return FrameVAE(AutoencoderKL(**types, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=2))


@pytest.mark.parametrize("build", [causal_vae, frame_vae, lambda: VideoVAE(replace(VAE, scale=2.0, shift=0.5))])
@torch.no_grad()
def test_moments_are_those_of_the_posterior_that_a_vae_samples(build):
    torch.manual_seed(0)
    vae = build().eval()
    x = torch.randn(2, 3, 5, 16, 16)
    mean, std = vae.encode_moments(x)
    assert torch.equal(mean, vae.encode(x, sample_posterior=False))
    assert std.shape == mean.shape
    assert std.min() > 0
    if not isinstance(vae, VideoVAE):  # of which `encode` samples the frames' posterior too
        one = vae.encode(x, draw_noise=torch.ones_like)
        torch.testing.assert_close(mean + std, one)
    else:
        vae.spatial_vae.encode = lambda x, draw_noise, encode=vae.spatial_vae.encode: encode(x, None)
        torch.testing.assert_close(mean + std, vae.encode(x, draw_noise=torch.ones_like))


def test_moments_and_half_precision_come_back_as_float(folder, vae, text, tmp_path):
    encoding = config(folder, tmp_path / "out", store="moments", storage="bf16", batch_size=3)
    run_encode(encoding, vae, text)
    batch = next(iter(make_loader(training_on(encoding))))
    assert batch["latents"].shape == batch["latents_std"].shape
    assert (batch["latents"].dtype, batch["latents_std"].dtype) == (torch.float32, torch.float32)
    assert batch["y"].dtype == torch.bfloat16
    clips = make_loader(encoding.data).dataset
    video = torch.stack([clips[ClipRequest(i, 5, 16, 16)]["video"] for i in range(NUM_CLIPS)])
    with torch.no_grad():
        mean, std = vae.encode_moments(video)
    dataset = EncodedDataset(encoding.output)
    for index in range(NUM_CLIPS):
        torch.testing.assert_close(dataset[index]["latents"], mean[index], rtol=2**-8, atol=1e-6)
        torch.testing.assert_close(dataset[index]["latents_std"], std[index], rtol=2**-8, atol=1e-6)


def test_encoded_images_stand_beside_encoded_clips(folder, vae, text, tmp_path):
    stills = []
    for index in range(3):
        write_png(folder / f"still{index}.png", generate(index, num_frames=1, height=20, width=20)[1][0])
        stills.append((f"still{index}.png", CAPTIONS[index], 1, 20, 20, 0, "", ""))
    clips = config(folder, tmp_path / "clips", store="moments")
    data = replace(clips.data, manifest=write_list(folder / "stills.csv", stills), num_frames=1)
    images = config(folder, tmp_path / "images", data=data, store="moments")
    for encoding in (clips, images):
        run_encode(encoding, vae, text)
    loaded = training_on(clips, use_image_num=2, encoded_images=images.output)
    batch = next(iter(make_loader(loaded)))
    assert batch["latents"].shape == (2, 4, 2, 8, 8)
    assert batch["image_latents"].shape == batch["image_latents_std"].shape == (2, 2, 4, 8, 8)
    assert (batch["image_y"].shape, batch["image_mask"].shape) == ((2, 2, LENGTH, 64), (2, 2, LENGTH))
    assert batch["image_text"][0] == CAPTIONS[:2]
    assert torch.equal(batch["image_latents"][0, 1], EncodedDataset(images.output)[1]["latents"][:, 0])
    inputs = Encoders(None, None, torch.device("cpu"))(batch, sample_posterior=False)
    assert (inputs.x0.shape, inputs.num_images, inputs.y.shape) == ((2, 4, 2 + 2, 8, 8), 2, (2, 1 + 2, LENGTH, 64))
    assert torch.equal(inputs.x0[:, :, 2], batch["image_latents"][:, 0])
    assert not torch.equal(Encoders(None, None, torch.device("cpu"))(batch).x0, inputs.x0)
    with pytest.raises(ValueError, match="encoded clips need encoded_images"):
        next(iter(make_loader(replace(loaded, encoded_images=""))))


def test_unreadable_clips_and_empty_captions_are_skipped_counted_and_named(folder, vae, text, tmp_path):
    (folder / "cut.mp4").write_bytes((folder / "1.mp4").read_bytes()[:-300])
    rows = rows_of(range(NUM_CLIPS))
    rows[1] = ("cut.mp4", *rows[1][1:])
    rows[2] = (rows[2][0], " ", *rows[2][2:])
    rows[3] = ("absent.mp4", *rows[3][1:])
    data = DataConfig(manifest=write_list(folder / "bad.csv", rows), num_frames=NUM_FRAMES, image_size=(16, 16))
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
