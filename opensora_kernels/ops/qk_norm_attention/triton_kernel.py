"""QK-norm self-attention of short sequences in Triton: one program holds all keys of a head, several heads in turn.

The backward pass of more than 32 tokens, whose tiles no longer fit into registers, is that of the chain of qk_norm_rope
and attention, which also serves long sequences: each of the two has Triton kernels of its own.
Axes: O, P leading axes, L tokens, N heads, D head size, F pairs of elements, K programs.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from opensora_kernels._triton import dense, launch, power_of_two
from opensora_kernels._triton.heads import equal_slices, views
from opensora_kernels.tuning import configuration

from .triton_backward import _qk_norm_attention_backward_kernel
from .triton_forward import _qk_norm_attention_forward_kernel

# Sixteen for each of an H200's 132 multiprocessors: a head takes a warp or two, which wait for memory most of the time.
_MOST_PROGRAMS = 2112
_LONGEST_BACKWARD = 32


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    order: str,
    rope_layout: str,
    norm_scope: str,
    scale: float,
) -> Tensor:
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    views_OPLND = views(*_evenly_strided(q, k, v))
    num_items = math.prod(q.shape[:-3]) * q.shape[-2]
    launch(
        _qk_norm_attention_forward_kernel,
        (min(num_items, _MOST_PROGRAMS),),
        *views_OPLND, dense(q_weight), dense(k_weight), dense(cos), dense(sin), out,
        num_items, *_numbers(views_OPLND[0], eps, scale),
        **_variant(views_OPLND[0], q_weight, cos, order, rope_layout), **_tile("forward", q),
    )  # fmt: skip
    return out


def backward(
    grads: list[Tensor | None],
    wanted: list[bool],
    saved: list[Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    order: str,
    rope_layout: str,
    norm_scope: str,
    scale: float,
) -> list[Tensor | None]:
    grad_out = torch.zeros_like(q) if grads[0] is None else grads[0]
    if q.shape[-3] > _LONGEST_BACKWARD:
        return _backward_of_chain(
            grad_out, wanted, (q, k, q_weight, k_weight, cos, sin, eps, order, rope_layout, norm_scope), v, scale
        )
    *views_OPLND, grad_q, grad_k, grad_v = views(*_evenly_strided(q, k, v), *(torch.empty_like(q) for _ in range(3)))
    wants_weight, wants_angles = any(wanted[3:5]), any(wanted[5:7])
    num_items = math.prod(q.shape[:-3]) * q.shape[-2] if q.numel() else 0
    num_programs = min(num_items, _MOST_PROGRAMS)
    # Each program's own sums: atomics would add them up in another order every time.
    weight_K2D = torch.zeros(num_programs if wants_weight else 0, 2, q.shape[-1], dtype=torch.float32, device=q.device)
    angles_shape = (num_programs if wants_angles else 0, 2, q.shape[-3], q.shape[-1] // 2)
    angles_K2LF = torch.zeros(angles_shape, dtype=torch.float32, device=q.device)
    launch(
        _qk_norm_attention_backward_kernel,
        (num_programs,),
        *views_OPLND, dense(q_weight), dense(k_weight), dense(cos), dense(sin), grad_out.contiguous(),
        grad_q, grad_k, grad_v, weight_K2D, angles_K2LF, num_items, *_numbers(views_OPLND[0], eps, scale), scale,
        *(grad_q.stride(axis) for axis in (0, 1, 2, 4)), STRIDE_GN=grad_q.stride(3),
        WANTS_WEIGHT=wants_weight, WANTS_ANGLES=wants_angles,
        **_variant(views_OPLND[0], q_weight, cos, order, rope_layout), **_tile("backward", q),
    )  # fmt: skip
    grad_weights = weight_K2D.sum(0).unbind(0) if wants_weight else (None, None)
    grad_angles = angles_K2LF.sum(0).unbind(0) if wants_angles else (None, None)
    found = [*(grad.view(q.shape) for grad in (grad_q, grad_k, grad_v)), *grad_weights, *grad_angles]
    values = (q, k, v, q_weight, k_weight, cos, sin)
    typed = [None if grad is None else grad.to(x.dtype) for grad, x in zip(found, values, strict=True)]
    return [*typed, None, None, None, None, None]


def _backward_of_chain(
    grad_out: Tensor, wanted: list[bool], values: tuple[Any, ...], v: Tensor, scale: float
) -> list[Tensor | None]:
    """By way of the registered operators, which torch.compile sees into; `values` are qk_norm_rope's."""
    ops = torch.ops.opensora_kernels
    q_normed, k_normed = ops.qk_norm_rope(*values, "triton")
    saved = ops.attention(q_normed, k_normed, v, scale, None, "triton")
    grad_q_normed, grad_k_normed, grad_v = ops.attention_backward(
        [grad_out], [True, True, True, False, False], saved, q_normed, k_normed, v, scale, None, "triton"
    )
    wanted_of_norm = [*wanted[:2], *wanted[3:7], False, False, False, False]
    found = iter(
        ops.qk_norm_rope_backward([grad_q_normed, grad_k_normed], wanted_of_norm, [], *values, "triton")
        if any(wanted_of_norm)
        else []
    )
    grad_q, grad_k, *grads_of_parameters = (next(found) if is_wanted else None for is_wanted in wanted_of_norm[:6])
    return [grad_q, grad_k, grad_v, *grads_of_parameters, None, None, None, None, None]


def _evenly_strided(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As they are if they lie alike, as views of a packed qkv do; else copies."""
    if q.stride() == k.stride() == v.stride():
        return q, k, v
    return q.contiguous(), k.contiguous(), v.contiguous()


def _numbers(x_OPLND: Tensor, eps: float, scale: float) -> tuple[float, ...]:
    strides = (x_OPLND.stride(axis) for axis in (0, 1, 2, 4))
    return (x_OPLND.shape[1], x_OPLND.shape[2], *strides, eps, scale * math.log2(math.e))


def _variant(
    x_OPLND: Tensor, q_weight: Tensor | None, cos: Tensor | None, order: str, rope_layout: str
) -> dict[str, Any]:
    """The stride of heads is a constant: only so does the compiler know that 72 elements are whole vectors."""
    return {
        "STRIDE_XN": x_OPLND.stride(3),
        "NUM_HEADS": x_OPLND.shape[3],
        "HEAD_SIZE": x_OPLND.shape[4],
        "HAS_NORM": q_weight is not None,
        "HAS_ROPE": cos is not None,
        "IS_ROPE_FIRST": order == "rope_norm",
        "IS_INTERLEAVED": cos is None or rope_layout == "interleaved",
    }


def _tile(direction: str, q: Tensor) -> dict[str, Any]:
    """All keys, and the most queries whose tiles spill on none of sm_80, sm_90, sm_100 and gfx942."""
    block_k = max(16, power_of_two(q.shape[-3], 128))
    # 16 elements in a slice: the smallest inner size of a matrix product
    pairs, num_slices = equal_slices((q.shape[-1] + 1) // 2, least=8)
    if direction == "forward":
        default = {"BLOCK_L": min(block_k, 64), "num_warps": min(4, block_k // 16)}
    else:  # three times as many tiles
        default = {"num_warps": block_k // 8}
    key = f"{direction} D={q.shape[-1]} K={block_k} {q.dtype}"
    tile = configuration("qk_norm_attention", key, default, q.device)
    # one stage: the sums that the backward pass keeps in memory are read in the loop that writes them
    return {"BLOCK_K": block_k, "PAIRS": pairs, "SLICES": num_slices, **tile, "num_stages": 1}
