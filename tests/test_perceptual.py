"""LPIPS: a distance, and where its weights may come from."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from opensora.perceptual import LPIPS, Backbone
from tests.oracles.adversarial import seeded_lpips


@pytest.fixture(scope="module")
def lpips() -> LPIPS:
    return seeded_lpips()


def frames(seed: int) -> Tensor:
    return torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_it_is_a_distance_for_each_frame(lpips: LPIPS):
    x, y = frames(0), frames(1)
    assert torch.equal(lpips(x, x), torch.zeros(2, 1, 1, 1))
    torch.testing.assert_close(lpips(x, y), lpips(y, x))
    torch.testing.assert_close(lpips(x, y)[1:], lpips(x[1:], y[1:]))
    near = x + 0.1 * (y - x)
    assert (lpips(x, near) < lpips(x, y)).all()


def test_gradients_reach_the_frames_alone_and_are_finite_where_nothing_responds(lpips: LPIPS):
    x = torch.zeros(1, 3, 16, 16, requires_grad=True)
    lpips.train()(x, frames(0)[:1, :, :, :16]).sum().backward()
    assert torch.isfinite(x.grad).all()
    assert x.grad.abs().max() > 0
    assert not lpips.training
    assert all(parameter.grad is None for parameter in lpips.parameters())


@pytest.mark.parametrize(("backbone", "last"), [("vgg", "features.28.bias"), ("alex", "features.10.bias")])
def test_weights_come_under_any_of_the_names_in_use(backbone: Backbone, last: str):
    own = seeded_lpips(backbone=backbone).state_dict()
    upstream = {f"loss.perceptual_loss.{name}": tensor for name, tensor in own.items()}
    upstream |= {"loss.discriminator.main.0.weight": torch.zeros(1), "encoder.conv_in.weight": torch.zeros(1)}
    torchvision = {"classifier.0.weight": torch.zeros(1)}
    for name, tensor in own.items():
        if name.startswith("net."):
            torchvision[f"features.{'.'.join(name.split('.')[2:])}"] = tensor
        elif name.startswith("lin"):
            torchvision[name] = tensor
    assert last in torchvision
    for weights in (own, upstream, torchvision):
        loaded = LPIPS.from_weights(weights, source="file", backbone=backbone).state_dict()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in own.items())


def test_a_file_that_lacks_weights_is_refused_by_its_name(lpips: LPIPS):
    only_vgg = {name: tensor for name, tensor in lpips.state_dict().items() if not name.startswith("lin")}
    with pytest.raises(ValueError, match=r"vgg\.pth must hold the features of VGG16 .* no lin0\.model\.1\.weight; no"):
        LPIPS.from_weights(only_vgg, source="vgg.pth")
    other = lpips.state_dict() | {"lin0.model.1.weight": torch.zeros(1, 3, 1, 1)}
    with pytest.raises(ValueError, match=r"weight of shape \(1, 3, 1, 1\) instead of \(1, 64, 1, 1\)"):
        LPIPS.from_weights(other, source="other.pth")
