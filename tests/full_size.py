"""Full-size models on a CPU, with random weights: `python -m tests.full_size [NAME]`, or all of them.

Writes a sharded checkpoint of each, loads it in a fresh process, runs one forward on a small clip and prints seconds
and peak memory. Random weights tell nothing about pictures, but everything about shapes, keys, time and memory.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from opensora.checkpoints import load_model, save_model
from opensora.config import LatteT2VConfig, STDiT3Config, VideoVAEConfig
from opensora.models.latte import LatteT2V
from opensora.models.stdit import STDiT
from opensora.models.stdit2 import STDiT2
from opensora.models.stdit3 import STDiT3
from opensora.presets import open_sora_plan_v1_0, open_sora_v1_0, open_sora_v1_1, tiny
from opensora.sampling.stages import StageMeter
from opensora.vae import VideoVAE

SHARD_BYTES = 500 << 20


def write_checkpoint(name: str, folder: Path) -> None:
    """A sharded bf16 checkpoint of the released size; weights small enough for activations to stay finite."""
    case = MODELS[name]
    with torch.device("meta"):
        model = case.model_type(case.config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    tile = torch.randn(1 << 20, generator=generator).mul_(0.02).to(torch.bfloat16)
    for tensor in model.state_dict().values():
        flat = tensor.view(-1)
        for start in range(0, flat.numel(), tile.numel()):  # a billion normal numbers would take half a minute
            part = flat[start : start + tile.numel()]
            part.copy_(tile[: part.numel()])
    save_model(folder, model, case.config, max_shard_bytes=SHARD_BYTES)


@torch.no_grad()
def run(name: str, folder: Path) -> dict[str, float]:
    """Load and run in this process: weights and peak growth of memory in bytes, seconds of loading and of a forward."""
    case = MODELS[name]
    meter = StageMeter(torch.device("cpu"))
    case.model_type(case.smallest)  # imports happen here, outside what is measured
    with meter.stage("start"):
        pass
    with meter.stage("load"):
        model = load_model(folder, case.model_type, type(case.config))
    with meter.stage("forward"):
        output = case.forward(model)
    assert output.isfinite().all()
    costs = meter.costs
    return {
        "weight_bytes": sum(tensor.nbytes for tensor in model.state_dict().values()),
        "load_growth_bytes": costs["load"].peak_bytes - costs["start"].peak_bytes,
        "load_seconds": round(costs["load"].seconds, 2),
        "forward_seconds": round(costs["forward"].seconds, 2),
        "forward_growth_bytes": costs["forward"].peak_bytes - costs["start"].peak_bytes,  # the weights among them
    }


def _stdit_forward(model: nn.Module) -> Tensor:
    """5 x 4 x 4 latents: 17 frames of 32 x 32 pixels, conditional and unconditional."""
    bf16 = torch.bfloat16
    length = model.config.model_max_length
    x, y = torch.randn(2, 4, 5, 4, 4, dtype=bf16), torch.randn(2, 1, length, 4096, dtype=bf16)
    clip = {"num_frames": 17.0, "height": 32.0, "width": 32.0, "ar": 1.0, "fps": 24.0}
    mask = torch.arange(length)[None].repeat(2, 1) < 20
    timestep = torch.tensor([500.0, 500.0])
    return model(x, timestep, y, mask=mask, **{name: torch.full((2,), each) for name, each in clip.items()})


def _vae_forward(model: VideoVAE) -> Tensor:
    """5 frames of 16 x 16 pixels, encoded and decoded."""
    x = torch.rand(1, 3, 5, 16, 16, dtype=torch.bfloat16) * 2 - 1
    return model.decode(model.encode(x, sample_posterior=False), 5)


def _latte_forward(model: LatteT2V) -> Tensor:
    """5 x 4 x 4 latents: 17 frames of 32 x 32 pixels, conditional and unconditional."""
    x, y = torch.randn(1, 4, 5, 4, 4), torch.randn(2, 1, 300, 4096, dtype=torch.bfloat16)
    return model.denoiser(y)(x, torch.tensor([500]))


@dataclass(frozen=True)
class FullSize:
    """A model, its configuration as released and a small one, and a forward on a small clip."""

    model_type: type[nn.Module]
    config: Any
    smallest: Any
    forward: Callable[[Any], Tensor]


def _stdit(model_type: type[nn.Module], config: Any) -> FullSize:
    small = replace(config, hidden_size=48, depth=1, num_heads=1, caption_channels=8, model_max_length=4)
    return FullSize(model_type, config, small, _stdit_forward)


def _latte(config: LatteT2VConfig) -> FullSize:
    small = {"num_attention_heads": 1, "attention_head_dim": 16, "cross_attention_dim": 16, "num_layers": 1}
    return FullSize(LatteT2V, config, replace(config, **small, caption_channels=8), _latte_forward)


MODELS = {
    "stdit": _stdit(STDiT, open_sora_v1_0.transformer("16x256x256")),
    "stdit2": _stdit(STDiT2, open_sora_v1_1.transformer()),
    "transformer": _stdit(STDiT3, STDiT3Config()),
    "vae": FullSize(VideoVAE, VideoVAEConfig(), tiny.vae(), _vae_forward),
    "latte": _latte(open_sora_plan_v1_0.transformer("17x256x256")),
}


def measure(name: str) -> dict[str, float]:
    """`run` in a fresh process on a checkpoint in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(name, Path(folder))
        command = [sys.executable, "-m", "tests.full_size", name, folder]
        return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    if len(sys.argv) == 3:
        print(json.dumps(run(sys.argv[1], Path(sys.argv[2]))))
        return
    for name in sys.argv[1:] or MODELS:
        figures = measure(name)
        growth = figures["load_growth_bytes"] / figures["weight_bytes"]
        print(
            f"{name}: weights {figures['weight_bytes'] / 2**20:.0f} MiB, loaded in {figures['load_seconds']} s "
            f"at a peak of {growth:.3f} x the weights; one forward {figures['forward_seconds']} s, with "
            f"{figures['forward_growth_bytes'] / 2**20:.0f} MiB in all"
        )


if __name__ == "__main__":
    main()
