"""`opensora sample`: images and videos from text, and from images and videos to go on from."""

from __future__ import annotations

import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from opensora import presets
from opensora.cli import CommandError
from opensora.cli.options import OrNone, Parser, early_option
from opensora.config import (
    DiffusersSamplerConfig,
    DPMSolverConfig,
    IDDPMConfig,
    ParallelConfig,
    Precision,
    Preset,
    RectifiedFlowConfig,
    SampleConfig,
    SampleMethod,
    SchedulerConfig,
)

if TYPE_CHECKING:
    from opensora.parallel import ParallelContext
    from opensora.sampler import Clip, OnProgress, Sampler
    from opensora.sampling.requests import Request
    from opensora.sampling.stages import StageCost
    from opensora_kernels import SequenceShards

MAX_SHEET_ROWS = 16


def run(arguments: Sequence[str]) -> int:
    from opensora.sampling.guides import Guide
    from opensora.sampling.requests import clip_size, read_requests

    preset = presets.get(early_option(arguments, "--preset", presets.names()[0]))
    options = _parser(preset).parse(arguments)
    config, scheduler = _configs(preset, options)
    prompts = _read_prompts(options)
    outputs = _Outputs(options, config, prompts.texts)
    conditions = {"reference_paths": options["reference_path"], "mask_strategies": options["mask_strategy"]}
    conditions["first_index"] = prompts.first_index
    conditions["guides"] = [Guide(**{item.name: options[item.name] for item in fields(Guide)})]
    with _places(prompts):
        clip_size(config)
        # What is wrong already shows before the models are loaded, and whether there is anything to do.
        requests = outputs.to_do(read_requests(prompts.texts, config, **conditions))
        if not requests:
            print("nothing to do: all files exist")
            return 0
        context = _context(options, config)
        config = replace(config, device=str(context.device))
        sampler, load_cost = _load(preset, options, config, context.sequence)
        plan = sampler.plan(prompts.texts, config, scheduler=scheduler, **conditions)
    with _progress_bar(is_shown=context.is_main) as on_progress:
        try:
            plan = replace(plan, requests=tuple(outputs.to_do(plan.requests)))
            for clip in sampler.run(plan, on_progress=on_progress):
                if context.is_main:
                    outputs.save(clip)
        except KeyboardInterrupt:
            done = len(outputs.saved)
            raise KeyboardInterrupt(f"{done} of {plan.num_clips} clips are finished and saved") from None
    context.close()
    if not context.is_main:
        return 0
    outputs.save_sheet()
    _print_results(outputs, {"load": load_cost, **sampler.costs}, on_cpu=sampler.device.type == "cpu")
    return 0


