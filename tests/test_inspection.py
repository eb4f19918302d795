"""`opensora inspect`: what is said of every layout, and one line for what is no checkpoint."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import torch

from opensora.checkpoints import save_model
from opensora.cli import main
from opensora.config_files import config_to_dict
from opensora.models import STDiT, STDiT3
from opensora.vae import CausalVideoVAE
from tests.released_layouts import (
    CAUSAL_VAE,
    STDIT,
    STDIT3,
    autoencoder_kl,
    latte_state,
    named_state,
    pixart_state,
    write_hub_folder,
    write_training_checkpoint,
)


def said(path: Path, capsys) -> list[str]:
    """What is printed, with paths from `path` on and without sizes and configurations."""
    assert main(["inspect", str(path)]) == 0
    lines = capsys.readouterr().out.replace(str(path), path.name).splitlines()
    return [re.sub(r", \d+\.\d .iB$|(from [\w.]+): .*$", r"\1", line) for line in lines]


def refused(path: Path, capsys) -> str:
    assert main(["inspect", str(path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    return captured.err


def test_the_file_of_open_sora_1_0_tells_its_own_configuration(tmp_path, capsys):
    model = STDiT(STDIT).to(torch.bfloat16)
    state = dict(model.state_dict())
    torch.save({"state_dict": state, "ema": state}, tmp_path / "OpenSora-v1-HQ-16x256x256.pth")
    assert said(tmp_path / "OpenSora-v1-HQ-16x256x256.pth", capsys) == [
        "OpenSora-v1-HQ-16x256x256.pth, under 'state_dict': STDiT of Open-Sora 1.0",
        "  file        OpenSora-v1-HQ-16x256x256.pth",
        f"  tensors     37 with {sum(tensor.numel() for tensor in state.values()):,} values: bfloat16 (37)",
        f"  parameters  {sum(parameter.numel() for parameter in model.parameters()):,}",
        "  config      from weights",
        "  keys        every key found its place",
    ]
    assert main(["inspect", str(tmp_path)]) == 0
    assert "input_size [16, 32, 32], in_channels 3, patch_size [1, 2, 2], hidden_size 144, " in capsys.readouterr().out


def test_a_hub_folder_of_open_sora_1_2_and_what_it_lacks(tmp_path, capsys):
    state = named_state(STDiT3(STDIT3))
    del state["temporal_blocks.0.attn.qkv.bias"]
    write_hub_folder(tmp_path / "STDiT-v3", "STDiT3", STDIT3, state | {"stray": torch.zeros(2)})
    first, *_, config, keys = said(tmp_path / "STDiT-v3", capsys)
    assert first == "STDiT-v3: STDiT3 of Open-Sora 1.2"
    assert config == "  config      from config.json"
    assert keys == "  keys        1 missing (temporal_blocks.0.attn.qkv.bias); 1 unexpected (stray)"


def test_a_training_checkpoint_has_a_model_and_its_average(tmp_path, capsys):
    state = named_state(STDiT3(STDIT3))
    write_training_checkpoint(tmp_path / "epoch1-global_step2", state, state)
    lines = said(tmp_path / "epoch1-global_step2", capsys)
    assert [line for line in lines if line and not line.startswith(" ")] == [
        "epoch1-global_step2/ema.pt: STDiT3 of Open-Sora 1.2",
        "epoch1-global_step2/model: STDiT3 of Open-Sora 1.2",
    ]
    assert lines.count("  keys        every key found its place") == 2
    assert "  file        pytorch_model-00002.bin" in lines


def test_a_repository_of_open_sora_plan_lists_its_parts(tmp_path, capsys):
    root, released = tmp_path / "Open-Sora-Plan-v1.1.0", {"_class_name": "LatteT2V"}
    save_model(root / "65x512x512", latte_state(), released | {"use_rope": False}, stem="diffusion_pytorch_model")
    torch.save(latte_state(), tmp_path / "latte.pt")
    assert said(tmp_path / "latte.pt", capsys)[0] == "latte.pt: LatteT2V of Open-Sora-Plan 1.0 or 1.1"
    save_model(tmp_path / "Plan-v1.0.0", latte_state(), released)
    assert said(tmp_path / "Plan-v1.0.0", capsys)[0] == "Plan-v1.0.0: LatteT2V of Open-Sora-Plan 1.0"
    (root / "vae").mkdir()
    content = config_to_dict(CAUSAL_VAE) | {"_class_name": "CausalVAEModel"}
    del content["config_type"]
    (root / "vae" / "config.json").write_text(json.dumps(content))
    state = CausalVideoVAE(CAUSAL_VAE).state_dict() | {"loss.logvar": torch.zeros(())}
    torch.save(
        {"ema_state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, root / "vae" / "x.ckpt"
    )
    lines = said(root, capsys)
    assert lines[0] == "Open-Sora-Plan-v1.1.0/65x512x512: LatteT2V of Open-Sora-Plan 1.1"
    assert lines[1] == "  file        diffusion_pytorch_model.safetensors, 368 bytes"
    vae = lines[lines.index("") + 1 :]
    assert vae[0] == "Open-Sora-Plan-v1.1.0/vae, under 'ema_state_dict': CausalVideoVAE of Open-Sora-Plan"
    assert vae[-1] == "  keys        every key found its place"


def test_image_models_and_the_embedded_model_are_compared_too(tmp_path, capsys):
    autoencoder_kl().save_pretrained(tmp_path / "models" / "vae")
    torch.save({"state_dict": pixart_state()}, tmp_path / "models" / "PixArt-XL-2-256x256.pth")
    lines = said(tmp_path / "models", capsys)
    assert lines[0].endswith("PixArt of PixArt-alpha or PixArt-Sigma, for images")
    assert "  keys        not compared: there is no PixArt here to compare with" in lines
    assert "models/vae: AutoencoderKL of Stable Diffusion or SDXL, for images" in lines
    assert lines[-1] == "  keys        every key found its place"
    assert main(["inspect"]) == 0
    output = capsys.readouterr().out
    assert [line.rpartition(": ")[2] for line in output.splitlines() if line and line[0] != " "] == [
        "T5 of Google, for text",
        "STDiT3 of Open-Sora 1.2",
        "VideoVAE of Open-Sora 1.2",
    ]
    assert output.count("every key found its place") == 3


def test_unknown_keys_and_untold_configurations_are_said(tmp_path, capsys):
    torch.save({"layer.weight": torch.zeros(2)}, tmp_path / "a.pt")
    torch.save(named_state(STDiT(STDIT)), tmp_path / "b.pth")
    lines = said(tmp_path, capsys)
    assert lines[0].endswith("a.pt: not recognised")
    assert lines[-1] == (
        "  keys        not compared: STDiT: needs its config.json: the weights do not tell input_size, space_scale, "
        "time_scale"
    )


def test_a_damaged_part_does_not_hide_the_others(tmp_path, capsys):
    torch.save(pixart_state(), tmp_path / "PixArt.pth")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10")
    lines = said(tmp_path, capsys)
    assert lines[0].endswith("PixArt.pth: PixArt of PixArt-alpha or PixArt-Sigma, for images")
    assert lines[-2].endswith("cut.safetensors: not recognised")
    assert "  error       " in lines[-1]


def test_a_configuration_that_cannot_be_built_and_a_broken_index_do_not_hide_the_other_parts(tmp_path, capsys):
    root = tmp_path / "models"
    write_hub_folder(root / "a", "STDiT3", replace(STDIT3, num_heads=5), named_state(STDiT3(STDIT3)))
    autoencoder_kl().save_pretrained(root / "b")
    (root / "b" / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL", "block_out_channels": []}))
    for name, index in (("c", "{"), ("d", "[]"), ("e", '{"weight_map": {"layer.weight": 3}}')):
        (root / name).mkdir()
        (root / name / "model.safetensors.index.json").write_text(index)
    write_hub_folder(root / "f", "STDiT3", STDIT3, named_state(STDiT3(STDIT3)))
    parts = "\n".join(said(root, capsys)).split("\n\n")
    assert len(parts) == 6
    assert "keys        not compared: models/a/config.json: STDiT3: cannot be built from its config" in parts[0]
    assert "num_heads" in parts[0].splitlines()[-1]
    assert "keys        not compared: models/b/config.json: AutoencoderKL: cannot be built" in parts[1]
    assert "error       models/c/model.safetensors.index.json: Expecting property name" in parts[2]
    for part, name in zip(parts[3:5], "de", strict=True):
        assert f"error       models/{name}/model.safetensors.index.json: must hold an object whose weight_map" in part
    assert parts[5].endswith("keys        every key found its place")
    assert "c/model.safetensors.index.json: Expecting property name" in refused(root / "c", capsys)


def test_what_is_no_checkpoint_is_one_line_and_status_2(tmp_path, capsys):
    assert "absent: is no file or folder" in refused(tmp_path / "absent", capsys)
    assert "is no checkpoint: no weights in it" in refused(tmp_path, capsys)
    (tmp_path / "notes.txt").write_text("weights of a model")
    assert "notes.txt: is no file of weights" in refused(tmp_path / "notes.txt", capsys)
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    assert "empty.pth: is no checkpoint: no tensors in it" in refused(tmp_path / "empty.pth", capsys)
    (tmp_path / "cut.safetensors").write_bytes(b"\x10")
    assert "cut.safetensors: is no safetensors file, or it is cut short" in refused(
        tmp_path / "cut.safetensors", capsys
    )
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text("{")
    torch.save({"layer.weight": torch.zeros(2)}, tmp_path / "vae" / "model.pt")
    assert "config.json: Expecting property name" in refused(tmp_path / "vae", capsys)
