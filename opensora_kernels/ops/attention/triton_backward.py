"""Attention's backward kernels in Triton: one for the queries, then one for the keys and values; no atomics.

With weights P = softmax(scale q k^T) and out = P v: grad_v = P^T g; of the scores, G = P (g v^T - delta) with
delta = sum(g out) for each query; grad_q = scale G k, grad_k = scale G^T q.
Axes: B samples, L queries, K keys, N heads, D head size.
"""

from __future__ import annotations

import triton
import triton.language as tl

from opensora_kernels._triton.heads import dot_added, dot_rows, load_rows, store_rows, zero_rows

from .triton_forward import keys_of, place


@triton.jit
def _attention_backward_queries_kernel(
    q_ptr, k_ptr, v_ptr, lengths_ptr, ends_ptr, grad_ptr, lse_ptr, delta_ptr, out_ptr, grad_q_ptr,
    num_inner, num_queries, num_keys, stride_qo, stride_qp, stride_ql, stride_qd,
    stride_ko, stride_kp, stride_kk, stride_kd, stride_vo, stride_vp, stride_vk, stride_vd, scale_log2, scale,
    STRIDE_QN: tl.constexpr, STRIDE_KN: tl.constexpr, STRIDE_VN: tl.constexpr,
    NUM_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head against all keys of its sample. Leaves delta for the other kernel."""
    num_l_blocks = tl.cdiv(num_queries, BLOCK_L)
    block, o, p, n = place(tl.program_id(0), num_l_blocks, num_inner, NUM_HEADS)
    sample = o * num_inner + p
    offs_l = block * BLOCK_L + tl.arange(0, BLOCK_L)
    mask_l = offs_l < num_queries
    offs_out = ((sample * num_queries + offs_l) * NUM_HEADS + n) * HEAD_SIZE
    grad = load_rows(grad_ptr, offs_out, mask_l, 1, HEAD_SIZE, MAIN, TAIL)
    out = load_rows(out_ptr, offs_out, mask_l, 1, HEAD_SIZE, MAIN, TAIL)
    delta_l = tl.sum(grad[0].to(tl.float32) * out[0].to(tl.float32), 1)
    if TAIL > 0:
        delta_l += tl.sum(grad[1].to(tl.float32) * out[1].to(tl.float32), 1)
    offs_row = (sample * NUM_HEADS + n) * num_queries + offs_l
    tl.store(delta_ptr + offs_row, delta_l, mask=mask_l)
    lse_l = tl.load(lse_ptr + offs_row, mask=mask_l, other=float("inf"))
    q_ptr += o * stride_qo + p * stride_qp + n * STRIDE_QN
    q = load_rows(q_ptr, offs_l * stride_ql, mask_l, stride_qd, HEAD_SIZE, MAIN, TAIL)
    start, length = keys_of(sample, lengths_ptr, ends_ptr, num_keys)
    k_ptr += o * stride_ko + p * stride_kp + n * STRIDE_KN + start * stride_kk
    v_ptr += o * stride_vo + p * stride_vp + n * STRIDE_VN + start * stride_vk

    grad_q = zero_rows(BLOCK_L, MAIN, TAIL)
    whole = length // BLOCK_K * BLOCK_K
    for first in range(0, whole, BLOCK_K):
        grad_q = _add_keys(
            first, length, q, grad, grad_q, lse_l, delta_l, k_ptr, v_ptr, stride_kk, stride_kd, stride_vk, stride_vd,
            scale_log2, False, HEAD_SIZE, MAIN, TAIL, BLOCK_K,
        )  # fmt: skip
    if whole < length:
        grad_q = _add_keys(
            whole, length, q, grad, grad_q, lse_l, delta_l, k_ptr, v_ptr, stride_kk, stride_kd, stride_vk, stride_vd,
            scale_log2, True, HEAD_SIZE, MAIN, TAIL, BLOCK_K,
        )  # fmt: skip
    store_rows(grad_q_ptr, [piece * scale for piece in grad_q], offs_out, mask_l, 1, HEAD_SIZE, MAIN, TAIL)


@triton.jit
def _add_keys(
    first, length, q, grad, grad_q, lse_l, delta_l, k_ptr, v_ptr, stride_kk, stride_kd, stride_vk, stride_vd,
    scale_log2, IS_LAST: tl.constexpr, HEAD_SIZE: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    offs_k = (first + tl.arange(0, BLOCK_K)).to(tl.int64)
    mask_k = offs_k < length if IS_LAST else tl.full([BLOCK_K], True, tl.int1)
    k = load_rows(k_ptr, offs_k * stride_kk, mask_k, stride_kd, HEAD_SIZE, MAIN, TAIL)
    v = load_rows(v_ptr, offs_k * stride_vk, mask_k, stride_vd, HEAD_SIZE, MAIN, TAIL)
    weights = tl.exp2(dot_rows(q, k) * scale_log2 - lse_l[:, None])
    if IS_LAST:
        weights = tl.where(mask_k[None, :], weights, 0.0)
    grad_scores = weights * (dot_rows(grad, v) - delta_l[:, None])
    return dot_added(grad_q, grad_scores.to(k[0].dtype), k)


@triton.jit
def _attention_backward_keys_kernel(
    q_ptr, k_ptr, v_ptr, lengths_ptr, ends_ptr, grad_ptr, lse_ptr, delta_ptr, grad_k_ptr, grad_v_ptr, num_splits,
    num_inner, num_queries, num_keys, stride_qo, stride_qp, stride_ql, stride_qd,
    stride_ko, stride_kp, stride_kk, stride_kd, stride_vo, stride_vp, stride_vk, stride_vd, scale_log2, scale,
    STRIDE_QN: tl.constexpr, STRIDE_KN: tl.constexpr, STRIDE_VN: tl.constexpr,
    NUM_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One block of keys of one head against one split of its sample's queries."""
    num_programs_of_split = tl.num_programs(0) // num_splits
    split = (tl.program_id(0) // num_programs_of_split).to(tl.int64)
    num_k_blocks = tl.cdiv(num_keys, BLOCK_K)
    block, o, p, n = place(tl.program_id(0) % num_programs_of_split, num_k_blocks, num_inner, NUM_HEADS)
    sample = o * num_inner + p
    start, length = keys_of(sample, lengths_ptr, ends_ptr, num_keys)
    offs_k = block * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_k = offs_k < length
    k_ptr += o * stride_ko + p * stride_kp + n * STRIDE_KN + start * stride_kk
    v_ptr += o * stride_vo + p * stride_vp + n * STRIDE_VN + start * stride_vk
    k = load_rows(k_ptr, offs_k * stride_kk, mask_k, stride_kd, HEAD_SIZE, MAIN, TAIL)
    v = load_rows(v_ptr, offs_k * stride_vk, mask_k, stride_vd, HEAD_SIZE, MAIN, TAIL)
    q_ptr += o * stride_qo + p * stride_qp + n * STRIDE_QN
    grad_ptr += (sample * num_queries * NUM_HEADS + n) * HEAD_SIZE
    lse_ptr += (sample * NUM_HEADS + n) * num_queries
    delta_ptr += (sample * NUM_HEADS + n) * num_queries

    grad_k, grad_v = zero_rows(BLOCK_K, MAIN, TAIL), zero_rows(BLOCK_K, MAIN, TAIL)
    queries_of_split = tl.cdiv(tl.cdiv(num_queries, num_splits), BLOCK_L) * BLOCK_L
    begin = (split * queries_of_split).to(tl.int32)
    end = tl.maximum(begin, tl.minimum(begin + queries_of_split, num_queries))
    end = tl.where(block * BLOCK_K < length, end, begin)  # no queries for a block without keys
    whole = begin + (end - begin) // BLOCK_L * BLOCK_L
    for first in range(begin, whole, BLOCK_L):
        grad_k, grad_v = _add_queries(
            first, num_queries, k, v, grad_k, grad_v, q_ptr, grad_ptr, lse_ptr, delta_ptr, stride_ql, stride_qd,
            scale_log2, False, NUM_HEADS, HEAD_SIZE, MAIN, TAIL, BLOCK_L,
        )  # fmt: skip
    if whole < end:
        grad_k, grad_v = _add_queries(
            whole, num_queries, k, v, grad_k, grad_v, q_ptr, grad_ptr, lse_ptr, delta_ptr, stride_ql, stride_qd,
            scale_log2, True, NUM_HEADS, HEAD_SIZE, MAIN, TAIL, BLOCK_L,
        )  # fmt: skip

    grad_k = [tl.where(mask_k[:, None], piece * scale, 0.0) for piece in grad_k]
    grad_v = [tl.where(mask_k[:, None], piece, 0.0) for piece in grad_v]
    if ends_ptr is None:
        first_row = (split * (num_programs_of_split // (num_k_blocks * NUM_HEADS)) + sample) * num_keys
        mask_k = offs_k < num_keys
    else:  # other samples' keys lie next to these
        first_row = split * num_keys + start
    offs_grad = ((first_row + offs_k) * NUM_HEADS + n) * HEAD_SIZE
    store_rows(grad_k_ptr, grad_k, offs_grad, mask_k, 1, HEAD_SIZE, MAIN, TAIL)
    store_rows(grad_v_ptr, grad_v, offs_grad, mask_k, 1, HEAD_SIZE, MAIN, TAIL)


@triton.jit
def _add_queries(
    first, num_queries, k, v, grad_k, grad_v, q_ptr, grad_ptr, lse_ptr, delta_ptr, stride_ql, stride_qd, scale_log2,
    IS_LAST: tl.constexpr, NUM_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_L: tl.constexpr,
):  # fmt: skip
    offs_l = (first + tl.arange(0, BLOCK_L)).to(tl.int64)
    mask_l = offs_l < num_queries if IS_LAST else tl.full([BLOCK_L], True, tl.int1)
    q = load_rows(q_ptr, offs_l * stride_ql, mask_l, stride_qd, HEAD_SIZE, MAIN, TAIL)
    grad = load_rows(grad_ptr, offs_l * (NUM_HEADS * HEAD_SIZE), mask_l, 1, HEAD_SIZE, MAIN, TAIL)
    lse_l = tl.load(lse_ptr + offs_l, mask=mask_l, other=float("inf"))  # weights of 0 for queries beyond the last
    delta_l = tl.load(delta_ptr + offs_l, mask=mask_l, other=0.0)
    weights_KL = tl.exp2(dot_rows(k, q) * scale_log2 - lse_l[None, :])
    grad_v = dot_added(grad_v, weights_KL.to(grad[0].dtype), grad)
    grad_scores_KL = weights_KL * (dot_rows(v, grad) - delta_l[None, :])
    return dot_added(grad_k, grad_scores_KL.to(q[0].dtype), q), grad_v
