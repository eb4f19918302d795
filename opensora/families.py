"""What a checkpoint is: the model families that are told apart by their keys, and configurations read off shapes.

To add a family, add its line to FAMILIES; where ours to build, its classes to `opensora.family_models`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Shapes = Mapping[str, tuple[int, ...]]
Layout = Literal["pth", "transformers", "diffusers"]

RELEASED_HEAD_SIZE = 72
# (latent frames, latent rows) of Open-Sora 1.0's releases -> space_scale, time_scale.
_SCALES = {(16, 32): (0.5, 1.0), (16, 64): (1.0, 1.0), (64, 64): (1.0, 2 / 3)}


@dataclass(frozen=True)
class Family:
    """A model class with its release.

    keys: which all must be in a state dict; absent: which must not be. config_names: what a config.json calls it.
    layout: how it was released: one `.pth`, or config.json with model.safetensors (transformers) or with
    diffusion_pytorch_model.safetensors (diffusers).
    """

    name: str
    release: str
    layout: Layout
    keys: tuple[str, ...]
    absent: tuple[str, ...] = ()
    config_names: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.name} of {self.release}"


FAMILIES = (
    Family(
        "STDiT3",
        "Open-Sora 1.2",
        "transformers",
        ("spatial_blocks.0.cross_attn.q_linear.weight", "temporal_blocks.0.cross_attn.q_linear.weight"),
        config_names=("STDiT3", "STDiT3Config"),
    ),
    Family(
        "STDiT2",
        "Open-Sora 1.1",
        "transformers",
        ("blocks.0.attn_temp.qkv.weight", "blocks.0.scale_shift_table_temporal"),
        config_names=("STDiT2", "STDiT2Config"),
    ),
    Family(
        "STDiT",
        "Open-Sora 1.0",
        "pth",
        ("blocks.0.attn_temp.qkv.weight", "blocks.0.cross_attn.q_linear.weight"),
        ("blocks.0.scale_shift_table_temporal",),
        config_names=("STDiT", "STDiTConfig"),
    ),
    Family(
        "PixArt",
        "PixArt-alpha or PixArt-Sigma, for images",
        "pth",
        ("blocks.0.cross_attn.q_linear.weight", "x_embedder.proj.weight", "t_block.1.weight"),
        ("blocks.0.attn_temp.qkv.weight",),
    ),
    Family(
        "LatteT2V",
        "Open-Sora-Plan 1.0 or 1.1",
        "diffusers",
        ("temporal_transformer_blocks.0.attn1.to_q.weight", "adaln_single.linear.weight"),
        config_names=("LatteT2V", "LatteT2VConfig"),
    ),
    Family(
        "PixArtTransformer2DModel",
        "diffusers, for images",
        "diffusers",
        ("transformer_blocks.0.attn1.to_q.weight", "adaln_single.linear.weight"),
        ("temporal_transformer_blocks.0.attn1.to_q.weight",),
        config_names=("PixArtTransformer2DModel",),
    ),
    Family(
        "VideoVAE",
        "Open-Sora 1.2",
        "transformers",
        ("spatial_vae.module.encoder.conv_in.weight", "temporal_vae.encoder.conv_in.conv.weight"),
        config_names=("VideoAutoencoderPipeline", "VideoVAEConfig"),
    ),
    Family(
        "CausalVideoVAE",
        "Open-Sora-Plan",
        "diffusers",
        ("encoder.mid.attn_1.q.conv.weight", "decoder.mid.block_1.norm1.weight"),
        config_names=("CausalVAEModel", "CausalVideoVAEModel", "CausalVideoVAE", "CausalVideoVAEConfig"),
    ),
    Family(
        "AutoencoderKL",
        "Stable Diffusion or SDXL, for images",
        "diffusers",
        ("encoder.down_blocks.0.resnets.0.conv1.weight", "decoder.up_blocks.0.resnets.0.conv1.weight"),
        config_names=("AutoencoderKL",),
    ),
    Family(
        "AutoencoderKL-LDM",
        "Stable Diffusion, for images, under the names it was trained with",
        "pth",
        ("encoder.mid.attn_1.q.weight", "decoder.mid.block_1.norm1.weight"),
    ),
    Family(
        "T5",
        "Google, for text",
        "transformers",
        ("shared.weight", "encoder.block.0.layer.0.SelfAttention.q.weight"),
        config_names=("T5EncoderModel", "T5ForConditionalGeneration", "t5"),
    ),
)


def names() -> list[str]:
    return [family.name for family in FAMILIES]


def find(name: str) -> Family:
    """The family of that name in any case. Errors: ValueError listing the names."""
    for family in FAMILIES:
        if family.name.lower() == name.lower():
            return family
    raise ValueError(f"family: must be one of {', '.join(names())}, got {name!r}")


def recognise(shapes: Shapes, config: Mapping[str, Any] | None = None) -> Family | None:
    """The family whose keys these are; else the one that the content of a config.json names; else None.

    Keys come first: a configuration can be copied beside other weights.
    """
    for family in FAMILIES:
        is_whole = all(key in shapes for key in family.keys) and not any(key in shapes for key in family.absent)
        # Video VAEs of diffusers have the names of the image VAE, with kernels of three sizes.
        if is_whole and not (family.name == "AutoencoderKL" and len(shapes[family.keys[0]]) != 4):
            return family
    return named_in(config or {})


def named_in(config: Mapping[str, Any]) -> Family | None:
    """The family that the content of a config.json names, if any."""
    named = [config.get("config_type"), config.get("_class_name"), *(config.get("architectures") or ())]
    named.append(config.get("model_type"))
    for family in FAMILIES:
        if any(name in family.config_names for name in named):
            return family
    return None


def config_from_shapes(family: str, shapes: Shapes) -> dict[str, Any] | None:
    """Fields of a transformer's configuration, as far as shapes and the release say; None for other families.

    Of STDiT, STDiT2, STDiT3 and PixArt. Heads have the size of their norms or rotations, else 72 as in all releases; a
    width of no whole heads has no `num_heads` here. What shapes do not show is as released: input_sq_size, rotation
    before the norm in STDiT2, and STDiT's scales, which are absent for a clip that was not released.
    """
    if family not in ("STDiT", "STDiT2", "STDiT3", "PixArt"):
        return None
    prefix = "spatial_blocks" if family == "STDiT3" else "blocks"
    hidden, channels, *patch = shapes["x_embedder.proj.weight"]
    patch = [1] * (3 - len(patch)) + list(patch)
    num_patch = patch[0] * patch[1] * patch[2]
    found: dict[str, Any] = {
        "in_channels": channels,
        "patch_size": patch,
        "hidden_size": hidden,
        "depth": len({name.split(".")[1] for name in shapes if re.match(rf"{prefix}\.\d+\.", name)}),
        "mlp_ratio": shapes[f"{prefix}.0.mlp.fc1.weight"][0] / hidden,
        "pred_sigma": shapes["final_layer.linear.weight"][0] == 2 * channels * num_patch,
        "caption_channels": shapes["y_embedder.y_proj.fc1.weight"][1],
    }
    if "y_embedder.y_embedding" in shapes:
        found["model_max_length"] = shapes["y_embedder.y_embedding"][0]
    head_size = _head_size(shapes, prefix)
    if hidden % head_size == 0:
        found["num_heads"] = hidden // head_size
    if family in ("STDiT2", "STDiT3"):
        found |= {"input_sq_size": 512, "qk_norm": f"{prefix}.0.attn.q_norm.weight" in shapes}
    if family == "STDiT2":
        found["qk_norm_legacy"] = found["qk_norm"]
    if family == "STDiT":
        found |= _clip(shapes, patch)
    return found


def _head_size(shapes: Shapes, prefix: str) -> int:
    if f"{prefix}.0.attn.q_norm.weight" in shapes:
        return shapes[f"{prefix}.0.attn.q_norm.weight"][0]
    return 2 * shapes["rope.freqs"][0] if "rope.freqs" in shapes else RELEASED_HEAD_SIZE


def _clip(shapes: Shapes, patch: list[int]) -> dict[str, Any]:
    """Clip size and scales of STDiT from its position tables, for square clips that were released."""
    if "pos_embed" not in shapes or "pos_embed_temporal" not in shapes:
        return {}
    frames, side = shapes["pos_embed_temporal"][1] * patch[0], round(shapes["pos_embed"][1] ** 0.5) * patch[1]
    if (frames, side) not in _SCALES:
        return {}
    space_scale, time_scale = _SCALES[frames, side]
    return {"input_size": [frames, side, side], "space_scale": space_scale, "time_scale": time_scale}
