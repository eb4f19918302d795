"""Softmax attention in Triton, after FlashAttention-2: scores exist only as tiles, which the backward pass makes anew.

Axes: O, P leading axes, B samples (O * P), L queries, K keys, N heads, D head size, S splits of the queries.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from opensora_kernels._triton import launch, power_of_two
from opensora_kernels._triton.heads import main_and_tail, views
from opensora_kernels.tuning import configuration

from . import reference
from .triton_backward import _attention_backward_keys_kernel, _attention_backward_queries_kernel
from .triton_forward import _attention_forward_kernel

# Two programs for each of an H200's 132 multiprocessors: blocks of keys that are fewer share their queries out.
_FEWEST_PROGRAMS = 264
_QUERIES_OF_SPLIT = 512
# Rows that a program keeps, rows that it takes at once, and warps, for heads of up to so many elements: the largest
# that spill no register on any of sm_80, sm_90, sm_100 and gfx942. None has been timed.
_TILES = {
    "forward": {80: (128, 64, 8), 128: (128, 32, 8)},
    "backward_queries": {80: (128, 32, 8), 128: (128, 16, 8)},
    "backward_keys": {96: (64, 16, 4), 128: (32, 16, 4)},
}
_TILE_IN_FP32 = (32, 32, 4)  # without tensor cores: products one by one


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float, key_lengths: Tensor | None) -> list[Tensor]:
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    num_queries, num_heads, _ = q.shape[-3:]
    lse_BNL = q.new_empty(math.prod(q.shape[:-3]), num_heads, num_queries, dtype=torch.float32)
    q_OPLND, k_OPKND, v_OPKND = views(q, *_of_each_sample(q, k, v))
    tile = _tile("forward", q, k)
    launch(
        _attention_forward_kernel,
        (lse_BNL.shape[:2].numel() * triton.cdiv(num_queries, tile["BLOCK_L"]),),
        q_OPLND, k_OPKND, v_OPKND, *lengths_and_ends(q, k, key_lengths), out, lse_BNL,
        *_numbers(q_OPLND, k_OPKND, v_OPKND, scale), **_constants(q_OPLND, k_OPKND, v_OPKND), **tile,
    )  # fmt: skip
    return [out, lse_BNL]


def backward(
    grads: list[Tensor | None],
    wanted: list[bool],
    saved: list[Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    key_lengths: Tensor | None,
) -> list[Tensor | None]:
    out, lse_BNL = saved
    grad_out = torch.zeros_like(out) if grads[0] is None else grads[0].contiguous()
    q_OPLND, k_OPKND, v_OPKND = views(q, *_of_each_sample(q, k, v))
    delta_BNL, grad_q = torch.empty_like(lse_BNL), torch.empty(q.shape, dtype=q.dtype, device=q.device)
    inputs = (q_OPLND, k_OPKND, v_OPKND, *lengths_and_ends(q, k, key_lengths), grad_out, lse_BNL, delta_BNL)
    numbers, constants = _numbers(q_OPLND, k_OPKND, v_OPKND, scale), _constants(q_OPLND, k_OPKND, v_OPKND)
    tile = _tile("backward_queries", q, k)
    launch(
        _attention_backward_queries_kernel,
        (lse_BNL.shape[:2].numel() * triton.cdiv(q.shape[-3], tile["BLOCK_L"]),),
        *inputs, out, grad_q, *numbers, scale, **constants, **tile,
    )  # fmt: skip
    if not (wanted[1] or wanted[2]):
        return [grad_q, None, None, None, None]
    tile = _tile("backward_keys", q, k)
    num_splits = _num_splits(q, k, tile)
    grad_k, grad_v = (_gradient_of_splits(x, num_splits, reference.is_packed(q, k)) for x in (k, v))
    launch(
        _attention_backward_keys_kernel,
        (num_splits * lse_BNL.shape[:2].numel() * triton.cdiv(k.shape[-3], tile["BLOCK_K"]),),
        *inputs, grad_k, grad_v, num_splits, *numbers, scale, **constants, **tile,
    )  # fmt: skip
    grad_k, grad_v = (grad.sum(0).to(k.dtype) if num_splits > 1 else grad[0] for grad in (grad_k, grad_v))
    return [grad_q, grad_k, grad_v, None, None]


def _of_each_sample(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Padded keys and values as they are; packed ones (K, N, D) as (B, K, N, D), all of them again for each sample."""
    return (k.expand(len(q), -1, -1, -1), v.expand(len(q), -1, -1, -1)) if reference.is_packed(q, k) else (k, v)


