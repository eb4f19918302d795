"""The flat arguments of upsample_conv3d by name, and what follows from them. Axes: B, C, T, H, W; O output channels."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from opensora_kernels._triton.convolution import Taps


class Call(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    mode: str
    time_padding: str
    space_padding: str
    time_pad: int
    space_pad: list[int]  # left, right, top, bottom
    mix_factor: Tensor | None

    @property
    def has_phases(self) -> bool:
        """Whether the padding of the upsampled rows and columns is one of the small ones.

        A border that mirrors one pixel copies the outermost, which is also what lies beside the outermost small one;
        a wider mirrored border does not come in pairs.
        """
        return self.mode == "nearest_space" and (self.space_padding != "reflect" or max(self.space_pad) <= 1)

    @property
    def small_space_padding(self) -> str:
        return "zeros" if self.space_padding == "zeros" else "replicate"

    @property
    def upsampled_size(self) -> list[int]:
        num_frames, height, width = self.x.shape[2:]
        if self.mode == "nearest_space":
            return [num_frames, 2 * height, 2 * width]
        return [2 * num_frames - 1, height, width]

    @property
    def out_shape(self) -> list[int]:
        left, right, top, bottom = self.space_pad
        pads = (self.time_pad, top + bottom, left + right)
        sizes = zip(self.upsampled_size, pads, self.weight.shape[2:], strict=True)
        return [self.x.shape[0], self.weight.shape[0], *(size + pad - k + 1 for size, pad, k in sizes)]

    @property
    def taps(self) -> tuple[Taps, Taps, Taps]:
        """In frames, rows and columns of the upsampled clip."""
        starts = (-self.time_pad, -self.space_pad[2], -self.space_pad[0])
        return tuple(Taps(count, 1, start) for count, start in zip(self.weight.shape[2:], starts, strict=True))
