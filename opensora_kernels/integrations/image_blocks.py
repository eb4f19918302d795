"""Forwards of the blocks of diffusers' image VAEs, which video VAEs run on every frame.

Pictures with channels last are a clip whose frames lie one after the other, which a CPU takes a few at a time. Others
are clips of one frame each.
Axes: N pictures, C channels, H height, W width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from opensora_kernels.ops.causal_conv3d import causal_conv3d
from opensora_kernels.ops.upsample_conv3d import upsample_conv3d

from .norms import norm_of
from .steps import a_few_at_a_time, is_on_cpu, may_write


def is_image_block(module: nn.Module) -> bool:
    """diffusers' ResnetBlock2D as its image VAEs have it: without an embedding, resampling or a scale."""
    names = ("norm1", "conv1", "norm2", "conv2", "nonlinearity", "dropout", "time_emb_proj", "conv_shortcut")
    if not all(hasattr(module, name) for name in names) or type(module.nonlinearity) is not nn.SiLU:
        return False
    if module.time_emb_proj is not None or getattr(module, "output_scale_factor", 0) != 1.0:
        return False
    if getattr(module, "upsample", 0) is not None or getattr(module, "downsample", 0) is not None:
        return False
    norms_are_plain = type(module.norm1) is nn.GroupNorm and type(module.norm2) is nn.GroupNorm
    return norms_are_plain and _is_three_by_three(module.conv1) and _is_three_by_three(module.conv2)


def forward_image_block(self: nn.Module, input_tensor: Tensor, temb: Tensor | None = None, *args: Any) -> Tensor:
    if temb is not None or args or not _is_for_us(self, input_tensor):
        return type(self).forward(self, input_tensor, temb, *args)

    def run(pictures: Tensor) -> Tensor:
        x = _as_clip(pictures, pictures)
        hidden = _convolve(self.conv1, self.norm1, x)
        residual = x if self.conv_shortcut is None else _as_clip(self.conv_shortcut(pictures), pictures)
        out = _convolve(self.conv2, self.norm2, hidden, residual=residual, may_overwrite=True)
        return _as_pictures(out, pictures)

    return run(input_tensor) if _has_channels_last(input_tensor) else a_few_at_a_time(run, input_tensor)


def is_image_upsampling(module: nn.Module) -> bool:
    """diffusers' Upsample2D with a convolution."""
    names = ("conv", "use_conv_transpose", "interpolate", "norm")
    if not all(hasattr(module, name) for name in names) or hasattr(module, "compress_time"):
        return False
    is_plain = not module.use_conv_transpose and module.interpolate and module.norm is None
    return is_plain and _is_three_by_three(module.conv)


def upsample_image(self: nn.Module, hidden_states: Tensor, output_size: Any = None, *args: Any) -> Tensor:
    if output_size is not None or args or not _is_for_us(self, hidden_states):
        return type(self).forward(self, hidden_states, output_size, *args)

    def run(pictures: Tensor) -> Tensor:
        weight = self.conv.weight.unsqueeze(2)
        out = upsample_conv3d(_as_clip(pictures, pictures), weight, self.conv.bias, time_padding="none")
        return _as_pictures(out, pictures)

    return run(hidden_states) if _has_channels_last(hidden_states) else a_few_at_a_time(run, hidden_states)


def _convolve(conv: nn.Conv2d, norm: nn.GroupNorm, x: Tensor, **options: Any) -> Tensor:
    found = replace(norm_of(norm), per_frame=True)
    return causal_conv3d(
        x, conv.weight.unsqueeze(2), conv.bias, time_padding="none", norm=found, activation="silu", **options
    )


def _is_three_by_three(conv: nn.Module) -> bool:
    has_sizes = type(conv) is nn.Conv2d and conv.kernel_size == (3, 3) and conv.padding == (1, 1)
    return has_sizes and conv.stride == conv.dilation == (1, 1) and conv.groups == 1 and conv.padding_mode == "zeros"


def _is_for_us(module: nn.Module, x_NCHW: Tensor) -> bool:
    """On a CPU, without gradients. Whoever records the forward sees the module's own."""
    return may_write(x_NCHW) and is_on_cpu(x_NCHW) and not module.training


def _has_channels_last(x_NCHW: Tensor) -> bool:
    return x_NCHW.stride(1) == 1 and x_NCHW.shape[1] > 1 and not x_NCHW.is_contiguous()


def _as_clip(x_NCHW: Tensor, like_NCHW: Tensor) -> Tensor:
    """In the axes that `like_NCHW` takes: a convolution of it may give another order in memory, as on meta tensors."""
    return x_NCHW.transpose(0, 1).unsqueeze(0) if _has_channels_last(like_NCHW) else x_NCHW.unsqueeze(2)


def _as_pictures(x: Tensor, like_NCHW: Tensor) -> Tensor:
    return x.squeeze(0).transpose(0, 1) if _has_channels_last(like_NCHW) else x.squeeze(2)
