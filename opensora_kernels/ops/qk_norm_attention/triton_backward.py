"""The backward kernel of QK-norm self-attention of short sequences. Axes: L tokens, N heads, D head size, K programs.

With weights P = softmax(scale q k^T) and out = P v: grad_v = P^T g; of the scores, G = scale P (g v^T - delta) with
delta = sum(P g v^T) for each query; of the normalised and rotated q and k, G k and G^T q.
"""

from __future__ import annotations

import triton
import triton.language as tl

from opensora_kernels._triton.heads import (
    added,
    dot_added,
    dot_rows,
    joined,
    load_pairs,
    load_slices,
    norm_rope,
    norm_rope_backward,
    parted,
    store_pairs,
    store_slices,
    zero_slices,
)

from .triton_forward import exponentials, load_angles, load_weight, place


@triton.jit
def _qk_norm_attention_backward_kernel(
    q_ptr, k_ptr, v_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, grad_ptr, grad_q_ptr, grad_k_ptr, grad_v_ptr,
    weight_partial_ptr, angles_partial_ptr, num_items, num_inner, num_tokens,
    stride_xo, stride_xp, stride_xl, stride_xd, eps, scale_log2, scale, stride_go, stride_gp, stride_gl, stride_gd,
    STRIDE_XN: tl.constexpr, STRIDE_GN: tl.constexpr, WANTS_WEIGHT: tl.constexpr, WANTS_ANGLES: tl.constexpr,
    NUM_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, HAS_NORM: tl.constexpr, HAS_ROPE: tl.constexpr,
    IS_ROPE_FIRST: tl.constexpr, IS_INTERLEAVED: tl.constexpr,
    BLOCK_K: tl.constexpr, PAIRS: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """Every so many heads, all recomputed from q, k and v. Sums of weights' and angles' gradients are the program's."""
    X: tl.constexpr = q_ptr.dtype.element_ty
    offs_l = tl.arange(0, BLOCK_K).to(tl.int64)
    mask_l = offs_l < num_tokens
    program = tl.program_id(0).to(tl.int64)
    angles_partial_ptr += program * 2 * num_tokens * (HEAD_SIZE // 2)
    weight_partial_ptr += program * 2 * HEAD_SIZE
    q_weight = load_weight(q_weight_ptr, X, HEAD_SIZE, HAS_NORM, IS_INTERLEAVED, PAIRS, SLICES)
    k_weight = load_weight(k_weight_ptr, X, HEAD_SIZE, HAS_NORM, IS_INTERLEAVED, PAIRS, SLICES)
    for item in range(tl.program_id(0), num_items, tl.num_programs(0)):
        sample, o, p, n = place(item, num_inner, NUM_HEADS)
        offs_x = o * stride_xo + p * stride_xp + offs_l * stride_xl + n * STRIDE_XN
        offs_g = o * stride_go + p * stride_gp + offs_l * stride_gl + n * STRIDE_GN
        offs_out = ((sample * num_tokens + offs_l) * NUM_HEADS + n) * HEAD_SIZE
        cos = load_angles(cos_ptr, offs_l, mask_l, HEAD_SIZE, HAS_ROPE, PAIRS, SLICES)
        sin = load_angles(sin_ptr, offs_l, mask_l, HEAD_SIZE, HAS_ROPE, PAIRS, SLICES)
        q = load_pairs(q_ptr, offs_x, mask_l, stride_xd, HEAD_SIZE, IS_INTERLEAVED, PAIRS, SLICES)
        k = load_pairs(k_ptr, offs_x, mask_l, stride_xd, HEAD_SIZE, IS_INTERLEAVED, PAIRS, SLICES)
        v = load_slices(v_ptr, offs_x, mask_l, stride_xd, HEAD_SIZE, 2 * PAIRS, SLICES)
        grad = load_slices(grad_ptr, offs_out, mask_l, 1, HEAD_SIZE, 2 * PAIRS, SLICES)
        q = norm_rope(q, q_weight, cos, sin, mask_l, eps, X, HEAD_SIZE, 1, HAS_NORM, HAS_ROPE, IS_ROPE_FIRST)
        k = norm_rope(k, k_weight, cos, sin, mask_l, eps, X, HEAD_SIZE, 1, HAS_NORM, HAS_ROPE, IS_ROPE_FIRST)
        q, k = joined(q, X), joined(k, X)

        weights, sum_l = exponentials(q, k, mask_l, scale_log2)
        weights = weights / sum_l[:, None]
        zeros = zero_slices(BLOCK_K, 2 * PAIRS, SLICES)
        grad_v = dot_added(zeros, tl.trans(weights).to(X), grad)
        store_slices(grad_v_ptr, grad_v, offs_g, mask_l, stride_gd, HEAD_SIZE, 2 * PAIRS, SLICES)
        grad_weights = dot_rows(grad, v)
        grad_scores = weights * (grad_weights - tl.sum(weights * grad_weights, 1)[:, None]) * scale

        # q and k are read again, from the cache, rather than kept in registers
        q_part, q_cos, q_sin = _store_gradient(
            parted(dot_added(zeros, grad_scores.to(X), k)), q_ptr, grad_q_ptr, q_weight, cos, sin, offs_x, offs_g,
            mask_l, stride_xd, stride_gd, eps, HEAD_SIZE, HAS_NORM, HAS_ROPE, IS_ROPE_FIRST, IS_INTERLEAVED,
            PAIRS, SLICES,
        )  # fmt: skip
        k_part, k_cos, k_sin = _store_gradient(
            parted(dot_added(zeros, tl.trans(grad_scores).to(X), q)), k_ptr, grad_k_ptr, k_weight, cos, sin, offs_x,
            offs_g, mask_l, stride_xd, stride_gd, eps, HEAD_SIZE, HAS_NORM, HAS_ROPE, IS_ROPE_FIRST, IS_INTERLEAVED,
            PAIRS, SLICES,
        )  # fmt: skip
        if WANTS_WEIGHT:
            _add_weights(weight_partial_ptr, q_part, HEAD_SIZE, IS_INTERLEAVED, PAIRS, SLICES)
            _add_weights(weight_partial_ptr + HEAD_SIZE, k_part, HEAD_SIZE, IS_INTERLEAVED, PAIRS, SLICES)
        if WANTS_ANGLES:
            num_angles = num_tokens * (HEAD_SIZE // 2)
            _add_angles(angles_partial_ptr, added(q_cos, k_cos), offs_l, mask_l, HEAD_SIZE, PAIRS, SLICES)
            _add_angles(angles_partial_ptr + num_angles, added(q_sin, k_sin), offs_l, mask_l, HEAD_SIZE, PAIRS, SLICES)


@triton.jit
def _store_gradient(
    grad, x_ptr, grad_x_ptr, weight, cos, sin, offs_x, offs_g, mask_l, stride_xd, stride_gd, eps,
    HEAD_SIZE: tl.constexpr, HAS_NORM: tl.constexpr, HAS_ROPE: tl.constexpr, IS_ROPE_FIRST: tl.constexpr,
    IS_INTERLEAVED: tl.constexpr, PAIRS: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """From the gradient of the normalised and rotated x to that of x; returns what weight, cos and sin get of it."""
    x = load_pairs(x_ptr, offs_x, mask_l, stride_xd, HEAD_SIZE, IS_INTERLEAVED, PAIRS, SLICES)
    grad, grad_weight, grad_cos, grad_sin = norm_rope_backward(
        x, grad, weight, cos, sin, mask_l, eps, x_ptr.dtype.element_ty, HEAD_SIZE, 1, HAS_NORM, HAS_ROPE, IS_ROPE_FIRST
    )
    store_pairs(grad_x_ptr, grad, offs_g, mask_l, stride_gd, HEAD_SIZE, IS_INTERLEAVED, PAIRS, SLICES)
    return [tl.sum(piece, 0)[None, :] for piece in grad_weight], grad_cos, grad_sin


@triton.jit
def _add_weights(
    ptr, weights, HEAD_SIZE: tl.constexpr, IS_INTERLEAVED: tl.constexpr, PAIRS: tl.constexpr, SLICES: tl.constexpr
):
    """To the program's sums in memory, so as not to hold them in registers meanwhile."""
    offs, mask = tl.zeros([1], tl.int64), tl.full([1], True, tl.int1)
    tl.debug_barrier()  # what other threads stored for the last head
    before = load_pairs(ptr, offs, mask, 1, HEAD_SIZE, IS_INTERLEAVED, PAIRS, SLICES)
    store_pairs(ptr, added(before, weights), offs, mask, 1, HEAD_SIZE, IS_INTERLEAVED, PAIRS, SLICES)


@triton.jit
def _add_angles(ptr, angles, offs_l, mask_l, HEAD_SIZE: tl.constexpr, PAIRS: tl.constexpr, SLICES: tl.constexpr):
    """To the program's sums in memory: models do not ask for these, so they are not worth registers."""
    F: tl.constexpr = HEAD_SIZE // 2
    tl.debug_barrier()  # what other threads stored for the last head
    before = load_slices(ptr, offs_l * F, mask_l, 1, F, PAIRS, SLICES)
    store_slices(ptr, added(before, angles), offs_l * F, mask_l, 1, F, PAIRS, SLICES)
