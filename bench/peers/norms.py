"""Rivals of rms_norm, rms_norm_silu and group_norm_silu."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .registry import Arguments, first_reason, holding, peer, refuses


@peer("rms_norm", "torch", "F.rms_norm")
def _torch_rms_norm(arguments: Arguments) -> Callable[[], Any]:
    x = arguments["x"]
    return partial(F.rms_norm, x, x.shape[-1:], arguments.get("weight"), _eps(arguments))


@peer("rms_norm", "diffusers", "diffusers RMSNorm")
def _diffusers_rms_norm(arguments: Arguments) -> Callable[[], Any]:
    from diffusers.models.normalization import RMSNorm

    x, weight = arguments["x"], arguments.get("weight")
    module = RMSNorm(x.shape[-1], _eps(arguments), elementwise_affine=weight is not None)
    return partial(holding(module, weight=weight), x)


def _needs_weight(arguments: Arguments) -> str | None:
    return "it needs a weight" if arguments.get("weight") is None else None


@peer("rms_norm", "liger", "LigerRMSNorm", _needs_weight)
def _liger_rms_norm(arguments: Arguments) -> Callable[[], Any]:
    from liger_kernel.transformers import LigerRMSNorm

    x = arguments["x"]
    # in_place writes the gradient of x into that of the result, which a second backward pass would read
    module = LigerRMSNorm(x.shape[-1], eps=_eps(arguments), in_place=False)
    return partial(holding(module, weight=arguments["weight"]), x)


@peer("rms_norm", "apex", "apex FusedRMSNorm", _needs_weight)
def _apex_rms_norm(arguments: Arguments) -> Callable[[], Any]:
    from apex.normalization.fused_layer_norm import fused_rms_norm_affine

    x = arguments["x"]
    return partial(fused_rms_norm_affine, x, arguments["weight"], x.shape[-1:], _eps(arguments))


def _not_cudnn(arguments: Arguments) -> str | None:
    x = arguments["x"]
    return None if x.is_contiguous() and x.numel() else "this graph is made for contiguous rows"


@peer("rms_norm", "cudnn", "cuDNN frontend", first_reason(_needs_weight, _not_cudnn), has_gradient=False)
def _cudnn_rms_norm(arguments: Arguments) -> Callable[[], Any]:
    """Its own graph API, inference phase; scale and epsilon are tensors of one row there. It runs on the stream of a
    handle, which follows PyTorch's, so that a CUDA graph holds it."""
    import cudnn

    x, weight = arguments["x"].flatten(0, -2)[..., None, None], arguments["weight"][None, :, None, None]
    out, eps = torch.empty_like(x), torch.full((1, 1, 1, 1), _eps(arguments), dtype=torch.float32)
    kind = {torch.bfloat16: "BFLOAT16", torch.float16: "HALF", torch.float32: "FLOAT"}[x.dtype]
    handle = _cudnn_handle(x.device)
    graph = cudnn.pygraph(
        handle=handle,
        io_data_type=getattr(cudnn.data_type, kind),
        intermediate_data_type=cudnn.data_type.FLOAT,
        compute_data_type=cudnn.data_type.FLOAT,
    )
    nodes = [graph.tensor_like(x), graph.tensor_like(weight), graph.tensor_like(eps)]
    result, _ = graph.rmsnorm(
        norm_forward_phase=cudnn.norm_forward_phase.INFERENCE, input=nodes[0], scale=nodes[1], epsilon=nodes[2]
    )
    result.set_output(True)
    graph.build([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    workspace = torch.empty(graph.get_workspace_size(), dtype=torch.uint8, device=x.device)
    pack = {nodes[0]: x, nodes[1]: weight, nodes[2]: eps, result: out}
    shape = arguments["x"].shape

    def run() -> Tensor:
        cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream(x.device).cuda_stream)
        graph.execute(pack, workspace, handle=handle)
        return out.view(shape)

    return run


@cache
def _cudnn_handle(device: torch.device) -> Any:
    import cudnn

    with torch.cuda.device(device):
        return cudnn.create_handle()


@peer("rms_norm_silu", "torch", "F.normalize, F.silu")
def _torch_rms_norm_silu(arguments: Arguments) -> Callable[[], Any]:
    x, weight, bias = (arguments.get(name) for name in ("x", "weight", "bias"))

    def run() -> Tensor:
        shape = (-1, *(1,) * (x.dim() - 2))
        out = F.normalize(x.float(), dim=1, eps=arguments.get("eps", 1e-12)).to(x.dtype) * x.shape[1] ** 0.5
        out = out if weight is None else out * weight.view(shape)
        return _activated(out if bias is None else out + bias.view(shape), arguments)

    return run


def _not_wan(arguments: Arguments) -> str | None:
    return "it always has a gamma" if arguments.get("weight") is None else None


@peer("rms_norm_silu", "diffusers", "diffusers WanRMS_norm", first_reason(_not_wan, refuses("eps", "its eps is 1e-12")))
def _wan_rms_norm_silu(arguments: Arguments) -> Callable[[], Any]:
    module = wan_rms_norm(arguments["x"], arguments["weight"], arguments.get("bias"))
    return lambda: _activated(module(arguments["x"]), arguments)


def wan_rms_norm(x: Tensor, weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanRMS_norm

    shape = (-1, *(1,) * (x.dim() - 2))
    module = WanRMS_norm(x.shape[1], images=x.dim() == 4, bias=bias is not None)
    if bias is not None:
        holding(module, bias=bias.view(shape))
    return holding(module, gamma=weight.view(shape))


def _not_group_norm(arguments: Arguments) -> str | None:
    if arguments.get("per_frame"):
        return "GroupNorm takes its statistics over the whole clip"
    if arguments.get("statistics") is not None:
        return "GroupNorm takes no statistics of an earlier layer"
    num_elements = arguments["x"].shape[1:].numel() // arguments["num_groups"]
    return "GroupNorm refuses groups of one element" if num_elements <= 1 else None


@peer("group_norm_silu", "torch", "F.group_norm, F.silu", _not_group_norm)
def _torch_group_norm_silu(arguments: Arguments) -> Callable[[], Any]:
    x, num_groups, weight, bias = (arguments.get(name) for name in ("x", "num_groups", "weight", "bias"))
    eps = _eps(arguments)
    return lambda: _activated(F.group_norm(x, num_groups, weight, bias, eps), arguments)


def _not_apex_group_norm(arguments: Arguments) -> str | None:
    return "it takes images (B, C, H, W) alone" if arguments["x"].dim() != 4 else None


@peer("group_norm_silu", "apex", "apex GroupNorm", first_reason(_not_group_norm, _not_apex_group_norm))
def _apex_group_norm_silu(arguments: Arguments) -> Callable[[], Any]:
    from apex.contrib.group_norm import GroupNorm

    x, activation = arguments["x"], arguments.get("activation", "silu")
    module = GroupNorm(arguments["num_groups"], x.shape[1], _eps(arguments), act=activation or "")
    return partial(holding(module, weight=arguments.get("weight"), bias=arguments.get("bias")), x)


def _eps(arguments: Arguments) -> float:
    return arguments.get("eps", 1e-6)


def _activated(x: Tensor, arguments: Arguments) -> Tensor:
    return x if arguments.get("activation", "silu") is None else F.silu(x)
