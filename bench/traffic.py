"""`python -m bench traffic`: the activations that a model's block reads and writes, and its launches, with no device.

One unit is one bf16 activation of the block, [B, N, D] or (B, C, T, H, W). What moves for matrix products and
convolutions is counted apart from all else. `fused`: every operator runs its Triton kernels. A CUDA device does so by
itself, except that it leaves long attention to PyTorch's, which moves the same, and convolutions until they are tuned
for it. `unfused`: every operator is its reference in PyTorch's own operators, with PyTorch's attention for long
sequences.
Text keys and values are made once for each prompt, so they are no part of a block.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from typing import Literal
from unittest import mock

import torch
from torch import Tensor, nn

from bench.about import json_file, write_json
from bench.launches import Launch, counted
from opensora.config import STDiT2Config, STDiT3Config, TemporalVAEConfig
from opensora.models import layers
from opensora.models.stdit2 import Conditions, STDiT2Block
from opensora.models.stdit3 import STDiT3Block
from opensora.vae.temporal import ResBlock
from opensora_kernels import __version__, _triton, use

Build = Literal["fused", "unfused"]
BUILDS: tuple[Build, ...] = ("fused", "unfused")
# With guidance, a batch of two. Open-Sora 1.2's latents are of 17 frames to 5, 1.1's of single frames.
SIZES_OF_STDIT3 = {"720p 4 s": (2, 30, 3600), "240p 2 s": (2, 15, 405)}
SIZES_OF_STDIT2 = {"720p 16 frames": (2, 16, 3600), "240p 16 frames": (2, 16, 405)}
SIZES_OF_VAE = {"720p 17 frames": (1, 20, 90, 160)}  # padded to five latent frames


@dataclass(frozen=True)
class Block:
    """`make(sizes, has_masks)` gives the block's computation and its activation. `attention`: who serves the unfused
    build's self-attention, the library if PyTorch never holds the scores of so long sequences."""

    name: str
    sizes: dict[str, tuple[int, ...]]
    make: Callable[[tuple[int, ...], bool], tuple[Callable[[], Tensor], Tensor]]
    masks: tuple[bool, ...] = (False, True)
    attention: Literal["library", "reference"] = "library"


@dataclass(frozen=True)
class Row:
    block: str
    size: str
    has_masks: bool
    build: Build
    outside: float  # units of everything but products and convolutions
    inside: float
    launches: int
    operators: list[dict[str, str | int | float]]

    def line(self) -> str:
        masks = "with" if self.has_masks else "without"
        return (
            f"{self.block:<18}{self.size:<16}{masks:<9}{self.build:<8}"
            f"{self.outside:8.1f}{self.inside:8.1f}{self.launches:10d}"
        )


def main(arguments: Sequence[str]) -> int:
    options = read_options(arguments)
    if "fused" in options.builds and (reason := _triton.why_not_installed()) is not None:
        raise SystemExit(f"bench traffic: {reason}, whose kernels the fused build counts; --builds unfused needs none")
    print(f"{'block':<18}{'size':<16}{'masks':<9}{'build':<8}{'outside':>8}{'GEMMs':>8}{'launches':>10}")
    rows = []
    for block in BLOCKS:
        for size, has_masks, build in product(block.sizes, block.masks, options.builds):
            row = measure(block, size, has_masks, build)
            rows.append(row)
            print(row.line(), flush=True)
            for operator in row.operators if options.per_op else []:
                place = "GEMM" if operator["is_gemm"] else ""
                print(f"    {operator['name']:<39}{place:<8}{operator['units']:8.2f}{operator['launches']:18d}")
    if options.json:
        about = {"opensora_kernels": __version__, "torch": torch.__version__, "rows": [asdict(row) for row in rows]}
        write_json(options.json, about)
    return 0


def read_options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench traffic", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--builds", nargs="+", choices=BUILDS, default=BUILDS, help="default: both")
    parser.add_argument("--per-op", action="store_true", help="below each block its operators, in the order of use")
    parser.add_argument("--json", type=json_file, metavar="FILE", help="write everything there too")
    return parser.parse_args(arguments)


def measure(block: Block, size: str, has_masks: bool, build: Build) -> Row:
    with torch.no_grad(), built(build, block.attention):
        run, activation = block.make(block.sizes[size], has_masks)
        with counted() as launches:
            run()
        unit = activation.numel() * activation.element_size()
    operators: dict[str, dict[str, str | int | float]] = {}
    for launch in launches:
        entry = operators.setdefault(
            launch.name, {"name": launch.name, "is_gemm": launch.is_gemm, "units": 0.0, "launches": 0}
        )
        entry["units"] += launch.num_bytes / unit
        entry["launches"] += 1
    outside, inside = (_units(launches, unit, is_gemm) for is_gemm in (False, True))
    return Row(block.name, size, has_masks, build, outside, inside, len(launches), list(operators.values()))


