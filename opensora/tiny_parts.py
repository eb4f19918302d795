"""What the tiny twin of a training stage reads, made without downloads: clips, images, and VAEs of each kind.

    clips.csv, heldout.csv   moving shapes of 20, 36 and 60 frames in three aspect ratios, with scores, and still images
    images.csv               still images alone
    image-vae                the 2-D half of the embedded model's VAE
    vae-frames               the same, with as many latent channels as the whole VAE
    vae-causal-1.0, -1.1     CausalVideoVAE as released, with fewer channels and random weights
    image-model              a transformer for images as PixArt's, of random weights

Latents of the VAEs have mean 0 and deviation 1. Processes may make the same folder at once: each writes one of its own,
and the first to finish gives it its name.
"""

from __future__ import annotations

import csv
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from opensora.checkpoints import load_model, save_model
from opensora.config import STDiTConfig, VideoVAEConfig
from opensora.data.shapes import generate
from opensora.models import STDiT
from opensora.presets import open_sora_plan_v1_0, open_sora_plan_v1_1, tiny
from opensora.presets.scaling import CAPTION_CHANNELS, LATENT_CHANNELS, MADE, TEXT_LENGTH, small_causal_vae
from opensora.vae import CausalVideoVAE, VideoVAE
from opensora.vae.frame_vae import SCALING_FACTOR
from opensora.video import write_mp4, write_png

Config = TypeVar("Config")

FPS = 24
LENGTHS = (20, 36, 60)
SIZES = ((64, 64), (48, 86), (86, 48))
NUM_CLIPS, NUM_IMAGES = 72, 48
NUM_HELD_OUT_CLIPS, NUM_HELD_OUT_IMAGES = 9, 6
LOG_VARIANCE = -10.0
COLUMNS = ("path", "text", "num_frames", "height", "width", "fps", "aes", "flow")


def complete(config: Config, folder: str | Path) -> Config:
    """The configuration with what it names "made:..." made in `folder`, unless it is there, and named by its path."""
    changes: dict[str, Any] = {}
    for item in fields(config):  # type: ignore[arg-type]
        value = getattr(config, item.name)
        if is_dataclass(value):
            changes[item.name] = complete(value, folder)
        elif isinstance(value, str) and value.startswith(MADE):
            changes[item.name] = str(_made(Path(folder), value.removeprefix(MADE)))
    return replace(config, **changes)  # type: ignore[type-var]


@torch.no_grad()
def _made(folder: Path, name: str) -> Path:
    if name.endswith(".csv"):
        return _once(folder / "data", _write_data) / name
    return _once(folder / name, _MODELS[name])


def _once(folder: Path, write: Callable[[Path], None]) -> Path:
    """`folder`, written by `write` if it is not there; whole or absent."""
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        write(temporary)
        temporary.chmod(0o755)
        try:
            os.rename(temporary, folder)
        except OSError:
            if not folder.exists():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _write_data(folder: Path) -> None:
    rows = {
        "clips": [*_clips(folder, "clips", NUM_CLIPS, seed=0), *_images(folder, "images", NUM_IMAGES, seed=0)],
        "images": _images(folder, "more_images", NUM_IMAGES, seed=2),
        "heldout": [
            *_clips(folder, "heldout", NUM_HELD_OUT_CLIPS, seed=1),
            *_images(folder, "heldout_images", NUM_HELD_OUT_IMAGES, seed=1),
        ],
    }
    for name, its_rows in rows.items():
        with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            writer.writerows(its_rows)


