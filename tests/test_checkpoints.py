"""Checkpoints: what is written comes back, in every layout, and a wrong one says what is wrong with it."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

import opensora.checkpoints as checkpoints
from opensora.checkpoints import CheckpointError, load_config, load_model, load_weights, save_config, save_model
from opensora.config import STDiT3Config, TrainConfig, VideoVAEConfig
from opensora.config_files import ConfigError, config_from_dict, config_to_dict


@dataclass(frozen=True)
class ToyConfig:
    width: int = 8
    length: int = 4


class Embedder(nn.Module):
    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.register_buffer("y_embedding", torch.randn(config.length, config.width))


class PatchEmbedder(nn.Module):
    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.proj = nn.Conv3d(3, config.width, (1, 2, 2), (1, 2, 2))


class Toy(nn.Module):
    """The parts of STDiT3 that loading treats specially: stored, computed and extended tensors, upstream's names."""

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.config = config
        self.x_embedder = PatchEmbedder(config)
        self.y_embedder = Embedder(config)
        self.spatial_blocks = nn.ModuleList(nn.Linear(config.width, config.width) for _ in range(2))
        self.temporal_blocks = nn.ModuleList(nn.Linear(config.width, config.width) for _ in range(2))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.register_buffer("inverse_frequencies", torch.arange(4.0), persistent=False)


@pytest.fixture
def toy() -> Toy:
    torch.manual_seed(0)
    return Toy(ToyConfig())


def load_toy(source: Path, **options) -> Toy:
    return load_model(source, Toy, ToyConfig, **options)


def assert_same_weights(actual: nn.Module, expected: nn.Module) -> None:
    assert list(actual.state_dict()) == list(expected.state_dict())
    for name, tensor in expected.state_dict().items():
        assert torch.equal(actual.state_dict()[name], tensor), name


@pytest.mark.parametrize("max_shard_bytes", [5 << 30, 300])
def test_what_is_saved_comes_back_bit_for_bit(toy, tmp_path, max_shard_bytes):
    save_model(tmp_path, toy, toy.config, max_shard_bytes=max_shard_bytes)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (max_shard_bytes == 300)
    loaded = load_toy(tmp_path)
    assert_same_weights(loaded, toy)
    assert not loaded.training
    assert loaded.config == toy.config
    assert loaded.spatial_blocks[0].weight.requires_grad
    assert not loaded.frozen.requires_grad
    assert torch.equal(loaded.inverse_frequencies, toy.inverse_frequencies)


def test_our_files_are_read_by_the_safetensors_package(toy, tmp_path):
    from safetensors.torch import load_file

    save_model(tmp_path, toy, toy.config)
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        assert torch.equal(tensor, toy.state_dict()[name])


def test_weights_may_be_read_by_whoever_may_read_the_configuration(toy, tmp_path):
    save_model(tmp_path, toy, toy.config)
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "config.json").stat().st_mode


def test_dtype_converts_floats_of_file_or_model(toy, tmp_path):
    save_model(tmp_path, toy, toy.config, dtype=torch.bfloat16)
    stored = load_toy(tmp_path)
    assert {p.dtype for p in stored.parameters()} == {torch.bfloat16}
    assert stored.inverse_frequencies.dtype == torch.bfloat16
    widened = load_toy(tmp_path, dtype=torch.float32)
    assert torch.equal(widened.frozen, toy.frozen)
    assert widened.spatial_blocks[1].weight.dtype == torch.float32


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "diffusion_pytorch_model.safetensors"])
def test_other_file_names_and_pickles_load(toy, tmp_path, name):
    from safetensors.torch import save_file

    save_config(tmp_path, toy.config)
    if name.endswith(".safetensors"):
        save_file(toy.state_dict(), tmp_path / name)
    else:
        torch.save({"state_dict": toy.state_dict()}, tmp_path / name)
    assert_same_weights(load_toy(tmp_path), toy)
    assert_same_weights(load_toy(tmp_path / name), toy)


def test_a_pickle_that_would_run_code_is_refused(toy, tmp_path):
    save_config(tmp_path, toy.config)
    torch.save({"model": toy}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="cannot be read as tensors only"):
        load_toy(tmp_path)


def test_a_wrong_checkpoint_lists_missing_unexpected_and_mis_shaped_keys(toy, tmp_path):
    state = toy.state_dict()
    del state["spatial_blocks.1.bias"]
    state["stray.weight"] = torch.zeros(2)
    state["frozen"] = torch.zeros(4)
    save_model(tmp_path, state, toy.config)
    with pytest.raises(CheckpointError) as failure:
        load_toy(tmp_path)
    message = str(failure.value)
    assert "1 missing (spatial_blocks.1.bias)" in message
    assert "1 unexpected (stray.weight)" in message
    assert "1 mis-shaped (frozen [4] for [3])" in message


def test_a_cut_short_file_and_a_lost_shard_are_named(toy, tmp_path):
    save_model(tmp_path / "whole", toy, toy.config)
    path = tmp_path / "whole" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is cut short"):
        load_toy(tmp_path / "whole")
    save_model(tmp_path / "parts", toy, toy.config, max_shard_bytes=300)
    sorted((tmp_path / "parts").glob("*.safetensors"))[1].unlink()
    with pytest.raises(CheckpointError, match="which the folder lacks"):
        load_toy(tmp_path / "parts")


def test_sources_that_are_nothing_say_so(tmp_path):
    with pytest.raises(CheckpointError, match="neither an existing folder"):
        load_toy(tmp_path / "absent" / "folder")
    with pytest.raises(CheckpointError, match="holds no weights"):
        load_model(tmp_path, Toy, ToyConfig, config=ToyConfig())
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        load_toy(tmp_path)


