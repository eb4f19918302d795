"""Peak memory of a decode in a process of its own, and what the planner predicts: `python -m bench.peaks CASE`.

A process that did something else before keeps memory that hides what comes after. A case is JSON on the command line;
what is found comes out as lines of JSON, the prediction first, so that it is there when the run takes too long.

Axes: B batch, C channels, T frames, H height, W width.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from opensora.device_memory import peak_memory, reset_peak_memory
from opensora.presets import open_sora_plan_v1_1
from opensora.vae import CausalVideoVAE
from opensora_kernels.vae import Streaming, Tiled, TilePlan, Tiling, Whole, decode, plan_tiles
from tests.vae import models

# Freed memory goes back to the system at once, so that what is resident is what is in use. One thread: predictions are
# made and checked for it, and several processes can run side by side.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
CHUNK_FRAMES = 2  # of latents: memory is flat from the shortest clip on
LATENT_CHANNELS = 4
_TAIL = 2000  # characters of an error


@dataclass(frozen=True)
class Decoder:
    """A decoder for latents of (C, T, H, W); `factor`: pixels of a latent. All give 4 T - 3 frames. tile, stride:
    latents of its tiles; window: frames of latents in a window, or None."""

    title: str
    make: Callable[[], nn.Module]
    size: tuple[int, int]
    factor: int
    tile: int
    stride: int
    window: int | None

    def tiling(self) -> Tiling:
        overlap, keep = (self.tile - self.stride) * self.factor, self.stride * self.factor
        return Tiling((self.tile,) * 2, (self.stride,) * 2, (overlap,) * 2, (keep,) * 2, self.window)


class PlanDecoder(nn.Module):
    """Open-Sora-Plan 1.1's, narrower."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        narrow = {"hidden_size": hidden_size, "hidden_size_mult": (1, 1, 2, 2), "num_res_blocks": 1}
        self.vae = CausalVideoVAE(replace(open_sora_plan_v1_1.vae(), **narrow))

    def forward(self, z: Tensor) -> Tensor:
        return self.vae.decode(z)


DECODERS = {
    "wan": Decoder("norm per position, as in Wan", lambda: models.WanLike(32), (24, 24), 4, 16, 12, None),
    "plan": Decoder(
        "GroupNorm over the clip: Open-Sora-Plan 1.1, 32 channels", lambda: PlanDecoder(32), (12, 12), 8, 8, 6, 17
    ),
}


STRATEGIES = ("whole", "tiled", "streaming, device", "streaming, host", "streaming, file", "planner")


@dataclass(frozen=True)
class Case:
    """num_frames: of the video. strategy: of STRATEGIES. budget: bytes for the planner. most_bytes: above that the
    run is left to the prediction."""

    decoder: str
    num_frames: int
    strategy: str
    budget: int
    most_bytes: int
    device: str = "cpu"

    def shape(self) -> tuple[int, ...]:
        return (1, LATENT_CHANNELS, (self.num_frames + 3) // 4, *DECODERS[self.decoder].size)


def measure(case: Case) -> Iterator[dict[str, Any]]:
    """`predicted`, `plan` and `spill`; then `measured` and `seconds`. In this process, which should be fresh."""
    device, shape = torch.device(case.device), case.shape()
    model = models.build(DECODERS[case.decoder].make).to(device)
    if case.strategy == "planner":
        chosen = plan_tiles(model, shape, case.budget, torch.float32, device)
    else:
        strategy = _strategy(case)
        chosen = plan_tiles(model, shape, "1TiB", torch.float32, device, strategies=[strategy])
    yield {"predicted": chosen.peak_bytes, "plan": str(chosen.strategy), "spill": chosen.spill_bytes}
    if chosen.peak_bytes > case.most_bytes:
        return
    small = torch.randn((*shape[:2], min(shape[2], 2), 4, 4), device=device)  # what libraries map once
    _let_go(decode(model, small, plan=TilePlan(chosen.strategy)))
    x, start = torch.randn(shape, device=device), time.perf_counter()
    measured = peak_of(lambda: decode(model, x, plan=chosen), device)
    yield {"measured": measured, "seconds": time.perf_counter() - start}


def peak_of(run: Callable[[], Iterable[Tensor]], device: torch.device) -> int:
    """The most memory in use while the chunks of `run()` are made and let go, beyond what is there before."""
    reset_peak_memory(device)
    before = peak_memory(device)
    _let_go(run())
    return peak_memory(device) - before


def measure_afresh(module: str, case: Any, *, seconds: float | None = None) -> dict[str, Any]:
    """What `python -m module CASE` prints as JSON, from a process of its own; with `stopped` if that takes longer than
    `seconds`. Errors: RuntimeError with the end of what a process that fails says."""
    command = [sys.executable, "-m", module, json.dumps(asdict(case))]
    try:
        done = subprocess.run(command, capture_output=True, env={**os.environ, **ENVIRONMENT}, timeout=seconds)
        if done.returncode:
            raise RuntimeError(f"{case}: {done.stderr.decode()[-_TAIL:]}")
        printed, found = done.stdout, {}
    except subprocess.TimeoutExpired as stopped:
        printed, found = stopped.stdout or b"", {"stopped": f"after {seconds:.0f} s"}
    for line in printed.decode().splitlines():
        found |= json.loads(line) if line.startswith("{") else {}
    return found


def _strategy(case: Case) -> Any:
    if case.strategy == "whole":
        return Whole()
    if case.strategy == "tiled":
        return Tiled(DECODERS[case.decoder].tiling())
    return Streaming(CHUNK_FRAMES, case.strategy.split(", ")[1])


def _let_go(chunks: Iterable[Tensor]) -> None:
    for chunk in chunks:
        del chunk


if __name__ == "__main__":
    for found in measure(Case(**json.loads(sys.argv[1]))):
        print(json.dumps(found), flush=True)
