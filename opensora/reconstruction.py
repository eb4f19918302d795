"""A clip through a VAE and back, with whatever VAE a folder holds.

Axes: B batch, C channels, T frames, H height, W width.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from opensora.checkpoints import load_model, resolve
from opensora.config import CausalVideoVAEConfig, VideoVAEConfig
from opensora.config_files import ConfigError
from opensora.vae import CausalVideoVAE, FrameVAE, VAETiling, VideoVAE
from opensora.video import to_uint8
from opensora_kernels import apply_opensora_kernels
from opensora_kernels.vae import (
    Streaming,
    Tiled,
    TilePlan,
    Tiling,
    Whole,
    decode,
    decoder_of,
    encode,
    encoder_of,
    gather,
    plan_tiles,
)

Strategy = Literal["whole", "tiled", "streaming"]
LTX_DECODE_TIMESTEP = 0.05
"""How noisy LTX 0.9.5 takes latents to be, as in diffusers' examples."""
TILE = 256
"""Pixels, of which the next tile covers a quarter too, as in Open-Sora-Plan: for VAEs without tiles of their own."""


class OwnTiles(Whole):
    """The model at once, which cuts the clip into tiles itself."""

    is_exact = False

    def __str__(self) -> str:
        return "tiled: the VAE's own tiles, of a clip that is larger than one"