def test_position_tables_are_dropped_and_null_captions_change_length(toy, tmp_path):
    state = toy.state_dict()
    state["pos_embed"] = torch.zeros(7)
    save_model(tmp_path, state, toy.config)
    longer = load_toy(tmp_path, config=ToyConfig(length=6)).y_embedder.y_embedding
    table = toy.y_embedder.y_embedding
    assert torch.equal(longer, torch.cat([table, table[-1:], table[-1:]]))
    shorter = load_toy(tmp_path, config=ToyConfig(length=3)).y_embedder.y_embedding
    assert torch.equal(shorter, table[:3])


def test_a_pixart_checkpoint_fills_the_spatial_half(toy, tmp_path):
    state = {n.replace("spatial_blocks", "blocks"): t for n, t in toy.state_dict().items() if "temporal" not in n}
    state["x_embedder.proj.weight"] = state["x_embedder.proj.weight"].squeeze(2)
    torch.save({"state_dict": state}, tmp_path / "pixart.pth")
    other = Toy(ToyConfig())
    temporal = other.temporal_blocks[0].weight.clone()
    with pytest.raises(CheckpointError, match="4 missing"):
        load_weights(other, tmp_path / "pixart.pth")
    report = load_weights(other, tmp_path / "pixart.pth", strict=False)
    assert len(report.missing) == 4
    assert torch.equal(other.spatial_blocks[1].weight, toy.spatial_blocks[1].weight)
    assert torch.equal(other.x_embedder.proj.weight, toy.x_embedder.proj.weight)
    assert torch.equal(other.temporal_blocks[0].weight, temporal)


def test_a_checkpoint_of_which_nothing_fits_is_refused_even_where_parts_are_welcome(toy, tmp_path):
    torch.save({"decoder.weight": torch.ones(2)}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=r"does not fit Toy: \d+ missing .*1 unexpected \(decoder.weight\)"):
        load_weights(toy, tmp_path / "other.pt", strict=False)


def test_a_full_disk_leaves_the_previous_checkpoint_intact(toy, tmp_path, monkeypatch):
    save_model(tmp_path, toy, toy.config)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full_disk(folder: Path, config: ToyConfig) -> None:
        (folder / "config.json").write_text("{")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_config", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_model(tmp_path, Toy(ToyConfig()), toy.config)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_saving_whole_over_shards_leaves_no_stale_weights(toy, tmp_path):
    save_model(tmp_path, toy, toy.config, max_shard_bytes=300)
    save_model(tmp_path, toy, toy.config)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert_same_weights(load_toy(tmp_path), toy)


def test_released_configurations_are_understood():
    vae = {
        "architectures": ["VideoAutoencoderPipeline"],
        "cal_loss": False,
        "freeze_vae_2d": False,
        "from_pretrained": None,
        "micro_frame_size": 17,
        "model_type": "VideoAutoencoderPipeline",
        "scale": [3.85, 2.32, 2.33, 3.06],
        "shift": [-0.10, 0.34, 0.27, 0.98],
        "torch_dtype": "float32",
        "transformers_version": "4.36.2",
        "vae_2d": {
            "from_pretrained": "PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers",
            "micro_batch_size": 4,
            "subfolder": "vae",
            "type": "VideoAutoencoderKL",
        },
        "vae_temporal": {"from_pretrained": None, "type": "VAE_Temporal_SD"},
    }
    assert config_from_dict(VideoVAEConfig, vae) == VideoVAEConfig()
    transformer = {
        "architectures": ["STDiT3"],
        "enable_flash_attn": True,
        "enable_layernorm_kernel": True,
        "enable_sequence_parallelism": False,
        "freeze_y_embedder": True,
        "input_size": [None, None, None],
        "model_type": "STDiT3",
        "patch_size": [1, 2, 2],
        "torch_dtype": "bfloat16",
    }
    assert config_from_dict(STDiT3Config, transformer) == STDiT3Config(freeze_y_embedder=True)


def test_configurations_survive_json_and_unknown_fields_are_named(tmp_path):
    from opensora.config import DataConfig

    config = TrainConfig(data=DataConfig(buckets={"240p": {1: (1.0, 4), 51: ((0.5, 0.3), 1)}}))
    assert config_from_dict(TrainConfig, json.loads(json.dumps(config_to_dict(config)))) == config
    with pytest.raises(ConfigError, match="unknown field hiden_size"):
        config_from_dict(STDiT3Config, {"hiden_size": 3})
    (tmp_path / "config.json").write_text('{"depth": "many"}')
    with pytest.raises(CheckpointError, match=r"STDiT3Config\.depth: must be int, got 'many'"):
        load_config(tmp_path, STDiT3Config)


_PEAK = """
import resource, sys
from dataclasses import dataclass
import torch
from torch import nn
from opensora.checkpoints import load_model

@dataclass(frozen=True)
class Config:
    depth: int = 24

class Model(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(1024, 1024, bias=False) for _ in range(config.depth))

torch.ones(8, 8) @ torch.ones(8, 8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
load_model(sys.argv[1], Model, Config)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB only on Linux")
def test_loading_shards_peaks_below_one_point_two_times_the_weights(tmp_path):
    @dataclass(frozen=True)
    class Config:
        depth: int = 24

    state = {f"layers.{i}.weight": torch.full((1024, 1024), float(i)) for i in range(24)}
    save_model(tmp_path, state, Config(), max_shard_bytes=50 << 20)
    root = str(Path(__file__).parents[1])
    answer = subprocess.run(
        [sys.executable, "-c", _PEAK, str(tmp_path)], capture_output=True, text=True, check=True, cwd=root
    )
    assert float(answer.stdout) < 1.2 * 24 * 4 * 1024**2
