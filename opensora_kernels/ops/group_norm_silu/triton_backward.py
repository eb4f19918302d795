"""The way back through GroupNorm and SiLU in Triton.

Axes: B batch, C channels, T frames (one, unless statistics are per frame), P positions, G groups,
K chunks of positions, N samples' frames.
With n = (x - mean) rstd, g the gradient before SiLU and w the weight, mean() over the elements of a group:
grad_x = rstd (g w - mean(g w) - n mean(g w n)); under given statistics, which are constants to x, rstd g w.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from opensora_kernels._triton import dense, launch, planes
from opensora_kernels._triton.silu import silu_backward
from opensora_kernels.norms import memory_format

from .triton_tiles import fold_of, folded, grid_of, load_channels, load_pairs, num_tiles_of, place, start_of, tile_of


def backward(
    grads: list[Tensor | None],
    wanted: list[bool],
    saved: list[Tensor],
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    per_frame: bool,
    activation: str,
    statistics: Tensor | None,
) -> list[Tensor | None]:
    """One pass over x and its gradient for the sums, one for x's own; under given statistics the first does both."""
    wants_x, wants_weight, wants_bias, wants_statistics = wanted[0], wanted[2], wanted[3], wanted[7]
    is_given = statistics is not None
    layout = memory_format(x)
    x_BCTP, grad_BCTP = (planes(tensor, layout, per_frame=per_frame) for tensor in (x, grads[0]))
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=layout) if wants_x else None
    strides = planes(grad_x, layout, per_frame=per_frame).stride() if wants_x else (0, 0, 0, 0)
    both = _Both(x_BCTP, grad_BCTP, dense(weight), dense(bias), saved[0], grad_x, strides, layout, activation == "silu")
    wants_sums = wants_weight or wants_bias or wants_statistics or not is_given
    sums_NC2 = _sums(both, wants_x=wants_x and is_given, wants_sums=wants_sums)
    grad_weight = sums_NC2[..., 1].sum(0).to(weight.dtype) if wants_weight else None
    grad_bias = sums_NC2[..., 0].sum(0).to(bias.dtype) if wants_bias else None
    grad_statistics = None
    if wants_statistics or (wants_x and not is_given):
        weighted_NC2 = sums_NC2 if weight is None else sums_NC2 * weight.float()[:, None]
        sums_NG2 = weighted_NC2.unflatten(1, (num_groups, -1)).sum(2)
        if is_given:
            grad_statistics = _statistics_gradient(statistics, saved[0], sums_NG2, x.shape[3] * x.shape[4])
        else:
            _write_grad_x(both, sums_NG2)
    return [grad_x, None, grad_weight, grad_bias, None, None, None, grad_statistics]


@dataclass(frozen=True)
class _Both:
    """What both passes work on; N counts samples and frames."""

    x_BCTP: Tensor
    grad_BCTP: Tensor
    weight: Tensor | None
    bias: Tensor | None
    moments_BTG2: Tensor
    grad_x: Tensor | None
    strides: tuple[int, ...]  # of grad_x as (B, C, T, P)
    layout: torch.memory_format
    has_silu: bool

    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.x_BCTP, self.grad_BCTP, self.weight, self.bias, self.moments_BTG2, self.grad_x

    def sizes(self) -> tuple[int, ...]:
        _, num_channels, num_frames, num_positions = self.x_BCTP.shape
        return num_channels, num_frames, num_positions, self.moments_BTG2.shape[2]

    def all_strides(self) -> tuple[int, ...]:
        return *self.x_BCTP.stride(), *self.grad_BCTP.stride(), *self.strides

    def flags(self) -> dict[str, bool]:
        return {"HAS_WEIGHT": self.weight is not None, "HAS_BIAS": self.bias is not None, "HAS_SILU": self.has_silu}


