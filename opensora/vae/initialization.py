"""Weights to start from when no checkpoint is there.

PyTorch's default shrinks a signal to 0.58 of its size at every convolution and adds random constants, so that latents
of a fresh VAE carry next to nothing: for hundreds of steps it learns only brightness. Released weights never needed it.
"""

from __future__ import annotations

import torch
from torch import nn

from opensora.vae.causal_video import CausalVideoVAE
from opensora.vae.causal_video.layers import AttnBlock, AttnBlock3D, AttnBlock3DFix, ResnetBlock2D, ResnetBlock3D
from opensora.vae.temporal import ResBlock
from opensora.vae.video_vae import VideoVAE

# A residual block begins as nearly the identity, so that the depth of the network does not matter at first.
RESIDUAL_GAIN = 0.1


@torch.no_grad()
def initialize_for_training(vae: VideoVAE | CausalVideoVAE, *, log_variance: float) -> None:
    """Draw new weights that keep the size of a signal, zero all biases, and begin posteriors at `log_variance`.

    At a log variance of 0, noise would drown the first latents.
    """
    from diffusers.models import attention_processor, resnet

    for layer in vae.modules():
        if isinstance(layer, nn.Conv2d | nn.Conv3d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    for block in vae.modules():
        if isinstance(block, resnet.ResnetBlock2D | ResnetBlock2D):
            block.conv2.weight.mul_(RESIDUAL_GAIN)
        elif isinstance(block, ResBlock | ResnetBlock3D):
            block.conv2.conv.weight.mul_(RESIDUAL_GAIN)
        elif isinstance(block, attention_processor.Attention):
            block.to_out[0].weight.mul_(RESIDUAL_GAIN)
        elif isinstance(block, AttnBlock | AttnBlock3D | AttnBlock3DFix):
            getattr(block.proj_out, "conv", block.proj_out).weight.mul_(RESIDUAL_GAIN)
    for quant_conv in _quant_convs(vae):
        nn.init.constant_(quant_conv.bias.chunk(2)[1], log_variance)


@torch.no_grad()
def set_mix_factors(vae: CausalVideoVAE, value: float) -> int:
    """Start every trained resampling in time from sigmoid(value) of the plain one; returns how many there are.

    Open-Sora-Plan 1.1 did so at 0.5 before its last stage: after the others the shares were where they began, at
    sigmoid(2) = 0.88.
    """
    factors = [parameter for name, parameter in vae.named_parameters() if name.endswith("mix_factor")]
    for factor in factors:
        factor.fill_(value)
    return len(factors)


def _quant_convs(vae: VideoVAE | CausalVideoVAE) -> list[nn.Module]:
    if isinstance(vae, CausalVideoVAE):
        return [vae.quant_conv]
    return [vae.spatial_vae.module.quant_conv, vae.temporal_vae.quant_conv.conv]
