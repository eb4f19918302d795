"""The layouts in which the five systems were released or trained: each written small, and read back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from opensora.checkpoints import CheckpointError, load_model, load_weights, resolve, save_config, save_model
from opensora.config import STDiT2Config, STDiT3Config
from opensora.config_files import config_from_dict
from opensora.models import STDiT, STDiT2, STDiT3
from opensora.vae import FrameVAE
from opensora.weight_files import weight_files
from tests.released_layouts import (
    STDIT,
    STDIT2,
    STDIT3,
    VAE_2D,
    autoencoder_kl,
    named_state,
    write_hub_folder,
    write_training_checkpoint,
)


def read(location: Path, *, prefer_ema: bool = False) -> dict[str, Tensor]:
    return {name: tensor for file in weight_files(location, prefer_ema=prefer_ema) for name, tensor in file.tensors()}


def assert_same(state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert state.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())


LAST, AVERAGED = {"layer.weight": torch.ones(2)}, {"layer.weight": torch.full((2,), 3.0)}


@pytest.mark.parametrize(
    "content",
    [
        LAST,
        {"state_dict": LAST, "epoch": 3},
        {"model": {f"module.{name}": tensor for name, tensor in LAST.items()}},
        {"step": torch.tensor(7), "state_dict": {"gen_model": {"module.layer.weight": LAST["layer.weight"]}}},
        {"_orig_mod.layer.weight": LAST["layer.weight"]},
    ],
    ids=["flat", "state_dict", "module of a model", "generator and step", "compiled"],
)
def test_weights_are_found_inside_what_training_code_wrote_around_them(tmp_path, content):
    torch.save(content, tmp_path / "any-name.pth")
    for location in (tmp_path, tmp_path / "any-name.pth"):
        assert_same(read(location), LAST)


@pytest.mark.parametrize("entry", ["ema_state_dict", "state_dict_ema", "ema"])
def test_averaged_weights_are_taken_only_when_preferred_or_alone(tmp_path, entry):
    torch.save({"state_dict": LAST, entry: AVERAGED}, tmp_path / "both.ckpt")
    assert_same(read(tmp_path / "both.ckpt"), LAST)
    assert_same(read(tmp_path / "both.ckpt", prefer_ema=True), AVERAGED)
    assert weight_files(tmp_path, prefer_ema=True)[0].entry == entry
    torch.save({entry: AVERAGED}, tmp_path / "alone.ckpt")
    assert_same(read(tmp_path / "alone.ckpt"), AVERAGED)
    torch.save(LAST, tmp_path / "plain.ckpt")
    assert_same(read(tmp_path / "plain.ckpt", prefer_ema=True), LAST)


def test_a_training_checkpoint_gives_its_model_or_its_average(tmp_path):
    write_training_checkpoint(tmp_path / "epoch1-global_step2", LAST | {"layer.bias": torch.zeros(1)}, AVERAGED)
    assert_same(read(tmp_path / "epoch1-global_step2"), LAST | {"layer.bias": torch.zeros(1)})
    assert_same(read(tmp_path / "epoch1-global_step2", prefer_ema=True), AVERAGED)
    save_model(tmp_path / "checkpoint-500" / "model", LAST, {})
    save_model(tmp_path / "checkpoint-500" / "model_ema", AVERAGED, {})
    assert_same(read(tmp_path / "checkpoint-500"), LAST)
    assert_same(read(tmp_path / "checkpoint-500", prefer_ema=True), AVERAGED)


def test_several_files_of_weights_in_a_folder_are_listed(tmp_path):
    for name in ("OpenSora-v1-16x256x256.pth", "OpenSora-v1-HQ-16x256x256.pth"):
        torch.save(LAST, tmp_path / name)
    with pytest.raises(CheckpointError, match=r"several checkpoints, name one: OpenSora-v1-16x256x256\.pth, OpenSora"):
        weight_files(tmp_path)


def test_open_sora_1_0_loads_from_its_file_and_keeps_its_own_position_tables(tmp_path):
    state = named_state(STDiT(STDIT))
    torch.save(state | {"pos_embed": torch.zeros(1, 1, 4)}, tmp_path / "OpenSora-v1-HQ-16x256x256.pth")
    model = load_model(tmp_path / "OpenSora-v1-HQ-16x256x256.pth", STDiT, type(STDIT), config=STDIT)
    assert_same({name: tensor for name, tensor in model.state_dict().items() if "pos_embed" not in name}, state)
    assert torch.equal(model.pos_embed, STDiT(STDIT).pos_embed)
    assert torch.equal(model.pos_embed_temporal, STDiT(STDIT).pos_embed_temporal)
    save_model(tmp_path / "ours", model, STDIT)
    assert torch.equal(load_model(tmp_path / "ours", STDiT, type(STDIT)).pos_embed, model.pos_embed)


def test_open_sora_1_1_rotates_before_the_norm_though_its_configuration_has_no_field_for_it(tmp_path):
    write_hub_folder(tmp_path / "STDiT-v2", "STDiT2", STDIT2, named_state(STDiT2(STDIT2)))
    assert "qk_norm_legacy" not in json.loads((tmp_path / "STDiT-v2" / "config.json").read_text())
    assert load_model(tmp_path / "STDiT-v2", STDiT2, STDiT2Config).config == STDIT2
    released = {"architectures": ["STDiT2"], "qk_norm": True}
    assert not config_from_dict(STDiT2Config, released | {"qk_norm_legacy": False}).qk_norm_legacy
    assert not config_from_dict(STDiT2Config, released | {"qk_norm": False}).qk_norm_legacy
    assert not config_from_dict(STDiT2Config, {"config_type": "STDiT2Config", "qk_norm": True}).qk_norm_legacy


def test_averaged_weights_reach_the_model(tmp_path):
    last, averaged = named_state(STDiT3(STDIT3), seed=1), named_state(STDiT3(STDIT3), seed=2)
    folder = tmp_path / "epoch0-global_step1"
    write_training_checkpoint(folder, last, averaged)
    for prefer_ema, expected in ((False, last), (True, averaged)):
        model = load_model(folder, STDiT3, STDiT3Config, config=STDIT3, prefer_ema=prefer_ema)
        assert_same(model.state_dict(), expected)
        load_weights(model, folder, prefer_ema=not prefer_ema)
        assert not torch.equal(model.state_dict()["x_embedder.proj.weight"], expected["x_embedder.proj.weight"])


def test_an_image_vae_with_the_attention_names_of_older_files_loads(tmp_path):
    vae = autoencoder_kl()
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = dict(vae.state_dict())
    for new, name in old.items():
        state = {key.replace(f".{new}.", f".{name}."): tensor for key, tensor in state.items()}
    assert state.keys() != vae.state_dict().keys()
    save_model(tmp_path, state, {"_class_name": "AutoencoderKL"}, stem="diffusion_pytorch_model")
    other = autoencoder_kl(seed=1)
    load_weights(other, tmp_path)
    assert_same(other.state_dict(), dict(vae.state_dict()))


def test_an_image_vae_that_lacks_a_weight_is_refused(tmp_path):
    state = dict(autoencoder_kl().state_dict())
    save_model(tmp_path, state, VAE_2D | {"_class_name": "AutoencoderKL"}, stem="diffusion_pytorch_model")
    assert_same(dict(FrameVAE.from_pretrained(tmp_path).spatial_vae.module.state_dict()), state)
    del state["decoder.conv_in.bias"], state["encoder.conv_in.weight"]
    save_model(tmp_path, state, VAE_2D | {"_class_name": "AutoencoderKL"}, stem="diffusion_pytorch_model")
    with pytest.raises(ValueError, match=r"every weight, lacks 2: decoder\.conv_in\.bias, encoder\.conv_in\.weight$"):
        FrameVAE.from_pretrained(tmp_path)


def test_a_checkpoint_of_another_family_is_named(tmp_path):
    torch.save(named_state(STDiT(STDIT)), tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match=r"does not fit STDiT3: .*; looks like STDiT of Open-Sora 1\.0$"):
        load_model(tmp_path, STDiT3, STDiT3Config, config=STDIT3)
    save_config(tmp_path, STDiT2Config(qk_norm_legacy=True))
    with pytest.raises(CheckpointError, match=r"unknown field .*qk_norm_legacy.*; looks like STDiT of Open-Sora 1\.0$"):
        load_model(tmp_path, STDiT3, STDiT3Config)
    (tmp_path / "vae").mkdir()
    autoencoder_kl().save_pretrained(tmp_path / "vae")
    with pytest.raises(CheckpointError, match="looks like AutoencoderKL of Stable Diffusion or SDXL, for images"):
        load_weights(STDiT3(STDIT3), tmp_path / "vae", strict=False)


def test_a_part_of_a_hub_repository_is_named_after_a_colon(tmp_path, monkeypatch):
    import huggingface_hub

    asked = []

    def download(repository: str, allow_patterns: list[str]) -> str:
        asked.append((repository, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    (tmp_path / "vae").mkdir()
    assert resolve("LanguageBind/Open-Sora-Plan-v1.1.0:vae") == tmp_path / "vae"
    assert asked[0][0] == "LanguageBind/Open-Sora-Plan-v1.1.0"
    assert {f"vae/*.{suffix}" for suffix in ("safetensors", "bin", "pt", "pth", "ckpt", "json")} <= set(asked[0][1])
    assert "*.safetensors" not in asked[0][1]
    assert resolve("hpcai-tech/OpenSora-STDiT-v3") == tmp_path
    with pytest.raises(CheckpointError, match="LanguageBind/Plan on the hub has no 65x512x512"):
        resolve("LanguageBind/Plan:65x512x512")