def _parser(preset: Preset) -> Parser:
    sample, scheduler = preset.sample, preset.scheduler
    parser = Parser("sample", "Make images and videos from text, and from images and videos to go on from.")
    add = parser.add_argument
    add("--preset", type=str, default=preset.name, help=f"one of {', '.join(presets.names())}")
    add("--config", action="config", help="YAML file with any of the options below")
    models = "folder or hub id, in place of the preset's"
    add("--checkpoint", "--ckpt-path", type=str, help=f"the diffusion transformer: {models}")
    add("--vae", type=str, help=f"the VAE: {models}")
    add("--text-encoder", type=str, help=f"the text encoder: {models}")

    add("--prompt", action="extend", type=str, nargs="+", help="one or more prompts")
    add("--prompt-path", type=str, help="a text file with a prompt on each line")
    add("--start-index", type=int, default=0, help="first prompt of the file to use, from 0")
    add("--end-index", type=int, help="the prompt of the file to stop before")
    add("--negative-prompt", type=str, default=sample.negative_prompt, help="what to move away from")
    add("--aes", type=OrNone(float), default=sample.aes, help="aesthetic score to ask for, about 4 to 7")
    add("--flow", type=OrNone(float), default=sample.flow, help="motion score to ask for, 0 to 100")
    add("--camera-motion", type=OrNone(str), default=sample.camera_motion, help="pan right, zoom in, static, ...")

    add("--num-frames", type=str, default=sample.num_frames, help='frames ("51"; 1 is an image) or seconds ("4s")')
    add("--resolution", type=OrNone(str), default=sample.resolution, help="144p to 4k")
    add("--aspect-ratio", type=OrNone(str), default=sample.aspect_ratio, help="height:width, as 9:16")
    image_size = list(sample.image_size) if sample.image_size else None
    add("--image-size", type=int, nargs=2, default=image_size, metavar=("H", "W"), help="pixels")
    add("--fps", type=float, default=sample.fps, help="frames per second the model is told")
    add("--save-fps", type=OrNone(float), default=sample.save_fps, help="of the file; default fps // frame interval")
    add("--frame-interval", type=int, default=sample.frame_interval)

    begin = "an image that is the first frame, or a video to go on from"
    add("--start", type=str, default="", help=begin)
    add("--end", type=str, default="", help="an image that is the last frame, or a video to lead up to")
    add("--edit", type=str, default="", help="a video (for an image: an image) to make a changed copy of")
    add("--edit-ratio", type=float, help="0 changes nothing, 1 everything; default: 0.7, with a region 1")
    region = "top,left,height,width in pixels, or a picture or video that is bright where to edit; the rest stays"
    add("--edit-region", type=str, default="", help=region)
    add("--join-given", type=bool, default=sample.join_given, help="put the videos of --start and --end into the file")
    add("--reference-path", type=str, nargs="+", help="images or videos, joined by ';': one list, or one per prompt")
    strategy = "loop,reference,reference start,target start,length,edit ratio; latent frames; joined by ';'"
    add("--mask-strategy", type=str, nargs="+", help=strategy)
    add("--loop", type=int, default=sample.loop, help="parts of a clip: each goes on from the end of the one before")
    add("--condition-frame-length", type=int, default=sample.condition_frame_length, help="latent frames repeated")
    add("--condition-frame-edit", type=float, default=sample.condition_frame_edit, help="0 keeps them, 1 makes new")
    add("--align", type=OrNone(int), default=sample.align, help="latent frames that starts are rounded to")

    methods = _methods(preset)
    add("--sample-method", type=str, default=methods[0], help=f"one of {', '.join(methods)}")
    usual = f"default: {scheduler.num_sampling_steps}, or what is usual for the method"
    add("--num-sampling-steps", type=OrNone(int), help=usual)
    add("--cfg-scale", type=float, default=scheduler.cfg_scale, help="how closely to follow the prompt; 1: no guidance")
    add("--num-sample", type=int, default=sample.num_sample, help="clips of each prompt")
    add("--batch-size", type=int, default=sample.batch_size, help="clips made at a time")
    add("--seed", type=int, default=sample.seed, help="of the first clip; clip n takes seed + n")
    add("--dtype", type=Precision, default=sample.dtype)
    add("--text-dtype", type=Precision, default=sample.text_dtype)
    memory = 'what decoding may take beyond latents and weights, as "10GiB"; default: all frames at once'
    add("--vae-memory", type=OrNone(str), default=sample.vae_memory, help=memory)
    add("--device", type=str, default=sample.device, help="auto, cpu, cuda, npu, ...")
    ring = (
        "of the processes of torchrun, which make each clip together, how many groups pass keys round; the ranks of a "
    )
    add("--ring", type=int, default=1, help=ring + "group trade tokens for heads, which should be as many or more")
    add("--offload", type=bool, default=False, help="each model is on the device only while it works")
    add("--text-cache", type=OrNone(str), help="a folder for embeddings; the encoder is loaded for new texts alone")

    add("-o", "--output", type=str, help="file for a single clip: .mp4, .gif, or .png for an image")
    add("--save-dir", type=str, default="samples", help="folder for the clips when there is no --output")
    add("--sample-name", type=str, default="sample", help="what file names in the folder begin with")
    add("--prompt-as-path", type=bool, default=False, help="name files by their prompts and skip those that exist")
    add("--resume", type=bool, default=False, help="skip clips whose files exist: go on after an interruption")
    add("--contact-sheet", type=bool, default=True, help="write a picture of frames of the videos beside them")
    return parser


def _configs(preset: Preset, options: dict[str, Any]) -> tuple[SampleConfig, SchedulerConfig]:
    values = {item.name: options.get(item.name, getattr(preset.sample, item.name)) for item in fields(SampleConfig)}
    values["image_size"] = tuple(values["image_size"]) if values["image_size"] is not None else None
    config = SampleConfig(**values)
    sized_by_name = (config.resolution, config.aspect_ratio) != (preset.sample.resolution, preset.sample.aspect_ratio)
    if sized_by_name and config.image_size == preset.sample.image_size:
        config = replace(config, image_size=None)
    steps = options["num_sampling_steps"]
    if steps is not None and steps < 1:
        raise CommandError(f"num_sampling_steps: must be at least 1, got {steps}")
    method, methods = options["sample_method"], _methods(preset)
    if method not in methods:
        raise CommandError(f"sample_method: must be one of {', '.join(methods)} for {preset.name}, got {method!r}")
    scheduler = preset.scheduler if method == methods[0] else _scheduler(preset, method)
    steps = steps or scheduler.num_sampling_steps
    return config, replace(scheduler, num_sampling_steps=steps, cfg_scale=options["cfg_scale"])


