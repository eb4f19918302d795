"""LayerNorm and adaptive scale and shift in Triton, one read and one write of the tokens.

Axes: B batch, T frames, S tokens of a frame, L = T*S, C channels, R = B*L rows, K tables, P programs. Without a
mask, all tokens of a sample are one frame.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from opensora_kernels._triton import dense, launch
from opensora_kernels._triton.modulation import (
    count_frames,
    inside,
    is_first_choice,
    layer_norm,
    layer_norm_backward,
    load_table,
    load_tokens,
    locate,
    one_plus,
    scale_and_shift,
    store_sum,
    store_tokens,
    summing_chunk,
    table_gradients,
    table_pair,
    table_strides,
    token_rows,
    token_tile,
)


def forward(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    normalize: bool,
    eps: float,
    frame_mask: Tensor | None,
    shift0: Tensor | None,
    scale0: Tensor | None,
) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x_RC = token_rows(x)
    tables = [*table_pair(shift, shift0), *table_pair(scale, scale0)]
    num_frames, num_sites = count_frames(x, frame_mask)
    tile = token_tile("modulate", "forward", x_RC, NUM_BLOCKS=8)
    num_chunks = triton.cdiv(num_sites, tile["BLOCK_S"] * tile["NUM_BLOCKS"])
    launch(
        _modulate_forward_kernel,
        (x.shape[0] * num_frames * num_chunks,),
        x_RC, *tables, dense(frame_mask), out,
        num_frames, num_sites, x_RC.stride(0), *table_strides(*tables), eps,
        NORMALIZE=normalize, HAS_MASK=frame_mask is not None, **tile,
    )  # fmt: skip
    return out


def backward(
    grads: list[Tensor | None],
    wanted: list[bool],
    saved: list[Tensor],
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    normalize: bool,
    eps: float,
    frame_mask: Tensor | None,
    shift0: Tensor | None,
    scale0: Tensor | None,
) -> list[Tensor | None]:
    x_RC, grad_RC = token_rows(x), token_rows(grads[0])
    scales = table_pair(scale, scale0)
    num_frames, num_sites = count_frames(x, frame_mask)
    # 240 registers let eight warps run on each of an H200's 132 multiprocessors
    tile = token_tile("modulate", "backward", x_RC, num_programs=1056)
    chunk_size = summing_chunk(x.shape[0] * num_frames, num_sites, tile["BLOCK_S"], tile.pop("num_programs"))
    num_programs = x.shape[0] * num_frames * triton.cdiv(num_sites, chunk_size)
    wants_tables = any(wanted[index] for index in (1, 2, 6, 7))
    grad_x = torch.empty(x.shape if wanted[0] else 0, dtype=x.dtype, device=x.device)
    partial_shape = (2, num_programs if wants_tables else 0, x.shape[2])
    partial_KPC = torch.empty(partial_shape, dtype=torch.float32, device=x.device)
    launch(
        _modulate_backward_kernel,
        (num_programs,),
        x_RC, grad_RC, *scales, dense(frame_mask), grad_x, partial_KPC,
        num_frames, num_sites, chunk_size, x_RC.stride(0), grad_RC.stride(0), *table_strides(*scales), eps,
        NORMALIZE=normalize, HAS_MASK=frame_mask is not None, WANTS_X=wanted[0], WANTS_TABLES=wants_tables, **tile,
    )  # fmt: skip
    if not wants_tables:
        return [grad_x, *(None,) * 7]
    found = table_gradients(partial_KPC, x.shape[0], frame_mask)
    tables = (shift, scale) if frame_mask is None else (shift, scale, shift0, scale0)
    grads_of_tables = [grad.to(table.dtype) for grad, table in zip(found, tables, strict=True)]
    return [grad_x, *grads_of_tables[:2], None, None, None, *(grads_of_tables[2:] or (None, None))]


@triton.jit
def _modulate_forward_kernel(
    x_ptr, shift_ptr, shift0_ptr, scale_ptr, scale0_ptr, frame_mask_ptr, out_ptr,
    num_frames, num_sites, stride_xr, stride_shift, stride_shift0, stride_scale, stride_scale0, eps,
    NORMALIZE: tl.constexpr, HAS_MASK: tl.constexpr, NUM_C: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr, NUM_BLOCKS: tl.constexpr,
):  # fmt: skip
    frame, sample, first = locate(num_frames, num_sites, BLOCK_S * NUM_BLOCKS)
    is_first = is_first_choice(frame_mask_ptr, frame, HAS_MASK)
    shift = load_table(shift_ptr, shift0_ptr, sample, stride_shift, stride_shift0, is_first, HAS_MASK, NUM_C, BLOCK_C)
    scale = load_table(scale_ptr, scale0_ptr, sample, stride_scale, stride_scale0, is_first, HAS_MASK, NUM_C, BLOCK_C)
    for start in range(first, tl.minimum(first + BLOCK_S * NUM_BLOCKS, num_sites), BLOCK_S):
        offs_s = start + tl.arange(0, BLOCK_S)
        mask_s = inside(offs_s, num_sites, BLOCK_S)
        offs_r = frame * num_sites + offs_s
        x = load_tokens(x_ptr, offs_r, mask_s, stride_xr, NUM_C, BLOCK_C)
        normed = x
        if NORMALIZE:
            wide, _ = layer_norm(x, eps, NUM_C)
            normed = wide.to(x.dtype)
        store_tokens(out_ptr, scale_and_shift(normed, scale, shift), offs_r, mask_s, NUM_C, BLOCK_C)


@triton.jit
def _modulate_backward_kernel(
    x_ptr, grad_ptr, scale_ptr, scale0_ptr, frame_mask_ptr, grad_x_ptr, partial_ptr,
    num_frames, num_sites, chunk_size, stride_xr, stride_gr, stride_scale, stride_scale0, eps,
    NORMALIZE: tl.constexpr, HAS_MASK: tl.constexpr, WANTS_X: tl.constexpr, WANTS_TABLES: tl.constexpr,
    NUM_C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Per token the gradient of x; per program the sums over its tokens of grad, for shift, and of grad * normed."""
    frame, sample, first = locate(num_frames, num_sites, chunk_size)
    is_first = is_first_choice(frame_mask_ptr, frame, HAS_MASK)
    scale = load_table(scale_ptr, scale0_ptr, sample, stride_scale, stride_scale0, is_first, HAS_MASK, NUM_C, BLOCK_C)
    # Still apart by token: to add up a block's in the loop would move data between threads.
    sum_shift = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    sum_scale = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    for start in range(first, tl.minimum(first + chunk_size, num_sites), BLOCK_S):
        offs_s = start + tl.arange(0, BLOCK_S)
        mask_s = inside(offs_s, num_sites, BLOCK_S)
        offs_r = frame * num_sites + offs_s
        x = load_tokens(x_ptr, offs_r, mask_s, stride_xr, NUM_C, BLOCK_C)
        grad = load_tokens(grad_ptr, offs_r, mask_s, stride_gr, NUM_C, BLOCK_C).to(tl.float32)
        normed = x.to(tl.float32)
        grad_x = grad * one_plus(scale)
        if NORMALIZE:
            normed, rstd = layer_norm(x, eps, NUM_C)
            grad_x = layer_norm_backward(grad_x, normed, rstd, NUM_C)
        if WANTS_X:
            store_tokens(grad_x_ptr, grad_x, offs_r, mask_s, NUM_C, BLOCK_C)
        if WANTS_TABLES:
            sum_shift += grad
            sum_scale += grad * normed.to(x.dtype).to(tl.float32)  # what the forward pass multiplied by the scale
    if WANTS_TABLES:
        store_sum(partial_ptr, 0, sum_shift, NUM_C, BLOCK_C)
        store_sum(partial_ptr, 1, sum_scale, NUM_C, BLOCK_C)
