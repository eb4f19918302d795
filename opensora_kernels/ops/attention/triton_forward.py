"""Attention's forward kernel in Triton. Axes: B samples, L queries, K keys, N heads, D head size."""

from __future__ import annotations

import triton
import triton.language as tl

from opensora_kernels._triton.heads import dot_added, dot_rows, load_rows, store_rows, zero_rows


@triton.jit
def _attention_forward_kernel(
    q_ptr, k_ptr, v_ptr, lengths_ptr, ends_ptr, out_ptr, lse_ptr, num_inner, num_queries, num_keys,
    stride_qo, stride_qp, stride_ql, stride_qd, stride_ko, stride_kp, stride_kk, stride_kd,
    stride_vo, stride_vp, stride_vk, stride_vd, scale_log2,
    STRIDE_QN: tl.constexpr, STRIDE_KN: tl.constexpr, STRIDE_VN: tl.constexpr,
    NUM_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head against all keys of its sample; neighbours share those through the cache."""
    num_l_blocks = tl.cdiv(num_queries, BLOCK_L)
    block, o, p, n = place(tl.program_id(0), num_l_blocks, num_inner, NUM_HEADS)
    sample = o * num_inner + p
    offs_l = block * BLOCK_L + tl.arange(0, BLOCK_L)
    mask_l = offs_l < num_queries
    q_ptr += o * stride_qo + p * stride_qp + n * STRIDE_QN
    q = load_rows(q_ptr, offs_l * stride_ql, mask_l, stride_qd, HEAD_SIZE, MAIN, TAIL)
    start, length = keys_of(sample, lengths_ptr, ends_ptr, num_keys)
    k_ptr += o * stride_ko + p * stride_kp + n * STRIDE_KN + start * stride_kk
    v_ptr += o * stride_vo + p * stride_vp + n * STRIDE_VN + start * stride_vk

    acc = zero_rows(BLOCK_L, MAIN, TAIL)
    max_l = tl.full([BLOCK_L], float("-inf"), tl.float32)
    sum_l = tl.zeros([BLOCK_L], tl.float32)
    whole = length // BLOCK_K * BLOCK_K
    for first in range(0, whole, BLOCK_K):
        acc, max_l, sum_l = _attend(
            first, length, q, acc, max_l, sum_l, k_ptr, v_ptr, stride_kk, stride_kd, stride_vk, stride_vd, scale_log2,
            False, HEAD_SIZE, MAIN, TAIL, BLOCK_K,
        )  # fmt: skip
    if whole < length:
        acc, max_l, sum_l = _attend(
            whole, length, q, acc, max_l, sum_l, k_ptr, v_ptr, stride_kk, stride_kd, stride_vk, stride_vd, scale_log2,
            True, HEAD_SIZE, MAIN, TAIL, BLOCK_K,
        )  # fmt: skip

    has_keys = sum_l > 0  # a sample without any gives zeros
    inverse_l = 1.0 / tl.where(has_keys, sum_l, 1.0)
    acc = [piece * inverse_l[:, None] for piece in acc]
    offs_out = ((sample * num_queries + offs_l) * NUM_HEADS + n) * HEAD_SIZE
    store_rows(out_ptr, acc, offs_out, mask_l, 1, HEAD_SIZE, MAIN, TAIL)
    lse_l = tl.where(has_keys, max_l + tl.log2(tl.where(has_keys, sum_l, 1.0)), float("inf"))
    tl.store(lse_ptr + (sample * NUM_HEADS + n) * num_queries + offs_l, lse_l, mask=mask_l)


@triton.jit
def _attend(
    first, length, q, acc, max_l, sum_l, k_ptr, v_ptr, stride_kk, stride_kd, stride_vk, stride_vd, scale_log2,
    IS_LAST: tl.constexpr, HEAD_SIZE: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Adds a block of keys to the running sums of weights and of weighted values, both relative to the maximum."""
    offs_k = (first + tl.arange(0, BLOCK_K)).to(tl.int64)
    mask_k = offs_k < length if IS_LAST else tl.full([BLOCK_K], True, tl.int1)
    k = load_rows(k_ptr, offs_k * stride_kk, mask_k, stride_kd, HEAD_SIZE, MAIN, TAIL)
    v = load_rows(v_ptr, offs_k * stride_vk, mask_k, stride_vd, HEAD_SIZE, MAIN, TAIL)
    scores = dot_rows(q, k)
    if IS_LAST:
        scores = tl.where(mask_k[None, :], scores, float("-inf"))
    new_max_l = tl.maximum(max_l, tl.max(scores, 1) * scale_log2)
    weights = tl.exp2(scores * scale_log2 - new_max_l[:, None])
    rescale_l = tl.exp2(max_l - new_max_l)
    sum_l = sum_l * rescale_l + tl.sum(weights, 1)
    acc = dot_added([piece * rescale_l[:, None] for piece in acc], weights.to(v[0].dtype), v)
    return acc, new_max_l, sum_l


@triton.jit
def place(program, num_blocks, num_inner, NUM_HEADS: tl.constexpr):
    """(block, o, p, n) of a program, in int64; blocks go by first."""
    rest = program // num_blocks
    sample = rest // NUM_HEADS
    o, p = sample // num_inner, sample % num_inner
    return (program % num_blocks).to(tl.int64), o.to(tl.int64), p.to(tl.int64), (rest % NUM_HEADS).to(tl.int64)


@triton.jit
def keys_of(sample, lengths_ptr, ends_ptr, num_keys):
    """The first key of a sample and how many it has: all, or its part of padded or packed ones."""
    start = sample * 0
    length = num_keys
    if lengths_ptr is not None:
        length = tl.load(lengths_ptr + sample).to(tl.int64)
        if ends_ptr is not None:
            start = tl.load(ends_ptr + sample).to(tl.int64) - length
        length = tl.maximum(tl.minimum(length, num_keys - start), 0).to(tl.int32)
    return start, length
