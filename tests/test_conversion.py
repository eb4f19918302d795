"""`opensora convert`: round trips are bit for bit, in every layout; what is not whole is not written."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from opensora.checkpoints import load_config, load_model
from opensora.cli import main
from opensora.config import CausalVideoVAEConfig, STDiT3Config, VideoVAEConfig
from opensora.conversion import read_checkpoint, write_checkpoint
from opensora.models import STDiT, STDiT2, STDiT3
from opensora.text.tiny import build_tiny_text_encoder
from opensora.vae import CausalVideoVAE, VideoVAE
from tests import tiny_models
from tests.released_layouts import (
    CAUSAL_VAE,
    STDIT,
    STDIT2,
    STDIT3,
    autoencoder_kl,
    latte_state,
    named_state,
    pixart_state,
    write_hub_folder,
    write_training_checkpoint,
)

MODELS: dict[str, tuple[type[nn.Module], object]] = {
    "STDiT": (STDiT, STDIT),
    "STDiT2": (STDiT2, STDIT2),
    "STDiT3": (STDiT3, STDIT3),
    "VideoVAE": (VideoVAE, tiny_models.VAE),
    "CausalVideoVAE": (CausalVideoVAE, CAUSAL_VAE),
}


def write(model: nn.Module, config: object, location: Path) -> dict[str, Tensor]:
    """Our layout, values drawn."""
    from opensora.checkpoints import save_model

    state = dict(model.state_dict()) | named_state(model)
    save_model(location, state, config)
    return state


def assert_same(state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert state.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())


@pytest.mark.parametrize("family", MODELS)
def test_there_and_back_is_bit_for_bit_and_keeps_the_configuration(tmp_path, family):
    model_type, config = MODELS[family]
    state = write(model_type(config), config, tmp_path / "ours")
    released = tmp_path / ("released.pth" if family == "STDiT" else "released")
    write_checkpoint(read_checkpoint(tmp_path / "ours"), released, layout="released")
    again = read_checkpoint(released)
    assert again.family.name == family
    assert again.config == config
    write_checkpoint(again, tmp_path / "again")
    assert_same(read_checkpoint(tmp_path / "again").state, state)
    assert (tmp_path / "again" / "config.json").read_text() == (tmp_path / "ours" / "config.json").read_text()
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "ours" / "model.safetensors"
    ).read_bytes()
    written = write_checkpoint(again, tmp_path / "flat.pth", layout="pth")
    assert written == [tmp_path / "flat.pth"]
    assert_same(torch.load(tmp_path / "flat.pth", weights_only=True), state)


def test_released_folders_are_those_of_upstream(tmp_path):
    for family in ("STDiT2", "VideoVAE", "CausalVideoVAE"):
        model_type, config = MODELS[family]
        write(model_type(config), config, tmp_path / "ours")
        write_checkpoint(read_checkpoint(tmp_path / "ours"), tmp_path / family, layout="released")
    assert json.loads((tmp_path / "STDiT2" / "config.json").read_text())["architectures"] == ["STDiT2"]
    vae = json.loads((tmp_path / "VideoVAE" / "config.json").read_text())
    assert vae["vae_2d"]["type"] == "VideoAutoencoderKL"
    assert vae["architectures"] == ["VideoAutoencoderPipeline"]
    assert load_config(tmp_path / "VideoVAE", VideoVAEConfig) == tiny_models.VAE
    plan = json.loads((tmp_path / "CausalVideoVAE" / "config.json").read_text())
    assert plan["_class_name"] == "CausalVAEModel"
    assert (tmp_path / "CausalVideoVAE" / "diffusion_pytorch_model.safetensors").is_file()
    load_model(tmp_path / "CausalVideoVAE", CausalVideoVAE, CausalVideoVAEConfig)


def test_a_training_checkpoint_becomes_a_folder_that_loads(tmp_path, capsys):
    last, averaged = named_state(STDiT3(STDIT3), seed=1), named_state(STDiT3(STDIT3), seed=2)
    write_training_checkpoint(tmp_path / "epoch1-global_step2", last, averaged)
    for flags, expected in (([], last), (["--ema"], averaged)):
        assert main(["convert", str(tmp_path / "epoch1-global_step2"), str(tmp_path / "out"), *flags]) == 0
        assert_same(load_model(tmp_path / "out", STDiT3, STDiT3Config).state_dict(), expected)
    assert "STDiT3 of Open-Sora 1.2" in capsys.readouterr().out


def test_a_causal_vae_of_a_trainer_loses_what_training_alone_needs(tmp_path):
    vae = CausalVideoVAE(CAUSAL_VAE)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "CausalVAEModel", **asdict(CAUSAL_VAE)}))
    state = dict(vae.state_dict())
    torch.save({"state_dict": {"gen_model": state | {"loss.logvar": torch.zeros(())}}}, tmp_path / "last.ckpt")
    checkpoint = read_checkpoint(tmp_path)
    assert checkpoint.entry == "state_dict.gen_model"
    assert_same(checkpoint.state, state)


def test_models_of_others_keep_their_layout(tmp_path):
    from diffusers import AutoencoderKL

    from opensora.text.t5 import TextEncoder

    vae = autoencoder_kl()
    vae.save_pretrained(tmp_path / "vae")
    write_checkpoint(read_checkpoint(tmp_path / "vae"), tmp_path / "vae2", dtype=torch.bfloat16)
    again = AutoencoderKL.from_pretrained(tmp_path / "vae2")
    assert torch.equal(again.encoder.conv_in.weight, vae.encoder.conv_in.weight.bfloat16().float())
    folder = tiny_models.save_tiny_models(tmp_path / "tiny") / "text_encoder"
    write_checkpoint(read_checkpoint(folder), tmp_path / "t5")
    texts = [TextEncoder.from_pretrained(each).encode(["a red circle"])[0] for each in (folder, tmp_path / "t5")]
    assert torch.equal(*texts)
    write_checkpoint(read_checkpoint(folder.parent / "vae"), tmp_path / "vae3")
    torch.save(latte_state(), tmp_path / "latte.pt")
    with pytest.raises(ValueError, match=r"LatteT2V: needs its config\.json"):
        read_checkpoint(tmp_path / "latte.pt")


def test_precision_is_changed_in_the_file_alone(tmp_path, capsys):
    write_hub_folder(tmp_path / "in", "STDiT3", STDIT3, named_state(STDiT3(STDIT3)))
    assert main(["convert", str(tmp_path / "in"), str(tmp_path / "out"), "--dtype", "bf16"]) == 0
    assert str(tmp_path / "out" / "model.safetensors") in capsys.readouterr().out
    assert {tensor.dtype for tensor in read_checkpoint(tmp_path / "out").state.values()} == {torch.bfloat16}
    assert load_config(tmp_path / "out", STDiT3Config) == STDIT3


def test_adapting_from_the_command_line_writes_a_model_that_loads(tmp_path, capsys):
    torch.save({"state_dict": pixart_state()}, tmp_path / "PixArt.pth")
    (tmp_path / "fields.json").write_text('{"input_sq_size": 64}')
    arguments = ["--adapt-to", "stdit3", "--config", str(tmp_path / "fields.json"), "--qk-norm", "false"]
    assert main(["convert", str(tmp_path / "PixArt.pth"), str(tmp_path / "out"), *arguments]) == 0
    assert capsys.readouterr().out.startswith("PixArt to STDiT3: ")
    model = load_model(tmp_path / "out", STDiT3, STDiT3Config)
    assert (model.config.input_sq_size, model.config.qk_norm, model.config.model_max_length) == (64, False, 300)
    assert torch.equal(model.spatial_blocks[0].mlp.fc1.weight, pixart_state()["blocks.0.mlp.fc1.weight"])


def test_what_is_not_whole_or_does_not_fit_its_layout_is_not_written(tmp_path, capsys):
    state = named_state(STDiT3(STDIT3))
    del state["rope.freqs"]
    write_hub_folder(tmp_path / "in", "STDiT3", STDIT3, state)
    out = tmp_path / "out"
    for arguments, message in (
        ([str(tmp_path / "in"), str(out)], "does not fit STDiT3: 1 missing (rope.freqs)"),
        ([str(tmp_path / "in"), str(out), "--family", "unet"], "family: must be one of STDiT3"),
        ([str(tmp_path / "in"), str(out), "--adapt-to", "stdit2"], "STDiT2 can start from PixArt or STDiT, got STDiT3"),
        ([str(tmp_path / "in"), str(out), "--config", str(tmp_path / "in/model.safetensors")], "must hold JSON"),
    ):
        assert main(["convert", *arguments]) == 2
        assert message in capsys.readouterr().err
    torch.save(pixart_state(), tmp_path / "PixArt.pth")
    with pytest.raises(ValueError, match=r"out must end in \.pth or \.pt"):
        write_checkpoint(read_checkpoint(tmp_path / "PixArt.pth"), out)
    vae = read_checkpoint(tiny_models.save_tiny_models(tmp_path / "tiny") / "vae")
    with pytest.raises(ValueError, match="out must be a folder for this layout of VideoVAE"):
        write_checkpoint(vae, tmp_path / "vae.safetensors")
    assert not out.exists()


@pytest.mark.parametrize(
    ("part", "absent"), [("vae", "encoder.conv_in.weight"), ("text_encoder", "encoder.final_layer_norm.weight")]
)
def test_models_of_others_that_lack_weights_are_not_written(tmp_path, capsys, part, absent):
    autoencoder_kl().save_pretrained(tmp_path / "vae")
    build_tiny_text_encoder(["a"], model_max_length=4).save_pretrained(tmp_path / "text_encoder")
    (weights,) = (tmp_path / part).glob("*.safetensors")
    state = load_file(weights)
    del state[absent]
    save_file(state, weights)
    assert main(["convert", str(tmp_path / part), str(tmp_path / "out")]) == 2
    assert f"1 missing ({absent})" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_t5_encoder_with_its_embedding_under_the_other_name_is_whole(tmp_path):
    build_tiny_text_encoder(["a"], model_max_length=4).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["encoder.embed_tokens.weight"] = state.pop("shared.weight")
    save_file(state, tmp_path / "model.safetensors")
    assert_same(read_checkpoint(tmp_path).state, state)


def test_a_full_disk_leaves_the_previous_file_intact(tmp_path, monkeypatch):
    torch.save(pixart_state(), tmp_path / "PixArt.pth")
    before = (tmp_path / "PixArt.pth").read_bytes()
    checkpoint = read_checkpoint(tmp_path / "PixArt.pth")

    def full_disk(content: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_checkpoint(checkpoint, tmp_path / "PixArt.pth")
    assert (tmp_path / "PixArt.pth").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["PixArt.pth"]
