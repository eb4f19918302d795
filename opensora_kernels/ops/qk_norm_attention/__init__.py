"""Self-attention with normalised and rotated queries and keys."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from opensora_kernels import _extension, _triton, backends
from opensora_kernels._cpu import why_attention_is_slower
from opensora_kernels.backends import Implementation
from opensora_kernels.checks import check_float, check_same_device, check_shape
from opensora_kernels.ops.qk_norm_rope import NormScope, Order, RopeLayout, check_qk_norm_rope, why_no_cpu
from opensora_kernels.registration import call, register_op

from . import library, reference

__all__ = ["qk_norm_attention"]

# Longer sequences, or larger heads, have tiles of scores, of q, k and v that no longer fit into registers.
LONG = 128
LARGEST_TILE = 128 * 80


def qk_norm_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    *,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    eps: float = 1e-6,
    order: Order = "norm_rope",
    rope_layout: RopeLayout = "interleaved",
    norm_scope: NormScope = "head",
    scale: float | None = None,
) -> Tensor:
    """attention(*qk_norm_rope(q, k, ...), v): softmax(scale * q k^T) v of the normalised and rotated q and k.

    Shapes: q, k, v (*, L, N, D) with any strides, such as views of one packed qkv (temporal attention strides over
    frames). Weights, cos, sin and options as in `qk_norm_rope`; scale is D**-0.5 unless given. Returns (*, L, N, D),
    contiguous, in q's dtype.
    Numbers: those of `qk_norm_rope` followed by `attention`.
    Errors: those of `qk_norm_rope`; TypeError when q, k and v differ in dtype, ValueError when they do in shape.
    Source: Open-Sora v1.2.0, opensora/models/layers/blocks.py, Attention.
    """
    op = "qk_norm_attention"
    check_qk_norm_rope(op, q, k, q_weight, k_weight, cos, sin, order, rope_layout, norm_scope)
    for name, tensor in (("k", k), ("v", v)):
        check_float(op, name, tensor)
        check_shape(op, name, tensor, q.shape, "that of q, (*, L, N, D)")
        if tensor.dtype != q.dtype:
            raise TypeError(f"{op}: {name} must have q's dtype {q.dtype}, got {tensor.dtype}")
    check_same_device(op, q=q, v=v)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return call(op, q, k, v, q_weight, k_weight, cos, sin, eps, order, rope_layout, norm_scope, scale)


def _why_no_triton(q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor | None, *others: Any) -> str | None:
    *_, norm_scope, scale = others
    num_tokens, head_size = q.shape[-3], q.shape[-1]
    if num_tokens > LONG or num_tokens * head_size > LARGEST_TILE:
        return (
            f"one program holds all tokens of a head, up to {LONG} and {LARGEST_TILE} elements, got {num_tokens} of "
            f"{head_size}; the library is qk_norm_rope and attention, each with its own kernels"
        )
    if norm_scope == "token" and q_weight is not None:
        return 'one program holds one head of a token, but norm_scope "token" takes the mean over all'
    if not scale > 0:
        return f"maxima are taken before the scale, which must be positive, got {scale}"
    return None


def _why_no_cpu(q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor | None, *others: Any) -> str | None:
    if others[-2] == "token" and q_weight is not None:
        return 'heads are attended to one by one, but norm_scope "token" takes the mean over all'
    return why_no_cpu(q, k, q_weight, *others[:3])


def _why_cpu_is_slower(q: Tensor, *others: Any) -> str | None:
    return why_attention_is_slower(q, q.shape[-3])


register_op(
    "qk_norm_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor? q_weight, Tensor? k_weight, Tensor? cos, Tensor? sin, float eps, "
    "str order, str rope_layout, str norm_scope, float scale) -> Tensor",
    reference.qk_norm_attention,
    casts=("q", "k", "v"),
)
backends.register("qk_norm_attention", "library", Implementation(library.qk_norm_attention, is_plain=True))
_triton.register("qk_norm_attention", why_not=_why_no_triton)
_extension.register("qk_norm_attention", "cpu", why_not=_why_no_cpu, why_slower=_why_cpu_is_slower)
