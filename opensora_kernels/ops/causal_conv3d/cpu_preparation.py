"""What happens to a clip before the convolution reads it, a few frames at a time, on a CPU.

The compiled library normalises, activates and pads frames where the convolution will read them; without it PyTorch
makes a copy for each of these, and another when they join the frames before them.
Axes: B batch, C channels, T frames, H height, W width.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from opensora_kernels import _extension, backends, cpu_norms, norms
from opensora_kernels._cpu import why_not_these
from opensora_kernels.causal_padding import pad_for_convolution, pad_time
from opensora_kernels.norms import memory_format

from . import reference


@dataclass
class Preparation:
    """activation(norm(x)), padded in space as far as the convolution does not do it itself."""

    x: Tensor
    norm: str
    weight: Tensor | None
    bias: Tensor | None
    num_groups: int
    eps: float
    per_frame: bool
    statistics: Tensor | None
    activation: str
    space_padding: str
    space_pad: list[int]
    state: Tensor | None  # frames in front of x, as the convolution reads them
    shows_x: bool  # a window may be a part of x; not where the result takes its memory meanwhile
    is_by_library: bool = field(init=False)
    _of_clip: Tensor | None = field(
        init=False
    )  # moments or, by PyTorch, statistics of all frames, if the norm wants them

    def __post_init__(self) -> None:
        self.is_by_library = self._can_be_by_library()
        self._of_clip = self._moments_of_clip() if self.is_by_library else self._statistics_of_clip()

    @property
    def padding(self) -> list[int]:
        """(T, H, W), left to the convolution: zeros, the same number on either side."""
        left, right, top, bottom = self.space_pad
        is_even = self.space_padding == "zeros" and left == right and top == bottom
        return [0, top, left] if is_even else [0, 0, 0]

    @property
    def border(self) -> list[int]:
        """(left, right, top, bottom), added here."""
        return [0] * 4 if any(self.padding) else self.space_pad

    @property
    def _changes(self) -> bool:
        return bool(self.norm or self.activation or any(self.border))

    def _can_be_by_library(self) -> bool:
        """Whether the compiled library takes these tensors. On meta tensors memory is planned as if it were there."""
        given = [each for each in (self.x, self.weight, self.bias, self.statistics) if each is not None]
        if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
            return False
        if any(type(each) is not Tensor for each in (self.x, self.state) if each is not None):
            return False
        if any(not isinstance(each, Tensor) for each in given) or backends.is_seen_through(*given, self.state):
            return False
        if self.norm == "rms" and any(each.dtype is not self.x.dtype for each in given):
            return False
        return why_not_these(self.x) is None and _extension.why_not_loaded("cpu") is None

    def _moments_of_clip(self) -> Tensor | None:
        if self.norm != "group" or self.per_frame:
            return None
        return cpu_norms.group_moments(self.x, self.num_groups, self.eps, False, self.statistics)

    def _statistics_of_clip(self) -> Tensor | None:
        if self.norm != "group" or self.per_frame or self.statistics is not None:
            return self.statistics
        return norms.group_statistics(self.x, self.num_groups)

    def window(self, previous: Tensor | None, num_kept: int, frames: slice, time_pad: int, time_padding: str) -> Tensor:
        """What the convolution reads: the last `num_kept` frames of the window before, then `frames`.

        The first window has in front the state or, without one, `time_pad` frames. The next one may take its memory; a
        part of x, where nothing is to be done, is only read.
        """
        is_first = previous is None
        num_front = num_kept if not is_first else time_pad if self.state is None else self.state.shape[2]
        start = frames.start - num_front
        if self.shows_x and not self._changes and start >= 0 and not (is_first and num_front):
            return self.x[:, :, start : frames.stop]
        if not self.is_by_library:
            return self._window_by_pytorch(previous, num_kept, frames, time_pad, time_padding)
        size = num_front + frames.stop - frames.start
        window = previous if not is_first and previous.shape[2] == size else self._empty(size)
        for index in range(0 if is_first else num_kept):  # in place: a frame moves to where another one was read
            window[:, :, index] = previous[:, :, previous.shape[2] - num_kept + index]
        self._write(frames, window[:, :, num_front:])
        if is_first and num_front:
            self._write_front(window, num_front, time_padding)
        return window

    def statistics_of(self, result: Tensor) -> Tensor:
        """`norms.frame_statistics` of some frames of the convolution's result."""
        if self.is_by_library and result.dtype is self.x.dtype and not backends.is_seen_through(result):
            return cpu_norms.frame_statistics(result)
        return norms.frame_statistics(result)

    def _write_front(self, window: Tensor, num_front: int, time_padding: str) -> None:
        front = window[:, :, :num_front]
        if self.state is not None:
            self._apply(self.state, None, front)
        elif time_padding == "zeros":
            front.zero_()
        else:
            front.copy_(window[:, :, num_front : num_front + 1].expand_as(front))

    def _empty(self, num_frames: int) -> Tensor:
        left, right, top, bottom = self.border
        num_samples, num_channels, _, height, width = self.x.shape
        size = (num_samples, num_channels, num_frames, height + top + bottom, width + left + right)
        return torch.empty(size, dtype=self.x.dtype, device=self.x.device, memory_format=memory_format(self.x))

    def _write(self, frames: slice, out: Tensor) -> None:
        part = self.x[:, :, frames]
        if self.norm == "rms":
            cpu_norms.apply_rms_norm(
                part, self.weight, self.bias, self.eps, self.activation == "silu", out, self.border,
                self.space_padding,
            )  # fmt: skip
            return
        moments = self._of_clip
        if self.norm == "group" and self.per_frame:
            given = self.statistics if self.statistics is None else self.statistics[:, :, frames]
            moments = cpu_norms.group_moments(part, self.num_groups, self.eps, True, given)
        self._apply(part, moments, out, self.activation == "silu")

    def _apply(self, part: Tensor, moments: Tensor | None, out: Tensor, has_silu: bool = False) -> None:
        cpu_norms.apply_group_norm(
            part, moments, self.weight, self.bias, has_silu, out, self.border, self.space_padding
        )

    def _window_by_pytorch(
        self, previous: Tensor | None, num_kept: int, frames: slice, time_pad: int, time_padding: str
    ) -> Tensor:
        statistics = self._of_clip
        if self.per_frame and statistics is not None:
            statistics = statistics[:, :, frames]
        hidden = reference.prepare(
            self.x[:, :, frames], self.norm, self.weight, self.bias, self.num_groups, self.eps, self.per_frame,
            statistics, self.activation,
        )  # fmt: skip
        hidden = self._bordered(hidden)
        if previous is not None:
            return _slide(previous, num_kept, hidden) if num_kept else hidden
        state = None if self.state is None else self._bordered(self.state)
        window = pad_time(hidden, time_pad, time_padding, state)
        return window.clone() if window is hidden and not self._changes else window

    def _bordered(self, x: Tensor) -> Tensor:
        return pad_for_convolution(x, 0, self.space_pad, "none", self.space_padding, None)[0]


def _slide(window: Tensor, num_kept: int, hidden: Tensor) -> Tensor:
    """The last `num_kept` frames of the window and those of `hidden`, in the window's own memory if they fill it."""
    num_dropped = window.shape[2] - num_kept
    if hidden.shape[2] != num_dropped:
        return torch.cat([window[:, :, num_dropped:], hidden], 2)
    for index in range(num_kept):
        window[:, :, index] = window[:, :, index + num_dropped]
    window[:, :, num_kept:] = hidden
    return window