def _sums(both: _Both, *, wants_x: bool, wants_sums: bool) -> Tensor:
    """sum(g) and sum(g n) over the positions of each channel, (N, C, 2). Writes grad_x too, if that needs no sums."""
    x_BCTP = both.x_BCTP
    num_samples, num_channels, num_frames, _ = x_BCTP.shape
    # half the forward's tile: two inputs, two running sums
    tile = tile_of("sums", x_BCTP, both.layout, num_elements=2048)
    num_tiles = num_tiles_of(x_BCTP, both.layout, tile)
    grid, num_c_blocks, num_chunks = grid_of(x_BCTP, tile, num_tiles)
    num_planes = num_samples * num_frames if wants_sums else 0
    partial_NKC2 = torch.empty(num_planes, num_chunks, num_channels, 2, dtype=torch.float32, device=x_BCTP.device)
    launch(
        _group_norm_silu_sums_kernel, grid,
        *both.tensors(), partial_NKC2, *both.sizes(), num_c_blocks, num_chunks, num_tiles, *both.all_strides(),
        WANTS_X=wants_x, WANTS_SUMS=wants_sums, FOLD=fold_of(tile), **both.flags(), **tile,
    )  # fmt: skip
    return partial_NKC2.sum(1)


def _write_grad_x(both: _Both, sums_NG2: Tensor) -> None:
    tile = tile_of("backward", both.x_BCTP, both.layout, num_elements=2048)
    grid, num_c_blocks, num_chunks = grid_of(both.x_BCTP, tile, num_tiles=1)
    launch(
        _group_norm_silu_backward_kernel, grid,
        *both.tensors(), sums_NG2, *both.sizes(), num_c_blocks, num_chunks, *both.all_strides(),
        **both.flags(), **tile,
    )  # fmt: skip


