"""RMSNorm of queries and keys and their rotary position embedding, in either order."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from opensora_kernels import _extension, _triton
from opensora_kernels._cpu import why_not_heads, why_small_is_slower
from opensora_kernels.checks import check_choice, check_float, check_same_device, check_shape
from opensora_kernels.registration import call, register_op

from . import reference

__all__ = ["qk_norm_rope"]

Order = Literal["norm_rope", "rope_norm"]
RopeLayout = Literal["interleaved", "half"]
NormScope = Literal["head", "token"]


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    *,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    eps: float = 1e-6,
    order: Order = "norm_rope",
    rope_layout: RopeLayout = "interleaved",
    norm_scope: NormScope = "head",
) -> tuple[Tensor, Tensor]:
    """RMSNorm of q and k, then the rotation (a, b) -> (a cos - b sin, b cos + a sin) of pairs, or the reverse order.

    Shapes: q (*, L, N, D) and k (*, Lk, N, D) with any strides, such as views of one packed qkv; Lk = L when they are
    rotated. q_weight, k_weight (D,), or (N*D,) for norm_scope "token"; both None: no norm. cos, sin (L, D/2); both
    None: no rotation. Returns q and k, contiguous, in their own dtypes; with nothing to do, the inputs themselves.
    Options: order "rope_norm" rotates first. rope_layout "interleaved" pairs elements (2i, 2i+1), "half" pairs
    (i, i + D/2). norm_scope "head" takes each head's mean square, "token" the mean over all heads of a token.
    Numbers: mean squares in fp32; the normalised value is rounded to q's dtype before the weight multiplies it; the
    rotation runs in the promoted dtype of q and cos, rounding each product and sum, so bf16 cos and sin give bf16
    products and fp32 ones a rotation that is rounded once.
    Errors: TypeError for a dtype that is not floating-point; ValueError for a shape, device or option not named here,
    or one of a pair (weights, cos and sin) without the other.
    Source: Open-Sora v1.2.0, opensora/models/layers/blocks.py, with rotary-embedding-torch 0.5.3; order "rope_norm" is
    its qk_norm_legacy of the v1.1 checkpoints.
    """
    check_qk_norm_rope("qk_norm_rope", q, k, q_weight, k_weight, cos, sin, order, rope_layout, norm_scope)
    if q_weight is None and cos is None:
        return q, k
    return call("qk_norm_rope", q, k, q_weight, k_weight, cos, sin, eps, order, rope_layout, norm_scope)


def check_qk_norm_rope(
    op: str,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    order: str,
    rope_layout: str,
    norm_scope: str,
) -> None:
    """Raise the errors that `qk_norm_rope` documents, in the name of `op`."""
    for name, tensor in (
        ("q", q),
        ("k", k),
        ("q_weight", q_weight),
        ("k_weight", k_weight),
        ("cos", cos),
        ("sin", sin),
    ):
        if tensor is not None:
            check_float(op, name, tensor)
    check_choice(op, "order", order, Order)
    check_choice(op, "rope_layout", rope_layout, RopeLayout)
    check_choice(op, "norm_scope", norm_scope, NormScope)
    if q.dim() < 3 or q.shape[-1] == 0:
        raise ValueError(f"{op}: q must have shape (*, L, N, D) with D of at least 1, got {tuple(q.shape)}")
    num_heads, head_size = q.shape[-2:]
    check_shape(op, "k", k, (*q.shape[:-3], None, num_heads, head_size), "(*, Lk, N, D)")
    if (q_weight is None) != (k_weight is None):
        raise ValueError(f"{op}: q_weight and k_weight must be given together, got only one")
    if (cos is None) != (sin is None):
        raise ValueError(f"{op}: cos and sin must be given together, got only one")
    num_weights, meaning = (head_size, "(D,)") if norm_scope == "head" else (num_heads * head_size, "(N*D,)")
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is not None:
            check_shape(op, name, weight, (num_weights,), meaning)
    if cos is not None:
        if head_size % 2:
            raise ValueError(f"{op}: q must have an even head size D to be rotated, got {head_size}")
        check_shape(op, "k", k, q.shape, "(*, L, N, D), as q, to be rotated")
        check_shape(op, "cos", cos, (q.shape[-3], head_size // 2), "(L, D/2)")
        check_shape(op, "sin", sin, (q.shape[-3], head_size // 2), "(L, D/2)")
    check_same_device(op, q=q, k=k, q_weight=q_weight, k_weight=k_weight, cos=cos, sin=sin)


def why_no_cpu(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    *options: Any,
) -> str | None:
    """Why the CPU library can't serve the norm and rotation of these; `qk_norm_attention` asks too."""
    if cos is not None and cos.dtype != sin.dtype:
        return f"the compiled CPU library takes cos and sin of one dtype, got {cos.dtype} and {sin.dtype}"
    return why_not_heads(q, k, q_weight, k_weight, cos, sin)


def _why_cpu_is_slower(q: Tensor, *others: Any) -> str | None:
    # bf16 on one core, 2026-11-30: 2,048 elements of q 39 us against 28; with gradients 24,576 249 us against 284,
    # 122,880 1,488 against 647
    return why_small_is_slower((q, *others), q.numel(), 1, 32_768)


register_op(
    "qk_norm_rope",
    "(Tensor q, Tensor k, Tensor? q_weight, Tensor? k_weight, Tensor? cos, Tensor? sin, float eps, str order, "
    "str rope_layout, str norm_scope) -> (Tensor, Tensor)",
    reference.qk_norm_rope,
)
_triton.register("qk_norm_rope")
_extension.register("qk_norm_rope", "cpu", why_not=why_no_cpu, why_slower=_why_cpu_is_slower)
