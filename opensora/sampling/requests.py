"""What a prompt asks for: its texts, references and masks, checked before any work is done."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from opensora.conditioning.masks import parse_mask_strategy
from opensora.conditioning.prompts import append_scores, merge_loops, prompt_for_loop, split_json, split_loops
from opensora.config import SampleConfig
from opensora.data.aspect_ratios import get_image_size, get_num_frames
from opensora.data.reading import VideoError, probe
from opensora.sampling.guides import Guide
from opensora.text.cleaning import clean_caption

CHUNK_FRAMES = 17
IMAGE_FPS = 120.0  # the frame rate that stands for a still image


class PromptError(ValueError):
    """A prompt that cannot be used; `index` counts the prompts of the call from 0."""

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(f"prompt {index + 1}: {reason}")
        self.index = index
        self.reason = reason


@dataclass(frozen=True)
class Request:
    """One prompt, ready: `texts` per loop as the text encoder reads them, references as files, and how to use them.

    negative: what guidance moves away from, as the text encoder reads it; None stands for the model's null caption.
    """

    index: int
    prompt: str
    texts: tuple[str, ...]
    references: tuple[str, ...] = ()
    mask_strategy: str = ""
    guide: Guide = field(default_factory=Guide)
    negative: str | None = None


@dataclass(frozen=True)
class ClipSize:
    """Frames and pixels of one generated clip (of one loop), and the frame rates it is made and saved for."""

    num_frames: int
    height: int
    width: int
    fps: float
    save_fps: float


def clip_size(config: SampleConfig) -> ClipSize:
    """The size that `config` asks for. Errors: ValueError for unknown names, sizes and rates that are not positive."""
    num_frames = _num_frames(config)
    if config.image_size is not None:
        height, width = config.image_size
        if min(height, width) < 1:
            raise ValueError(f"image_size: must be a positive height and width, got {height} {width}")
    elif config.resolution is None or config.aspect_ratio is None:
        raise ValueError(
            "resolution and aspect_ratio: must be given together, as 240p and 9:16, or image_size instead, "
            f"got resolution {config.resolution} and aspect_ratio {config.aspect_ratio}"
        )
    else:
        height, width = get_image_size(config.resolution, config.aspect_ratio)
    if config.fps <= 0 or config.frame_interval < 1:
        raise ValueError(
            f"fps and frame_interval: must be positive, got fps {config.fps} and frame_interval {config.frame_interval}"
        )
    if config.save_fps is not None and config.save_fps <= 0:
        raise ValueError(f"save_fps: must be positive, got {config.save_fps}")
    save_fps = config.save_fps or max(1.0, config.fps // config.frame_interval)
    return ClipSize(num_frames, height, width, config.fps if num_frames > 1 else IMAGE_FPS, save_fps)


def _num_frames(config: SampleConfig) -> int:
    """Names of seconds are those of Open-Sora 1.2 (2s = 51) at its 24 fps, at other rates the next whole number of its
    chunks; where frames are skipped, as in 1.0 and 1.1, as many as are shown in that time (2s = 16)."""
    seconds = re.fullmatch(r"(\d+(?:\.\d+)?)s", config.num_frames)
    if seconds is not None and config.frame_interval > 1:
        return max(1, math.ceil(float(seconds[1]) * config.fps / config.frame_interval))
    if seconds is None or config.fps == 24:
        return get_num_frames(config.num_frames)
    return CHUNK_FRAMES * max(1, math.ceil(float(seconds[1]) * config.fps / CHUNK_FRAMES))


def read_requests(
    prompts: Sequence[str],
    config: SampleConfig,
    *,
    reference_paths: Sequence[str | None] | None = None,
    mask_strategies: Sequence[str | None] | None = None,
    guides: Sequence[Guide | None] | None = None,
    first_index: int = 0,
) -> list[Request]:
    """Prompts in upstream's order: JSON split, references, loop split, score suffix, cleaning.

    One reference path, mask strategy and guide serve all prompts, or there is one for each; those in a prompt's JSON
    win. A reference without a strategy gets "0": its first latent frame becomes the clip's first. `first_index` is the
    number of the first prompt where these are a part of a longer list.
    Errors: ValueError for counts that do not match and options out of range; PromptError naming the first prompt that
    is wrong.
    """
    if not prompts:
        raise ValueError("prompts: at least one is needed, got none")
    if config.loop < 1 or config.num_sample < 1 or config.batch_size < 1:
        raise ValueError(
            "loop, num_sample and batch_size: must be at least 1, "
            f"got {config.loop}, {config.num_sample} and {config.batch_size}"
        )
    if config.align is not None and config.align < 1:
        raise ValueError(f"align: must be at least 1, or None for starts as they are, got {config.align}")
    if not 0 <= config.condition_frame_edit <= 1:
        raise ValueError(f"condition_frame_edit: must lie in [0, 1], got {config.condition_frame_edit}")
    if not -(1 << 63) <= config.seed < 1 << 63:  # what a torch.Generator takes
        raise ValueError(f"seed: must lie in [-2**63, 2**63), got {config.seed}")
    paths = _one_each("reference_path", reference_paths, len(prompts))
    strategies = _one_each("mask_strategy", mask_strategies, len(prompts))
    each_guide = _one_each("start, end, edit", guides, len(prompts))
    requests = []
    for index, (prompt, path, strategy, guide) in enumerate(zip(prompts, paths, strategies, each_guide, strict=True)):
        try:
            requests.append(_read_request(first_index + index, prompt, path, strategy, guide or Guide(), config))
        except ValueError as error:
            raise PromptError(index, str(error)) from error
    return requests


def _one_each(name: str, values: Sequence[Any] | None, count: int) -> list[Any]:
    values = [value or "" for value in values or [""]]
    if len(values) not in (1, count):
        raise ValueError(f"{name}: there must be one, or one for each of the {count} prompts, got {len(values)}")
    return values * count if len(values) == 1 else values


def _read_request(index: int, prompt: str, path: str, strategy: str, guide: Guide, config: SampleConfig) -> Request:
    parts = split_json(prompt)
    own = {item.name: getattr(parts, item.name) for item in fields(Guide)}
    guide = replace(guide, **{name: value for name, value in own.items() if value not in ("", None)})
    references = [name for name in (parts.reference_path or path).split(";") if name]
    strategy = parts.mask_strategy or strategy or ("0" if references else "")
    if guide and (references or strategy):
        raise ValueError("start, end, edit: must not be given beside reference_path and mask_strategy")
    for name in references:
        check_reference(name)
    for group in parse_mask_strategy(strategy):
        if group.loop < config.loop and not 0 <= group.reference < len(references) + group.loop:
            raise ValueError(
                f"mask_strategy {strategy!r}: names reference {group.reference}, "
                f"but loop {group.loop} has {len(references) + group.loop}"
            )
    texts, starts = split_loops(parts.text)
    texts = [
        clean_caption(append_scores(text, aes=config.aes, flow=config.flow, camera_motion=config.camera_motion))
        for text in texts
    ]
    if not any(texts):
        raise ValueError(f"the text must not be empty, got {prompt!r}")
    merged = merge_loops(texts, starts)
    of_loop = tuple(prompt_for_loop(merged, loop) for loop in range(config.loop))
    negative = config.negative_prompt if parts.negative_prompt is None else parts.negative_prompt
    negative = None if negative is None else clean_caption(negative)
    return Request(index, prompt, of_loop, tuple(references), strategy, guide, negative)


def check_reference(path: str) -> None:
    """ValueError when the image or video cannot be opened."""
    try:
        probe(path)
    except VideoError as error:
        missing = "" if Path(path).exists() else " (no such file)"
        raise ValueError(f"reference_path: {error}{missing}") from error
