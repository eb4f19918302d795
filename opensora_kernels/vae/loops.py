"""Models that step through a clip by themselves: some frames in, some out, and caches from one step to the next.

Recording one gives a graph as long as the clip. Its own steps give the same frames, one after the other, in the memory
of one step.

Axes: B batch, C channels, T frames, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from opensora_kernels.cpu_steps import counted

from .clip import CannotRecord, clip_of
from .inference import inference, on_paper
from .memory import Ledger
from .modules import is_on_meta

Span = tuple[int, int]
Spans = Callable[[int], "Sequence[Span] | None"]
Step = Callable[[Tensor, Any], tuple[Tensor, Any]]
REMARK = "the model steps through the clip by itself: chunks are its own, of any length"
# Steps of the same length that are looked at one by one: the first fill the caches, the last one stands for the rest.
NUM_LOOKED_AT = 4


@dataclass(frozen=True)
class Loop:
    """A model, and the loop over frames that it runs inside.

    whole: the model on all frames at once. spans(T): which frames each step takes, from and to, which may overlap; None
    if the model takes T frames at once. step(frames, state) -> (chunk, next state): one round of the loop; `state` is
    None at first, and what the model would keep in its modules is given back to them as it was.
    num_frames(T): where the model cuts off what its steps make beyond that.
    """

    whole: Callable[[Tensor], Any]
    spans: Spans
    step: Step
    num_frames: Callable[[int], int] | None = None

    def __call__(self, x: Tensor) -> Any:
        return self.whole(x)

    def chunks(self, x: Tensor) -> Iterator[Tensor]:
        """The frames of whole(x), as each step makes them. Nothing is left behind where the caller stops half-way."""
        left = self.num_frames(x.shape[2]) if self.num_frames else None
        state = None
        for start, stop in self.spans(x.shape[2]):
            with inference(x.device):  # not around the yield: what the caller does there is not ours
                made, state = self.step(x[:, :, start:stop], state)
            if left is not None:
                made = made[:, :, :left]
                left -= made.shape[2]
            chunk = [made]
            del made  # not to be held while the caller works
            if chunk[0].shape[2]:
                yield chunk.pop()


@dataclass(frozen=True)
class Outlook:
    """What the steps of a loop will take: most bytes alive at once, cost in bytes moved, frames they make."""

    peak_bytes: int
    cost: float
    num_frames: int


def loop_of(model: Any, num_frames: int) -> Loop | None:
    """The model's loop over so many frames, None if it has none."""
    return model if isinstance(model, Loop) and model.spans(num_frames) is not None else None


def foresee(
    loop: Loop,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    num_looked_at: int = NUM_LOOKED_AT,
) -> Outlook:
    """The steps of a clip of `shape` on tensors without data, as many as differ.

    TypeError if a step looks at values or writes into parts of a tensor; ValueError if the steps leave out frames.
    """
    spans = loop.spans(shape[2])
    if left_out := shape[2] - len({frame for start, stop in spans for frame in range(start, stop)}):
        raise ValueError(f"the model's own steps leave out {left_out} of {shape[2]} frames")
    place = torch.device("meta") if is_on_meta(loop) else device
    ledger, state = Ledger(device), None
    cost, num_frames = 0.0, 0
    with on_paper(device), counted(), ledger:
        for length, times in _different(spans, num_looked_at):
            before = ledger.cost
            with ledger.paused():  # frames of the clip are there already
                frames = clip_of((*shape[:2], length, *shape[3:]), dtype, place)
            try:
                made, state = loop.step(frames, state)
            except CannotRecord as error:
                raise TypeError(str(error)) from error
            cost += times * (ledger.cost - before)
            num_frames += times * made.shape[2]
            del made
    return Outlook(ledger.peak, cost, num_frames if loop.num_frames is None else loop.num_frames(shape[2]))


def _different(spans: Sequence[Span], num_looked_at: int) -> Iterator[tuple[int, int]]:
    """(frames, steps) with the steps of a kind together, but for the first ones."""
    for length, group in groupby(stop - start for start, stop in spans):
        count = len(list(group))
        for _ in range(min(count, num_looked_at) - 1):
            yield length, 1
        yield length, max(1, count - num_looked_at + 1)
