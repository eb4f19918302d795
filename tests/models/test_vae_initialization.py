"""A VAE trained from nothing must pass a signal from its first step on."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from opensora.presets.tiny import vae as tiny_vae
from opensora.vae import VideoVAE
from opensora.vae.initialization import initialize_for_training


def color_fields(num_images: int, generator: torch.Generator) -> Tensor:
    """Smooth random colours, (B, 3, 1, 32, 32) in [-1, 1]."""
    corners = torch.rand(num_images, 3, 4, 4, generator=generator) * 2 - 1
    return interpolate(corners, size=(32, 32), mode="bilinear")[:, :, None]


def test_latents_begin_at_the_size_of_the_pixels_and_posteriors_where_asked():
    torch.manual_seed(0)
    vae = VideoVAE(tiny_vae())
    initialize_for_training(vae, log_variance=-4.0)
    x = color_fields(8, torch.Generator().manual_seed(0))
    with torch.no_grad():
        latents = vae.spatial_vae.encode(x, None)
        posterior = vae.temporal_vae.encode(latents)
    assert 0.2 < latents.std() / x.std() < 5
    assert 0.2 < posterior.mean.std() / x.std() < 5
    assert vae.temporal_vae.quant_conv.conv.bias.chunk(2)[1].eq(-4.0).all()


def test_colour_is_learned_in_the_first_hundred_steps():
    torch.manual_seed(0)
    vae = VideoVAE(tiny_vae())
    initialize_for_training(vae, log_variance=-4.0)
    optimizer = torch.optim.AdamW(vae.spatial_vae.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        x = color_fields(8, generator)
        decoded = vae(x, through_time=False, generator=generator).x_rec
        optimizer.zero_grad()
        (decoded - x).abs().mean().backward()
        optimizer.step()
    error, size = (chroma(y).abs().mean() for y in (decoded - x, x))
    # 0.29 to 0.64 with four seeds; with PyTorch's own initialisation 0.83, and still 0.8 after 300 steps
    assert error / size < 0.7


def chroma(x: Tensor) -> Tensor:
    return x - x.mean(1, keepdim=True)
