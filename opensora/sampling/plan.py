"""What a run of a sampler will do, checked, and how far it is."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from opensora.conditioning.masks import parse_mask_strategy
from opensora.config import SampleConfig
from opensora.sampling.guides import ClipShape
from opensora.sampling.requests import ClipSize, Request
from opensora.schedulers import Scheduler
from opensora_kernels.vae import TilePlan

OnProgress = Callable[[str, int, int], None]
"""Called as (stage, steps done, steps in all) whenever a step of "text", "denoise" or "decode" is done."""


@dataclass(frozen=True)
class Plan:
    """Checked work: every request, the size of a clip in pixels and latents; `decoding` None decodes a batch at once.

    `shape` has the frames that are made, of which `size.num_frames` are kept.
    """

    requests: tuple[Request, ...]
    config: SampleConfig
    scheduler: Scheduler
    size: ClipSize
    shape: ClipShape
    latent_size: tuple[int, int, int]
    decoding: TilePlan | None = None

    @property
    def num_clips(self) -> int:
        return len(self.requests) * self.config.num_sample

    def batches(self) -> list[list[tuple[Request, int]]]:
        """Requests and numbers of their samples, at most `batch_size` at a time.

        Clips with given frames draw other random numbers than those without: only clips of one kind share a batch, so
        that none depends on its neighbours.
        """
        jobs = [(request, sample) for request in self.requests for sample in range(self.config.num_sample)]
        batches = []
        for _, alike in itertools.groupby(jobs, lambda job: self._given_in(job[0])):
            group = list(alike)
            size = self.config.batch_size
            batches += [group[start : start + size] for start in range(0, len(group), size)]
        return batches

    def _given_in(self, request: Request) -> tuple[bool, ...]:
        """Of each loop, whether frames are given."""
        guide, groups = request.guide, parse_mask_strategy(request.mask_strategy)
        edits_frames = bool(guide.edit) and not guide.edit_region and guide.strength < 1
        first = bool(guide.start or guide.end) or edits_frames
        goes_on = guide.goes_backward or self.config.condition_frame_edit < 1
        return tuple(
            (goes_on if loop else first) or any(group.loop == loop and group.edit_ratio < 1 for group in groups)
            for loop in range(self.config.loop)
        )

    def arguments(self, batch: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """The scalars a model is told, each (B,), in its own dtype as upstream: bf16 makes 854 pixels 856."""
        size = self.size
        values = {"fps": size.fps, "height": size.height, "width": size.width, "num_frames": size.num_frames}
        values["ar"] = size.height / size.width
        return {name: torch.full((batch,), float(value), dtype=dtype, device=device) for name, value in values.items()}


class Progress:
    """Counts steps of each stage and passes the counts on."""

    def __init__(self, plan: Plan, on_progress: OnProgress | None) -> None:
        num_batches = len(plan.batches()) * plan.config.loop
        num_steps = len(plan.scheduler.sampling_timesteps(1, plan.arguments(1, torch.device("cpu"), torch.float32)))
        self._totals = {"text": 1, "denoise": num_batches * num_steps, "decode": num_batches}
        self._counts = dict.fromkeys(self._totals, 0)
        self._on_progress = on_progress

    def done(self, stage: str) -> None:
        self._counts[stage] += 1
        if self._on_progress is not None:
            self._on_progress(stage, self._counts[stage], self._totals[stage])
