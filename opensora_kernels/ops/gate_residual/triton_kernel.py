"""Gated residual sum in Triton, and in the same pass over the tokens the modulation of the next branch.

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
    y: Tensor,
    gate: Tensor,
    frame_mask: Tensor | None,
    gate0: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    shift0: Tensor | None,
    scale0: Tensor | None,
    eps: float,
) -> list[Tensor]:
    outs = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(1 if shift is None else 2)]
    x_RC, y_RC = token_rows(x), token_rows(y)
    tables = [*table_pair(gate, gate0), *table_pair(shift, shift0), *table_pair(scale, scale0)]
    num_frames, num_sites = count_frames(x, frame_mask)
    tile = token_tile("gate_residual", "forward", x_RC, NUM_BLOCKS=8)
    num_chunks = triton.cdiv(num_sites, tile["BLOCK_S"] * tile["NUM_BLOCKS"])
    launch(
        _gate_residual_forward_kernel,
        (x.shape[0] * num_frames * num_chunks,),
        x_RC, y_RC, *tables, dense(frame_mask), outs[0], outs[-1],
        num_frames, num_sites, x_RC.stride(0), y_RC.stride(0), *table_strides(*tables), eps,
        HAS_MASK=frame_mask is not None, MODULATES=shift is not None, **tile,
    )  # fmt: skip
    return outs


def backward(
    grads: list[Tensor | None],
    wanted: list[bool],
    saved: list[Tensor],
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    frame_mask: Tensor | None,
    gate0: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    shift0: Tensor | None,
    scale0: Tensor | None,
    eps: float,
) -> list[Tensor | None]:
    grad_total, grad_out = grads[0], grads[-1]  # without a modulation one and the same
    rows = [token_rows(torch.zeros_like(x) if value is None else value) for value in (x, y, grad_total, grad_out)]
    tables = [*table_pair(gate, gate0), *table_pair(scale, scale0)]
    num_frames, num_sites = count_frames(x, frame_mask)
    tile = _backward_tile(rows[0], shift is not None)
    chunk_size = summing_chunk(x.shape[0] * num_frames, num_sites, tile["BLOCK_S"], tile.pop("num_programs"))
    num_programs = x.shape[0] * num_frames * triton.cdiv(num_sites, chunk_size)
    wants_x, wants_y, wants_tables = wanted[0], wanted[1], any(wanted[2:])
    grad_x = torch.empty(x.shape if wants_x else 0, dtype=x.dtype, device=x.device)
    grad_y = torch.empty(y.shape if wants_y else 0, dtype=y.dtype, device=x.device)
    partial_shape = (1 if shift is None else 3, num_programs if wants_tables else 0, x.shape[2])
    partial_KPC = torch.empty(partial_shape, dtype=torch.float32, device=x.device)
    launch(
        _gate_residual_backward_kernel,
        (num_programs,),
        *rows, *tables, dense(frame_mask), grad_x, grad_y, partial_KPC,
        num_frames, num_sites, chunk_size, *(row.stride(0) for row in rows), *table_strides(*tables), eps,
        HAS_MASK=frame_mask is not None, MODULATES=shift is not None,
        WANTS_X=wants_x, WANTS_Y=wants_y, WANTS_TABLES=wants_tables, **tile,
    )  # fmt: skip
    if not wants_tables:
        return [grad_x, grad_y, *(None,) * 8]
    found = iter(table_gradients(partial_KPC, x.shape[0], frame_mask))
    in_order = (gate, shift, scale, gate0, shift0, scale0)
    of_gate, of_shift, of_scale, *of_others = (None if t is None else next(found).to(t.dtype) for t in in_order)
    return [grad_x, grad_y, of_gate, None, of_others[0], of_shift, of_scale, *of_others[1:], None]


def _backward_tile(x_RC: Tensor, modulates: bool) -> dict[str, int]:
    if not modulates:
        return token_tile("gate_residual", "backward", x_RC, channels_per_warp=288, num_programs=1056)
    # 245 registers let four programs of two warps run on each of an H200's 132 multiprocessors
    return token_tile("gate_residual", "backward with modulate", x_RC, channels_per_warp=640, num_programs=528)


@triton.jit
def _gate_residual_forward_kernel(
    x_ptr, y_ptr, gate_ptr, gate0_ptr, shift_ptr, shift0_ptr, scale_ptr, scale0_ptr, frame_mask_ptr, total_ptr, out_ptr,
    num_frames, num_sites, stride_xr, stride_yr,
    stride_gate, stride_gate0, stride_shift, stride_shift0, stride_scale, stride_scale0, eps,
    HAS_MASK: tl.constexpr, MODULATES: tl.constexpr, NUM_C: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr, NUM_BLOCKS: tl.constexpr,
):  # fmt: skip
    frame, sample, first = locate(num_frames, num_sites, BLOCK_S * NUM_BLOCKS)
    is_first = is_first_choice(frame_mask_ptr, frame, HAS_MASK)
    gate = load_table(gate_ptr, gate0_ptr, sample, stride_gate, stride_gate0, is_first, HAS_MASK, NUM_C, BLOCK_C)
    if MODULATES:
        shift = load_table(
            shift_ptr, shift0_ptr, sample, stride_shift, stride_shift0, is_first, HAS_MASK, NUM_C, BLOCK_C
        )
        scale = load_table(
            scale_ptr, scale0_ptr, sample, stride_scale, stride_scale0, is_first, HAS_MASK, NUM_C, BLOCK_C
        )
    for start in range(first, tl.minimum(first + BLOCK_S * NUM_BLOCKS, num_sites), BLOCK_S):
        offs_s = start + tl.arange(0, BLOCK_S)
        mask_s = inside(offs_s, num_sites, BLOCK_S)
        offs_r = frame * num_sites + offs_s
        x = load_tokens(x_ptr, offs_r, mask_s, stride_xr, NUM_C, BLOCK_C)
        y = load_tokens(y_ptr, offs_r, mask_s, stride_yr, NUM_C, BLOCK_C)
        total = _gated_sum(x, y, gate)
        store_tokens(total_ptr, total, offs_r, mask_s, NUM_C, BLOCK_C)
        if MODULATES:
            normed, _ = layer_norm(total, eps, NUM_C)
            out = scale_and_shift(normed.to(x.dtype), scale, shift)
            store_tokens(out_ptr, out, offs_r, mask_s, NUM_C, BLOCK_C)


@triton.jit
def _gate_residual_backward_kernel(
    x_ptr, y_ptr, grad_total_ptr, grad_out_ptr, gate_ptr, gate0_ptr, scale_ptr, scale0_ptr, frame_mask_ptr,
    grad_x_ptr, grad_y_ptr, partial_ptr, num_frames, num_sites, chunk_size,
    stride_xr, stride_yr, stride_tr, stride_or, stride_gate, stride_gate0, stride_scale, stride_scale0, eps,
    HAS_MASK: tl.constexpr, MODULATES: tl.constexpr,
    WANTS_X: tl.constexpr, WANTS_Y: tl.constexpr, WANTS_TABLES: tl.constexpr,
    NUM_C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Per token the sum's gradient g, that through the modulation included: x gets g, y gets g * gate. Per program sums
    over its tokens: of g * y, for gate, and those of the modulation's shift and scale."""
    frame, sample, first = locate(num_frames, num_sites, chunk_size)
    is_first = is_first_choice(frame_mask_ptr, frame, HAS_MASK)
    gate = load_table(gate_ptr, gate0_ptr, sample, stride_gate, stride_gate0, is_first, HAS_MASK, NUM_C, BLOCK_C)
    sum_gate = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    if MODULATES:
        scale = load_table(
            scale_ptr, scale0_ptr, sample, stride_scale, stride_scale0, is_first, HAS_MASK, NUM_C, BLOCK_C
        )
        sum_shift = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
        sum_scale = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    for start in range(first, tl.minimum(first + chunk_size, num_sites), BLOCK_S):
        offs_s = start + tl.arange(0, BLOCK_S)
        mask_s = inside(offs_s, num_sites, BLOCK_S)
        offs_r = frame * num_sites + offs_s
        y = load_tokens(y_ptr, offs_r, mask_s, stride_yr, NUM_C, BLOCK_C)
        grad = load_tokens(grad_total_ptr, offs_r, mask_s, stride_tr, NUM_C, BLOCK_C).to(tl.float32)
        if MODULATES:
            # The sum again: keeping it from the forward pass would read as many bytes as x.
            x = load_tokens(x_ptr, offs_r, mask_s, stride_xr, NUM_C, BLOCK_C)
            normed, rstd = layer_norm(_gated_sum(x, y, gate), eps, NUM_C)
            grad_out = load_tokens(grad_out_ptr, offs_r, mask_s, stride_or, NUM_C, BLOCK_C).to(tl.float32)
            if WANTS_TABLES:
                sum_shift += grad_out
                sum_scale += grad_out * normed.to(x.dtype).to(tl.float32)  # what the forward pass multiplied
            grad += layer_norm_backward(grad_out * one_plus(scale), normed, rstd, NUM_C)
        if WANTS_X:
            store_tokens(grad_x_ptr, grad, offs_r, mask_s, NUM_C, BLOCK_C)
        if WANTS_Y:
            store_tokens(grad_y_ptr, grad * gate.to(tl.float32), offs_r, mask_s, NUM_C, BLOCK_C)
        if WANTS_TABLES:
            sum_gate += grad * y.to(tl.float32)
    if WANTS_TABLES:
        store_sum(partial_ptr, 0, sum_gate, NUM_C, BLOCK_C)
        if MODULATES:
            store_sum(partial_ptr, 1, sum_shift, NUM_C, BLOCK_C)
            store_sum(partial_ptr, 2, sum_scale, NUM_C, BLOCK_C)


@triton.jit
def _gated_sum(x, y, gate):
    """x + gate * y, rounded where the reference rounds: the product if both have one dtype, the sum."""
    product = gate.to(tl.float32) * y.to(tl.float32)
    if gate.dtype == y.dtype:
        product = product.to(y.dtype).to(tl.float32)
    return (x.to(tl.float32) + product).to(x.dtype)