def _clips(folder: Path, name: str, count: int, *, seed: int) -> list[tuple[Any, ...]]:
    rows = []
    for index in range(count):
        num_frames, (height, width) = LENGTHS[index % 3], SIZES[index // 3 % 3]
        # 7 and 72 have no common divisor: colours, shapes and directions come in all lengths and sizes.
        caption, frames = generate(7 * index, seed=seed, num_frames=num_frames, height=height, width=width)
        path = f"{name}/{index:03d}.mp4"
        write_mp4(folder / path, frames, fps=FPS, crf=12)
        rows.append((path, caption, num_frames, height, width, FPS, 4 + index % 5 / 2, index % 7))
    return rows


def _images(folder: Path, name: str, count: int, *, seed: int) -> list[tuple[Any, ...]]:
    rows = []
    for index in range(count):
        height, width = SIZES[index % 3]
        caption, frames = generate(7 * index, seed=seed, num_frames=1, height=height, width=width)
        path = f"{name}/{index:03d}.png"
        write_png(folder / path, frames[0])
        rows.append((path, caption.partition(" moving")[0], 1, height, width, 0, 4 + index % 5 / 2, ""))
    return rows


def _write_frame_vae(folder: Path) -> None:
    """An AutoencoderKL as diffusers saves it, whose latents have the deviation that `FrameVAE` expects of them.

    Its 16 channels are the 8 of the embedded model's 2-D VAE, turned in a space of twice as many.
    """
    from diffusers import AutoencoderKL

    narrow = _image_vae()
    moments = narrow.encode(_first_frames(16)).latent_dist.parameters
    mean_C, std_C = _standardise(narrow.quant_conv, moments, scale=SCALING_FACTOR)
    wide = AutoencoderKL(**{**narrow.config, "latent_channels": LATENT_CHANNELS["frames"]})
    state, own = narrow.state_dict(), wide.state_dict()
    for name, tensor in own.items():
        part = tensor.zero_()[tuple(slice(size) for size in state[name].shape)]
        part.copy_(state[name])
    num_narrow, num_wide = len(mean_C), LATENT_CHANNELS["frames"]
    turn_WN, _ = torch.linalg.qr(torch.randn(num_wide, num_narrow, generator=torch.Generator().manual_seed(0)))
    turn_WN *= (num_wide / num_narrow) ** 0.5
    encoding, decoding = wide.quant_conv, wide.post_quant_conv
    from_means, bias = state["quant_conv.weight"][:num_narrow, :, 0, 0], state["quant_conv.bias"][:num_narrow]
    encoding.weight.zero_()[:num_wide, : 2 * num_narrow, 0, 0] = turn_WN @ from_means
    encoding.bias.copy_(torch.cat([turn_WN @ bias, torch.full((num_wide,), LOG_VARIANCE)]))
    back_NW = torch.linalg.pinv(turn_WN)
    to_decoder = state["post_quant_conv.weight"][:, :, 0, 0]
    decoding.weight.zero_()[:num_narrow, :, 0, 0] = to_decoder @ (std_C[:, None] * back_NW)
    decoding.bias.zero_()[:num_narrow] = state["post_quant_conv.bias"] + to_decoder @ mean_C
    wide.save_pretrained(folder)


def _image_vae() -> nn.Module:
    return load_model(tiny.ASSETS / "vae", VideoVAE, VideoVAEConfig, dtype=torch.float32).spatial_vae.module


def _write_causal_vae(folder: Path, version: str) -> None:
    released = {"1.0": open_sora_plan_v1_0.vae, "1.1": open_sora_plan_v1_1.vae}[version]()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = CausalVideoVAE(small_causal_vae(released)).eval()
    _, frames_TCHW = generate(7, seed=3, num_frames=17)
    moments = vae.posterior(frames_TCHW.transpose(0, 1)[None].float() / 127.5 - 1).moments
    layer = getattr(vae.quant_conv, "conv", vae.quant_conv)
    layer.weight.chunk(2)[1].zero_()
    layer.bias.chunk(2)[1].fill_(LOG_VARIANCE)  # random weights say 1, and would drown their means in noise
    moments.chunk(2, dim=1)[1].fill_(LOG_VARIANCE)
    _standardise(layer, moments, scale=vae.config.scaling_factor)
    save_model(folder, vae, vae.config)


def _write_image_model(folder: Path) -> None:
    """STDiT without its temporal attention, which is what makes it more than PixArt."""
    config = STDiTConfig(
        hidden_size=48,
        depth=2,
        num_heads=4,
        in_channels=LATENT_CHANNELS["frames"],
        caption_channels=CAPTION_CHANNELS,
        model_max_length=TEXT_LENGTH,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        state = STDiT(config).state_dict()
    save_file(
        {name: tensor for name, tensor in state.items() if ".attn_temp." not in name and "pos_embed" not in name},
        folder / "model.safetensors",
    )


def _first_frames(count: int) -> Tensor:
    """(N, 3, H, W) in [-1, 1]."""
    frames = [generate(7 * index, seed=3, num_frames=1)[1] for index in range(count)]
    return torch.cat(frames).float() / 127.5 - 1


def _standardise(quantiser: nn.Module, moments: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
    """Change an encoder's last layer, which gave `moments` (N, 2C, ...), so that `scale` times its means has mean 0 and
    deviation 1, and its posteriors follow. Old means are new ones times the second result plus the first, (C,) each."""
    means_CN = moments.chunk(2, dim=1)[0].transpose(0, 1).flatten(1)
    mean_C, std_C = means_CN.mean(1), scale * means_CN.std(1)
    of_mean, of_log_variance = quantiser.bias.chunk(2)
    of_mean.sub_(mean_C).div_(std_C)
    of_log_variance.sub_(2 * std_C.log())
    quantiser.weight.chunk(2)[0].div_(std_C.view(-1, *[1] * (quantiser.weight.ndim - 1)))
    return mean_C, std_C


_MODELS: dict[str, Callable[[Path], None]] = {
    "image-model": _write_image_model,
    "image-vae": lambda folder: _image_vae().save_pretrained(folder),
    "vae-frames": _write_frame_vae,
    "vae-causal-1.0": lambda folder: _write_causal_vae(folder, "1.0"),
    "vae-causal-1.1": lambda folder: _write_causal_vae(folder, "1.1"),
}
