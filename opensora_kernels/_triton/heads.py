"""Queries, keys and values in Triton: where their heads lie, RMSNorm and rotation of a tile of them, both ways.

Axes: O, P leading axes, L tokens, N heads, D head size, R rows (one head of one token each), F pairs of elements.
A tile of rows is a tuple of tensors, slices of D, since few D are powers of two: slices of equal width, which share one
layout, where a row's sums are needed (five of 16 for D = 72), a main one and a tail for large products of matrices
(64 + 16). A tile of pairs is one of fp32 tensors, (first, second) of the pairs in each slice, slice after slice.
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


def equal_slices(size: int, least: int = 1) -> tuple[int, int]:
    """(width, number) of the widest slices that cover `size` with at most a fifth to spare; powers of two."""
    width = triton.next_power_of_2(size)
    while width > least and 5 * width * triton.cdiv(size, width) > 6 * size:
        width //= 2
    width = max(width, least)
    return width, triton.cdiv(size, width)


def main_and_tail(size: int, least: int) -> tuple[int, int]:
    """Powers of two whose sum covers `size`: 72 = 64 + 8. The second is 0 where one of up to 64 alone is as tight; 128
    are two of 64, because a product's factor of half the width takes half the registers."""
    main = max(least, triton.next_power_of_2(size + 1) // 2)
    if main >= size:
        return (main, 0) if main <= 64 else (main // 2, main // 2)
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
    """What the reference makes of pairs x of dtype X, rounding where it rounds; values of dtype X in fp32.

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
        grad = ()
        for i in tl.static_range(len(n)):
            grad += (rstd_r[:, None] * (grad_n[i] - n[i] * mean_r[:, None]),)
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
    ptr, offs_r, mask_r, stride_d,
    D: tl.constexpr, IS_INTERLEAVED: tl.constexpr, PAIRS: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """The rows that begin at `offs_r` as pairs: elements (2i, 2i + 1), loaded side by side, or (i, i + D/2).

    0 in rows where `mask_r` is False and beyond D.
    """
    x = ()
    HALF: tl.constexpr = D // 2
    for i in tl.static_range(SLICES):
        if IS_INTERLEAVED:
            row = _load_lanes(ptr, offs_r, mask_r, stride_d, 2 * PAIRS * i, 2 * PAIRS, D).to(tl.float32)
            first, second = tl.split(tl.reshape(row, [row.shape[0], PAIRS, 2]))
        else:
            first = _load_lanes(ptr, offs_r, mask_r, stride_d, PAIRS * i, PAIRS, HALF).to(tl.float32)
            second = _load_lanes(ptr + HALF * stride_d, offs_r, mask_r, stride_d, PAIRS * i, PAIRS, HALF).to(tl.float32)
        x += (first, second)
    return x


@triton.jit
def store_pairs(
    ptr, x, offs_r, mask_r, stride_d,
    D: tl.constexpr, IS_INTERLEAVED: tl.constexpr, PAIRS: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = D // 2
    for i in tl.static_range(SLICES):
        if IS_INTERLEAVED:
            row = tl.reshape(tl.join(x[2 * i], x[2 * i + 1]), [x[0].shape[0], 2 * PAIRS])
            _store_lanes(ptr, row, offs_r, mask_r, stride_d, 2 * PAIRS * i, 2 * PAIRS, D)
        else:
            _store_lanes(ptr, x[2 * i], offs_r, mask_r, stride_d, PAIRS * i, PAIRS, HALF)
            _store_lanes(ptr + HALF * stride_d, x[2 * i + 1], offs_r, mask_r, stride_d, PAIRS * i, PAIRS, HALF)


@triton.jit
def load_slices(ptr, offs_r, mask_r, stride, SIZE: tl.constexpr, WIDTH: tl.constexpr, SLICES: tl.constexpr):
    """The first SIZE elements from `offs_r` on, in their own dtype, as slices of equal width."""
    x = ()
    for i in tl.static_range(SLICES):
        x += (_load_lanes(ptr, offs_r, mask_r, stride, WIDTH * i, WIDTH, SIZE),)
    return x


@triton.jit
def store_slices(ptr, x, offs_r, mask_r, stride, SIZE: tl.constexpr, WIDTH: tl.constexpr, SLICES: tl.constexpr):
    for i in tl.static_range(SLICES):
        _store_lanes(ptr, x[i], offs_r, mask_r, stride, WIDTH * i, WIDTH, SIZE)


@triton.jit
def load_rows(ptr, offs_r, mask_r, stride, SIZE: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr):
    """The first SIZE elements from `offs_r` on, in their own dtype, as (main,) or (main, tail)."""
    x = (_load_lanes(ptr, offs_r, mask_r, stride, 0, MAIN, SIZE),)
    if TAIL > 0:
        x += (_load_lanes(ptr, offs_r, mask_r, stride, MAIN, TAIL, SIZE),)
    return x


@triton.jit
def store_rows(ptr, x, offs_r, mask_r, stride, SIZE: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr):
    _store_lanes(ptr, x[0], offs_r, mask_r, stride, 0, MAIN, SIZE)
    if TAIL > 0:
        _store_lanes(ptr, x[1], offs_r, mask_r, stride, MAIN, TAIL, SIZE)


@triton.jit
def zero_slices(ROWS: tl.constexpr, WIDTH: tl.constexpr, SLICES: tl.constexpr):
    x = ()
    for _ in tl.static_range(SLICES):
        x += (tl.zeros([ROWS, WIDTH], tl.float32),)
    return x


@triton.jit
def zero_rows(ROWS: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr):
    x = (tl.zeros([ROWS, MAIN], tl.float32),)
    if TAIL > 0:
        x += (tl.zeros([ROWS, TAIL], tl.float32),)
    return x


@triton.jit
def joined(x, X: tl.constexpr):
    """Pairs as slices of dtype X, the elements of a pair side by side whatever their order in memory was."""
    rows = ()
    for i in tl.static_range(len(x) // 2):
        rows += (tl.reshape(tl.join(x[2 * i], x[2 * i + 1]), [x[0].shape[0], 2 * x[0].shape[1]]).to(X),)
    return rows


@triton.jit
def parted(rows):
    """Slices in which the elements of a pair lie side by side as pairs."""
    x = ()
    for i in tl.static_range(len(rows)):
        x += tl.split(tl.reshape(rows[i], [rows[i].shape[0], rows[i].shape[1] // 2, 2]))
    return x


@triton.jit
def dot_rows(x, y):
    """x y^T, slice by slice: one number for each row of x and each of y, in fp32."""
    products = tl.dot(x[0], tl.trans(y[0]), input_precision="ieee")
    for i in tl.static_range(1, len(x)):
        products = tl.dot(x[i], tl.trans(y[i]), products, input_precision="ieee")
    return products


@triton.jit
def dot_added(total, weights, x):
    """total + weights x, slice by slice."""
    result = ()
    for i in tl.static_range(len(x)):
        result += (tl.dot(weights, x[i], total[i], input_precision="ieee"),)
    return result


@triton.jit
def added(x, y):
    total = ()
    for i in tl.static_range(len(x)):
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
def _rotate(x, cos, sin, X: tl.constexpr):
    y = ()
    for i in tl.static_range(len(x) // 2):
        y += _rotate_slice(x[2 * i], x[2 * i + 1], cos[i], sin[i], X)
    return y


@triton.jit
def _rotate_slice(first, second, cos, sin, X: tl.constexpr):
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
    x = ()
    for i in tl.static_range(len(grad) // 2):
        wide_cos, wide_sin = cos[i].to(tl.float32), sin[i].to(tl.float32)
        x += _rotate_slice(grad[2 * i], grad[2 * i + 1], wide_cos, -wide_sin, tl.float32)
    return x


@triton.jit
def _angle_gradients(x, grad):
    """Gradients of the cosines and sines that turned x: g1 a + g2 b and g2 a - g1 b of its pairs (a, b)."""
    grad_cos, grad_sin = (), ()
    for i in tl.static_range(len(x) // 2):
        first, second, grad_first, grad_second = x[2 * i], x[2 * i + 1], grad[2 * i], grad[2 * i + 1]
        grad_cos += (grad_first * first + grad_second * second,)
        grad_sin += (grad_second * first - grad_first * second,)
    return grad_cos, grad_sin


@triton.jit
def _times(x, y):
    product = ()
    for i in tl.static_range(len(x)):
        product += (x[i] * y[i],)
    return product


@triton.jit
def _row_sums(x):
    total = x[0]
    for i in tl.static_range(1, len(x)):
        total += x[i]
    return tl.sum(total, 1)


@triton.jit
def _mean(total_r, NUM_NORMED: tl.constexpr, NUM_SHARING: tl.constexpr):
    if NUM_SHARING > 1:
        shared = tl.reshape(total_r, [total_r.shape[0] // NUM_SHARING, NUM_SHARING])
        shared = tl.broadcast_to(tl.sum(shared, 1)[:, None], shared.shape)
        total_r = tl.reshape(shared, total_r.shape)
    return total_r / NUM_NORMED


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
