"""Ways to run a model on a clip: whole, or streamed chunk by chunk. Any object with the same members is a third way.

Axes: B batch, C channels, T frames, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from math import inf
from numbers import Real
from pathlib import Path
from typing import Any, Protocol, get_args

from torch import Tensor

from .clip import record
from .graph import Node
from .inference import inference, made_one_by_one
from .loops import REMARK, Loop, loop_of
from .spill import Place, open_spill
from .streams import Run, pull_chunks

Model = Callable[[Tensor], Any]


class Strategy(Protocol):
    """A way to run a model. `is_exact`: the result is that of the model on the whole clip."""

    @property
    def is_exact(self) -> bool: ...

    def run(self, model: Model, x: Tensor) -> Iterator[Tensor]:
        """Chunks of model(x), in order, along axis 2."""
        ...


@dataclass(frozen=True)
class Whole:
    """The model as it is, on all frames at once."""

    is_exact = True

    def run(self, model: Model, x: Tensor) -> Iterator[Tensor]:
        with inference(x.device):
            result = [tensor_of(model(x))]
        yield result.pop()

    def __str__(self) -> str:
        return "whole: all frames at once"


@dataclass(frozen=True)
class Streaming:
    """`chunk_frames` frames of the clip in, the frames they make out, with the state of every layer carried along.

    Where a norm looks at all frames its input waits in the spill: "device", "host", or "file" in temporary files below
    `folder` (None: the system's place for them), which are gone when the run ends, however it ends.
    A fraction of a frame makes steps smaller than what one frame of the clip becomes.
    A model that steps through the clip by itself (see `decoder_of`) does so: its steps are its own. `by_layer`: it is
    recorded over all frames instead, as any other model is, and each of its layers streams, step after step; the frames
    at a time are those of one step at most.
    """

    chunk_frames: int | Fraction = 1
    spill: Place = "device"
    folder: str | Path | None = None
    by_layer: bool = False
    is_exact = True

    def __post_init__(self) -> None:
        if not isinstance(self.chunk_frames, Real) or isinstance(self.chunk_frames, bool):
            raise TypeError(f"Streaming: chunk_frames must be a number, got {self.chunk_frames!r}")
        if not 0 < self.chunk_frames < inf:
            raise ValueError(f"Streaming: chunk_frames must be above 0 and finite, got {self.chunk_frames}")
        if self.spill not in get_args(Place):
            raise ValueError(f"Streaming: spill must be one of {', '.join(get_args(Place))}, got {self.spill!r}")

    def run(self, model: Model, x: Tensor) -> Iterator[Tensor]:
        if (loop := self.loop_in(model, x.shape[2])) is not None:
            return loop.chunks(x)
        return self.run_recorded(record(model, tuple(x.shape), x.dtype, x.device), x)

    def run_recorded(self, recorded: Node, x: Tensor) -> Iterator[Tensor]:
        run = Run(x, self.share(x.shape[2]), lambda tensor: tensor)
        with open_spill(self.spill, self.folder) as spill:
            yield from made_one_by_one(pull_chunks(recorded, run, spill), x.device)

    def loop_in(self, model: Model, num_frames: int) -> Loop | None:
        """The model's own loop over so many frames, if that is what runs."""
        return None if self.by_layer else loop_of(model, num_frames)

    def as_run_by(self, model: Model, num_frames: int) -> Streaming:
        """What a model makes of it for a clip of so many frames: its own steps where it has any, which it prints."""
        return self if self.loop_in(model, num_frames) is None else OwnSteps()

    def share(self, num_frames: int) -> Fraction:
        """Of all frames of a clip, those at a time."""
        return min(Fraction(1), Fraction(self.chunk_frames) / num_frames)

    def __str__(self) -> str:
        frames = "frame" if self.chunk_frames == 1 else "frames"
        layers = "layer by layer, " if self.by_layer else ""
        return f"streaming: {layers}{self.chunk_frames} {frames} of the clip at a time, spill on {self.spill}"


class OwnSteps(Streaming):
    """`Streaming` for a model that is known to step through the clip by itself."""

    def __str__(self) -> str:
        return f"streaming: {REMARK}"


def tensor_of(result: Any) -> Tensor:
    result = getattr(result, "sample", result)
    if isinstance(result, tuple) and len(result) == 1:
        (result,) = result
    if not isinstance(result, Tensor):
        raise TypeError(f"the model must return one tensor, got {type(result).__name__}")
    return result