_NOISE_METHODS = ("iddpm", "ddim", "dpm-solver", *get_args(SampleMethod))
"""For models that predict noise. Of the names, capital letters are diffusers', as Open-Sora-Plan spells them."""


def _scheduler(preset: Preset, method: str) -> SchedulerConfig:
    """Another way to sample than the preset's own, with what the model's training says of it."""
    if method in ("iddpm", "ddim"):
        own = preset.scheduler if isinstance(preset.scheduler, IDDPMConfig) else IDDPMConfig(table_dtype="float64")
        return replace(own, sampler="ddim" if method == "ddim" else "ddpm")
    return DPMSolverConfig() if method == "dpm-solver" else DiffusersSamplerConfig(sample_method=method)


def _methods(preset: Preset) -> list[str]:
    """Names of the ways to sample a preset's model, its own first."""
    scheduler = preset.scheduler
    if isinstance(scheduler, RectifiedFlowConfig):
        return ["rflow"]
    names = list(_NOISE_METHODS)
    kinds = {IDDPMConfig: "iddpm", DPMSolverConfig: "dpm-solver"}
    own = scheduler.sample_method if isinstance(scheduler, DiffusersSamplerConfig) else kinds[type(scheduler)]
    return [own, *(name for name in names if name != own)]


@dataclass(frozen=True)
class _Prompts:
    """Prompts, where each came from, and the number of the first in its file."""

    texts: list[str]
    places: list[str]
    first_index: int = 0


def _read_prompts(options: dict[str, Any]) -> _Prompts:
    given, path = options["prompt"], options["prompt_path"]
    if bool(given) == bool(path):
        raise CommandError('give either --prompt "a red circle moving left" or --prompt-path FILE')
    if given:
        return _Prompts(list(given), [f"prompt {i + 1}" for i in range(len(given))])
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        line = Path(path).read_bytes()[: error.start].count(b"\n") + 1
        raise CommandError(f"{path}, line {line}: is not UTF-8 text") from error
    numbered = [(line.strip(), number) for number, line in enumerate(lines, start=1) if line.strip()]
    if options["start_index"] < 0:
        raise CommandError(f"start_index: must be 0 or more, got {options['start_index']}")
    chosen = numbered[options["start_index"] : options["end_index"]]
    if not chosen:
        raise CommandError(f"{path}: holds {len(numbered)} prompts, none from --start-index to --end-index")
    texts, places = [text for text, _ in chosen], [f"{path}, line {number}" for _, number in chosen]
    return _Prompts(texts, places, options["start_index"])


