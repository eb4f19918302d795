"""Softmax attention, to itself or to text of given lengths."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from opensora_kernels import _extension, _triton, backends
from opensora_kernels._cpu import why_attention_is_slower, why_not_heads
from opensora_kernels.backends import Implementation
from opensora_kernels.checks import check_float, check_same_device, check_shape
from opensora_kernels.registration import call, register_op

from . import library, reference

__all__ = ["attention"]

# More queries or keys than this fill tiles of the sizes that the library's kernels are made for.
LONG = 128
# Instances of the template in csrc/attention_sm90a.cuh.
CUDA_HEAD_SIZES = (64, 72, 96, 128)


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, key_lengths: Tensor | None = None
) -> Tensor:
    """softmax(scale * q k^T) v for each head.

    Shapes: q (*, L, N, D), any strides. k, v (*, Lk, N, D); or packed (K, N, D), the keys of all samples one after
    another, for q (B, L, N, D). Returns (*, L, N, D), contiguous, in q's dtype. scale: D**-0.5 unless given.
    key_lengths: whole numbers (*), on q's device or the host: how many keys each sample has. Padded keys beyond them,
    and packed rows after their sum, are not attended to but must be finite. A sample with zero keys gives zeros.
    Packed keys need key_lengths, which are read on the host unless the call is being compiled.
    Numbers: the reference rounds q*scale, the scores and the weights to q's dtype and takes the softmax in fp32; fused
    kernels keep scores in fp32 and are closer to the truth. On a GPU they round the weights to q's dtype.
    Errors: TypeError for dtypes that are not floating-point or differ, or lengths that are not whole numbers;
    ValueError for shapes or devices that do not fit, and packed keys without key_lengths.
    Source: Open-Sora v1.2.0, opensora/models/layers/blocks.py, Attention (eager) and MultiHeadCrossAttention.
    """
    _check(q, k, v, key_lengths)
    return call("attention", q, k, v, q.shape[-1] ** -0.5 if scale is None else scale, key_lengths)


def _check(q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor | None) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_float("attention", name, tensor)
        if tensor.dtype != q.dtype:
            raise TypeError(f"attention: {name} must have q's dtype {q.dtype}, got {tensor.dtype}")
    if q.dim() < 3 or q.shape[-1] == 0:
        raise ValueError(f"attention: q must have shape (*, L, N, D) with D of at least 1, got {tuple(q.shape)}")
    if reference.is_packed(q, k):
        if key_lengths is None:
            raise ValueError(f"attention: key_lengths must be given for packed k of shape {tuple(k.shape)}, got None")
        check_shape("attention", "k", k, (None, *q.shape[-2:]), "(sum Lk, N, D)")
    else:
        check_shape("attention", "k", k, (*q.shape[:-3], None, *q.shape[-2:]), "(*, Lk, N, D)")
    check_shape("attention", "v", v, k.shape, "that of k")
    check_same_device("attention", q=q, k=k, v=v)
    if key_lengths is not None:
        if key_lengths.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"attention: key_lengths must be int32 or int64, got {key_lengths.dtype}")
        check_shape("attention", "key_lengths", key_lengths, q.shape[:-3], "(*)")


def _why_no_triton(q: Tensor, k: Tensor, v: Tensor, scale: float, key_lengths: Tensor | None) -> str | None:
    if q.shape[-1] > 128:
        return f"tiles of larger heads than 128 elements spill registers, got {q.shape[-1]}"
    if not scale > 0:
        return f"maxima are taken before the scale, which must be positive, got {scale}"
    return None


def _why_no_cuda(q: Tensor, k: Tensor, v: Tensor, scale: float, key_lengths: Tensor | None) -> str | None:
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"the tensor cores multiply bfloat16 or float16, got {q.dtype}"
    if q.shape[-1] not in CUDA_HEAD_SIZES:
        return f"it is compiled for heads of {', '.join(map(str, CUDA_HEAD_SIZES))} elements, got {q.shape[-1]}"
    if not scale > 0:
        return f"maxima are taken before the scale, which must be positive, got {scale}"
    if q.numel() == 0 or k.numel() == 0:
        return "there is nothing to copy for no queries or no keys"
    for name, x in (("q", q), ("k", k), ("v", v)):
        strides = [stride for stride, size in zip(x.stride()[:-1], x.shape[:-1], strict=True) if size > 1]
        if x.stride(-1) != 1 or any(stride <= 0 or stride % 8 for stride in strides):
            return f"strides must be multiples of 8 elements and the last one 1 for TMA, got {x.stride()} for {name}"
    if (reason := _triton.why_not_installed()) is not None:
        return f"its backward pass is Triton's, and {reason}"
    if q.is_cuda and (capability := _extension.compute_capability(q.device.index)) != (9, 0):
        return f"it is made of Hopper's instructions, of compute capability 9.0, got {'.'.join(map(str, capability))}"
    return None


def _why_cuda_is_slower(q: Tensor, k: Tensor, v: Tensor, scale: float, key_lengths: Tensor | None) -> str | None:
    if max(q.shape[-3], k.shape[-3]) <= LONG:
        return f"its tiles are of 128 keys and more queries, so that Triton's serve {LONG} and fewer"
    return _extension.NOT_MEASURED


def _why_triton_is_slower(q: Tensor, k: Tensor, v: Tensor, scale: float, key_lengths: Tensor | None) -> str | None:
    if (
        q.is_meta
    ):  # on paper: PyTorch's fused attention, which keeps the same for its backward pass, has no meta tensors
        return None
    if max(q.shape[-3], k.shape[-3]) <= LONG or library.why_not(q, k, v, scale, key_lengths) is not None:
        return None
    return f"PyTorch's fused attention is thought faster for more than {LONG} queries or keys; not measured yet"


def _why_no_cpu(q: Tensor, k: Tensor, v: Tensor, scale: float, key_lengths: Tensor | None) -> str | None:
    return why_not_heads(q, k, v)


def _why_cpu_is_slower(q: Tensor, k: Tensor, v: Tensor, scale: float, key_lengths: Tensor | None) -> str | None:
    return why_attention_is_slower(q, k.shape[-3])


def _saved_by_kernels(q: Tensor, k: Tensor, v: Tensor, scale: float, key_lengths: Tensor | None) -> list[Tensor]:
    """The logarithm, to base 2, of the sum of exponentials of each query's scores."""
    num_queries, num_heads, _ = q.shape[-3:]
    return [q.new_empty(math.prod(q.shape[:-3]), num_heads, num_queries, dtype=torch.float32)]


register_op(
    "attention",
    "(Tensor q, Tensor k, Tensor v, float scale, Tensor? key_lengths) -> Tensor",
    reference.attention,
    saves=True,
    keeps=lambda *values: True,
    casts=("q", "k", "v"),
)
_triton.register("attention", why_not=_why_no_triton, why_slower=_why_triton_is_slower, saved_like=_saved_by_kernels)
_extension.register(
    "attention", "cuda", why_not=_why_no_cuda, why_slower=_why_cuda_is_slower, saved_like=_saved_by_kernels
)
backends.register(
    "attention",
    "library",
    Implementation(library.attention, why_not=library.why_not, why_slower=library.why_slower, is_plain=True),
)
_extension.register("attention", "cpu", why_not=_why_no_cpu, why_slower=_why_cpu_is_slower)
