"""`run_train_vae` of both kinds of VAE, with and without a discriminator, on models as small as they can be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file

from opensora import presets, vae_trainer
from opensora.checkpoints import load_model, save_model
from opensora.cli import main
from opensora.config import AdversaryConfig, CausalVideoVAEConfig, ParallelConfig, RunConfig, VAEConfig, VAELossConfig
from opensora.data.loader import make_loader
from opensora.metrics import scores_of_clip
from opensora.parallel import ParallelContext
from opensora.presets.scaling import scaled
from opensora.training.records import read_losses
from opensora.vae import CausalVideoVAE, VideoVAE
from tests.oracles.adversarial import seeded_lpips
from tests.training.small_models import CAUSAL_VAE, VAE, train_small, vae_config, write_clips

VAES = {"stacked": VAE, "causal": CAUSAL_VAE}
# From the second step on: its counter is at 2 then for the VAE.
SHARP = ("sharpness", "psnr")
GAN = AdversaryConfig(kind="2d", start=2, channels=4, num_layers=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    write_clips(folder)
    return folder


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run_of(folder: Path, output: Path, **changes):
    return replace(vae_config(folder, output).run, **{"checkpoint_every": 0, **changes})


@pytest.mark.parametrize(("kind", "dtype"), [("stacked", "fp32"), ("causal", "bf16")])
def test_training_against_a_discriminator_resumes_as_if_unbroken(folder: Path, tmp_path: Path, kind: str, dtype: str):
    adversary = replace(GAN, kind="3d") if kind == "causal" else GAN
    changes = {"vae": VAES[kind], "adversary": adversary, "initial_log_variance": -4.0}
    for output, steps in (("whole", 4), ("parts", 2), ("parts", 4)):
        run = run_of(folder, tmp_path / output, steps=steps, dtype=dtype, grad_checkpoint=kind == "stacked")
        train_small("vae", folder, tmp_path / output, run=run, resume=(output, steps) == ("parts", 4), **changes)
    whole, parts = (read_losses(tmp_path / output) for output in ("whole", "parts"))
    names = ("step", "loss", "reconstruction", "adversarial", "logits_real", "logits_fake")
    assert [[row[name] for name in names] for row in whole] == [[row[name] for name in names] for row in parts]
    assert [float(row["adversarial"]) == 0 for row in whole] == [True, False, False, False]


def test_the_discriminator_learns_and_is_not_exported(folder: Path, tmp_path: Path):
    result = train_small("vae", folder, tmp_path, adversary=GAN, run=run_of(folder, tmp_path, steps=2))
    assert sorted(path.name for path in result.model.iterdir()) == ["vae"]
    assert not any("main" in name for name in load_file(result.model / "vae" / "model.safetensors"))


def test_the_vae_is_the_same_with_a_discriminator_until_that_comes_in(folder: Path, tmp_path: Path):
    rows = []
    for name, adversary in (("with", GAN), ("without", AdversaryConfig())):
        run = run_of(folder, tmp_path / name, steps=1)
        train_small("vae", folder, tmp_path / name, adversary=adversary, run=run)
        rows.append(read_losses(tmp_path / name)[0]["reconstruction"])
    assert rows[0] == rows[1]


def test_a_causal_vae_starts_from_an_image_vae_and_given_shares(folder: Path, tmp_path: Path):
    torch.manual_seed(0)
    vae = CausalVideoVAE(CAUSAL_VAE)
    weights = {}  # those of a 2-D VAE: a causal kernel has `conv` in its name and a last frame
    for name, tensor in vae.state_dict().items():
        *parents, _, leaf = name.split(".")
        is_causal = type(vae.get_submodule(".".join(parents))).__name__ == "CausalConv3d"
        if "time_" not in name:
            name = ".".join([*parents, leaf]) if is_causal else name
            weights[f"first_stage_model.{name}"] = (tensor[:, :, -1] if tensor.dim() == 5 else tensor).contiguous()
    save_file(weights, tmp_path / "image.safetensors")
    config = replace(
        vae_config(folder, tmp_path), vae=CAUSAL_VAE, image_vae=str(tmp_path / "image.safetensors"), mix_factor=0.5
    )
    built = vae_trainer._build(config, torch.device("cpu"))
    kernel = built.decoder.conv_out.conv.weight
    assert torch.equal(kernel[:, :, -1], weights["first_stage_model.decoder.conv_out.weight"])
    assert not kernel[:, :, :-1].any()
    factors = [parameter.item() for name, parameter in built.named_parameters() if name.endswith("mix_factor")]
    assert factors == [0.5, 0.5]


def test_a_stacked_vae_takes_its_2d_half_from_an_image_vae(folder: Path, tmp_path: Path):
    torch.manual_seed(1)
    image_vae = VideoVAE(VAE).spatial_vae.module
    image_vae.save_pretrained(tmp_path / "image")
    config = replace(vae_config(folder, tmp_path), image_vae=str(tmp_path / "image"), freeze_spatial=True)
    built = vae_trainer._build(config, torch.device("cpu")).spatial_vae.module.state_dict()
    assert all(torch.equal(built[name], tensor) for name, tensor in image_vae.state_dict().items())


def test_lpips_from_a_file_is_part_of_the_loss(folder: Path, tmp_path: Path):
    save_file(seeded_lpips().state_dict(), tmp_path / "lpips.safetensors")
    rows = []
    for name, weight in (("without", 0.0), ("with", 0.5)):
        loss = VAELossConfig(perceptual_weight=weight, perceptual_path=str(tmp_path / "lpips.safetensors"))
        run = run_of(folder, tmp_path / name, steps=1)
        train_small("vae", folder, tmp_path / name, vae=CAUSAL_VAE, loss=loss, run=run)
        rows.append(float(read_losses(tmp_path / name)[0]["reconstruction"]))
    assert rows[1] > rows[0] + 1


def test_heldout_clips_are_scored_and_shown(folder: Path, tmp_path: Path):
    config = vae_config(folder, tmp_path)
    data = replace(config.data, validation=config.data.manifest)
    run = run_of(folder, tmp_path, steps=2, sample_every=2, validate_every=1)
    train_small("vae", folder, tmp_path, vae=CAUSAL_VAE, data=data, run=run)
    assert (tmp_path / "samples" / "heldout-00000002.png").exists()
    assert list((tmp_path / "samples").glob("train-00000002-*.mp4"))


class OneOfMany(ParallelContext):
    """A rank of sixteen that read different batches, which remembers what is to be added up."""

    data_world_size = 16
    sums: ClassVar[list[torch.Tensor]] = []

    @property
    def data_rank(self) -> int:
        return self.rank

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        self.sums.append(values)
        return torch.ones_like(values)


def test_more_ranks_than_held_out_clips_share_them(folder: Path, tmp_path: Path):
    config = replace(vae_config(folder, tmp_path), vae=CAUSAL_VAE)
    vae, clips = vae_trainer._build(config, torch.device("cpu")), make_loader(config.data).dataset

    def validate(context: ParallelContext) -> dict[str, float]:
        with torch.no_grad():
            return vae_trainer._VAETask(config, vae, None, None, clips, clips, context).validate(1)

    for rank in range(16):
        validate(OneOfMany(rank=rank))
    count, *totals = sum(OneOfMany.sums).tolist()
    assert count == len(clips) == 6
    assert [total / count for total in totals] == pytest.approx(list(validate(ParallelContext()).values()), rel=1e-5)


def test_sharpness_is_the_share_of_gradient_energy_that_is_left():
    frames = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    same = scores_of_clip(frames, frames)
    torch.testing.assert_close(same, torch.tensor([100.0, 1.0, 1.0], dtype=torch.float64))
    halved = scores_of_clip(frames, (frames.float() / 2 + 64).round().to(torch.uint8))
    assert halved[2].item() == pytest.approx(0.25, abs=0.01)


@pytest.mark.slow
def test_a_discriminator_makes_reconstructions_sharper_at_the_same_psnr(folder: Path, tmp_path: Path, monkeypatch):
    found: dict[str, dict[str, float]] = {}
    measure = vae_trainer._VAETask.validate

    def remember(task, step: int) -> dict[str, float]:
        return found.setdefault(Path(task.config.run.output).name, measure(task, step))

    monkeypatch.setattr(vae_trainer._VAETask, "validate", remember)
    config = vae_config(folder, tmp_path)
    optimizer = replace(config.optimizer, lr=2e-3, betas=(0.5, 0.9), accumulation_steps=1)
    common = {
        "vae": replace(CAUSAL_VAE, z_channels=1, embed_dim=1),  # so few latents that details are lost
        "data": replace(config.data, validation=config.data.manifest, batch_size=3, cache_in_memory=True),
        "optimizer": optimizer,
        "mixed": "none",
    }
    gan = AdversaryConfig("2d", start=0, weight=0.25, channels=16, num_layers=1, optimizer=replace(optimizer, lr=1e-3))
    first = run_of(folder, tmp_path / "first", steps=60)
    result = train_small("vae", folder, tmp_path / "first", run=first, initial_log_variance=-4.0, **common)
    for name, adversary in (("without", AdversaryConfig()), ("with", gan)):
        run = run_of(folder, tmp_path / name, steps=40, validate_every=40, log_every=40)
        initial = str(result.model / "vae")
        train_small("vae", folder, tmp_path / name, run=run, initial_vae=initial, adversary=adversary, **common)
    # measured on one core: sharpness 0.27 against 0.13, PSNR 16.6 dB against 16.5
    sharpness, psnr = ([found[name][f"validation/{score}"] for name in ("with", "without")] for score in SHARP)
    assert sharpness[0] > 1.4 * sharpness[1]
    assert abs(psnr[0] - psnr[1]) < 1


def test_random_lengths_of_a_causal_vae_are_those_it_takes():
    config = replace(vae_config(Path(), Path()), vae=CAUSAL_VAE, mixed="random")
    vae, x = CausalVideoVAE(CAUSAL_VAE), torch.zeros(1, 3, 7, 2, 2)
    torch.manual_seed(0)
    assert {vae_trainer._mixed(x, config, vae).shape[2] for _ in range(60)} == {1, 3, 5, 7}


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (
            "stacked",
            {"loss": VAELossConfig(perceptual_weight=0.1)},
            r"path must be a file.*got None; .*weight 0",
        ),
        ("causal", {"loss": VAELossConfig(perceptual_weight=0.1, perceptual_path="/none")}, r"got '/none'"),
        (
            "stacked",
            {"loss": VAELossConfig(use_real_rec_loss=False, use_z_rec_loss=True), "adversary": GAN},
            r"adversary.kind must be off where loss.use_real_rec_loss is",
        ),
        (
            "causal",
            {"loss": VAELossConfig(use_z_rec_loss=True)},
            r"use_z_rec_loss must be false for a Causal",
        ),
        ("causal", {"freeze_spatial": True}, r"freeze_spatial must be false for a CausalVideoVAE"),
        ("causal", {"parallel": ParallelConfig(ulysses=2)}, r"a VAE has no tokens to cut, got 2 and 1"),
        ("stacked", {"mix_factor": 0.5}, r"mix_factor must be none unless"),
        ("stacked", {"freeze_spatial": True}, r"freeze_spatial needs initial_vae or image_vae"),
        ("causal", {"initial_vae": "a", "image_vae": "b"}, r"from initial_vae or from image_vae, got both"),
        ("stacked", {"run": RunConfig(grad_checkpoint="selective")}, r"grad_checkpoint must be full or none for a VAE"),
        ("causal", {"num_frames": 4}, r"num_frames must be 2 n \+ 1 .* got 4; the nearest are 3 and 5"),
        (
            "causal",
            {"num_frames": 1, "adversary": replace(GAN, kind="3d")},
            r"must be '2d' for single images",
        ),
        (
            "causal",
            {"adversary": replace(GAN, kind="3d-v1.0", num_layers=3)},
            r"3 layers needs at least 10 x 24 x 24 \(frames, height and width\), .* may have 5 x 16 x 16",
        ),
        ("causal", {"adversary": replace(GAN, kind="3d-v1.0"), "mixed": "random"}, r"may have 1 x 16 x 16"),
    ],
)
def test_trainings_that_cannot_be_are_refused(folder: Path, tmp_path: Path, kind: str, changes: dict, message: str):
    data = vae_config(folder, tmp_path).data
    changes = {"vae": VAES[kind], "data": replace(data, num_frames=changes.get("num_frames", 5)), "mixed": "none"} | {
        name: value for name, value in changes.items() if name != "num_frames"
    }
    with pytest.raises(ValueError, match=message):
        train_small("vae", folder, tmp_path, **changes)


STAGES = [(name, stage) for name in presets.names() for stage in presets.get(name).vae_training if name != "tiny"]


@pytest.mark.parametrize(("name", "stage"), STAGES, ids=lambda value: value)
def test_every_stage_of_a_release_can_be_built_scaled_down(name: str, stage: str):
    whole = presets.get(name).vae_training[stage]
    config = scaled(whole, "tiny")
    assert _structure(config.vae) == _structure(whole.vae)
    assert config.adversary.kind == whole.adversary.kind
    vae = vae_trainer._build(replace(config, image_vae=None), torch.device("cpu"))  # a file that a run makes
    lengths = vae_trainer._lengths(config, vae)
    assert (vae_trainer._build_discriminator(config, lengths) is None) == (whole.adversary.kind == "none")
    assert max(lengths) == config.data.num_frames


def test_train_all_trains_against_the_discriminator_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    stage = "open-sora-plan-v1.1 vae gan2d"
    assert main(["train-all", "--only", stage, "--steps", "2", "--output", str(tmp_path)]) == 0
    header, row = capsys.readouterr().out.splitlines()
    assert header.split() == ["stage", "first", "last", "s/step", "before", "after"]
    assert row.startswith(stage)
    rows = read_losses(tmp_path / stage.replace(" ", "-"))
    assert [float(row["adversarial"]) == 0 for row in rows] == [True, False]


def test_clips_are_cut_as_upstream_cuts_them():
    cuts = {(name, presets.get(name).vae_training[stage].data.fit) for name, stage in STAGES}
    assert cuts == {("open-sora-v1.2", "center"), ("open-sora-plan-v1.0", "crop"), ("open-sora-plan-v1.1", "crop")}


def _structure(config: VAEConfig) -> object:
    if not isinstance(config, CausalVideoVAEConfig):
        return type(config)
    return (config.encoder_resnet_blocks, config.encoder_temporal_downsample, config.decoder_attention)


def test_a_trained_causal_vae_loads_and_keeps_its_scale(folder: Path, tmp_path: Path):
    save_model(tmp_path / "first", CausalVideoVAE(CAUSAL_VAE), CAUSAL_VAE)
    changes = {"vae": CAUSAL_VAE, "initial_vae": str(tmp_path / "first"), "freeze_encoder": True}
    result = train_small("vae", folder, tmp_path, run=run_of(folder, tmp_path, steps=2), **changes)
    vae = load_model(result.model / "vae", CausalVideoVAE, CausalVideoVAEConfig)
    assert vae.config == CAUSAL_VAE
    before, after = (load_file(path / "model.safetensors") for path in (tmp_path / "first", result.model / "vae"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith(("decoder.", "post_quant_conv.")) for name in changed)