def _context(options: dict[str, Any], config: SampleConfig) -> ParallelContext:
    """All processes of torchrun on the same clips; one process without it."""
    from opensora.parallel import ParallelContext

    num_ranks, ring = int(os.environ.get("WORLD_SIZE", 1)), options["ring"]
    if ring < 1 or num_ranks % ring:
        raise CommandError(f"ring: must divide the number of processes, {num_ranks}, got {ring}")
    parallel = ParallelConfig(ulysses=num_ranks // ring, ring=ring)
    return ParallelContext.from_environment(parallel, config.device)


def _load(
    preset: Preset, options: dict[str, Any], config: SampleConfig, sequence: SequenceShards | None
) -> tuple[Sampler, StageCost]:
    from transformers.utils import logging

    from opensora.parallel import resolve_device
    from opensora.sampler import Sampler
    from opensora.sampling.stages import StageMeter

    logging.disable_progress_bar()  # ours says more
    meter = StageMeter(resolve_device(config.device))
    with meter.stage("load"):
        sampler = Sampler.from_preset(
            preset.name,
            vae=options["vae"],
            transformer=options["checkpoint"],
            text_encoder=options["text_encoder"],
            config=config,
            offload=options["offload"],
            text_cache=options["text_cache"],
            sequence=sequence,
        )
    return sampler, meter.costs["load"]


@contextmanager
def _places(prompts: _Prompts) -> Iterator[None]:
    """Errors in a prompt name its line in the file."""
    from opensora.sampling.requests import PromptError

    try:
        yield
    except PromptError as error:
        raise CommandError(f"{prompts.places[error.index]}: {error.reason}") from error


class _Outputs:
    """Names files, writes them, and remembers what was written."""

    def __init__(self, options: dict[str, Any], config: SampleConfig, prompts: Sequence[str]) -> None:
        num_clips = len(prompts) * config.num_sample
        self._num_of_text = Counter(prompt.partition("{")[0] for prompt in prompts)
        self.saved: list[tuple[Path, Clip]] = []
        self.sheet: Path | None = None
        self._file = Path(options["output"]) if options["output"] else None
        self._folder = Path(options["save_dir"])
        self._options, self._config = options, config
        self._suffix = ".png" if config.num_frames == "1" and config.loop == 1 else ".mp4"
        if self._file is None:
            return
        if num_clips > 1:
            raise CommandError(f"output: holds one clip, but {num_clips} are asked for; use --save-dir FOLDER")
        known = (".mp4", ".gif", ".png") if self._suffix == ".png" else (".mp4", ".gif")
        if self._file.suffix.lower() not in known:
            raise CommandError(f"output: must end in {', '.join(known)}, got {str(self._file)!r}")

    def to_do(self, requests: Sequence[Request]) -> list[Request]:
        """With --resume or --prompt-as-path, prompts whose files are all there are not done again."""
        if not self._options["resume"] and (self._file is not None or not self._options["prompt_as_path"]):
            return list(requests)
        samples = range(self._config.num_sample)

        def is_done(request: Request) -> bool:
            paths = [self._file] if self._file else [self._path(request.prompt, request.index, k) for k in samples]
            return all(path.exists() for path in paths)

        return [request for request in requests if not is_done(request)]

    def save(self, clip: Clip) -> None:
        path = self._file or self._path(clip.prompt, clip.index, clip.sample)
        self.saved.append((clip.save(path), clip))

    def save_sheet(self) -> None:
        """A row of frames for each of the first videos."""
        from opensora.video import write_contact_sheet

        clips = [clip.frames for _, clip in self.saved[:MAX_SHEET_ROWS]]
        if not self._options["contact_sheet"] or not clips or len(clips[0]) == 1:
            return
        sheet = self._folder / f"{self._options['sample_name']}-sheet.png"
        if self._file is not None:
            sheet = self._file.with_name(f"{self._file.stem}-sheet.png")
        self.sheet = write_contact_sheet(sheet, clips)

    def _path(self, prompt: str, index: int, sample: int) -> Path:
        if self._options["prompt_as_path"]:
            # VBench looks for "<prompt>-<number>.mp4"; a file name may have 255 bytes.
            text = re.sub(r"[/\\\0]", " ", prompt.partition("{")[0]).strip()
            name = f"{text.encode()[:200].decode(errors='ignore')}-{sample}"
            if self._num_of_text[prompt.partition("{")[0]] > 1:  # the same words with other JSON after them
                name += f"-{index:04d}"
        else:
            name = f"{self._options['sample_name']}_{index:04d}"
            name += f"-{sample}" if self._config.num_sample > 1 else ""
        return self._folder / f"{name}{self._suffix}"


@contextmanager
def _progress_bar(*, is_shown: bool) -> Iterator[OnProgress | None]:
    """A bar on standard error with the time left; where that is no terminal, a line for each tenth."""
    if not is_shown:
        yield None
        return
    if not sys.stderr.isatty():
        yield _print_tenths
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description:<8}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("text", total=None)

        def show(stage: str, done: int, total: int) -> None:
            if stage == "denoise":
                progress.update(task, description=stage, completed=done, total=total)
            else:
                progress.update(task, description=stage)

        yield show


def _print_tenths(stage: str, done: int, total: int) -> None:
    if stage == "denoise" and done * 10 // total > (done - 1) * 10 // total:
        print(f"{stage} {done}/{total}", file=sys.stderr, flush=True)


def _print_results(outputs: _Outputs, costs: dict[str, StageCost], *, on_cpu: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    for path, clip in outputs.saved:
        num_frames, _, height, width = clip.frames.shape
        kind = "image" if num_frames == 1 else f"{num_frames} frames at {clip.fps:g} fps"
        print(f"{path}: {kind}, {height} x {width}, seed {clip.seed}: {clip.prompt}")
    if outputs.sheet is not None:
        print(f"{outputs.sheet}: contact sheet")
    table = Table("stage", title="resident memory of the process" if on_cpu else "memory of the device")
    table.add_column("seconds", justify="right")
    table.add_column("peak MiB", justify="right")
    for name, cost in costs.items():
        table.add_row(name, f"{cost.seconds:.2f}", f"{cost.peak_bytes / 2**20:,.0f}")
    Console().print(table)