@dataclass(frozen=True)
class AnyVAE:
    """What reconstruction needs of a VAE. encode(x) and decoder(num_frames)(z) keep nothing between calls.

    space_factor, time_factor: pixels and frames of one latent. has_odd_clips: it takes 1 + n * time_factor frames only.
    tile: switches the VAE's own tiling on; None if it has none, and `tiling` cuts its clips. tiles: (frames, height,
    width) of a tile, and from one to the next, of which a clip must consist; None for any clip.
    """

    module: nn.Module
    encode: Callable[[Tensor], Tensor]
    decoder: Callable[[int], Callable[[Tensor], Tensor]]
    space_factor: int
    time_factor: int
    has_odd_clips: bool
    tile: Callable[[], Any] | None
    tiles: tuple[tuple[int, int, int], tuple[int, int, int]] | None = None

    def valid_length(self, num_frames: int) -> int:
        """The longest clip of at most `num_frames` frames that it takes, or the shortest of all."""
        if self.tiles is not None:
            return _in_tiles(num_frames, self.tiles[0][0], self.tiles[1][0])
        return num_frames - (num_frames - 1) % self.time_factor if self.has_odd_clips else num_frames

    @property
    def tiling(self) -> VAETiling:
        """Tiles of all frames, for a VAE that has none."""
        latents = max(1, TILE // self.space_factor)
        return VAETiling(latents * self.space_factor, latents, sample_frames=None, latent_frames=None)

    def size_below(self, height: int, width: int) -> tuple[int, int]:
        """The largest size of whole latents or tiles, at least one."""
        if self.tiles is not None:
            return tuple(map(_in_tiles, (height, width), self.tiles[0][1:], self.tiles[1][1:]))
        factor = self.space_factor
        return max(factor, height // factor * factor), max(factor, width // factor * factor)


def _in_tiles(size: int, tile: int, stride: int) -> int:
    return max(tile, size - (size - tile) % stride)


def load_any_vae(source: str | Path, *, dtype: torch.dtype, device: torch.device) -> AnyVAE:
    """The VAE in a folder, or with a hub id: Open-Sora 1.2's, the image VAE of 1.0 and 1.1, Open-Sora-Plan's, or any
    causal video VAE of diffusers, which gets this project's operators. Errors: ConfigError for a config.json of another
    kind; see `load_model`."""
    location = resolve(source)
    file = location / "config.json"
    if not file.is_file():
        raise ConfigError(f"vae: {source} must be a folder with a config.json")
    content = json.loads(file.read_text())
    kind = content.get("config_type") or content.get("_class_name") or content.get("model_type") or ""
    if kind == "VideoVAEConfig" or "vae_2d" in content:
        return _open_sora(load_model(location, VideoVAE, VideoVAEConfig, dtype=dtype, device=device))
    if kind in ("CausalVideoVAEConfig", "CausalVAEModel"):
        return _open_sora_plan(load_model(location, CausalVideoVAE, CausalVideoVAEConfig, dtype=dtype, device=device))
    if kind == "AutoencoderKL":
        return _of_frames(FrameVAE.from_pretrained(location, dtype=dtype, device=device))
    if kind.startswith("Autoencoder") or "VAE" in kind:
        return _of_diffusers(kind, location, dtype, device)
    raise ConfigError(
        f"vae: config.json of {source} must be of VideoVAEConfig, CausalVideoVAEConfig, CausalVAEModel or a VAE of "
        f"diffusers, got {kind or 'none of them'}"
    )


def encode_clip(vae: AnyVAE, x: Tensor, strategy: Strategy | None, budget: str | None) -> tuple[Tensor, TilePlan]:
    """Latents of x (1, 3, T, H, W), and how they were made."""
    tiling = vae.tiling.of_pixels()
    plan = choose(vae, vae.encode, x, strategy, budget, chunk_frames=vae.time_factor, tiling=tiling)
    return gather(encode(vae.encode, x, plan=plan)), plan


def decode_clip(
    vae: AnyVAE, z: Tensor, num_frames: int, strategy: Strategy | None, budget: str | None
) -> tuple[Iterator[Tensor], TilePlan]:
    """Frames of z, uint8 (T, 3, H, W), chunk by chunk as they are asked for, and how they are made."""
    run = vae.decoder(num_frames)
    plan = choose(vae, run, z, strategy, budget, chunk_frames=1, tiling=vae.tiling.of_latents())
    return (to_uint8(chunk[0]) for chunk in decode(run, z, plan=plan)), plan


def choose(
    vae: AnyVAE,
    run: Callable[[Tensor], Tensor],
    x: Tensor,
    strategy: Strategy | None,
    budget: str | None,
    *,
    chunk_frames: int,
    tiling: Tiling,
) -> TilePlan:
    """The plan that was asked for, or with a budget the one that fits. Errors: ValueError for both, for streaming a VAE
    that has tiles alone, and for a budget that is too small."""
    if strategy is not None and strategy not in get_args(Strategy):
        raise ValueError(f"strategy: must be one of {', '.join(get_args(Strategy))}, got {strategy!r}")
    if budget is not None:
        if strategy is not None:
            raise ValueError(f"strategy: must not be given beside a memory budget, which chooses it, got {strategy!r}")
        if vae.tiles is not None:
            raise ValueError(
                f"memory: must not be given for this VAE, which runs its clips in tiles of its own, got {budget!r}"
            )
        return plan_tiles(run, tuple(x.shape), budget, x.dtype, x.device)
    if strategy == "streaming":
        if vae.tiles is not None:
            raise ValueError("strategy: streaming is not there in this VAE, which runs its clips in tiles of its own")
        streaming = Streaming(chunk_frames, spill="device" if x.device.type == "cpu" else "host")
        return TilePlan(streaming.as_run_by(run, x.shape[2]))
    if strategy == "tiled":
        if vae.tile is None:
            return TilePlan(Tiled(tiling))
        vae.tile()
        return TilePlan(OwnTiles())
    return TilePlan(Whole())


def _open_sora(vae: VideoVAE) -> AnyVAE:
    encode_mean = partial(vae.encode, sample_posterior=False)
    return AnyVAE(vae, encode_mean, partial(_decoder, vae), vae.space_factor, vae.time_factor, False, None)


def _of_frames(vae: FrameVAE) -> AnyVAE:
    encode_mean = partial(vae.encode, sample_posterior=False)
    return AnyVAE(vae, encode_mean, partial(_decoder, vae), vae.space_factor, vae.time_factor, False, None)


def _open_sora_plan(vae: CausalVideoVAE) -> AnyVAE:
    encode_mean = partial(vae.encode, sample_posterior=False)

    def tile() -> None:
        vae.tiling = VAETiling()

    return AnyVAE(vae, encode_mean, partial(_decoder, vae), vae.space_factor, vae.time_factor, True, tile)


def _decoder(vae: FrameVAE | VideoVAE | CausalVideoVAE, num_frames: int) -> Callable[[Tensor], Tensor]:
    return partial(vae.decode, num_frames=num_frames)


def _of_diffusers(kind: str, location: Path, dtype: torch.dtype, device: torch.device) -> AnyVAE:
    import diffusers

    if not hasattr(diffusers, kind):
        raise ConfigError(f"vae: diffusers {diffusers.__version__} has no {kind}")
    model = getattr(diffusers, kind)
    is_lean = find_spec("accelerate") is not None  # it says on five lines that it would like to be asked
    if not is_lean and getattr(model, "_keep_in_fp32_modules", None):
        raise ConfigError(f"vae: diffusers loads {kind} with the package accelerate alone, which is not installed")
    loaded = model.from_pretrained(location, torch_dtype=dtype, low_cpu_mem_usage=is_lean)
    vae = loaded.to(device).eval()
    apply_opensora_kernels(vae)
    space, time = (_factor(vae, name, default) for name, default in (("spatial", 8), ("temporal", 4)))
    # Cosmos and KVAE have the switch without tiles
    has_tiles = any(hasattr(vae, name) for name in ("tiled_decode", "_stitch_tiles"))
    tile = vae.enable_tiling if has_tiles else None
    if kind == "AutoencoderKLAllegro":  # in tiles alone, frames before channels, and no first frame by itself
        vae.enable_tiling()
        return AnyVAE(
            vae, encoder_of(vae), lambda _: lambda z: vae.decode(z).sample.transpose(1, 2), space, time, False, tile,
            (vae.kernel, vae.stride),  # what is left over beside its tiles it leaves grey
        )  # fmt: skip
    if has_tiles:
        vae.disable_tiling()  # MiniMax-H3 comes with it on
    options = {}
    if vae.config.get("timestep_conditioning"):
        options["temb"] = torch.full((1,), LTX_DECODE_TIMESTEP, device=device, dtype=dtype)
    return AnyVAE(vae, encoder_of(vae), lambda _: decoder_of(vae, **options), space, time, True, tile)


def _factor(vae: Any, axis: str, default: int) -> int:
    """Frames or pixels of one latent, under one of the names that diffusers' VAEs have for it."""
    names = (f"{axis}_compression_ratio", f"vae_scale_factor_{axis}", f"scale_factor_{axis}", f"{axis}_compress_times")
    for name in names:
        value = vae.config.get(name) or vars(vae).get(name)  # as an attribute the former warns
        if isinstance(value, int):
            return value
    return default
