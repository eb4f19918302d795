"""`opensora encode`: latents and text embeddings of a training's clips, made before it."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from opensora.cli import CommandError
from opensora.cli.options import Parser, add_config_options, config_from_options
from opensora.cli.training import choose_stage
from opensora.config import EncodeConfig, TrainConfig

if TYPE_CHECKING:
    import torch

    from opensora.encoding import EncodeResult

ALIASES = {
    "output": ("-o",),
    "data.manifest": ("--manifest", "--data-path"),
    "data.buckets": ("--buckets",),
    "data.image_size": ("--image-size",),
    "data.num_frames": ("--num-frames",),
    "data.num_workers": ("--num-workers",),
}
SECONDS_BETWEEN_LINES = 10


def run(arguments: Sequence[str]) -> int:
    choice = choose_stage("encode", arguments, lambda preset: preset.training)
    parser = Parser(
        "encode",
        "Encode what a stage of a preset's training would read, into a folder for --data.encoded of `opensora train`. "
        "May be stopped at any moment; the same command goes on. Under torchrun each process encodes its share.",
    )
    choice.add_options(parser)
    parser.add_argument("--rank", type=int, default=int(os.environ.get("RANK", 0)), help="default: torchrun's")
    parser.add_argument("--world-size", type=int, default=int(os.environ.get("WORLD_SIZE", 1)))
    add_config_options(parser, _defaults(choice.complete(choice.config)), ALIASES)
    options = parser.parse(arguments)
    choice.check(options)
    config = config_from_options(EncodeConfig, options)
    for name, value in (("manifest", config.data.manifest), ("output", config.output)):
        if not value:
            raise CommandError(f"{name}: must be given, got ''")

    result = _encode(config, options["rank"], options["world_size"])
    print(result.manifest)
    _print_unread(result)
    if result.is_finished:
        print(f"{config.output}: {result.num_encoded} clips encoded, for --data.encoded of `opensora train`")
    else:
        print(f"{config.output}: {result.num_encoded} of {result.num_items} clips so far, the rest is other ranks'")
    return 0


def _defaults(training: TrainConfig) -> EncodeConfig:
    return EncodeConfig(
        data=replace(training.data, encoded="", cache_in_memory=False, use_image_num=0, image_manifest=""),
        vae=training.vae,
        vae_kind=training.vae_kind,
        tile_vae=training.tile_vae,
        text_encoder=training.text_encoder,
        model_max_length=training.transformer.model_max_length,
        seed=training.run.seed,
        dtype=training.run.dtype,
        text_dtype=training.run.dtype,
    )


def _encode(config: EncodeConfig, rank: int, world_size: int) -> EncodeResult:
    from transformers.utils import logging

    from opensora.encoding import run_encode
    from opensora.loading import load_text_encoder, load_vae
    from opensora.parallel import DTYPES
    from opensora.vae import VAETiling

    logging.disable_progress_bar()
    device = _device(config.device)
    vae = load_vae(config.vae, config.vae_kind, dtype=DTYPES[config.dtype], device=device)
    if config.tile_vae and config.vae_kind == "causal":
        vae.tiling = VAETiling()
    text: Any = None
    if config.text_encoder:
        text = load_text_encoder(
            config.text_encoder, config.model_max_length, dtype=DTYPES[config.text_dtype], device=device
        )
    return run_encode(config, vae, text, rank=rank, world_size=world_size, progress=_Lines())


def _device(name: str) -> torch.device:
    """ "auto" is, under torchrun, the accelerator of the process's own number."""
    import torch

    from opensora.parallel import resolve_device

    device = resolve_device(name)
    if name == "auto" and device.type != "cpu" and "LOCAL_RANK" in os.environ:
        return torch.device(device.type, int(os.environ["LOCAL_RANK"]))
    return device


class _Lines:
    """A line with the share done and the time left, now and then and at the end."""

    def __init__(self) -> None:
        self._start = self._last = time.monotonic()

    def __call__(self, done: int, total: int, num_unread: int) -> None:
        now = time.monotonic()
        if done < total and now - self._last < SECONDS_BETWEEN_LINES:
            return
        self._last = now
        seconds = round((now - self._start) * (total - done) / max(done, 1))
        left = f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d} left"
        unread = f", {num_unread} unreadable" if num_unread else ""
        print(f"{100 * done / total:.1f} % encoded, {left}{unread}", file=sys.stderr, flush=True)


def _print_unread(result: EncodeResult, *, max_names: int = 20) -> None:
    if not result.unread:
        return
    print(f"{len(result.unread)} clips could not be read:")
    for clip in result.unread[:max_names]:
        print(f"  row {clip.row + 1}, window {clip.window}: {clip.path}: {clip.reason}")
    if len(result.unread) > max_names:
        print(f"  and {len(result.unread) - max_names} more")
