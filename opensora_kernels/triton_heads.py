"""Queries, keys and values in Triton: where their heads lie, RMSNorm and rotation of a tile of them, both ways.

Axes: O, P leading axes, L tokens, N heads, D head size, R rows (one head of one token each), F pairs of elements.
A tile of rows is a tuple of tensors, (main,) or (main, tail), since few D are powers of two: 72 elements take 64 + 16
lanes instead of 128. A tile of pairs is one of fp32 tensors, (first, second), the two elements of each pair, (R, F)
each, or (first, second, tail_first, tail_second): the 36 pairs of D = 72 take 32 + 4 lanes instead of 64.
"""

from __future__ import annotations

import math
from itertools import pairwise

import triton
import triton.language as tl
from torch import Tensor


def views(*tensors: Tensor) -> list[Tensor]:
    """Each (*, L, N, D), all of the same leading axes, as (O, P, L, N, D) with the same O and P.

    Views where one way to part the leading axes serves all, as for a packed qkv with or without time and space
    swapped; else copies.
    """
    leading = tensors[0].shape[:-3]
    splits = [
        split
        for split in range(len(leading), -1, -1)
        if all(_is_even(x, 0, split) and _is_even(x, split, len(leading)) for x in tensors)
    ]
    split = splits[0] if splits else 0
    outer, inner = math.prod(leading[:split]), math.prod(leading[split:])
    return [(x if splits else x.contiguous()).view(outer, inner, *x.shape[-3:]) for x in tensors]


