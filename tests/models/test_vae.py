"""The stacked VAE: upstream's parameter names, chunking, sizes, precision, training and losses."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from opensora.config import SpatialVAEConfig, TemporalVAEConfig, VAELossConfig, VideoVAEConfig
from opensora.vae import DiscriminatorLoss, GeneratorLoss, VAELoss, VideoVAE
from opensora.vae.losses import kl_loss, reconstruction_loss
from opensora.vae.temporal import CausalConv3d
from opensora_kernels.vae import Streaming, TilePlan, decode, gather

KEYS = Path(__file__).parent / "keys" / "opensora-vae-v1.2.json"


def tiny_config(**changes: object) -> VideoVAEConfig:
    """Eight latent channels and three spatial levels, unlike the release: nothing may assume 4 channels or factor 8."""
    spatial = SpatialVAEConfig(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 16),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=4,
    )
    temporal = TemporalVAEConfig(
        in_out_channels=8, latent_embed_dim=8, embed_dim=8, filters=8, num_res_blocks=1, num_groups=4
    )
    scale, shift = tuple(1.0 + 0.1 * i for i in range(8)), tuple(0.1 * i for i in range(8))
    return replace(VideoVAEConfig(spatial, temporal, scale, shift), **changes)


def tiny_vae(**changes: object) -> VideoVAE:
    torch.manual_seed(0)
    return VideoVAE(tiny_config(**changes))


def clip(num_frames: int, height: int = 16, width: int = 12, batch: int = 1) -> torch.Tensor:
    return torch.rand(batch, 3, num_frames, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_full_size_has_exactly_the_keys_and_shapes_of_the_release() -> None:
    with torch.device("meta"):
        vae = VideoVAE(VideoVAEConfig())
    expected = json.loads(KEYS.read_text())
    assert {key: list(tensor.shape) for key, tensor in vae.state_dict().items()} == expected
    assert sum(p.numel() for p in vae.spatial_vae.parameters()) == 83_653_863
    assert sum(p.numel() for p in vae.temporal_vae.parameters()) == 309_687_144


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((1, 240, 426), (1, 30, 53)),
        ((17, 480, 854), (5, 60, 106)),
        ((34, 256, 256), (10, 32, 32)),
        ((51, 720, 1280), (15, 90, 160)),
        ((102, 8, 8), (30, 1, 1)),
        ((408, 8, 8), (120, 1, 1)),
    ],
)
def test_latent_size_rounds_space_down_and_every_chunk_up(
    size: tuple[int, int, int], expected: tuple[int, int, int]
) -> None:
    with torch.device("meta"):
        vae = VideoVAE(VideoVAEConfig())
    assert vae.latent_size(size) == expected


def test_meta_tensors_tell_the_shapes_of_a_720p_clip() -> None:
    with torch.device("meta"), torch.no_grad():
        vae = VideoVAE(VideoVAEConfig())
        assert vae.decode(torch.empty(1, 4, 10, 90, 160), 34).shape == (1, 3, 34, 720, 1280)


@pytest.mark.parametrize("num_frames", [1, 2, 5, 17, 20])
def test_encode_has_latent_size_and_decode_returns_the_frames(num_frames: int) -> None:
    vae = tiny_vae().eval()
    with torch.no_grad():
        z = vae.encode(clip(num_frames, 17, 14, batch=2))
        assert z.shape == (2, 8, *vae.latent_size((num_frames, 17, 14)))
        assert vae.decode(z, num_frames).shape == (2, 3, num_frames, 16, 12)


def test_micro_batches_change_nothing() -> None:
    whole, parts = tiny_vae(micro_batch_size=None), tiny_vae(micro_batch_size=3)
    with torch.no_grad():
        z = whole.encode(clip(5), sample_posterior=False)
        torch.testing.assert_close(parts.encode(clip(5), sample_posterior=False), z, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(parts.decode(z, 5), whole.decode(z, 5), atol=1e-5, rtol=1e-5)


def test_micro_batches_stream_frame_after_frame() -> None:
    vae = tiny_vae(micro_batch_size=2).requires_grad_(False)
    z = torch.randn(1, 8, 3, 8, 8)
    chunks = list(decode(lambda z: vae.decode(z, 9), z, plan=TilePlan(Streaming(1))))
    assert len(chunks) > 1
    torch.testing.assert_close(gather(chunks), vae.decode(z, 9), atol=1e-5, rtol=1e-5)


def test_chunks_are_independent() -> None:
    vae = tiny_vae()
    x = clip(20)
    with torch.no_grad():
        z = vae.encode(x, sample_posterior=False)
        torch.testing.assert_close(z[:, :, :5], vae.encode(x[:, :, :17], sample_posterior=False), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(vae.decode(z, 20)[:, :, 17:], vae.decode(z[:, :, 5:], 3), atol=1e-5, rtol=1e-5)


def test_a_generator_repeats_the_same_latents_and_the_mean_needs_none() -> None:
    vae = tiny_vae()
    with torch.no_grad():
        first, again, other = (vae.encode(clip(5), generator=torch.Generator().manual_seed(s)) for s in (3, 3, 4))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        mean = vae.encode(clip(5), sample_posterior=False)
        assert torch.equal(mean, vae.encode(clip(5), sample_posterior=False))


def test_scale_and_shift_normalise_each_channel() -> None:
    config = tiny_config()
    vae, plain = tiny_vae(), tiny_vae(scale=1.0, shift=0.0)
    assert plain.state_dict()["scale"].shape == ()
    z, raw = (v.encode(clip(5), sample_posterior=False) for v in (vae, plain))
    scale, shift = (torch.tensor(v).view(1, 8, 1, 1, 1) for v in (config.scale, config.shift))
    torch.testing.assert_close(z, (raw - shift) / scale)
    torch.testing.assert_close(vae.decode(z, 5), plain.decode(raw, 5), atol=1e-5, rtol=1e-5)


def test_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for enabled in (False, True):
        vae = tiny_vae().train()
        vae.set_gradient_checkpointing(enabled)
        out = vae(clip(5), generator=torch.Generator().manual_seed(0))
        VAELoss(VAELossConfig())(clip(5), out).total.backward()
        gradients.append({name: p.grad for name, p in vae.named_parameters()})
    assert all(gradient is not None for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_bf16_weights_and_bf16_autocast_both_run_close_to_fp32() -> None:
    vae = tiny_vae()
    with torch.no_grad():
        z = vae.encode(clip(5), sample_posterior=False)
        x = vae.decode(z, 5)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = vae.decode(vae.encode(clip(5), sample_posterior=False), 5)
        half = vae.to(torch.bfloat16)
        assert half.scale.dtype == torch.bfloat16
        rounded = half.decode(half.encode(clip(5).bfloat16(), sample_posterior=False), 5)
    # 40 layers of bf16 rounding, 2^-9 each, add up like a random walk: sqrt(40) * 2^-9 = 1.2 %
    for actual in (mixed, rounded):
        assert actual.dtype == torch.bfloat16
        assert (actual.float() - x).norm() < 0.05 * x.norm()


def test_autocast_trains_fp32_weights() -> None:
    vae = tiny_vae()
    with torch.autocast("cpu", torch.bfloat16):
        out = vae(clip(5))
    loss = VAELoss(VAELossConfig())(clip(5), out).total
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in vae.parameters())


@pytest.mark.parametrize("stride", [1, 2])
def test_a_later_frame_does_not_change_an_earlier_output(stride: int) -> None:
    torch.manual_seed(0)
    conv = CausalConv3d(4, 4, 3, stride=stride)
    x = torch.randn(1, 4, 8, 3, 3)
    changed = x.clone()
    changed[:, :, 4:] += 1.0
    before, after = conv(x), conv(changed)
    first = 4 // stride
    assert torch.equal(before[:, :, :first], after[:, :, :first])
    assert not torch.equal(before[:, :, first], after[:, :, first])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda vae: vae.encode(clip(5)[:, :2]),
            r"encode: x must have shape \(B, 3, T, H, W\), got \(1, 2, 5, 16, 12\)",
        ),
        (lambda vae: vae.encode(clip(5, 3, 3)), "encode: x must have a frame and at least 4 x 4 pixels"),
        (lambda vae: vae.decode(torch.zeros(1, 8, 3, 4, 3), 5), r"decode: z must have shape \(B, 8, 2, H, W\) for 5"),
        (lambda vae: vae.latent_size((0, 8, 8)), "num_frames must be at least 1, got 0"),
        (lambda vae: tiny_vae(scale=(1.0,) * 4), "scale must be a number or have 8 entries, got 4"),
    ],
)
def test_errors_name_argument_rule_and_value(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(tiny_vae())


def test_losses_switch_on_one_by_one() -> None:
    vae = tiny_vae()
    image, video = clip(1), clip(5)
    off = VAELossConfig(use_real_rec_loss=False)
    z_only = VAELoss(replace(off, use_z_rec_loss=True, use_image_identity_loss=True))
    out = vae(video, decode_pixels=False)
    assert out.x_rec is None
    terms = z_only(video, out)
    assert terms.reconstruction is None
    assert terms.kl is None
    assert terms.identity is None
    torch.testing.assert_close(terms.total, reconstruction_loss(out.x_z, out.z_rec))
    assert z_only(image, vae(image, decode_pixels=False)).identity is not None
    with pytest.raises(ValueError, match=r"x_rec must be decoded"):
        VAELoss(VAELossConfig())(video, out)


def test_reconstruction_is_summed_over_pixels_and_averaged_over_frames() -> None:
    target, output = torch.zeros(2, 3, 4, 5, 6), torch.full((2, 3, 4, 5, 6), 0.5)
    assert reconstruction_loss(target, output).item() == pytest.approx(0.5 * 3 * 5 * 6)
    distance = lambda a, b: (a - b).abs().amax((1, 2, 3))  # noqa: E731
    with_distance = reconstruction_loss(target, output, perceptual=distance, perceptual_weight=0.1)
    assert with_distance.item() == pytest.approx((0.5 + 0.1 * 0.5) * 3 * 5 * 6)


def test_kl_counts_every_chunk() -> None:
    vae = tiny_vae(micro_frame_size=4)
    posteriors = vae(clip(8), decode_pixels=False).posteriors
    assert len(posteriors) == 2
    torch.testing.assert_close(kl_loss(posteriors), sum(p.kl().mean() for p in posteriors))


def test_lecam_pulls_towards_running_means_that_move_only_in_training() -> None:
    loss = DiscriminatorLoss(start=0, lecam_weight=0.5, lecam_decay=0.9)
    plain = DiscriminatorLoss(start=0)
    real, fake = torch.tensor([2.0, 4.0]), torch.tensor([-1.0, -3.0])
    value = loss(real, fake, 1)
    assert loss.lecam_real.item() == pytest.approx(0.3)
    assert loss.lecam_fake.item() == pytest.approx(-0.2)
    lecam = ((2.2**2 + 4.2**2) + (1.3**2 + 3.3**2)) / 2
    assert value.item() == pytest.approx(plain(real, fake, 1).item() + 0.5 * lecam)
    loss.eval()(real, fake, 1)
    assert loss.lecam_real.item() == pytest.approx(0.3)


def test_adversarial_losses_wait_for_their_start() -> None:
    weight = torch.ones(3, requires_grad=True)
    nll, logits = (weight * 2).sum(), weight * 4
    assert GeneratorLoss(start=10)(logits, nll, weight, 9).item() == 0
    # gradients: 2 per entry against -4/3, so the adaptive weight is 1.5 and the loss 0.5 * 1.5 * -4
    assert GeneratorLoss(start=10)(logits, nll, weight, 10).item() == pytest.approx(-3.0, rel=1e-3)


def test_models_of_diffusers_are_whole_after_ours_was_made_on_meta():
    code = (
        "import torch; from opensora.presets import tiny; from opensora.vae import VideoVAE\n"
        "with torch.device('meta'): VideoVAE(tiny.vae())\n"
        "from diffusers.models.autoencoders.autoencoder_kl_cosmos import _WAVELETS\n"
        "assert all(tensor.device.type == 'cpu' for tensor in _WAVELETS.values())"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
