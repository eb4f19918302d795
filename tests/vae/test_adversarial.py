"""Discriminators and the losses of training against one; recorded answers of upstream are in tests/oracles."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from opensora.vae import DiscriminatorLoss, GeneratorLoss, PatchDiscriminator
from opensora.vae.adversarial import MAX_ADAPTIVE_WEIGHT, adaptive_weight, at_reconstruction
from opensora.vae.discriminators import ActNorm


def clip(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_a_gradient_found_at_the_reconstruction_is_the_plain_one_and_stays_there():
    torch.manual_seed(0)
    decoder, network = nn.Conv3d(3, 3, 1), PatchDiscriminator("3d", channels=4, num_layers=1)
    x = clip(1, 3, 2, 8, 8)
    network(decoder(x)).square().mean().backward()
    expected = decoder.weight.grad.clone()
    decoder.zero_grad()
    network.zero_grad()
    value = at_reconstruction(lambda leaf: network(leaf).square().mean(), decoder(x))
    (2 * value).backward()
    torch.testing.assert_close(decoder.weight.grad, 2 * expected)
    assert all(parameter.grad is None for parameter in network.parameters())


def test_the_adaptive_weight_makes_both_gradients_equally_long_at_the_last_layer():
    torch.manual_seed(0)
    layer = nn.Conv3d(3, 3, 1)
    y = layer(clip(1, 3, 2, 4, 4))
    nll, score = y.abs().sum() * 7, y.square().mean()
    weighted = torch.autograd.grad(adaptive_weight(nll, score, layer.weight) * score, layer.weight, retain_graph=True)
    wanted = torch.autograd.grad(nll, layer.weight, retain_graph=True)
    assert weighted[0].norm().item() == pytest.approx(wanted[0].norm().item(), rel=1e-3)  # 1e-4 beside a norm of 0.3
    assert adaptive_weight(nll * 1e9, score, layer.weight) == MAX_ADAPTIVE_WEIGHT


@pytest.mark.parametrize("kind", ["hinge", "vanilla", "non-saturating"])
def test_either_side_gains_by_what_the_other_loses(kind: str):
    generator, judge = GeneratorLoss(kind=kind), DiscriminatorLoss(start=0, kind=kind)
    real, fake = torch.zeros(3), torch.full((3,), 0.2, requires_grad=True)
    assert torch.autograd.grad(generator.score(fake), fake)[0].lt(0).all()
    assert torch.autograd.grad(judge(real, fake, 0), fake)[0].gt(0).all()


def test_the_hinge_loss_leaves_patches_alone_that_are_told_apart_well():
    judge = DiscriminatorLoss(start=0)
    assert judge(torch.tensor([1.0, 3.0]), torch.tensor([-1.0, -2.0]), 0) == 0
    assert judge(torch.zeros(2), torch.zeros(2), 0) == 1


@pytest.mark.parametrize("kind", ["2d", "3d", "3d-v1.0"])
@pytest.mark.parametrize("num_layers", [1, 3])
def test_the_smallest_clip_gives_one_patch_and_no_smaller_one_goes_through(kind: str, num_layers: int):
    network = PatchDiscriminator(kind, channels=4, num_layers=num_layers).eval()
    least = network.min_size
    assert network(clip(2, 3, *least)).shape == (2, 1, *[1] * len(least))
    if kind == "3d":
        assert least[0] == 1
        return
    for axis in range(len(least)):
        size = list(least)
        size[axis] -= 1
        with pytest.raises(ValueError, match=r"discriminator: x must have at least"):
            network(clip(2, 3, *size))


def test_the_3d_discriminator_of_1_0_needs_ten_frames_and_says_so():
    with pytest.raises(ValueError, match=r"at least 10, 24, 24 frames, .* for kind '3d-v1.0', got .*9, 64"):
        PatchDiscriminator("3d-v1.0", channels=4)(clip(1, 3, 9, 64, 64))


def test_the_2d_discriminator_judges_every_frame_by_itself_and_the_3d_one_does_not():
    torch.manual_seed(0)
    x = clip(1, 3, 4, 16, 16)
    frames, clips = (PatchDiscriminator(kind, channels=4, num_layers=1).eval() for kind in ("2d", "3d"))
    torch.testing.assert_close(frames(x.flip(2)), frames(x).flip(0))
    torch.testing.assert_close(frames(x), frames(x[0].transpose(0, 1)))
    assert not torch.allclose(clips(x.flip(2)), clips(x).flip(2), atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_3d_discriminator_judges_one_frame_as_a_frame_among_zeros(dtype: torch.dtype):
    layer = PatchDiscriminator("3d", channels=4).main[0].to(dtype)
    frame = clip(2, 3, 1, 16, 16).to(dtype)
    _ = [torch.full((10**n,), torch.nan, dtype=dtype) for n in range(3, 7)]  # what memory that nobody wrote would hold
    del _
    zeros = torch.zeros_like(frame)
    among = nn.functional.conv3d(
        torch.cat([zeros, frame, zeros], 2).float(), layer.weight.float(), layer.bias.float(), layer.stride, (0, 1, 1)
    )
    torch.testing.assert_close(layer(frame).float(), among, rtol=0.02, atol=0.002)


def test_actnorm_takes_its_first_values_from_the_first_training_batch_alone():
    norm, x = ActNorm(3), 5 + 3 * clip(4, 3, 6, 6)
    assert torch.equal(norm.eval()(x), x)
    y = norm.train()(x).transpose(0, 1).flatten(1)
    torch.testing.assert_close(y.mean(1), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(y.std(1), torch.ones(3))
    before = norm.scale.clone()
    norm(2 * x)
    assert torch.equal(norm.scale, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "4d"}, r"kind must be one of 2d, 3d, 3d-v1.0, got '4d'"),
        ({"kind": "3d", "use_actnorm": True}, r"use_actnorm must be false unless kind is '2d', got kind '3d'"),
        ({"kind": "2d", "num_layers": 0}, r"num_layers and channels must be at least 1, got 0, 64"),
    ],
)
def test_options_that_no_discriminator_has_are_refused(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        PatchDiscriminator(**options)