def pieces(size: int, least: int = 1) -> tuple[int, int]:
    """Powers of two (main, tail) that cover `size`, tail 0 where one alone covers it as tightly: 72 = 64 + 8."""
    main = max(least, triton.next_power_of_2(size + 1) // 2)
    if main >= size:
        return main, 0
    tail = max(least, triton.next_power_of_2(size - main))
    return (main, tail) if tail < main else (2 * main, 0)


def _is_even(x: Tensor, start: int, end: int) -> bool:
    """Whether axes start..end - 1 of x can become one."""
    axes = [axis for axis in range(start, end) if x.shape[axis] != 1]
    return not x.numel() or all(x.stride(left) == x.stride(right) * x.shape[right] for left, right in pairwise(axes))


@triton.jit
def norm_rope(
    x, weight, cos, sin, mask_r, eps, X: tl.constexpr, NUM_NORMED: tl.constexpr, NUM_SHARING: tl.constexpr,
    HAS_NORM: tl.constexpr, HAS_ROPE: tl.constexpr, IS_ROPE_FIRST: tl.constexpr,
):  # fmt: skip
    """What the reference makes of rows x of dtype X, rounding where it rounds; values of dtype X in fp32.

    The mean is over NUM_NORMED elements, those of NUM_SHARING neighbouring rows.
    """
    if HAS_ROPE and IS_ROPE_FIRST:
        x = _rotate(x, cos, sin, X)
    if HAS_NORM:
        x, _, _ = _norm(x, weight, mask_r, eps, X, NUM_NORMED, NUM_SHARING)
    if HAS_ROPE and not IS_ROPE_FIRST:
        x = _rotate(x, cos, sin, X)
    return x


@triton.jit
def norm_rope_backward(
    x, grad, weight, cos, sin, mask_r, eps, X: tl.constexpr, NUM_NORMED: tl.constexpr, NUM_SHARING: tl.constexpr,
    HAS_NORM: tl.constexpr, HAS_ROPE: tl.constexpr, IS_ROPE_FIRST: tl.constexpr,
):  # fmt: skip
    """The gradients of x, and each row's part in those of weight, cos and sin (meaningless without norm or rotation).

    With n = x rstd and y = w n: grad_x = rstd (g w - n mean(g w n)), grad_w = g n.
    """
    grad_weight, turned, grad_turned = x, x, grad
    if HAS_ROPE and IS_ROPE_FIRST:
        x = _rotate(x, cos, sin, X)
    if HAS_NORM:
        y, n, rstd_r = _norm(x, weight, mask_r, eps, X, NUM_NORMED, NUM_SHARING)
        if not IS_ROPE_FIRST:
            turned = y
            if HAS_ROPE:
                grad = _rotate_back(grad, cos, sin)
        grad_weight = _times(grad, rounded(n, X))
        grad_n = _times(grad, weight)
        mean_r = _mean(_row_sums(_times(grad_n, n)), NUM_NORMED, NUM_SHARING)
        grad = _norm_backward(grad_n, n, rstd_r, mean_r)
        if IS_ROPE_FIRST:
            grad_turned = grad
            if HAS_ROPE:
                grad = _rotate_back(grad, cos, sin)
    elif HAS_ROPE:
        grad = _rotate_back(grad, cos, sin)
    grad_cos, grad_sin = _angle_gradients(turned, grad_turned)
    return grad, grad_weight, grad_cos, grad_sin


@triton.jit
def load_pairs(
    ptr, offs_r, mask_r, stride_d, D: tl.constexpr, IS_INTERLEAVED: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr
):
    """The rows that begin at `offs_r`, in fp32; 0 in rows where `mask_r` is False and beyond D."""
    if TAIL > 0:
        # Where both meet, the compiler moves what it found first into the layout of what it found last.
        tail = _load_piece(ptr, offs_r, mask_r, stride_d, D, IS_INTERLEAVED, MAIN, TAIL)
    x = _load_piece(ptr, offs_r, mask_r, stride_d, D, IS_INTERLEAVED, 0, MAIN)
    if TAIL > 0:
        x += tail
    return x


@triton.jit
def store_pairs(
    ptr, x, offs_r, mask_r, stride_d,
    D: tl.constexpr, IS_INTERLEAVED: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    _store_piece(ptr, x[0], x[1], offs_r, mask_r, stride_d, D, IS_INTERLEAVED, 0, MAIN)
    if TAIL > 0:
        _store_piece(ptr, x[2], x[3], offs_r, mask_r, stride_d, D, IS_INTERLEAVED, MAIN, TAIL)


@triton.jit
def load_rows(ptr, offs_r, mask_r, stride, SIZE: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr):
    """The first SIZE elements from `offs_r` on, in their own dtype, as (main,) or (main, tail)."""
    if TAIL > 0:
        tail = _load_lanes(ptr, offs_r, mask_r, stride, MAIN, TAIL, SIZE)  # before the main piece, as in load_pairs
    x = (_load_lanes(ptr, offs_r, mask_r, stride, 0, MAIN, SIZE),)
    if TAIL > 0:
        x += (tail,)
    return x


@triton.jit
def store_rows(ptr, x, offs_r, mask_r, stride, SIZE: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr):
    _store_lanes(ptr, x[0], offs_r, mask_r, stride, 0, MAIN, SIZE)
    if TAIL > 0:
        _store_lanes(ptr, x[1], offs_r, mask_r, stride, MAIN, TAIL, SIZE)


@triton.jit
def zero_pairs(ROWS: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr):
    x = (tl.zeros([ROWS, MAIN], tl.float32), tl.zeros([ROWS, MAIN], tl.float32))
    if TAIL > 0:
        x += (tl.zeros([ROWS, TAIL], tl.float32), tl.zeros([ROWS, TAIL], tl.float32))
    return x


@triton.jit
def zero_rows(ROWS: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr):
    x = (tl.zeros([ROWS, MAIN], tl.float32),)
    if TAIL > 0:
        x += (tl.zeros([ROWS, TAIL], tl.float32),)
    return x


@triton.jit
def dot_rows(x, y):
    """x y^T of rows (main,) or (main, tail): one number for each row of x and each of y, in fp32."""
    products = tl.dot(x[0], tl.trans(y[0]), input_precision="ieee")
    if len(x) > 1:
        products = tl.dot(x[1], tl.trans(y[1]), products, input_precision="ieee")
    return products


@triton.jit
def dot_added(total, weights, x):
    """total + weights x, piece by piece."""
    result = (tl.dot(weights, x[0], total[0], input_precision="ieee"),)
    if len(x) > 1:
        result += (tl.dot(weights, x[1], total[1], input_precision="ieee"),)
    return result


@triton.jit
def added(x, y):
    total = (x[0] + y[0],)
    for i in tl.static_range(1, len(x)):
        total += (x[i] + y[i],)
    return total


@triton.jit
def rounded(x, X: tl.constexpr):
    """To values of dtype X, still in fp32."""
    return [piece.to(X).to(tl.float32) for piece in x]


@triton.jit
def _norm(x, weight, mask_r, eps, X: tl.constexpr, NUM_NORMED: tl.constexpr, NUM_SHARING: tl.constexpr):
    """y = weight * n rounded twice, n = x rstd, rstd."""
    mean_r = _mean(_row_sums(_times(x, x)), NUM_NORMED, NUM_SHARING)
    rstd_r = 1.0 / tl.sqrt(tl.where(mask_r, mean_r + eps, 1.0))  # with eps 0, rows beyond the end must not give NaN
    n = [piece * rstd_r[:, None] for piece in x]
    return rounded(_times(rounded(n, X), weight), X), n, rstd_r


@triton.jit
def _norm_backward(grad_n, n, rstd_r, mean_r):
    grad = (
        rstd_r[:, None] * (grad_n[0] - n[0] * mean_r[:, None]),
        rstd_r[:, None] * (grad_n[1] - n[1] * mean_r[:, None]),
    )
    if len(n) > 2:
        grad += (
            rstd_r[:, None] * (grad_n[2] - n[2] * mean_r[:, None]),
            rstd_r[:, None] * (grad_n[3] - n[3] * mean_r[:, None]),
        )
    return grad


@triton.jit
def _rotate(x, cos, sin, X: tl.constexpr):
    y = _rotate_piece(x[0], x[1], cos[0], sin[0], X)
    if len(x) > 2:
        y += _rotate_piece(x[2], x[3], cos[1], sin[1], X)
    return y


@triton.jit
def _rotate_piece(first, second, cos, sin, X: tl.constexpr):
    """Each product and each sum is rounded to the promoted dtype of what it is made of, and the result to X."""
    COS: tl.constexpr = X if cos.dtype == X else tl.float32
    SIN: tl.constexpr = X if sin.dtype == X else tl.float32
    SUM: tl.constexpr = COS if COS == SIN else tl.float32
    cos, sin = cos.to(tl.float32), sin.to(tl.float32)
    turned = (first * cos).to(COS).to(tl.float32) - (second * sin).to(SIN).to(tl.float32)
    other = (second * cos).to(COS).to(tl.float32) + (first * sin).to(SIN).to(tl.float32)
    return turned.to(SUM).to(X).to(tl.float32), other.to(SUM).to(X).to(tl.float32)


@triton.jit
def _rotate_back(grad, cos, sin):
    x = _rotate_piece(grad[0], grad[1], cos[0].to(tl.float32), -sin[0].to(tl.float32), tl.float32)
    if len(grad) > 2:
        x += _rotate_piece(grad[2], grad[3], cos[1].to(tl.float32), -sin[1].to(tl.float32), tl.float32)
    return x


@triton.jit
def _angle_gradients(x, grad):
    """Gradients of the cosines and sines that turned x: g1 a + g2 b and g2 a - g1 b of its pairs (a, b)."""
    grad_cos = (grad[0] * x[0] + grad[1] * x[1],)
    grad_sin = (grad[1] * x[0] - grad[0] * x[1],)
    if len(x) > 2:
        grad_cos += (grad[2] * x[2] + grad[3] * x[3],)
        grad_sin += (grad[3] * x[2] - grad[2] * x[3],)
    return grad_cos, grad_sin


@triton.jit
def _times(x, y):
    product = (x[0] * y[0], x[1] * y[1])
    if len(x) > 2:
        product += (x[2] * y[2], x[3] * y[3])
    return product


@triton.jit
def _row_sums(x):
    total_r = tl.sum(x[0] + x[1], 1)
    if len(x) > 2:
        total_r += tl.sum(x[2] + x[3], 1)
    return total_r


@triton.jit
def _mean(total_r, NUM_NORMED: tl.constexpr, NUM_SHARING: tl.constexpr):
    if NUM_SHARING > 1:
        shared = tl.reshape(total_r, [total_r.shape[0] // NUM_SHARING, NUM_SHARING])
        shared = tl.broadcast_to(tl.sum(shared, 1)[:, None], shared.shape)
        total_r = tl.reshape(shared, total_r.shape)
    return total_r / NUM_NORMED


@triton.jit
def _load_piece(
    ptr,
    offs_r,
    mask_r,
    stride_d,
    D: tl.constexpr,
    IS_INTERLEAVED: tl.constexpr,
    START: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Pairs START..START + SIZE - 1 of rows: elements (2i, 2i + 1), loaded side by side, or (i, i + D/2)."""
    if IS_INTERLEAVED:
        x = _load_lanes(ptr, offs_r, mask_r, stride_d, 2 * START, 2 * SIZE, D).to(tl.float32)
        first, second = tl.split(tl.reshape(x, [x.shape[0], SIZE, 2]))
        return first, second
    HALF: tl.constexpr = D // 2
    first = _load_lanes(ptr, offs_r, mask_r, stride_d, START, SIZE, HALF)
    second = _load_lanes(ptr + HALF * stride_d, offs_r, mask_r, stride_d, START, SIZE, HALF)
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def _store_piece(
    ptr, first, second, offs_r, mask_r, stride_d,
    D: tl.constexpr, IS_INTERLEAVED: tl.constexpr, START: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    if IS_INTERLEAVED:
        joined = tl.reshape(tl.join(first, second), [first.shape[0], 2 * SIZE])
        _store_lanes(ptr, joined, offs_r, mask_r, stride_d, 2 * START, 2 * SIZE, D)
    else:
        HALF: tl.constexpr = D // 2
        _store_lanes(ptr, first, offs_r, mask_r, stride_d, START, SIZE, HALF)
        _store_lanes(ptr + HALF * stride_d, second, offs_r, mask_r, stride_d, START, SIZE, HALF)


@triton.jit
def _load_lanes(ptr, offs_r, mask_r, stride, START: tl.constexpr, SIZE: tl.constexpr, END: tl.constexpr):
    offs = START + tl.arange(0, SIZE)
    mask = mask_r[:, None]
    if START + SIZE > END:  # a mask that differs within a row would stop vector loads
        mask = mask & (offs < END)[None, :]
    return tl.load(ptr + (offs_r[:, None] + (offs.to(tl.int64) * stride)[None, :]), mask=mask, other=0.0)


@triton.jit
def _store_lanes(ptr, x, offs_r, mask_r, stride, START: tl.constexpr, SIZE: tl.constexpr, END: tl.constexpr):
    offs = START + tl.arange(0, SIZE)
    mask = mask_r[:, None]
    if START + SIZE > END:
        mask = mask & (offs < END)[None, :]
    tl.store(ptr + (offs_r[:, None] + (offs.to(tl.int64) * stride)[None, :]), x.to(ptr.dtype.element_ty), mask=mask)
