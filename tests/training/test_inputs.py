"""What a batch becomes before a transformer sees it, and the loss on held-out clips."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from opensora import latents
from opensora.checkpoints import CheckpointError, save_model
from opensora.config import (
    DataConfig,
    IDDPMConfig,
    RectifiedFlowConfig,
    RunConfig,
    STDiT3Config,
    STDiTConfig,
    TrainConfig,
)
from opensora.data.loader import make_loader
from opensora.initial_weights import check_resumed, start_from
from opensora.inputs import Encoders, Inputs, captions_of
from opensora.models import LatteT2V, STDiT, STDiT3
from opensora.parallel import ParallelContext
from opensora.schedulers import build
from opensora.validation import SHARES, held_out, summary, validation_losses, write_losses
from tests.tiny_systems import SYSTEMS
from tests.training.small_models import write_clips

CPU = torch.device("cpu")


class Pooling(torch.nn.Module):
    """A VAE of one weight: latents are means of 8 x 8 pixels and, with a posterior, one more."""

    latent_channels = 3

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def encode(self, x_BCTHW: Tensor, *, sample_posterior: bool = True) -> Tensor:
        return torch.nn.functional.avg_pool3d(x_BCTHW, (1, 8, 8)) + float(sample_posterior)


class Lengths:
    """A text encoder whose embeddings are the lengths of captions."""

    def encode(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        y = torch.tensor([float(len(text)) for text in captions]).view(-1, 1, 1, 1).repeat(1, 1, 4, 2)
        return y, torch.ones(len(captions), 4, dtype=torch.int64)


def batch(**changes: Any) -> dict[str, Any]:
    sizes = {name: torch.tensor([16.0, 16.0]) for name in ("height", "width", "fps")}
    video = torch.rand(2, 3, 5, 16, 16, generator=torch.Generator().manual_seed(0))
    return sizes | {"num_frames": torch.tensor([5.0, 5.0]), "video": video, "text": ["a", "bcd"]} | changes


def encoders() -> Encoders:
    return Encoders(Pooling(), Lengths(), CPU)


def test_images_go_behind_their_clip_and_their_texts_behind_its_text():
    images = torch.rand(2, 3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    texts = [["ab", "abc", "abcd"], ["abcde", "abcdef", "abcdefg"]]
    inputs = encoders()(batch(images=images, image_text=texts), sample_posterior=False)
    assert inputs.x0.shape == (2, 3, 5 + 3, 2, 2)
    assert inputs.num_images == 3
    for b in range(2):
        for i in range(3):
            expected = torch.nn.functional.avg_pool2d(images[b, i], 8)
            torch.testing.assert_close(inputs.x0[b, :, 5 + i], expected)
    assert inputs.y[:, :, 0, 0].tolist() == [[1, 2, 3, 4], [3, 5, 6, 7]]
    assert inputs.text_mask.shape == (2, 4, 4)
    assert inputs.first_frames().x0.shape == (2, 3, 1, 2, 2)


def test_the_main_rank_alone_keeps_cached_latents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    data = DataConfig(manifest=str(write_clips(tmp_path)), image_size=(16, 16), num_frames=5)
    config = TrainConfig(data=data, run=RunConfig(output=str(tmp_path / "run")))
    clips = make_loader(data).dataset
    encoded = latents._encode_all(config, encoders(), clips, ParallelContext(rank=1, world_size=2))
    assert not (tmp_path / "run").exists()
    latents._encode_all(config, encoders(), clips, ParallelContext())
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["latents.safetensors"]
    monkeypatch.setattr(latents, "save_file", None)  # read from now on
    again = latents._encode_all(config, encoders(), clips, ParallelContext(rank=1, world_size=2))
    assert torch.equal(encoded[0], again[0])
    assert encoded[2] == again[2]


def test_stored_latents_and_texts_need_no_encoder():
    stored = {
        "latents": torch.zeros(2, 4, 3, 2, 2),
        "latents_std": torch.ones(2, 4, 3, 2, 2),
        "image_latents": torch.ones(2, 2, 4, 2, 2),
        "y": torch.zeros(2, 1, 5, 6),
        "mask": torch.ones(2, 5, dtype=torch.int64),
        "image_y": torch.ones(2, 2, 5, 6),
        "image_mask": torch.zeros(2, 2, 5, dtype=torch.int64),
    }
    given = {name: value for name, value in batch().items() if name not in ("video", "text")}
    torch.manual_seed(0)
    inputs = Encoders(None, None, CPU)(given | stored)
    assert inputs.x0.shape == (2, 4, 3 + 2, 2, 2)
    assert 0.5 < float(inputs.x0[:, :, :3].std()) < 1.5  # drawn from the posterior
    assert not Encoders(None, None, CPU)(given | stored, sample_posterior=False).x0[:, :, :3].any()
    assert inputs.y[:, :, 0, 0].tolist() == [[0, 1, 1], [0, 1, 1]]
    assert inputs.text_mask.sum(-1).tolist() == [[5, 0, 0], [5, 0, 0]]
    with pytest.raises(ValueError, match="vae must name a folder"):
        Encoders(None, None, CPU)(batch())
    with pytest.raises(ValueError, match="text_encoder must name a folder"):
        Encoders(Pooling(), None, CPU)(batch())


def test_scores_are_appended_as_at_sampling():
    texts = {"text": ["A fish", "A bird", "A cat"], "aes": [6.5, None, math.nan], "flow": torch.tensor([1.0, 2.0, 0.0])}
    assert captions_of(texts | {"camera_motion": ["zoom in", None, ""]}) == [
        "a fish aesthetic score: 6.5. motion score: 1.0. camera motion: zoom in.",
        "a bird motion score: 2.0.",
        "a cat motion score: 0.0.",
    ]
    assert captions_of({"text": ["A fish"]}) == ["a fish"]


def test_a_mask_of_nothing_is_no_mask():
    whole, padded = torch.ones(2, 5, 2, 2), torch.ones(2, 5, 2, 2)
    padded[0, 4] = 0
    assert encoders()(batch(attention_mask=whole)).attention_mask is None
    assert encoders()(batch(attention_mask=padded)).attention_mask is padded


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    manifest = write_clips(tmp_path_factory.mktemp("clips"))
    return DataConfig(validation=str(manifest), image_size=(16, 16), num_frames=5, batch_size=4)


def model_of(inputs: Inputs) -> Callable[..., Tensor]:
    """Velocity and its variance, or noise, as a function of what it is given."""
    return lambda x, t, **sizes: torch.cat([x * (t / 1000).view(-1, 1, 1, 1, 1), x], dim=1)


@pytest.mark.parametrize("config", [RectifiedFlowConfig(), IDDPMConfig()])
def test_held_out_losses_depend_on_weights_alone(clips: DataConfig, config: Any):
    context, scheduler = ParallelContext.single_process("cpu"), build(config)
    data = held_out(clips, 3)
    assert {name: len(requests) for name, requests in data.requests.items()} == {"5_frames": 3}
    torch.manual_seed(0)
    first = validation_losses(data, encoders(), scheduler, model_of, context)
    state = torch.get_rng_state()
    again = validation_losses(data, encoders(), scheduler, model_of, context)
    assert torch.equal(torch.get_rng_state(), state)
    assert first == again
    assert len(first["5_frames"]) == len(SHARES) == 10
    one_by_one = type(data)(data.clips, data.requests, {"5_frames": 1})
    other = validation_losses(one_by_one, encoders(), scheduler, model_of, context)
    assert other["5_frames"] == pytest.approx(first["5_frames"], rel=1e-5)


def test_held_out_files_that_cannot_be_read_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    data = held_out(DataConfig(validation=str(write_clips(tmp_path)), image_size=(16, 16), num_frames=5), 1)
    (tmp_path / "0.mp4").unlink()
    context = ParallelContext.single_process("cpu")
    validation_losses(data, encoders(), build(RectifiedFlowConfig()), model_of, context)
    assert f"skipped {tmp_path / '0.mp4'}, held out: No such file" in caplog.text


def test_held_out_losses_of_rectified_flow_are_those_of_its_formula(clips: DataConfig):
    """x = (1 - u) z + u n, the model says u x, the truth is z - n."""
    data = held_out(clips, 1)
    losses = validation_losses(
        data, encoders(), build(RectifiedFlowConfig()), model_of, ParallelContext.single_process("cpu")
    )
    (request,) = data.requests["5_frames"]
    z = encoders().encode_pixels(data.clips[request]["video"][None], sample_posterior=False)
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(request.index))
    for share, loss in zip(SHARES, losses["5_frames"], strict=True):
        expected = (share * ((1 - share) * z + share * noise) - (z - noise)).square().mean()
        assert loss == pytest.approx(float(expected), rel=1e-5)


def test_each_bucket_has_the_clips_that_fill_it(clips: DataConfig):
    table = {"32": {1: (1.0, 2), 17: (1.0, 1)}, "48": {1: (0.0, 0)}}
    with pytest.raises(ValueError, match="must fill a bucket, of 6 none do"):
        held_out(DataConfig(validation=clips.validation, buckets=table), 4)
    with pytest.raises(ValueError, match="must fill a bucket, of 6 none do"):
        held_out(DataConfig(validation=clips.validation, num_frames=6), 4)


def test_losses_of_a_step_are_written_once(tmp_path: Path):
    path = tmp_path / "run" / "validation.csv"
    losses = {"a": [1.0] * 10, "b": [3.0] * 10}
    write_losses(path, 0, losses)
    write_losses(path, 5, {"a": [2.0] * 10})
    write_losses(path, 5, {"a": [0.5] * 10})
    rows = path.read_text().splitlines()
    assert rows[0] == "step,bucket,timestep,loss"
    assert rows[1] == "0,a,90.9,1"
    assert len(rows) == 1 + 20 + 10
    assert rows[-1] == "5,a,909.1,0.5"
    assert summary(losses) == {"validation": 2.0, "validation/a": 1.0, "validation/b": 3.0}


def test_weights_start_from_the_same_model_or_an_earlier_one(tmp_path: Path):
    size = {"hidden_size": 24, "depth": 1, "num_heads": 2, "caption_channels": 8, "model_max_length": 4}
    first, second = STDiT(STDiTConfig(input_size=(2, 4, 4), **size)), STDiT3(STDiT3Config(**size))
    save_model(tmp_path / "first", first, first.config)
    save_model(tmp_path / "second", second, second.config)
    assert "STDiT to STDiT3" in start_from(second, tmp_path / "first")
    torch.testing.assert_close(second.t_embedder.mlp[0].weight, first.t_embedder.mlp[0].weight)
    start_from(STDiT3(second.config), tmp_path / "second")
    with pytest.raises(ValueError, match=r"must be a STDiT or an earlier .*got .*STDiT3 of Open-Sora 1\.2"):
        start_from(first, tmp_path / "second")
    with pytest.raises(ValueError, match="must be a LatteT2V"):
        start_from(LatteT2V(SYSTEMS["open-sora-plan-v1.1"].transformer), tmp_path / "first")
    with pytest.raises(CheckpointError, match="does not fit STDiT3"):
        start_from(STDiT3(STDiT3Config(**size | {"hidden_size": 48})), tmp_path / "second")


def test_a_run_of_another_model_is_not_resumed(tmp_path: Path):
    folder = tmp_path / "checkpoints" / "step-00000002"
    folder.mkdir(parents=True)
    before = STDiT3Config(hidden_size=24, depth=1, num_heads=2)
    (folder / "state.json").write_text(json.dumps({"config": {"transformer": asdict(before)}}))
    check_resumed(tmp_path, replace(before, class_dropout_prob=0.5, freeze_y_embedder=True))
    check_resumed(tmp_path / "nowhere", before)
    with pytest.raises(ValueError, match=r"resume: .*step-00000002 must be of the same model, .*depth was 1, now 2;"):
        check_resumed(tmp_path, replace(before, depth=2))
    with pytest.raises(
        ValueError, match=r"input_sq_size was 512, now absent; .* and \d+ more; is it of another preset"
    ):
        check_resumed(tmp_path, STDiTConfig(hidden_size=24, depth=1, num_heads=2))
