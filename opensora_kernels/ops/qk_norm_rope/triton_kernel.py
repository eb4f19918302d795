"""RMSNorm and rotation of queries and keys in Triton, one launch for both.

Axes: O, P leading axes, L tokens, N heads, D head size, F pairs of elements, R rows (one head of one token each),
W weights (D, or N * D for norm_scope "token"), K programs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from opensora_kernels._triton import dense, launch, power_of_two
from opensora_kernels._triton.heads import (
    added,
    equal_slices,
    load_pairs,
    load_slices,
    norm_rope,
    norm_rope_backward,
    rounded,
    store_pairs,
    store_slices,
    views,
    zero_slices,
)
from opensora_kernels.tuning import configuration, num_row_programs


def forward(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    order: str,
    rope_layout: str,
    norm_scope: str,
) -> tuple[Tensor, Tensor]:
    q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    q_OPLND, k_OPLND = views(q, k)
    tile = _tile("forward", q, norm_scope)
    num_q_blocks, num_k_blocks = (_num_blocks(x, tile) for x in (q_OPLND, k_OPLND))
    launch(
        _qk_norm_rope_forward_kernel,
        (num_q_blocks + num_k_blocks,),
        q_OPLND, k_OPLND, dense(q_weight), dense(k_weight), dense(cos), dense(sin), q_out, k_out,
        num_q_blocks, *_sizes(q_OPLND, k_OPLND), *_strides(q_OPLND), *_strides(k_OPLND), eps,
        STRIDE_QN=q_OPLND.stride(3), STRIDE_KN=k_OPLND.stride(3),
        **_variant(q, q_weight, cos, order, rope_layout, norm_scope), **tile,
    )  # fmt: skip
    return q_out, k_out


def backward(
    grads: list[Tensor | None],
    wanted: list[bool],
    saved: list[Tensor],
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    order: str,
    rope_layout: str,
    norm_scope: str,
) -> list[Tensor | None]:
    grad_q_out, grad_k_out = (
        torch.zeros_like(x) if grad is None else grad.contiguous() for x, grad in zip((q, k), grads, strict=True)
    )
    q_OPLND, k_OPLND, grad_q, grad_k = views(q, k, torch.empty_like(q), torch.empty_like(k))
    wants_weight, wants_angles = any(wanted[2:4]), any(wanted[4:6])
    tile = _tile("backward of angles" if wants_angles else "backward", q, norm_scope)
    num_l_blocks = max(1, triton.cdiv(q.shape[-3], tile["BLOCK_L"]))
    num_blocks = [_num_blocks(x, tile) for x in (q_OPLND, k_OPLND)]
    num_programs = [num_row_programs(blocks, 1) for blocks in num_blocks]
    if wants_angles:  # then a program must always see the same tokens: it steps by a multiple of their blocks
        num_programs = [num_l_blocks * -(-number // num_l_blocks) for number in num_programs]
    # One fp32 sum of each program: atomics would add them up in another order every time.
    num_weights = 0 if q_weight is None or not wants_weight else q_weight.shape[0]
    weight_KW = torch.empty(sum(num_programs), num_weights, dtype=torch.float32, device=q.device)
    angles_shape = (2, sum(num_programs) if wants_angles else 0, tile["BLOCK_L"], q.shape[-1] // 2)
    angles_2KLF = torch.empty(angles_shape, dtype=torch.float32, device=q.device)
    launch(
        _qk_norm_rope_backward_kernel,
        (sum(num_programs),),
        q_OPLND, k_OPLND, dense(q_weight), dense(k_weight), dense(cos), dense(sin), grad_q_out, grad_k_out,
        grad_q, grad_k, weight_KW, angles_2KLF, num_programs[0], *num_blocks, *_sizes(q_OPLND, k_OPLND),
        *(number for x in (q_OPLND, k_OPLND, grad_q, grad_k) for number in _strides(x)), eps,
        STRIDE_QN=q_OPLND.stride(3), STRIDE_KN=k_OPLND.stride(3),
        STRIDE_GQN=grad_q.stride(3), STRIDE_GKN=grad_k.stride(3),
        WANTS_WEIGHT=wants_weight, WANTS_ANGLES=wants_angles,
        **_variant(q, q_weight, cos, order, rope_layout, norm_scope), **tile,
    )  # fmt: skip
    grad_weights = [part.sum(0) for part in weight_KW.split(num_programs)] if wants_weight else [None, None]
    grad_angles = _sums_of_tokens(angles_2KLF, num_l_blocks, q.shape[-3]) if wants_angles else [None, None]
    found = [grad_q.view(q.shape), grad_k.view(k.shape), *grad_weights, *grad_angles]
    values = (q, k, q_weight, k_weight, cos, sin)
    typed = [None if grad is None else grad.to(x.dtype) for grad, x in zip(found, values, strict=True)]
    return [*typed, None, None, None, None]


def _sums_of_tokens(angles_2KLF: Tensor, num_l_blocks: int, num_tokens: int) -> tuple[Tensor, ...]:
    """Gradients of cos and sin: program k has summed over block k % num_l_blocks of the tokens."""
    return angles_2KLF.unflatten(1, (-1, num_l_blocks)).sum(1).flatten(1, 2)[:, :num_tokens].unbind(0)


def _tile(direction: str, q: Tensor, norm_scope: str) -> dict[str, Any]:
    """Some tokens with as many of their heads as a power of two allows, or all where they share a mean."""
    num_tokens, num_heads, head_size = q.shape[-3:]
    pairs, num_slices = equal_slices((head_size + 1) // 2)
    all_heads = triton.next_power_of_2(num_heads)
    block_n = all_heads if norm_scope == "token" else max(num_heads & -num_heads, min(4, all_heads))
    elements = 4096 if direction == "forward" else 2048  # the backward pass holds x, its gradient and sums
    block_l = power_of_two(num_tokens, max(1, elements * 2 // (block_n * triton.next_power_of_2(head_size + 1))))
    # a vector of 16 bytes of bf16 to a thread and slice, or half of one where sums of angles take as many registers
    num_vectors = block_l * block_n * pairs // (2 if direction == "backward of angles" else 4)
    num_warps = min(16 if norm_scope == "token" else 4, max(1, num_vectors // 32))
    default = {"BLOCK_L": block_l, "BLOCK_N": block_n, "num_warps": num_warps}
    key = f"{direction} N={num_heads} D={head_size} {norm_scope} {q.dtype}"
    return {"PAIRS": pairs, "SLICES": num_slices, **configuration("qk_norm_rope", key, default, q.device)}


def _num_blocks(x_OPLND: Tensor, tile: dict[str, Any]) -> int:
    num_outer, num_inner, num_tokens, num_heads, _ = x_OPLND.shape
    return num_outer * num_inner * triton.cdiv(num_tokens, tile["BLOCK_L"]) * triton.cdiv(num_heads, tile["BLOCK_N"])


def _sizes(q_OPLND: Tensor, k_OPLND: Tensor) -> tuple[int, int, int]:
    return q_OPLND.shape[1], q_OPLND.shape[2], k_OPLND.shape[2]


def _strides(x_OPLND: Tensor) -> tuple[int, int, int, int]:
    """Without that of heads, a constant: only so does the compiler know that 72 elements are whole vectors."""
    stride_o, stride_p, stride_l, _, stride_d = x_OPLND.stride()
    return stride_o, stride_p, stride_l, stride_d


def _variant(
    q: Tensor, q_weight: Tensor | None, cos: Tensor | None, order: str, rope_layout: str, norm_scope: str
) -> dict[str, Any]:
    return {
        "NUM_HEADS": q.shape[-2],
        "HEAD_SIZE": q.shape[-1],
        "HAS_NORM": q_weight is not None,
        "HAS_ROPE": cos is not None,
        "IS_ROPE_FIRST": order == "rope_norm",
        "IS_INTERLEAVED": cos is None or rope_layout == "interleaved",
        "IS_TOKEN": norm_scope == "token",
    }


@triton.jit
def _qk_norm_rope_forward_kernel(
    q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr,
    num_q_blocks, num_inner, num_q_tokens, num_k_tokens,
    stride_qo, stride_qp, stride_ql, stride_qd, stride_ko, stride_kp, stride_kl, stride_kd, eps,
    STRIDE_QN: tl.constexpr, STRIDE_KN: tl.constexpr, NUM_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr,
    HAS_NORM: tl.constexpr, HAS_ROPE: tl.constexpr, IS_ROPE_FIRST: tl.constexpr,
    IS_INTERLEAVED: tl.constexpr, IS_TOKEN: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr, PAIRS: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """The first programs take q, a tile each, the others k."""
    program = tl.program_id(0)
    if program < num_q_blocks:
        _forward_tile(
            program, q_ptr, q_weight_ptr, cos_ptr, sin_ptr, q_out_ptr, num_inner, num_q_tokens,
            stride_qo, stride_qp, stride_ql, stride_qd, eps, STRIDE_QN, NUM_HEADS, HEAD_SIZE,
            HAS_NORM, HAS_ROPE, IS_ROPE_FIRST, IS_INTERLEAVED, IS_TOKEN, BLOCK_L, BLOCK_N, PAIRS, SLICES,
        )  # fmt: skip
    else:
        _forward_tile(
            program - num_q_blocks, k_ptr, k_weight_ptr, cos_ptr, sin_ptr, k_out_ptr, num_inner, num_k_tokens,
            stride_ko, stride_kp, stride_kl, stride_kd, eps, STRIDE_KN, NUM_HEADS, HEAD_SIZE,
            HAS_NORM, HAS_ROPE, IS_ROPE_FIRST, IS_INTERLEAVED, IS_TOKEN, BLOCK_L, BLOCK_N, PAIRS, SLICES,
        )  # fmt: skip


@triton.jit
def _forward_tile(
    block, x_ptr, weight_ptr, cos_ptr, sin_ptr, out_ptr, num_inner, num_tokens,
    stride_xo, stride_xp, stride_xl, stride_xd, eps, STRIDE_XN: tl.constexpr,
    NUM_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr,
    HAS_NORM: tl.constexpr, HAS_ROPE: tl.constexpr, IS_ROPE_FIRST: tl.constexpr,
    IS_INTERLEAVED: tl.constexpr, IS_TOKEN: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr, PAIRS: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    X: tl.constexpr = x_ptr.dtype.element_ty
    o, p, offs_l, offs_n, mask_r = _place(block, num_inner, num_tokens, NUM_HEADS, BLOCK_L, BLOCK_N)
    offs_x = o * stride_xo + p * stride_xp + offs_l * stride_xl + offs_n * STRIDE_XN
    x = load_pairs(x_ptr, offs_x, mask_r, stride_xd, HEAD_SIZE, IS_INTERLEAVED, PAIRS, SLICES)
    weight, cos, sin = _parameters(
        weight_ptr, cos_ptr, sin_ptr, offs_l, offs_n, mask_r, X, HEAD_SIZE,
        HAS_NORM, HAS_ROPE, IS_INTERLEAVED, IS_TOKEN, PAIRS, SLICES,
    )  # fmt: skip
    NUM_SHARING: tl.constexpr = BLOCK_N if IS_TOKEN else 1
    NUM_NORMED: tl.constexpr = NUM_HEADS * HEAD_SIZE if IS_TOKEN else HEAD_SIZE
    x = norm_rope(x, weight, cos, sin, mask_r, eps, X, NUM_NORMED, NUM_SHARING, HAS_NORM, HAS_ROPE, IS_ROPE_FIRST)
    offs_out = (((o * num_inner + p) * num_tokens + offs_l) * NUM_HEADS + offs_n) * HEAD_SIZE
    store_pairs(out_ptr, x, offs_out, mask_r, 1, HEAD_SIZE, IS_INTERLEAVED, PAIRS, SLICES)


@triton.jit
def _qk_norm_rope_backward_kernel(
    q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, grad_q_out_ptr, grad_k_out_ptr,
    grad_q_ptr, grad_k_ptr, weight_partial_ptr, angles_partial_ptr,
    num_q_programs, num_q_blocks, num_k_blocks, num_inner, num_q_tokens, num_k_tokens,
    stride_qo, stride_qp, stride_ql, stride_qd, stride_ko, stride_kp, stride_kl, stride_kd,
    stride_gqo, stride_gqp, stride_gql, stride_gqd, stride_gko, stride_gkp, stride_gkl, stride_gkd, eps,
    STRIDE_QN: tl.constexpr, STRIDE_KN: tl.constexpr, STRIDE_GQN: tl.constexpr, STRIDE_GKN: tl.constexpr,
    WANTS_WEIGHT: tl.constexpr, WANTS_ANGLES: tl.constexpr, NUM_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr,
    HAS_NORM: tl.constexpr, HAS_ROPE: tl.constexpr, IS_ROPE_FIRST: tl.constexpr,
    IS_INTERLEAVED: tl.constexpr, IS_TOKEN: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr, PAIRS: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """The first programs take q, every so many tiles each, the others k."""
    program = tl.program_id(0)
    if program < num_q_programs:
        _backward_tiles(
            program, num_q_programs, num_q_blocks, q_ptr, q_weight_ptr, cos_ptr, sin_ptr, grad_q_out_ptr, grad_q_ptr,
            weight_partial_ptr, angles_partial_ptr, num_inner, num_q_tokens, stride_qo, stride_qp, stride_ql, stride_qd,
            stride_gqo, stride_gqp, stride_gql, stride_gqd, eps, STRIDE_QN, STRIDE_GQN, WANTS_WEIGHT, WANTS_ANGLES,
            NUM_HEADS, HEAD_SIZE, HAS_NORM, HAS_ROPE, IS_ROPE_FIRST, IS_INTERLEAVED, IS_TOKEN,
            BLOCK_L, BLOCK_N, PAIRS, SLICES,
        )  # fmt: skip
    else:
        _backward_tiles(
            program - num_q_programs, tl.num_programs(0) - num_q_programs, num_k_blocks, k_ptr, k_weight_ptr, cos_ptr,
            sin_ptr, grad_k_out_ptr, grad_k_ptr, weight_partial_ptr, angles_partial_ptr, num_inner, num_k_tokens,
            stride_ko, stride_kp, stride_kl, stride_kd, stride_gko, stride_gkp, stride_gkl, stride_gkd, eps,
            STRIDE_KN, STRIDE_GKN, WANTS_WEIGHT, WANTS_ANGLES, NUM_HEADS, HEAD_SIZE,
            HAS_NORM, HAS_ROPE, IS_ROPE_FIRST, IS_INTERLEAVED, IS_TOKEN, BLOCK_L, BLOCK_N, PAIRS, SLICES,
        )  # fmt: skip


@triton.jit
def _backward_tiles(
    first_block, num_programs, num_blocks, x_ptr, weight_ptr, cos_ptr, sin_ptr, grad_out_ptr, grad_x_ptr,
    weight_partial_ptr, angles_partial_ptr, num_inner, num_tokens, stride_xo, stride_xp, stride_xl, stride_xd,
    stride_go, stride_gp, stride_gl, stride_gd, eps, STRIDE_XN: tl.constexpr, STRIDE_GN: tl.constexpr,
    WANTS_WEIGHT: tl.constexpr, WANTS_ANGLES: tl.constexpr, NUM_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr,
    HAS_NORM: tl.constexpr, HAS_ROPE: tl.constexpr, IS_ROPE_FIRST: tl.constexpr,
    IS_INTERLEAVED: tl.constexpr, IS_TOKEN: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr, PAIRS: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    X: tl.constexpr = x_ptr.dtype.element_ty
    NUM_SHARING: tl.constexpr = BLOCK_N if IS_TOKEN else 1
    NUM_NORMED: tl.constexpr = NUM_HEADS * HEAD_SIZE if IS_TOKEN else HEAD_SIZE
    NUM_ROWS: tl.constexpr = BLOCK_L * BLOCK_N
    total_cos, total_sin = zero_slices(NUM_ROWS, PAIRS, SLICES), zero_slices(NUM_ROWS, PAIRS, SLICES)
    total_weight = zero_slices(NUM_ROWS, PAIRS, 2 * SLICES)
    for block in range(first_block, num_blocks, num_programs):
        o, p, offs_l, offs_n, mask_r = _place(block, num_inner, num_tokens, NUM_HEADS, BLOCK_L, BLOCK_N)
        offs_x = o * stride_xo + p * stride_xp + offs_l * stride_xl + offs_n * STRIDE_XN
        offs_out = (((o * num_inner + p) * num_tokens + offs_l) * NUM_HEADS + offs_n) * HEAD_SIZE
        x = load_pairs(x_ptr, offs_x, mask_r, stride_xd, HEAD_SIZE, IS_INTERLEAVED, PAIRS, SLICES)
        grad = load_pairs(grad_out_ptr, offs_out, mask_r, 1, HEAD_SIZE, IS_INTERLEAVED, PAIRS, SLICES)
        weight, cos, sin = _parameters(
            weight_ptr, cos_ptr, sin_ptr, offs_l, offs_n, mask_r, X, HEAD_SIZE,
            HAS_NORM, HAS_ROPE, IS_INTERLEAVED, IS_TOKEN, PAIRS, SLICES,
        )  # fmt: skip
        grad, grad_weight, grad_cos, grad_sin = norm_rope_backward(
            x, grad, weight, cos, sin, mask_r, eps, X, NUM_NORMED, NUM_SHARING, HAS_NORM, HAS_ROPE, IS_ROPE_FIRST
        )
        offs_x = o * stride_go + p * stride_gp + offs_l * stride_gl + offs_n * STRIDE_GN
        store_pairs(grad_x_ptr, grad, offs_x, mask_r, stride_gd, HEAD_SIZE, IS_INTERLEAVED, PAIRS, SLICES)
        if WANTS_WEIGHT:
            total_weight = added(total_weight, grad_weight)
        if WANTS_ANGLES:
            total_cos, total_sin = added(total_cos, grad_cos), added(total_sin, grad_sin)
    program = tl.program_id(0).to(tl.int64)
    if WANTS_WEIGHT:
        offs_r = tl.arange(0, NUM_SHARING)
        num_weights = NUM_HEADS * HEAD_SIZE if IS_TOKEN else HEAD_SIZE
        total_weight = _summed(total_weight, NUM_ROWS // NUM_SHARING, NUM_SHARING, 0)
        offs_w = program * num_weights + offs_r.to(tl.int64) * HEAD_SIZE
        mask_w = offs_r * HEAD_SIZE < num_weights
        store_pairs(weight_partial_ptr, total_weight, offs_w, mask_w, 1, HEAD_SIZE, IS_INTERLEAVED, PAIRS, SLICES)
    if WANTS_ANGLES:
        total_cos, total_sin = _summed(total_cos, BLOCK_L, BLOCK_N, 1), _summed(total_sin, BLOCK_L, BLOCK_N, 1)
        offs_l = program * BLOCK_L + tl.arange(0, BLOCK_L)
        offs_a = offs_l * (HEAD_SIZE // 2)
        offs_sin = (tl.num_programs(0).to(tl.int64) * BLOCK_L + offs_l) * (HEAD_SIZE // 2)
        store_slices(angles_partial_ptr, total_cos, offs_a, offs_l >= 0, 1, HEAD_SIZE // 2, PAIRS, SLICES)
        store_slices(angles_partial_ptr, total_sin, offs_sin, offs_l >= 0, 1, HEAD_SIZE // 2, PAIRS, SLICES)


@triton.jit
def _place(block, num_inner, num_tokens, NUM_HEADS: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr):
    """(o, p, tokens, heads, mask) of a tile's rows; blocks of tokens go by first."""
    num_l_blocks = tl.cdiv(num_tokens, BLOCK_L)
    NUM_N_BLOCKS: tl.constexpr = (NUM_HEADS + BLOCK_N - 1) // BLOCK_N
    rest = block // num_l_blocks
    outer = rest // NUM_N_BLOCKS
    offs_r = tl.arange(0, BLOCK_L * BLOCK_N)
    offs_l = (block % num_l_blocks).to(tl.int64) * BLOCK_L + offs_r // BLOCK_N
    offs_n = (rest % NUM_N_BLOCKS * BLOCK_N + offs_r % BLOCK_N).to(tl.int64)
    mask_r = (offs_l < num_tokens) & (offs_n < NUM_HEADS)
    return (outer // num_inner).to(tl.int64), (outer % num_inner).to(tl.int64), offs_l, offs_n, mask_r


@triton.jit
def _parameters(
    weight_ptr, cos_ptr, sin_ptr, offs_l, offs_n, mask_r, X: tl.constexpr, HEAD_SIZE: tl.constexpr,
    HAS_NORM: tl.constexpr, HAS_ROPE: tl.constexpr, IS_INTERLEAVED: tl.constexpr, IS_TOKEN: tl.constexpr,
    PAIRS: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """Weights, rounded to X, cosines and sines of a tile's rows; one row of weights where all heads share them."""
    weight, cos, sin = (offs_l,), (offs_l,), (offs_l,)
    if HAS_NORM:
        offs_w = offs_n * HEAD_SIZE if IS_TOKEN else tl.zeros([1], tl.int64)
        mask_w = mask_r if IS_TOKEN else tl.full([1], True, tl.int1)
        weight = load_pairs(weight_ptr, offs_w, mask_w, 1, HEAD_SIZE, IS_INTERLEAVED, PAIRS, SLICES)
        weight = rounded(weight, X)
    if HAS_ROPE:
        cos = load_slices(cos_ptr, offs_l * (HEAD_SIZE // 2), mask_r, 1, HEAD_SIZE // 2, PAIRS, SLICES)
        sin = load_slices(sin_ptr, offs_l * (HEAD_SIZE // 2), mask_r, 1, HEAD_SIZE // 2, PAIRS, SLICES)
    return weight, cos, sin


@triton.jit
def _summed(x, LEFT: tl.constexpr, RIGHT: tl.constexpr, AXIS: tl.constexpr):
    """Sums over one of the two axes that a tile's rows are made of."""
    return [tl.sum(tl.reshape(piece, [LEFT, RIGHT, piece.shape[1]]), AXIS) for piece in x]