def _statistics_gradient(statistics: Tensor, moments_BTG2: Tensor, sums_NG2: Tensor, frame_size: int) -> Tensor:
    """With M frames of channels to a group, each of P positions: mean = sum(mean_i) / M and
    1 / rstd^2 = (sum(squares_i) / P + sum((mean_i - mean)^2)) / M + eps."""
    _, num_frames, num_groups, _ = moments_BTG2.shape
    table_BGCT2 = statistics.float().unflatten(1, (num_groups, -1))
    mean, rstd = moments_BTG2.transpose(1, 2).unsqueeze(2).unbind(-1)  # (B, G, 1, T or 1)
    total, total_normed = sums_NG2.unflatten(0, (-1, num_frames)).transpose(1, 2).unsqueeze(2).unbind(-1)
    num_merged = table_BGCT2.shape[2] * (table_BGCT2.shape[3] // num_frames)
    slope = rstd.square() * total_normed / num_merged
    of_mean = -rstd * total / num_merged - slope * (table_BGCT2[..., 0] - mean)
    of_squares = (-slope / (2 * frame_size)).expand_as(of_mean)
    return torch.stack([of_mean, of_squares], -1).flatten(1, 2).to(statistics.dtype)


@triton.jit
def _centred_and_gradient(x, grad, mean_C, scale_C, bias_C, HAS_SILU: tl.constexpr):
    """x - mean and the gradient before SiLU, (BLOCK_C, BLOCK_P) each, in fp32: the reference rounds the value that goes
    into SiLU, which would only add an error here."""
    centred = x.to(tl.float32) - mean_C[:, None]
    grad = grad.to(tl.float32)
    if HAS_SILU:
        grad = silu_backward(centred * scale_C[:, None] + bias_C[:, None], grad)
    return centred, grad


@triton.jit
def _group_norm_silu_sums_kernel(
    x_ptr, grad_ptr, weight_ptr, bias_ptr, moments_ptr, grad_x_ptr, partial_ptr,
    num_channels, num_frames, num_positions, num_groups, num_c_blocks, num_chunks, num_tiles,
    stride_xb, stride_xc, stride_xt, stride_xp, stride_gb, stride_gc, stride_gt, stride_gp,
    stride_ob, stride_oc, stride_ot, stride_op,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SILU: tl.constexpr,
    WANTS_X: tl.constexpr, WANTS_SUMS: tl.constexpr, FOLD: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    plane, offs_c, chunk = place(tl.program_id(0), num_c_blocks, num_chunks, BLOCK_C)
    mask_c = offs_c < num_channels
    mean_C, rstd_C = load_pairs(moments_ptr, plane, offs_c, mask_c, num_channels, num_groups)
    scale_C = rstd_C * load_channels(weight_ptr, offs_c, mask_c, 1.0, HAS_WEIGHT, BLOCK_C)
    bias_C = load_channels(bias_ptr, offs_c, mask_c, 0.0, HAS_BIAS, BLOCK_C)
    x_ptrs = start_of(x_ptr, plane, num_frames, stride_xb, stride_xt) + offs_c[:, None] * stride_xc
    grad_ptrs = start_of(grad_ptr, plane, num_frames, stride_gb, stride_gt) + offs_c[:, None] * stride_gc
    total = tl.zeros([BLOCK_C, BLOCK_P // FOLD], tl.float32)
    total_centred = tl.zeros([BLOCK_C, BLOCK_P // FOLD], tl.float32)
    for tile in range(num_tiles):
        offs_p = (chunk * num_tiles + tile) * BLOCK_P + tl.arange(0, BLOCK_P)
        mask = mask_c[:, None] & (offs_p < num_positions)[None, :]
        x = tl.load(x_ptrs + offs_p[None, :] * stride_xp, mask=mask, other=0.0)
        grad = tl.load(grad_ptrs + offs_p[None, :] * stride_gp, mask=mask, other=0.0)
        centred, grad = _centred_and_gradient(x, grad, mean_C, scale_C, bias_C, HAS_SILU)
        if WANTS_X:
            out_ptrs = start_of(grad_x_ptr, plane, num_frames, stride_ob, stride_ot) + offs_c[:, None] * stride_oc
            tl.store(out_ptrs + offs_p[None, :] * stride_op, (grad * scale_C[:, None]).to(x.dtype), mask=mask)
        total += folded(grad, FOLD)  # zero where masked
        total_centred += folded(grad * centred, FOLD)
    if WANTS_SUMS:
        partial_ptrs = partial_ptr + ((plane.to(tl.int64) * num_chunks + chunk) * num_channels + offs_c) * 2
        tl.store(partial_ptrs, tl.sum(total, 1), mask=mask_c)
        tl.store(partial_ptrs + 1, tl.sum(total_centred, 1) * rstd_C, mask=mask_c)


@triton.jit
def _group_norm_silu_backward_kernel(
    x_ptr, grad_ptr, weight_ptr, bias_ptr, moments_ptr, grad_x_ptr, sums_ptr,
    num_channels, num_frames, num_positions, num_groups, num_c_blocks, num_chunks,
    stride_xb, stride_xc, stride_xt, stride_xp, stride_gb, stride_gc, stride_gt, stride_gp,
    stride_ob, stride_oc, stride_ot, stride_op,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SILU: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    # From the end to the start: the end is what the pass for the sums left in the cache.
    plane, offs_c, chunk = place(tl.num_programs(0) - 1 - tl.program_id(0), num_c_blocks, num_chunks, BLOCK_C)
    mask_c = offs_c < num_channels
    mean_C, rstd_C = load_pairs(moments_ptr, plane, offs_c, mask_c, num_channels, num_groups)
    sum_C, sum_normed_C = load_pairs(sums_ptr, plane, offs_c, mask_c, num_channels, num_groups)
    scale_C = rstd_C * load_channels(weight_ptr, offs_c, mask_c, 1.0, HAS_WEIGHT, BLOCK_C)
    bias_C = load_channels(bias_ptr, offs_c, mask_c, 0.0, HAS_BIAS, BLOCK_C)
    num_elements = tl.cast(num_channels // num_groups, tl.float32) * tl.cast(num_positions, tl.float32)
    offs_p = chunk * BLOCK_P + tl.arange(0, BLOCK_P)
    mask = mask_c[:, None] & (offs_p < num_positions)[None, :]
    x_ptrs = start_of(x_ptr, plane, num_frames, stride_xb, stride_xt) + offs_c[:, None] * stride_xc
    grad_ptrs = start_of(grad_ptr, plane, num_frames, stride_gb, stride_gt) + offs_c[:, None] * stride_gc
    out_ptrs = start_of(grad_x_ptr, plane, num_frames, stride_ob, stride_ot) + offs_c[:, None] * stride_oc
    x = tl.load(x_ptrs + offs_p[None, :] * stride_xp, mask=mask, other=0.0)
    grad = tl.load(grad_ptrs + offs_p[None, :] * stride_gp, mask=mask, other=0.0)
    centred, grad = _centred_and_gradient(x, grad, mean_C, scale_C, bias_C, HAS_SILU)
    shift_C, slope_C = rstd_C * sum_C / num_elements, rstd_C * rstd_C * sum_normed_C / num_elements
    grad_x = grad * scale_C[:, None] - shift_C[:, None] - centred * slope_C[:, None]
    tl.store(out_ptrs + offs_p[None, :] * stride_op, grad_x.to(x.dtype), mask=mask)
