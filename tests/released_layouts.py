"""Small models in the layouts of their releases, for tests of reading, inspection and conversion."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from opensora.config import STDiT2Config, STDiT3Config, STDiTConfig
from opensora.presets import open_sora_plan_v1_1

_SIZE = {
    "in_channels": 3,
    "hidden_size": 144,
    "depth": 1,
    "num_heads": 2,
    "mlp_ratio": 0.5,
    "caption_channels": 8,
    "model_max_length": 4,
}
STDIT = STDiTConfig(input_size=(16, 32, 32), space_scale=0.5, **_SIZE)
STDIT2 = STDiT2Config(input_sq_size=512, qk_norm=True, qk_norm_legacy=True, **_SIZE)
STDIT3 = STDiT3Config(**_SIZE)
CAUSAL_VAE = replace(
    open_sora_plan_v1_1.vae(), hidden_size=32, hidden_size_mult=(1, 1, 1, 1), num_res_blocks=1, embed_dim=3
)
VAE_2D = {
    "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"],
    "block_out_channels": [8],
    "layers_per_block": 1,
    "norm_num_groups": 2,
}
# Fields of ours that Open-Sora 1.1's code did not write.
_LATER_FIELDS = {"STDiT2": {"qk_norm_legacy", "exact_rope_dtype"}}


def named_state(model: nn.Module, *, seed: int = 0) -> dict[str, Tensor]:
    """The model's state dict without position tables, all values drawn: no zero hides a tensor that is lost."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(tensor.shape, generator=generator)
        for name, tensor in model.state_dict().items()
        if not name.startswith("pos_embed")
    }


def pixart_state(*, seed: int = 0) -> dict[str, Tensor]:
    """PixArt of STDIT's width, as its files have it: one block, a 2-D patch embedding, a table of 4 x 4 sites."""
    generator = torch.Generator().manual_seed(seed)
    dim, channels, text = STDIT.hidden_size, STDIT.in_channels, STDIT.caption_channels

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.1

    def linear(name: str, rows: int, columns: int) -> dict[str, Tensor]:
        return {f"{name}.weight": draw(rows, columns), f"{name}.bias": draw(rows)}

    return {
        "pos_embed": draw(1, 16, dim),
        "x_embedder.proj.weight": draw(dim, channels, 2, 2),
        "x_embedder.proj.bias": draw(dim),
        "y_embedder.y_embedding": draw(4, text),
        **linear("y_embedder.y_proj.fc1", dim, text),
        **linear("y_embedder.y_proj.fc2", dim, dim),
        **linear("t_embedder.mlp.0", dim, 256),
        **linear("t_embedder.mlp.2", dim, dim),
        **linear("t_block.1", 6 * dim, dim),
        "blocks.0.scale_shift_table": draw(6, dim),
        **linear("blocks.0.attn.qkv", 3 * dim, dim),
        **linear("blocks.0.attn.proj", dim, dim),
        **linear("blocks.0.cross_attn.q_linear", dim, dim),
        **linear("blocks.0.cross_attn.kv_linear", 2 * dim, dim),
        **linear("blocks.0.cross_attn.proj", dim, dim),
        **linear("blocks.0.mlp.fc1", dim // 2, dim),
        **linear("blocks.0.mlp.fc2", dim, dim // 2),
        "final_layer.scale_shift_table": draw(2, dim),
        **linear("final_layer.linear", 4 * 2 * channels, dim),
    }


def latte_state() -> dict[str, Tensor]:
    """A few of the keys of Open-Sora-Plan's transformer."""
    names = ("transformer_blocks.0.attn1.to_q", "temporal_transformer_blocks.0.attn1.to_q", "adaln_single.linear")
    return {f"{name}.weight": torch.zeros(2, 2) for name in names}


def autoencoder_kl(*, seed: int = 0) -> nn.Module:
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    return AutoencoderKL(**VAE_2D)


def write_hub_folder(folder: Path, name: str, config: object, state: dict[str, Tensor]) -> None:
    """As Open-Sora 1.1 and 1.2 are on the hub: config.json by transformers, model.safetensors."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    later = _LATER_FIELDS.get(name, set())
    fields = {field: value for field, value in asdict(config).items() if field not in later}
    content = {"architectures": [name], "model_type": name, "auto_map": {}, "torch_dtype": "float32", **fields}
    (folder / "config.json").write_text(json.dumps(content))
    save_file(state, folder / "model.safetensors")


def write_training_checkpoint(folder: Path, state: dict[str, Tensor], averaged: dict[str, Tensor]) -> None:
    """As Open-Sora's trainer: model/ in two shards with an index, ema.pt, and an optimizer that is no model."""
    (folder / "model").mkdir(parents=True)
    (folder / "optimizer").mkdir()
    names = list(state)
    shards = {"pytorch_model-00001.bin": names[::2], "pytorch_model-00002.bin": names[1::2]}
    for file, part in shards.items():
        torch.save({name: state[name] for name in part}, folder / "model" / file)
    weight_map = {name: file for file, part in shards.items() for name in part}
    (folder / "model" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    torch.save(averaged, folder / "ema.pt")
    torch.save({"state": {}}, folder / "optimizer" / "pytorch_optim-00001.bin")
    (folder / "running_states.json").write_text("{}")
