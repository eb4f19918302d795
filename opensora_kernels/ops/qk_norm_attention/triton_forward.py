"""The forward kernel of QK-norm self-attention of short sequences. Axes: L queries, K keys, N heads, D head size."""

from __future__ import annotations

import triton
import triton.language as tl

from opensora_kernels._triton.heads import (
    dot_added,
    dot_rows,
    joined,
    load_pairs,
    load_slices,
    norm_rope,
    rounded,
    store_slices,
    zero_slices,
)


@triton.jit
def _qk_norm_attention_forward_kernel(
    q_ptr, k_ptr, v_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, out_ptr, num_items, num_inner, num_tokens,
    stride_xo, stride_xp, stride_xl, stride_xd, eps, scale_log2, STRIDE_XN: tl.constexpr,
    NUM_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, HAS_NORM: tl.constexpr, HAS_ROPE: tl.constexpr,
    IS_ROPE_FIRST: tl.constexpr, IS_INTERLEAVED: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_K: tl.constexpr, PAIRS: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """Every so many heads: q, k and v are read once, where they lie, and nothing but the result is written."""
    X: tl.constexpr = q_ptr.dtype.element_ty
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
    mask_k = offs_k < num_tokens
    for item in range(tl.program_id(0), num_items, tl.num_programs(0)):
        sample, o, p, n = place(item, num_inner, NUM_HEADS)
        offs_x = o * stride_xo + p * stride_xp + n * STRIDE_XN
        offs_out = sample * num_tokens * (NUM_HEADS * HEAD_SIZE) + n * HEAD_SIZE
        k = load_normed(
            k_ptr + offs_x, k_weight_ptr, cos_ptr, sin_ptr, offs_k, mask_k, stride_xl, stride_xd, eps,
            HEAD_SIZE, HAS_NORM, HAS_ROPE, IS_ROPE_FIRST, IS_INTERLEAVED, PAIRS, SLICES,
        )  # fmt: skip
        v = load_slices(v_ptr + offs_x, offs_k * stride_xl, mask_k, stride_xd, HEAD_SIZE, 2 * PAIRS, SLICES)
        for first in range(0, num_tokens, BLOCK_L):
            offs_l = (first + tl.arange(0, BLOCK_L)).to(tl.int64)
            mask_l = offs_l < num_tokens
            q = load_normed(
                q_ptr + offs_x, q_weight_ptr, cos_ptr, sin_ptr, offs_l, mask_l, stride_xl, stride_xd, eps,
                HEAD_SIZE, HAS_NORM, HAS_ROPE, IS_ROPE_FIRST, IS_INTERLEAVED, PAIRS, SLICES,
            )  # fmt: skip
            weights, sum_l = exponentials(q, k, mask_k, scale_log2)
            out = dot_added(zero_slices(BLOCK_L, 2 * PAIRS, SLICES), weights.to(X), v)
            out = [piece / sum_l[:, None] for piece in out]
            offs = offs_l * (NUM_HEADS * HEAD_SIZE)
            store_slices(out_ptr + offs_out, out, offs, mask_l, 1, HEAD_SIZE, 2 * PAIRS, SLICES)


@triton.jit
def place(item, num_inner, NUM_HEADS: tl.constexpr):
    """(sample, o, p, n) of a head, in int64; heads of one sample follow one another."""
    sample = tl.cast(item, tl.int64) // NUM_HEADS
    return sample, sample // num_inner, sample % num_inner, tl.cast(item, tl.int64) % NUM_HEADS


@triton.jit
def load_normed(
    x_ptr, weight_ptr, cos_ptr, sin_ptr, offs_l, mask_l, stride_xl, stride_xd, eps,
    HEAD_SIZE: tl.constexpr, HAS_NORM: tl.constexpr, HAS_ROPE: tl.constexpr, IS_ROPE_FIRST: tl.constexpr,
    IS_INTERLEAVED: tl.constexpr, PAIRS: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """Some tokens of a head, normalised and rotated, in x's dtype; elements of a pair lie side by side."""
    X: tl.constexpr = x_ptr.dtype.element_ty
    x = load_pairs(x_ptr, offs_l * stride_xl, mask_l, stride_xd, HEAD_SIZE, IS_INTERLEAVED, PAIRS, SLICES)
    # all but x come from the cache, for every head anew: registers are scarcer
    weight = load_weight(weight_ptr, X, HEAD_SIZE, HAS_NORM, IS_INTERLEAVED, PAIRS, SLICES)
    cos = load_angles(cos_ptr, offs_l, mask_l, HEAD_SIZE, HAS_ROPE, PAIRS, SLICES)
    sin = load_angles(sin_ptr, offs_l, mask_l, HEAD_SIZE, HAS_ROPE, PAIRS, SLICES)
    return joined(norm_rope(x, weight, cos, sin, mask_l, eps, X, HEAD_SIZE, 1, HAS_NORM, HAS_ROPE, IS_ROPE_FIRST), X)


@triton.jit
def exponentials(q, k, mask_k, scale_log2):
    """exp(scale q k^T - maximum), 0 for keys beyond the last, and its sum for each query."""
    scores = tl.where(mask_k[None, :], dot_rows(q, k), float("-inf"))
    # the product is rounded after the difference, which is small for the keys that count
    weights = tl.exp2((scores - tl.max(scores, 1)[:, None]) * scale_log2)
    return weights, tl.sum(weights, 1)


@triton.jit
def load_weight(
    ptr, X: tl.constexpr, HEAD_SIZE: tl.constexpr, HAS_NORM: tl.constexpr, IS_INTERLEAVED: tl.constexpr,
    PAIRS: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """One row for all tokens, rounded to X."""
    weight = (0.0,)
    if HAS_NORM:
        offs, mask = tl.zeros([1], tl.int64), tl.full([1], True, tl.int1)
        weight = rounded(load_pairs(ptr, offs, mask, 1, HEAD_SIZE, IS_INTERLEAVED, PAIRS, SLICES), X)
    return weight


@triton.jit
def load_angles(
    ptr, offs_l, mask_l, HEAD_SIZE: tl.constexpr, HAS_ROPE: tl.constexpr, PAIRS: tl.constexpr, SLICES: tl.constexpr
):
    angles = (0.0,)
    if HAS_ROPE:
        angles = load_slices(ptr, offs_l * (HEAD_SIZE // 2), mask_l, 1, HEAD_SIZE // 2, PAIRS, SLICES)
    return angles