def lengths_and_ends(q: Tensor, k: Tensor, key_lengths: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Each sample's number of keys and, if they are packed, the key after its last: read by the kernels alone."""
    if key_lengths is None:
        return None, None
    lengths_B = key_lengths.to(q.device).reshape(-1).contiguous()
    return lengths_B, lengths_B.cumsum(0) if reference.is_packed(q, k) else None


def _numbers(q_OPLND: Tensor, k_OPKND: Tensor, v_OPKND: Tensor, scale: float) -> tuple[float, ...]:
    sizes = (q_OPLND.shape[1], q_OPLND.shape[2], k_OPKND.shape[2])
    strides = (x.stride(axis) for x in (q_OPLND, k_OPKND, v_OPKND) for axis in (0, 1, 2, 4))
    return (*sizes, *strides, scale * math.log2(math.e))


def _constants(q_OPLND: Tensor, k_OPKND: Tensor, v_OPKND: Tensor) -> dict[str, int]:
    """The stride of heads is one: only so does the compiler know that 72 elements are whole vectors."""
    strides = {f"STRIDE_{name}N": x.stride(3) for name, x in (("Q", q_OPLND), ("K", k_OPKND), ("V", v_OPKND))}
    main, tail = main_and_tail(q_OPLND.shape[4], least=16)  # 16: the smallest inner size of a matrix product in bf16
    return strides | {"NUM_HEADS": q_OPLND.shape[3], "HEAD_SIZE": q_OPLND.shape[4], "MAIN": main, "TAIL": tail}


def _tile(kernel: str, q: Tensor, k: Tensor) -> dict[str, Any]:
    """A large block of what a program keeps, a smaller one of what it loops over, both as short as their axes are."""
    head_size = q.shape[-1]
    fitting = next(tile for widest, tile in _TILES[kernel].items() if head_size <= widest)
    kept, other, num_warps = _TILE_IN_FP32 if q.dtype is torch.float32 else fitting
    block_l, block_k = (other, kept) if kernel == "backward_keys" else (kept, other)
    block_l = min(block_l, max(16, power_of_two(q.shape[-3], block_l)))
    block_k = min(block_k, max(16, power_of_two(k.shape[-3], block_k)))
    rows = block_k if kernel == "backward_keys" else block_l
    num_warps = min(num_warps, max(rows // 16, 2 if rows == 16 else 4))
    num_stages = 3 if kernel == "forward" else 2
    default = {"BLOCK_L": block_l, "BLOCK_K": block_k, "num_warps": num_warps, "num_stages": num_stages}
    key = f"{kernel} D={head_size} L={block_l} K={block_k} {q.dtype}"
    return configuration("attention", key, default, q.device)


def _num_splits(q: Tensor, k: Tensor, tile: dict[str, Any]) -> int:
    """Into how many parts to split the queries of each block of keys: text has few keys for its many queries."""
    num_samples = 1 if reference.is_packed(q, k) else math.prod(q.shape[:-3])
    num_blocks = num_samples * q.shape[-2] * triton.cdiv(k.shape[-3], tile["BLOCK_K"])
    most = q.shape[-3] // _QUERIES_OF_SPLIT
    return max(1, min(most, _FEWEST_PROGRAMS // max(1, num_blocks)))


def _gradient_of_splits(x: Tensor, num_splits: int, is_packed: bool) -> Tensor:
    """(S, *x.shape); zeros if packed, since no program writes to rows after the last sample's."""
    make = torch.zeros if is_packed else torch.empty
    return make(num_splits, *x.shape, dtype=torch.float32 if num_splits > 1 else x.dtype, device=x.device)
