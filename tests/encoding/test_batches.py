"""Batches of an encoded folder are those that a training would encode itself."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import pytest
import torch
from diffusers import AutoencoderKL

from opensora.config import (
    CausalVideoVAEConfig,
    DataConfig,
    EncodeConfig,
    OptimizerConfig,
    RectifiedFlowConfig,
    RunConfig,
    TrainConfig,
    TrainVAEConfig,
)
from opensora.data.encoded import EncodedDataset
from opensora.data.loader import make_loader
from opensora.data.samplers import ClipRequest
from opensora.data.shapes import generate
from opensora.encoding import run_encode
from opensora.inputs import Encoders, captions_of
from opensora.text.t5 import TextEncoder
from opensora.trainer import run_train
from opensora.training.records import read_losses
from opensora.vae import CausalVideoVAE, FrameVAE, VideoVAE
from opensora.vae_trainer import run_train_vae
from opensora.video import write_mp4, write_png
from tests.encoding.clips import LENGTH, NUM_CLIPS, config, training_on, write_list
from tests.tiny_models import CAPTIONS, TRANSFORMER, VAE


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
    with pytest.raises(ValueError, match="clips must have been made with num_frames 1, got 5"):
        make_loader(replace(loaded, encoded_images=clips.output))
    with pytest.raises(ValueError, match="encoded clips need encoded_images"):
        next(iter(make_loader(replace(loaded, encoded_images=""))))


def test_a_training_on_stored_clips_has_the_losses_of_one_that_encodes(folder, vae, tmp_path, monkeypatch):
    encode = Encoders.encode_pixels
    # Stored are means, so means are taken in training too.
    monkeypatch.setattr(Encoders, "encode_pixels", lambda self, x, **_: encode(self, x, sample_posterior=False))
    encoding = config(folder, tmp_path / "out", windows=2)
    run_encode(encoding, vae, TextEncoder.from_pretrained(folder / "text_encoder", model_max_length=LENGTH))
    run = RunConfig(steps=4, seed=42, dtype="fp32", device="cpu", log_every=1, checkpoint_every=0, tensorboard=False)
    training = TrainConfig(
        transformer=TRANSFORMER,
        scheduler=RectifiedFlowConfig(use_timestep_transform=False),
        data=encoding.data,
        optimizer=OptimizerConfig(lr=1e-3),
        mask_ratios={"random": 0.5},
        vae=str(folder / "vae"),
        text_encoder=str(folder / "text_encoder"),
    )
    stored = replace(training, data=training_on(encoding), vae="", text_encoder="")
    losses = []
    for name, each in (("encodes", training), ("stored", stored)):
        run_train(replace(each, run=replace(run, output=str(tmp_path / name))))
        losses.append([float(row["loss"]) for row in read_losses(tmp_path / name)])
    assert len(losses[0]) == 4
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)  # clips are encoded one by one here, in batches there
    with pytest.raises(ValueError, match=r"data\.encoded must not be set, for clips in pixels are needed"):
        run_train_vae(TrainVAEConfig(data=stored.data))
