"""Rivals of attention, qk_norm_rope and qk_norm_attention. Axes: L tokens, N heads, D head size."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from .registry import Arguments, bf16_only, first_reason, half_only, holding, peer, refuses

_SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
_NO_LENGTHS = refuses("key_lengths", "it takes no lengths of keys")


def _sdpa_arguments(arguments: Arguments) -> tuple[list[Tensor], float | None]:
    """q, k, v as (B, N, L, D), the view that models hand over."""
    tensors = [arguments[name].reshape(-1, *arguments[name].shape[-3:]).transpose(1, 2) for name in "qkv"]
    return tensors, arguments.get("scale")


def _not_this_sdpa(backend: SDPBackend) -> Callable[[Arguments], str | None]:
    def why_not(arguments: Arguments) -> str | None:
        q, k = arguments["q"], arguments["k"]
        if q.numel() == 0 or k.numel() == 0:
            return "there is nothing to attend to"
        if backend == SDPBackend.MATH or (q.device.type == "cpu" and backend == SDPBackend.FLASH_ATTENTION):
            return None
        if q.device.type != "cuda":
            return "PyTorch has it for CUDA devices alone"
        tensors, _ = _sdpa_arguments(arguments)
        can_use = {
            SDPBackend.FLASH_ATTENTION: torch.backends.cuda.can_use_flash_attention,
            SDPBackend.CUDNN_ATTENTION: torch.backends.cuda.can_use_cudnn_attention,
            SDPBackend.EFFICIENT_ATTENTION: torch.backends.cuda.can_use_efficient_attention,
        }[backend]
        parameters = torch.backends.cuda.SDPAParams(*tensors, None, 0.0, False, False)
        return None if can_use(parameters) else "PyTorch says that it can't serve these shapes and dtypes"

    return why_not


def _sdpa(backend: SDPBackend, arguments: Arguments) -> Callable[[], Tensor]:
    tensors, scale = _sdpa_arguments(arguments)
    shape = arguments["q"].shape

    def run() -> Tensor:
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(*tensors, scale=scale)
        return out.transpose(1, 2).reshape(shape)

    return run


for _name, _backend in _SDPA.items():
    _why_not = first_reason(_NO_LENGTHS, _not_this_sdpa(_backend))
    peer("attention", "sdpa", f"SDPA {_name}", _why_not)(partial(_sdpa, _backend))

_FLASH_WHY_NOT = first_reason(_NO_LENGTHS, half_only)


def _flat(arguments: Arguments) -> list[Tensor]:
    return [arguments[name].reshape(-1, *arguments[name].shape[-3:]) for name in "qkv"]


@peer("attention", "flash-attn", "flash-attn 2", _FLASH_WHY_NOT)
def _flash_attention(arguments: Arguments) -> Callable[[], Any]:
    from flash_attn import flash_attn_func

    tensors, shape = _flat(arguments), arguments["q"].shape
    return lambda: flash_attn_func(*tensors, softmax_scale=arguments.get("scale")).view(shape)


@peer("attention", "fa3", "flash-attn 3", _FLASH_WHY_NOT)
def _flash_attention_3(arguments: Arguments) -> Callable[[], Any]:
    from flash_attn_interface import flash_attn_func

    return _bound_flash_attention_3(flash_attn_func, arguments)


@peer("attention", "fa3-fwd", "flash-attn 3 forward", first_reason(_NO_LENGTHS, bf16_only), has_gradient=False)
def _flash_attention_3_forward(arguments: Arguments) -> Callable[[], Any]:
    """The wheel of PyPI, built without backward pass and without fp16."""
    from fa3_fwd_interface import flash_attn_func

    return _bound_flash_attention_3(flash_attn_func, arguments)


def _bound_flash_attention_3(function: Callable[..., Any], arguments: Arguments) -> Callable[[], Tensor]:
    tensors, shape = _flat(arguments), arguments["q"].shape

    def run() -> Tensor:
        out = function(*tensors, softmax_scale=arguments.get("scale"))
        return (out[0] if isinstance(out, tuple) else out).view(shape)  # releases differ in whether sums come along

    return run


@peer("attention", "sageattention", "SageAttention", _FLASH_WHY_NOT, has_gradient=False)
def _sage_attention(arguments: Arguments) -> Callable[[], Any]:
    """Rounds q and k to int8: it is fast where its error is allowed."""
    from sageattention import sageattn

    tensors, shape = _flat(arguments), arguments["q"].shape
    return lambda: sageattn(*tensors, tensor_layout="NHD", sm_scale=arguments.get("scale")).view(shape)


def _not_norm_then_rope(arguments: Arguments) -> str | None:
    if arguments.get("order", "norm_rope") != "norm_rope":
        return "it normalizes, then rotates"
    if arguments.get("cos") is not None and arguments["cos"].dtype != arguments["q"].dtype:
        return "its result would have the dtype of cos and sin"
    return None


def _torch_norm_rope(arguments: Arguments) -> Callable[[], tuple[Tensor, Tensor]]:
    return lambda: tuple(_rotated(_normed(arguments, name), arguments) for name in "qk")


def _normed(arguments: Arguments, name: str) -> Tensor:
    x, weight = arguments[name], arguments.get(f"{name}_weight")
    if weight is None:
        return x
    if arguments.get("norm_scope", "head") == "token":
        return F.rms_norm(x.flatten(-2), weight.shape, weight, arguments.get("eps", 1e-6)).view(x.shape)
    return F.rms_norm(x, weight.shape, weight, arguments.get("eps", 1e-6))


def _rotated(x_LND: Tensor, arguments: Arguments) -> Tensor:
    if arguments.get("cos") is None:
        return x_LND
    cos, sin = arguments["cos"][:, None], arguments["sin"][:, None]
    if arguments.get("rope_layout", "interleaved") == "half":
        first, second = x_LND.chunk(2, -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    first, second = x_LND.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([first * cos - second * sin, second * cos + first * sin], -1).flatten(-2)


def _diffusers_norm_rope(arguments: Arguments) -> Callable[[], tuple[Tensor, ...]]:
    from diffusers.models.embeddings import apply_rotary_emb
    from diffusers.models.normalization import RMSNorm

    is_half, eps = arguments.get("rope_layout") == "half", arguments.get("eps", 1e-6)
    norms = {}
    for name in "qk":
        weight = arguments[f"{name}_weight"]
        norms[name] = holding(RMSNorm(weight.shape[0], eps), weight=weight)
    tables = [arguments[name] for name in ("cos", "sin")]
    wide = [torch.cat([table] * 2, -1) if is_half else table.repeat_interleave(2, -1) for table in tables]
    rotate = partial(apply_rotary_emb, freqs_cis=wide, use_real_unbind_dim=-2 if is_half else -1, sequence_dim=1)

    def run() -> tuple[Tensor, ...]:
        return tuple(rotate(norms[name](arguments[name])) for name in "qk")

    return run


def _not_diffusers(arguments: Arguments) -> str | None:
    if arguments.get("cos") is None or arguments.get("q_weight") is None:
        return "this chain normalizes and rotates"
    if arguments["q"].dim() != 4:
        return "apply_rotary_emb takes (B, L, N, D)"
    is_token = arguments.get("norm_scope", "head") == "token"
    return "its norm is that of a head" if is_token else _not_norm_then_rope(arguments)


peer("qk_norm_rope", "torch", "F.rms_norm, rotation", _not_norm_then_rope)(_torch_norm_rope)
peer("qk_norm_rope", "diffusers", "diffusers RMSNorm, RoPE", _not_diffusers)(_diffusers_norm_rope)


def _then_sdpa(
    make: Callable[[Arguments], Callable[[], tuple[Tensor, ...]]], arguments: Arguments
) -> Callable[[], Tensor]:
    norm_rope, v, shape = make(arguments), arguments["v"], arguments["q"].shape

    def run() -> Tensor:
        tensors = [x.reshape(-1, *x.shape[-3:]).transpose(1, 2) for x in (*norm_rope(), v)]
        out = F.scaled_dot_product_attention(*tensors, scale=arguments.get("scale"))
        return out.transpose(1, 2).reshape(shape)

    return run


def _is_empty(arguments: Arguments) -> str | None:
    return None if arguments["q"].numel() else "there is nothing to attend to"


_TORCH_CHAIN = first_reason(_is_empty, _not_norm_then_rope)
_DIFFUSERS_CHAIN = first_reason(_is_empty, _not_diffusers)
peer("qk_norm_attention", "torch", "F.rms_norm, RoPE, SDPA", _TORCH_CHAIN)(partial(_then_sdpa, _torch_norm_rope))
peer("qk_norm_attention", "diffusers", "diffusers norm, RoPE, SDPA", _DIFFUSERS_CHAIN)(
    partial(_then_sdpa, _diffusers_norm_rope)
)
