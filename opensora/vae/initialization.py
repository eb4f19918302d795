"""Weights to start from when no checkpoint is there.

PyTorch's default shrinks a signal to 0.58 of its size at every convolution and adds random constants, so that latents
of a fresh VAE carry next to nothing: for hundreds of steps it learns only brightness. Released weights never needed it.
"""

from __future__ import annotations

import torch
from torch import nn

from opensora.vae.temporal import ResBlock
from opensora.vae.video_vae import VideoVAE

# A residual block begins as nearly the identity, so that the depth of the network does not matter at first.
RESIDUAL_GAIN = 0.1


@torch.no_grad()
def initialize_for_training(vae: VideoVAE, *, log_variance: float) -> None:
    """Draw new weights that keep the size of a signal, zero all biases, and begin posteriors at `log_variance`.

    At a log variance of 0, noise would drown the first latents.
    """
    from diffusers.models.attention_processor import Attention
    from diffusers.models.resnet import ResnetBlock2D

    for layer in vae.modules():
        if isinstance(layer, nn.Conv2d | nn.Conv3d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    for block in vae.modules():
        if isinstance(block, ResnetBlock2D):
            block.conv2.weight.mul_(RESIDUAL_GAIN)
        elif isinstance(block, ResBlock):
            block.conv2.conv.weight.mul_(RESIDUAL_GAIN)
        elif isinstance(block, Attention):
            block.to_out[0].weight.mul_(RESIDUAL_GAIN)
    for quant_conv in (vae.spatial_vae.module.quant_conv, vae.temporal_vae.quant_conv.conv):
        nn.init.constant_(quant_conv.bias.chunk(2)[1], log_variance)
