"""diffusers' image VAE on our operators: the same pictures in either order of axes, gradients by its own forward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from opensora_kernels import apply_opensora_kernels

diffusers = pytest.importorskip("diffusers")


def image_vae() -> torch.nn.Module:
    torch.manual_seed(0)
    types = {"up_block_types": ("UpDecoderBlock2D",) * 2, "down_block_types": ("DownEncoderBlock2D",) * 2}
    vae = diffusers.AutoencoderKL(**types, block_out_channels=(32, 64), latent_channels=4).eval()
    for name, parameter in vae.named_parameters():
        if "norm" in name:
            parameter.data.add_(0.2 * torch.randn(parameter.shape))
    return vae


def latents(layout: torch.memory_format) -> Tensor:
    z = torch.randn(3, 4, 5, 7, generator=torch.Generator().manual_seed(1))
    return z.contiguous(memory_format=layout)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_patched_pictures_are_the_same(layout: torch.memory_format):
    vae, z = image_vae(), latents(layout)
    with torch.no_grad():
        expected = vae.decode(z).sample
        report = apply_opensora_kernels(vae)
        actual = vae.decode(z).sample
    blocks = [entry for entry in report.entries if type(vae.get_submodule(entry.name)).__name__ == "ResnetBlock2D"]
    assert blocks
    chain = "causal_conv3d(norm, silu), causal_conv3d(norm, silu, residual) on a CPU without gradients"
    assert all(", ".join(entry.operators) == chain for entry in blocks)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


def test_gradients_are_those_of_its_own_forward():
    vae, z = image_vae(), latents(torch.contiguous_format)
    found = []
    for _ in range(2):
        leaf = z.clone().requires_grad_()
        found += torch.autograd.grad(vae.decode(leaf).sample.square().sum(), [leaf, *vae.decoder.parameters()])[:1]
        apply_opensora_kernels(vae)
    torch.testing.assert_close(*found)


def test_a_decode_is_planned_on_meta_tensors():
    vae = image_vae()
    apply_opensora_kernels(vae)
    with torch.no_grad():  # whose convolutions forget the order of axes there
        assert vae.to("meta").decode(latents(torch.channels_last).to("meta")).sample.shape == (3, 3, 10, 14)