def _units(launches: list[Launch], unit: int, is_gemm: bool) -> float:
    return sum(launch.num_bytes for launch in launches if launch.is_gemm == is_gemm) / unit


@contextmanager
def built(build: Build, attention: Literal["library", "reference"]) -> Iterator[None]:
    """Meanwhile new tensors have no memory, and operators run as `build` says."""
    is_fused = build == "fused"
    chosen = use("triton") if is_fused else use("reference", attention="library", qk_norm_attention=attention)
    # What a CUDA tensor would get: the reason against Triton, and the model's own rule, are about meta tensors.
    with (
        torch.device("meta"),
        chosen,
        mock.patch.object(_triton, "why_not", return_value=None),
        mock.patch.object(layers, "fuses_gelu", return_value=is_fused),
    ):
        yield


def stdit3_block(
    axis: Literal["space", "time"], sizes: tuple[int, ...], has_masks: bool
) -> tuple[Callable[[], Tensor], Tensor]:
    config = STDiT3Config()
    batch, num_frames, num_sites = sizes
    block, rope = _in_bf16(STDiT3Block(config, axis, 0.0)), _rope(config, num_frames)
    x_BTSD = torch.empty(batch, num_frames, num_sites, config.hidden_size, dtype=torch.bfloat16)
    t6_GB6D = torch.empty(1 + has_masks, batch, 6, config.hidden_size, dtype=torch.bfloat16)
    text, frame_mask = _text_and_mask(block, config, batch, num_frames, has_masks)
    return lambda: block(x_BTSD, text, None, t6_GB6D, frame_mask, rope), x_BTSD


def stdit2_block(sizes: tuple[int, ...], has_masks: bool) -> tuple[Callable[[], Tensor], Tensor]:
    config = STDiT2Config(input_sq_size=512, model_max_length=200, qk_norm=True, qk_norm_legacy=True)
    batch, num_frames, num_sites = sizes
    block, rope = _in_bf16(STDiT2Block(config, 0.0)), _rope(config, num_frames)
    x_BTSD = torch.empty(batch, num_frames, num_sites, config.hidden_size, dtype=torch.bfloat16)
    tables = (torch.empty(1 + has_masks, batch, n, config.hidden_size, dtype=torch.bfloat16) for n in (6, 3, 1))
    conditions = Conditions(*tables)
    text, frame_mask = _text_and_mask(block, config, batch, num_frames, has_masks)
    return lambda: block(x_BTSD, text, None, conditions, frame_mask, rope), x_BTSD


def residual_block(sizes: tuple[int, ...], has_masks: bool) -> tuple[Callable[[], Tensor], Tensor]:
    config = TemporalVAEConfig()
    batch, *clip = sizes
    block = _in_bf16(ResBlock(config.filters, config.filters, config.num_groups))
    x_BCTHW = torch.empty(batch, config.filters, *clip, dtype=torch.bfloat16)
    return lambda: block(x_BCTHW), x_BCTHW


def _in_bf16(module: nn.Module) -> nn.Module:
    return module.to(torch.bfloat16).eval()


def _rope(config: STDiT2Config | STDiT3Config, num_frames: int) -> layers.RotaryTable:
    return _in_bf16(layers.RotaryEmbedding(config.hidden_size // config.num_heads))(num_frames)


def _text_and_mask(
    block: STDiT2Block | STDiT3Block,
    config: STDiT2Config | STDiT3Config,
    batch: int,
    num_frames: int,
    has_masks: bool,
) -> tuple[tuple[Tensor, Tensor], Tensor | None]:
    tokens = torch.empty(batch, config.model_max_length, config.hidden_size, dtype=torch.bfloat16)
    frame_mask = torch.empty(batch, num_frames, dtype=torch.bool) if has_masks else None
    return block.cross_attn.keys_values(tokens), frame_mask


BLOCKS = (
    Block("STDiT3 spatial", SIZES_OF_STDIT3, partial(stdit3_block, "space")),
    Block("STDiT3 temporal", SIZES_OF_STDIT3, partial(stdit3_block, "time"), attention="reference"),
    Block("STDiT2", SIZES_OF_STDIT2, stdit2_block),
    Block("VAE residual", SIZES_OF_VAE, residual_block, masks=(False,)),
)
