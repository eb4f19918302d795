"""`opensora estimate`: memory, operations and seconds of training and sampling, before anything runs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, Literal

from opensora import presets
from opensora.cli import CommandError
from opensora.cli.options import Parser
from opensora.config import Preset

if TYPE_CHECKING:
    from opensora.estimate.placement import Hardware
    from opensora.estimate.training import BucketClip, TrainingEstimate, TrainingOnPaper

DEFAULT_PRESET = "open-sora-v1.2"
_EXAMPLE = "1 minute at 1080p on 8 x 80 GB"
_DESCRIPTION = (
    "Say what a training stage takes on each GPU, bucket by bucket, or what a clip of any size takes to train on or to "
    "make, and with which settings. Models run on paper: nothing is downloaded or computed."
)


def run(arguments: Sequence[str]) -> int:
    options = _parser().parse(arguments)
    from opensora.estimate.requests import read_request

    try:
        asked = asdict(read_request(options["request"], fps=options["fps"])) if options["request"] else {}
        preset, stage = presets.get_with_stage(options["preset"])
        hardware, size = _hardware(options, asked), _size(options, asked, preset)
    except ValueError as error:
        raise CommandError(str(error)) from error
    if options["task"] == "sample":
        return _sample(options, preset, hardware, size)
    return _train(options, preset, options["stage"] or stage, hardware, size)


def _parser() -> Parser:
    parser = Parser("estimate", _DESCRIPTION)
    add = parser.add_argument
    add("request", type=str, nargs="?", help=f'clip and machine in words, such as "{_EXAMPLE}"')
    add("--task", type=Literal["train", "sample"], default="train", help="what to estimate")
    add("--preset", type=str, default=DEFAULT_PRESET, help=f"one of {', '.join(presets.names())}, or with -STAGE")
    add("--stage", type=str, default=None, help="of training; default: the preset's first")
    add("--gpus", type=int, default=None, help="how many; default: 1")
    add("--memory", type=str, default=None, help='of one GPU; default: "80GB"')
    add("--resolution", type=str, default=None, help="of a clip in place of the stage's buckets: 1080p or 1080x1920")
    add("--num-frames", type=str, default=None, help='of that clip: "51", "4s", "1 minute"')
    add("--fps", type=float, default=24.0, help="frames of a second")
    add("--batch-size", type=int, default=None, help="clips of a batch; default: the stage's, or 1")
    add("--sequence", type=int, default=None, help="GPUs that share each clip's tokens; default: 1, or what is needed")
    add("--grad-checkpoint", type=Literal["none", "selective", "full"], default=None, help="default: the stage's")
    add("--encoded", action=argparse.BooleanOptionalAction, default=False, help="latents and text come from files")
    add("--mfu", type=float, default=0.35, help="share of --peak-tflops that is reached, for seconds")
    add("--peak-tflops", type=float, default=989.0, help="of one GPU at best; default: an H100's in bf16")
    add("--json", action="store_true", help="print numbers in bytes, operations and seconds instead of a table")
    return parser


def _hardware(options: dict[str, Any], asked: dict[str, Any]) -> Hardware:
    from opensora.estimate.placement import Hardware
    from opensora_kernels.vae import parse_bytes

    memory = parse_bytes(options["memory"]) if options["memory"] else asked.get("memory") or Hardware().memory
    num_gpus = options["gpus"] or asked.get("num_gpus") or 1
    if num_gpus < 1 or not 0 < options["mfu"] <= 1 or options["peak_tflops"] <= 0:
        raise ValueError(
            f"gpus, mfu and peak-tflops: must be at least 1, in (0, 1] and positive, got {num_gpus}, {options['mfu']} "
            f"and {options['peak_tflops']}"
        )
    return Hardware(num_gpus, memory, flops=options["peak_tflops"] * 1e12, mfu=options["mfu"])


def _size(options: dict[str, Any], asked: dict[str, Any], preset: Preset) -> tuple[int, int, int] | None:
    """Frames, height and width; None where neither duration nor size was asked for."""
    from opensora.estimate.requests import frames_of, pixels_of
    from opensora.sampling.requests import clip_size

    num_frames, pixels = asked.get("num_frames"), asked.get("pixels")
    if options["num_frames"] is not None:
        num_frames = frames_of(options["num_frames"], fps=options["fps"])
    if options["resolution"] is not None:
        pixels = pixels_of(options["resolution"], 9 / 16)
    if num_frames is None and pixels is None and options["task"] == "train":
        return None
    default = clip_size(preset.sample)
    return (num_frames or default.num_frames, *(pixels or (default.height, default.width)))


def _train(
    options: dict[str, Any], preset: Preset, stage: str | None, hardware: Hardware, size: tuple[int, int, int] | None
) -> int:
    from opensora.cli.estimate_tables import print_buckets, print_settings
    from opensora.estimate.training import BucketClip, TrainingOnPaper, buckets_of

    if not preset.training:
        raise CommandError(f"preset: {preset.name} has no training stages; --task sample estimates sampling")
    stage = stage or next(iter(preset.training))
    if stage not in preset.training:
        raise CommandError(f"stage: preset {preset.name} has {', '.join(preset.training)}, got {stage!r}")
    config = preset.training[stage]
    paper = TrainingOnPaper(preset, config, hardware, has_encoders=not options["encoded"])
    checkpointing = options["grad_checkpoint"] or config.run.checkpointing
    title = f"{preset.name}, {stage}"
    if size is not None:
        clip = BucketClip(f"{size[0]} frames of {size[1]} x {size[2]}", size, options["batch_size"] or 1)
        estimates = _settings(options, paper, clip)
        if options["json"]:
            return _print_json([asdict(estimate) for estimate in estimates])
        does_fit = options["sequence"] is not None or any(estimate.buckets[0].fits for estimate in estimates)
        return print_settings(title, clip, estimates, enough=None if does_fit else _enough(paper, clip))
    clips = list(buckets_of(config))
    if options["batch_size"]:
        clips = [replace(clip, batch=options["batch_size"]) for clip in clips]
    degree = options["sequence"] or config.parallel.ulysses * config.parallel.ring
    estimate = paper.estimate(clips, checkpointing=checkpointing, sequence_ranks=degree)
    return _print_json(asdict(estimate)) if options["json"] else print_buckets(title, estimate)


def _settings(options: dict[str, Any], paper: TrainingOnPaper, clip: BucketClip) -> list[Any]:
    """One estimate for every way to share and to recompute a clip, or for those that were asked for."""
    num_gpus = paper.hardware.num_gpus
    degrees = [options["sequence"]] if options["sequence"] else [n for n in _powers(num_gpus) if num_gpus % n == 0]
    modes = [options["grad_checkpoint"]] if options["grad_checkpoint"] else ["none", "selective", "full"]
    return [paper.estimate([clip], checkpointing=mode, sequence_ranks=n) for n in degrees for mode in modes]


def _enough(paper: TrainingOnPaper, clip: BucketClip) -> TrainingEstimate | None:
    """Of twice, four, ... 32 times the GPUs, all of which share the clip, the fewest that fit it."""
    for more in (2, 4, 8, 16, 32):
        hardware = replace(paper.hardware, num_gpus=more * paper.hardware.num_gpus)
        estimate = replace(paper, hardware=hardware).estimate(
            [clip], checkpointing="full", sequence_ranks=hardware.num_gpus
        )
        if estimate.buckets[0].fits:
            return estimate
    return None


def _sample(options: dict[str, Any], preset: Preset, hardware: Hardware, size: tuple[int, int, int] | None) -> int:
    from opensora.cli.estimate_tables import print_stages
    from opensora.estimate.sampling import SamplingOnPaper

    assert size is not None
    estimate = SamplingOnPaper(preset, hardware).estimate(size)
    if options["json"]:
        return _print_json(asdict(estimate) | {"fits": estimate.fits})
    return print_stages(estimate, fps=options["fps"])


def _powers(most: int) -> list[int]:
    return [2**n for n in range(most.bit_length()) if 2**n <= most]


def _print_json(value: Any) -> int:
    print(json.dumps(value, indent=1))
    return 0
