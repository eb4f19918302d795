"""Small causal video VAEs of diffusers with random weights, one for each family and way of keeping earlier frames."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Family:
    """A VAE class of diffusers, its arguments, and a clip (C, T, H, W) for it. tile, stride: of its spatial tiles,
    in pixels."""

    model: str
    arguments: dict[str, Any]
    clip: tuple[int, ...] = (3, 9, 32, 32)
    tile: int | None = 16
    stride: int = 12
    adjust: Callable[[nn.Module], None] = field(default=lambda vae: None)
    is_noisy: bool = False  # the decoder adds random numbers, others for each dtype

    def build(self) -> nn.Module:
        import diffusers

        torch.manual_seed(0)
        vae = getattr(diffusers, self.model)(**self.arguments).eval().requires_grad_(True)
        self.adjust(vae)
        with torch.no_grad():  # norms that start at one and biases at zero would hide a forgotten one
            for name, parameter in vae.named_parameters():
                if parameter.dim() == 1 or "norm" in name or "scale" in name:
                    parameter.add_(torch.randn(parameter.shape) * 0.1)
        return vae

    def frames(self, batch_size: int = 1) -> Tensor:
        return torch.rand(batch_size, *self.clip, generator=torch.Generator().manual_seed(1)) * 2 - 1


def _small_tiles(vae: Any) -> None:
    """Allegro decodes in tiles alone, of 24 x 320 x 320 unless told."""
    vae.enable_tiling()
    vae.kernel, vae.stride = (16, 32, 32), (8, 16, 16)


_WAN = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 2], "num_res_blocks": 1, "temperal_downsample": [True]}
_WAN |= {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
_COG = {"block_out_channels": (16, 16, 32, 32), "latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 8}
_HUNYUAN = {"latent_channels": 4, "block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4}
_HUNYUAN15 = {"latent_channels": 4, "block_out_channels": (8, 16, 16, 16, 16), "layers_per_block": 1}
_LTX = {
    "latent_channels": 8, "block_out_channels": (8, 16, 16, 16), "decoder_block_out_channels": (8, 16, 16, 16),
    "layers_per_block": (1, 1, 1, 1, 1), "decoder_layers_per_block": (1, 1, 1, 1, 1),
}  # fmt: skip
_MOCHI = {
    "encoder_block_out_channels": (32, 32, 32, 64), "decoder_block_out_channels": (32, 32, 32, 64),
    "latent_channels": 4, "layers_per_block": (1, 1, 1, 1, 1), "latents_mean": (0.0,) * 4, "latents_std": (1.0,) * 4,
}  # fmt: skip

FAMILIES: dict[str, Family] = {
    "wan": Family("AutoencoderKLWan", _WAN | {"scale_factor_spatial": 2, "scale_factor_temporal": 2}),
    "wan_2.2": Family(
        "AutoencoderKLWan",
        _WAN | {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12, "decoder_base_dim": 8}
        | {"dim_mult": [1, 2, 2], "temperal_downsample": [True, True]},
    ),
    "qwen_image": Family("AutoencoderKLQwenImage", _WAN, (3, 5, 32, 32)),
    "cogvideox": Family(
        "AutoencoderKLCogVideoX",
        _COG | {"down_block_types": ("CogVideoXDownBlock3D",) * 4, "up_block_types": ("CogVideoXUpBlock3D",) * 4},
        tile=24,
    ),
    "hunyuan_video": Family("AutoencoderKLHunyuanVideo", _HUNYUAN),
    "hunyuan_video_1.5": Family("AutoencoderKLHunyuanVideo15", _HUNYUAN15, (3, 5, 48, 48), tile=32),
    "hunyuan_image_refiner": Family("AutoencoderKLHunyuanImageRefiner", _HUNYUAN15, (3, 1, 32, 32), tile=None),
    "mochi": Family("AutoencoderKLMochi", _MOCHI, (3, 7, 32, 32)),
    "ltx": Family("AutoencoderKLLTXVideo", _LTX, (3, 9, 64, 64), tile=32, stride=32),
    "ltx_0.9.5": Family(
        "AutoencoderKLLTXVideo",
        _LTX | {"timestep_conditioning": True}
        | {"upsample_residual": (True,) * 3, "upsample_factor": (2,) * 3, "decoder_layers_per_block": (1,) * 4}
        | {"decoder_block_out_channels": (8, 16, 32), "decoder_spatio_temporal_scaling": (True,) * 3}
        | {"decoder_inject_noise": (True, True, False, False)},
        (3, 9, 64, 64), tile=None, is_noisy=True,
    ),
    "ltx_2": Family(
        "AutoencoderKLLTX2Video",
        {
            "latent_channels": 8, "block_out_channels": (8, 16, 16, 16), "decoder_block_out_channels": (8, 16, 32),
            "layers_per_block": (1, 1, 1, 1, 1), "decoder_layers_per_block": (1, 1, 1, 1),
        },
        (3, 9, 64, 64), tile=None,
    ),
    "cosmos": Family(
        "AutoencoderKLCosmos",
        {
            "latent_channels": 4, "encoder_block_out_channels": (8, 8, 16, 16),
            "decode_block_out_channels": (8, 8, 16, 16), "attention_resolutions": (8,), "resolution": 64,
            "num_layers": 1,
        },
        (3, 9, 32, 32), tile=None,
    ),
    "allegro": Family(
        "AutoencoderKLAllegro",
        {"block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 32},
        (3, 16, 48, 48), tile=None, adjust=_small_tiles,
    ),
    "magvit": Family(
        "AutoencoderKLMagvit",
        {
            "block_out_channels": [8, 8, 16, 16], "latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 4,
        },
    ),
    "magvit_clip_norm": Family(
        "AutoencoderKLMagvit",
        {
            "block_out_channels": [8, 8, 16, 16], "latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 4,
            "spatial_group_norm": False,
        },
    ),
    "minimax_h3": Family(
        "AutoencoderKLMiniMaxH3",
        {
            "latent_channels": 4, "block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4,
            "spatial_downsample_factors": (2, 2, 2, 2), "temporal_downsample_factors": (1, 2, 2, 1),
            "decoder_num_layers": 1, "decoder_num_attention_heads": 2, "decoder_attention_head_dim": 16,
            "latents_mean": (0.0,) * 4, "latents_std": (1.0,) * 4,
        },
        (3, 33, 32, 32), tile=None,
    ),
    "kvae": Family(
        "AutoencoderKLKVAEVideo", {"ch": 32, "ch_mult": (1, 1, 1), "num_res_blocks": 1, "z_channels": 4},
        (3, 17, 16, 16), tile=None,
    ),
    "kandinsky_6": Family(
        "Kandinsky6SRVAE",
        {
            "latent_channels": 4, "encoder_block_out_channels": (8, 8, 16), "decoder_block_out_channels": (8, 8, 16),
            "layers_per_block": 1,
        },
        (3, 17, 16, 16), tile=None,
    ),
    "vidtok": Family(
        "AutoencoderVidTok", {"ch": 8, "ch_mult": [1, 2, 2, 2], "num_res_blocks": 1}, (3, 17, 32, 32), tile=None
    ),
}  # fmt: skip


def encode(vae: Any, x: Tensor) -> Tensor:
    """The mean of the latents, whatever the class returns."""
    encoded = vae.encode(x)
    if hasattr(encoded, "latent_dist"):
        return encoded.latent_dist.mode()
    return encoded.latent if hasattr(encoded, "latent") else encoded[0]


def decode(vae: Any, z: Tensor) -> Tensor:
    """The frames, whatever the class returns."""
    options = {"temb": torch.tensor([0.05]).to(z)} if getattr(vae.config, "timestep_conditioning", 0) else {}
    torch.manual_seed(2)  # LTX 0.9.5 adds noise
    decoded = vae.decode(z, **options)
    return decoded if isinstance(decoded, Tensor) else decoded.sample
