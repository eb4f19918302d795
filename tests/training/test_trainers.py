"""`run_train_vae` and `run_train` on tiny models: resume after SIGKILL, what they leave behind, what they refuse."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from opensora import latents, vae_trainer
from opensora.checkpoints import load_model, save_model
from opensora.config import DataConfig, STDiT3Config, VideoVAEConfig
from opensora.data.datasets import IMAGE_FPS, ClipDataset
from opensora.data.manifest import read_manifest
from opensora.data.shapes import generate
from opensora.inputs import Encoders
from opensora.models import STDiT3
from opensora.parallel import ParallelContext
from opensora.schedulers.rectified_flow import RectifiedFlow
from opensora.text.t5 import TextEncoder
from opensora.training.checkpoint import read_tensors
from opensora.training.records import read_losses
from opensora.vae import VideoVAE
from opensora.video import write_video
from tests.training.small_models import VAE, flow_config, save_untrained_vae, train_small, vae_config, write_clips


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    write_clips(folder)
    save_untrained_vae(folder)
    return folder


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def losses(output: Path) -> list[tuple[str, str]]:
    return [(row["step"], row["loss"]) for row in read_losses(output)]


@pytest.mark.parametrize("kind", ["vae", "flow"])
def test_a_killed_run_resumes_with_the_losses_of_an_unbroken_one(folder: Path, tmp_path: Path, kind: str):
    for name in ("clips.csv", "vae", *(f"{index}.mp4" for index in range(6))):
        (tmp_path / name).symlink_to(folder / name)
    killed = subprocess.run(
        [sys.executable, "-m", "tests.training.killed_run", kind, str(tmp_path), "5"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [path.name for path in (tmp_path / "broken" / "checkpoints").iterdir()] == ["step-00000003"]
    train_small(kind, tmp_path, tmp_path / "whole")
    train_small(kind, tmp_path, tmp_path / "broken", resume=True)
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
    assert len(losses(tmp_path / "whole")) == 7


def test_clips_of_a_vae_are_read_ahead_by_workers(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made = []
    prefetcher = vae_trainer.Prefetcher
    monkeypatch.setattr(vae_trainer, "Prefetcher", lambda *arguments: made.append(1) or prefetcher(*arguments))
    config = vae_config(folder, tmp_path)
    for num_workers in (0, 1):
        run = replace(config.run, steps=2, output=str(tmp_path / str(num_workers)))
        train_small("vae", folder, tmp_path, run=run, data=replace(config.data, num_workers=num_workers))
    assert made == [1]
    assert losses(tmp_path / "0") == losses(tmp_path / "1")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_exported_vae_normalises_its_latents(folder: Path, tmp_path: Path, dtype: str):
    config = vae_config(folder, tmp_path)
    result = train_small("vae", folder, tmp_path, run=replace(config.run, dtype=dtype, steps=2, sample_every=2))
    vae = load_model(result.model / "vae", VideoVAE, VideoVAEConfig)
    clips = ClipDataset(read_manifest(folder / "clips.csv"), num_frames=5, image_size=(16, 16))
    with torch.no_grad():
        z = torch.cat([vae.encode(clips[i]["video"][None], sample_posterior=False) for i in range(len(clips))])
    z_CN = z.transpose(0, 1).flatten(1)
    # bf16 statistics: latents carry 8 bits, so mean and deviation are off by about 1 / 256 of a deviation, times the
    # condition of an untrained encoder whose mean is several deviations.
    tolerance = 1e-4 if dtype == "fp32" else 0.15
    assert z_CN.mean(1).abs().max() < tolerance
    assert (z_CN.std(1, correction=0) - 1).abs().max() < tolerance
    assert (tmp_path / "samples" / "train-00000002.png").exists()


def test_a_frozen_spatial_vae_stays_as_it_was(folder: Path, tmp_path: Path):
    config = vae_config(folder, tmp_path)
    result = train_small(
        "vae",
        folder,
        tmp_path,
        initial_vae=str(folder / "vae"),
        freeze_spatial=True,
        mixed="image",
        run=replace(config.run, steps=2),
    )
    before, after = (load_file(path / "model.safetensors") for path in (folder / "vae", result.model / "vae"))
    assert all(torch.equal(before[k], after[k]) for k in before if k.startswith("spatial_vae."))
    assert not all(torch.equal(before[k], after[k]) for k in before if k.startswith("temporal_vae."))


def test_a_frozen_encoder_keeps_its_latents(folder: Path, tmp_path: Path):
    config = vae_config(folder, tmp_path)
    run = replace(config.run, steps=2, dtype="fp32")
    result = train_small("vae", folder, tmp_path, initial_vae=str(folder / "vae"), freeze_encoder=True, run=run)
    before, after = (load_file(path / "model.safetensors") for path in (folder / "vae", result.model / "vae"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(".decoder." in name or ".post_quant_conv." in name for name in changed)


@pytest.mark.parametrize(("mixed", "lengths"), [("none", {5}), ("image", {1, 5}), ("random", {1, 2, 3, 4, 5})])
def test_mixed_lengths_come_from_inside_the_clip(folder: Path, mixed: str, lengths: set[int]):
    torch.manual_seed(0)
    x = torch.arange(5.0).view(1, 1, 5, 1, 1)
    config = replace(vae_config(folder, folder), mixed=mixed, mixed_image_ratio=0.5)
    vae = VideoVAE(VAE)
    cuts = [vae_trainer._mixed(x, config, vae).flatten() for _ in range(60)]
    assert {len(cut) for cut in cuts} == lengths
    assert all(torch.equal(cut, torch.arange(cut[0], cut[0] + len(cut))) for cut in cuts)


def test_a_trained_transformer_loads_and_samples_are_drawn(folder: Path, tmp_path: Path):
    config = flow_config(folder, tmp_path)
    result = train_small(
        "flow",
        folder,
        tmp_path,
        run=replace(config.run, steps=2, sample_every=2),
        sample_prompts=("a red circle",),
        cache_latents=True,
    )
    transformer = load_model(result.model / "transformer", STDiT3, STDiT3Config)
    assert transformer.config == config.transformer
    text = TextEncoder.from_pretrained(result.model / "text_encoder")
    assert text.model_max_length == config.transformer.model_max_length
    saved = read_tensors(result.checkpoint)
    state = transformer.state_dict() | {}
    assert all(
        torch.equal(saved[f"ema.transformer.{name}"], state[name])
        for name, _ in transformer.named_parameters()
        if name != "rope.freqs"
    )
    assert torch.equal(saved["ema.text_encoder.model.shared.weight"], text.model.shared.weight)
    assert (tmp_path / "samples" / "step-00000002.png").exists()


def test_cached_latents_are_encoded_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = flow_config(folder, tmp_path)
    calls = []
    encode = VideoVAE.encode
    monkeypatch.setattr(VideoVAE, "encode", lambda *a, **k: calls.append(1) or encode(*a, **k))
    train_small("flow", folder, tmp_path, cache_latents=True, run=replace(config.run, steps=3))
    assert len(calls) == 6
    train_small("flow", folder, tmp_path, cache_latents=True, resume=True, run=replace(config.run, steps=5))
    assert len(calls) == 6
    data = replace(config.data, num_frames=3)
    train_small("flow", folder, tmp_path, cache_latents=True, resume=True, data=data)
    assert len(calls) == 12


def test_a_rank_that_finishes_first_does_not_take_away_what_another_is_writing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = flow_config(folder, tmp_path)
    context = ParallelContext.single_process("cpu")
    vae = load_model(folder / "vae", VideoVAE, VideoVAEConfig)
    clips = ClipDataset(read_manifest(folder / "clips.csv"), num_frames=5, image_size=(16, 16))
    save = latents.save_file

    def save_beside_another(*arguments: object, **options: object) -> None:
        monkeypatch.setattr(latents, "save_file", save)
        save(*arguments, **options)
        latents.cached_batches(config, Encoders(vae, None, context.device), clips, replace(context, rank=1))

    monkeypatch.setattr(latents, "save_file", save_beside_another)
    latents.cached_batches(config, Encoders(vae, None, context.device), clips, context)
    assert [path.name for path in tmp_path.iterdir()] == ["latents.safetensors"]


def test_a_frozen_text_encoder_is_not_exported(folder: Path, tmp_path: Path):
    config = flow_config(folder, tmp_path)
    trained = train_small("flow", folder, tmp_path / "a", run=replace(config.run, output=str(tmp_path / "a"), steps=1))
    result = train_small(
        "flow",
        folder,
        tmp_path / "b",
        text_encoder=str(trained.model / "text_encoder"),
        train_text_encoder=False,
        run=replace(config.run, output=str(tmp_path / "b"), steps=2, dtype="bf16"),
    )
    assert [path.name for path in result.model.iterdir()] == ["transformer"]


def test_batches_without_given_frames_need_no_mask(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen = []
    losses = RectifiedFlow.training_losses
    monkeypatch.setattr(
        RectifiedFlow,
        "training_losses",
        lambda *a, **k: seen.append(k["frame_mask"]) or losses(*a, **k),
    )
    config = flow_config(folder, tmp_path)
    train_small("flow", folder, tmp_path, mask_ratios={}, run=replace(config.run, steps=1))
    assert seen == [None, None]


def test_bucketed_batches_of_clips_and_images_train_and_resume(folder: Path, tmp_path: Path):
    lines = ["path,text"]
    for index, num_frames in enumerate((1, 1, 6, 6)):
        path = write_video(
            tmp_path / f"{index}{'.png' if num_frames == 1 else '.mp4'}",
            generate(index, num_frames=num_frames, height=144, width=256)[1],
            fps=8,
        )
        lines.append(f"{path.name},a red circle")
    (tmp_path / "clips.csv").write_text("\n".join(lines))
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    coarse = replace(VAE, spatial=replace(VAE.spatial, block_out_channels=(8,) * 4, **blocks))  # attention at 1/8 size
    save_model(tmp_path / "vae", VideoVAE(coarse), coarse)
    data = DataConfig(manifest=str(tmp_path / "clips.csv"), buckets={"144p": {5: (1.0, 1), 1: (1.0, 2)}})
    changes = {"data": data, "vae": str(tmp_path / "vae")}
    run = replace(flow_config(folder, tmp_path).run, steps=4, checkpoint_every=1)
    train_small("flow", folder, tmp_path, run=replace(run, output=str(tmp_path / "whole")), **changes)
    for steps in (1, 4):
        part = replace(run, output=str(tmp_path / "parts"), steps=steps)
        train_small("flow", folder, tmp_path, resume=True, run=part, **changes)
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    assert len(losses(tmp_path / "whole")) == 4


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("flow", {"mask_ratios": {"halves": 0.5}}, "mask_ratios: kinds must be among"),
        ("flow", {"train_text_encoder": False}, "text_encoder must name a folder or hub id"),
        ("flow", {"transformer": STDiT3Config(hidden_size=16, depth=1, num_heads=2)}, "caption_channels must equal"),
    ],
)
def test_configurations_that_cannot_train_are_refused(
    folder: Path, tmp_path: Path, kind: str, changes: dict, message: str
):
    with pytest.raises(ValueError, match=message):
        train_small(kind, folder, tmp_path, **changes)


@pytest.mark.parametrize("kind", ["flow", "vae"])
def test_options_are_refused_before_anything_is_read(tmp_path: Path, kind: str):
    run = replace(flow_config(tmp_path, tmp_path).run, steps=0)
    with pytest.raises(ValueError, match=r"run\.steps must be at least 1, got 0"):
        train_small(kind, tmp_path, tmp_path, run=run)  # without clips and models


def test_image_ratio_cuts_batches_to_their_first_frame(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen = []
    whole = RectifiedFlow.training_losses

    def record(self: RectifiedFlow, model: STDiT3, x0: torch.Tensor, arguments: dict, **options: object):
        seen.append((x0.shape[2], set(arguments["num_frames"].tolist()), set(arguments["fps"].tolist())))
        return whole(self, model, x0, arguments, **options)

    monkeypatch.setattr(RectifiedFlow, "training_losses", record)
    train_small("flow", folder, tmp_path / "images", image_ratio=1.0)
    assert all(clip == (1, {1}, {IMAGE_FPS}) for clip in seen)
    seen.clear()
    train_small("flow", folder, tmp_path / "both", image_ratio=0.5)
    assert {num_frames for num_frames, _, _ in seen} == {1, 3}
    with pytest.raises(ValueError, match=r"train: image_ratio must lie in \[0, 1\], got 1.5"):
        train_small("flow", folder, tmp_path / "refused", image_ratio=1.5)
