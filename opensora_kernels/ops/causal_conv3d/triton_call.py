"""The flat arguments of causal_conv3d by name, and what follows from them. Axes: B, C, T, H, W; O output channels."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from opensora_kernels._triton.convolution import Taps
from opensora_kernels.norms import memory_format


class Call(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    stride: list[int]
    dilation: list[int]
    groups: int
    time_padding: str
    space_padding: str
    time_pad: int
    space_pad: list[int]  # left, right, top, bottom
    state: Tensor | None
    norm: str
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    num_groups: int
    eps: float
    per_frame: bool
    statistics: Tensor | None
    activation: str
    residual: Tensor | None
    return_state: bool
    return_statistics: bool

    @property
    def reads_x_itself(self) -> bool:
        """Whether no norm or activation lies between x and the convolution."""
        return not (self.norm or self.activation)

    @property
    def num_front(self) -> int:
        """Frames before x: given ones or padding."""
        return self.time_pad if self.state is None else self.state.shape[2]

    @property
    def layout(self) -> torch.memory_format:
        return memory_format(self.x)

    @property
    def taps(self) -> tuple[Taps, Taps, Taps]:
        """For frames counted from the state's first, or from x's first without one; rows and columns of x."""
        starts = (0 if self.state is not None else -self.time_pad, -self.space_pad[2], -self.space_pad[0])
        sizes = zip(self.weight.shape[2:], self.stride, starts, self.dilation, strict=True)
        return tuple(Taps(count, step, start, dilation) for count, step, start, dilation in sizes)

    @property
    def padded_size(self) -> list[int]:
        left, right, top, bottom = self.space_pad
        num_frames, height, width = self.x.shape[2:]
        return [num_frames + self.num_front, height + top + bottom, width + left + right]

    @property
    def library_padding(self) -> list[int]:
        """What PyTorch's convolution adds itself: the same zeros on both sides."""
        left, right, top, bottom = self.space_pad
        is_even = self.space_padding == "zeros" and left == right and top == bottom
        return [0, top, left] if is_even else [0, 0, 0]

    @property
    def written_space_pad(self) -> list[int]:
        """The borders that are written for PyTorch's convolution."""
        return [0, 0, 0, 0] if any(self.library_padding) else self.space_pad

    @property
    def out_shape(self) -> list[int]:
        sizes = zip(self.padded_size, self.weight.shape[2:], self.stride, self.dilation, strict=True)
        return [self.x.shape[0], self.weight.shape[0], *((n - d * (k - 1) - 1) // s + 1 for n, k, s, d in sizes)]

    def empty(self, shape: list[int], dtype: torch.dtype | None = None) -> Tensor:
        """Memory for a tensor (B, C, T, H, W) in x's order of axes."""
        return torch.empty(shape, dtype=dtype or self.x.dtype, device=self.x.device, memory_format=self.layout)
