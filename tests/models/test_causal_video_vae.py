"""Open-Sora-Plan's CausalVideoVAE: keys, sizes, frames, tiles, loading, and what its blocks compute."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from bench import plain_causal_vae
from opensora.checkpoints import CheckpointError, load_model
from opensora.config import CausalVideoVAEConfig
from opensora.presets import open_sora_plan_v1_0, open_sora_plan_v1_1
from opensora.vae import CausalVideoVAE, VAETiling, tail_initialize
from opensora.vae.causal_video import layers, resampling
from opensora.vae.causal_video.tiling import TILING_V1_0, TILING_V1_1
from opensora_kernels import cpu_steps

KEYS = Path(__file__).parent / "keys"
PRESETS = {"1.0": open_sora_plan_v1_0, "1.1": open_sora_plan_v1_1}
SMALL = VAETiling(sample_size=32, latent_size=4, sample_frames=9, latent_frames=3)


def tiny_config(version: str = "1.1", **changes: object) -> CausalVideoVAEConfig:
    """Three latent channels and one width that changes, unlike the releases."""
    small = {"hidden_size": 32, "hidden_size_mult": (1, 2, 1, 1), "num_res_blocks": 1, "embed_dim": 3, "z_channels": 5}
    return replace(PRESETS[version].vae(), **{**small, **changes})


def tiny_vae(version: str = "1.1", *, tiling: VAETiling | None = None, **changes: object) -> CausalVideoVAE:
    """Biases, norms and shares of a mix are drawn too: none of them may be forgotten."""
    torch.manual_seed(0)
    vae = CausalVideoVAE(tiny_config(version, **changes), tiling)
    with torch.no_grad():
        for parameter in vae.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    return vae.eval()


def clip(num_frames: int, height: int = 16, width: int = 24, batch: int = 1) -> Tensor:
    return torch.rand(batch, 3, num_frames, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def latents(num_frames: int, height: int = 2, width: int = 3) -> Tensor:
    return torch.randn(1, 3, num_frames, height, width, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(("version", "in_encoder", "in_decoder"), [("1.0", 93.82, 135.35), ("1.1", 97.35, 149.51)])
def test_full_size_has_exactly_the_keys_and_shapes_of_the_release(version: str, in_encoder: float, in_decoder: float):
    with torch.device("meta"):
        vae = CausalVideoVAE(PRESETS[version].vae())
    expected = json.loads((KEYS / f"causalvideovae-v{version}.json").read_text())
    assert {key: list(tensor.shape) for key, tensor in vae.state_dict().items()} == expected
    for half, millions in ((vae.encoder, in_encoder), (vae.decoder, in_decoder)):
        assert sum(p.numel() for p in half.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)


@pytest.mark.slow
@pytest.mark.parametrize(("version", "tiling"), [("1.0", TILING_V1_0), ("1.1", TILING_V1_1), ("1.1", None)])
def test_meta_tensors_tell_the_shapes_of_a_69_frame_clip(
    version: str, tiling: VAETiling | None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(cpu_steps, "STEP_BYTES", 1 << 50)  # one step for each layer: thousands take a minute on paper
    with torch.device("meta"), torch.no_grad():
        vae = CausalVideoVAE(PRESETS[version].vae(), tiling)
        assert (vae.time_factor, vae.space_factor) == (4, 8)
        assert vae.decode(torch.empty(1, 4, 18, 33, 25)).shape == (1, 3, 69, 264, 200)
        assert vae.encode(torch.empty(1, 3, 69, 264, 200)).shape == (1, 4, 18, 33, 25)


@pytest.mark.parametrize("version", PRESETS)
@pytest.mark.parametrize("num_frames", [1, 5, 17])
def test_encode_has_latent_size_and_decode_returns_the_frames(version: str, num_frames: int):
    vae = tiny_vae(version)
    with torch.no_grad():
        z = vae.encode(clip(num_frames, 17, 31, batch=2))
        assert z.shape == (2, 3, *vae.latent_size((num_frames, 17, 31))) == (2, 3, (num_frames + 3) // 4, 2, 3)
        assert vae.decode(z, num_frames).shape == (2, 3, num_frames, 16, 24)


def test_latents_are_scaled_and_a_generator_repeats_them():
    vae = tiny_vae()
    with torch.no_grad():
        mean = vae.encode(clip(5), sample_posterior=False)
        posterior = vae.posterior(clip(5))
        assert torch.equal(mean, posterior.mean * 0.18215)
        assert torch.equal(vae.decode(mean), vae.decode_unscaled(mean / 0.18215))  # not quite posterior.mean any more
        first, again, other = (vae.encode(clip(5), generator=torch.Generator().manual_seed(s)) for s in (3, 3, 4))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        noise = torch.ones_like(mean)
        drawn = vae.encode(clip(5), draw_noise=lambda mean: noise)
        torch.testing.assert_close(drawn, (posterior.mean + torch.exp(0.5 * posterior.logvar)) * 0.18215)


@pytest.mark.parametrize("version", PRESETS)
def test_a_clip_is_coded_sample_by_sample(version: str):
    vae = tiny_vae(version)
    x = clip(5, batch=2)
    with torch.no_grad():
        together = vae.encode(x, sample_posterior=False)
        torch.testing.assert_close(together[1:], vae.encode(x[1:], sample_posterior=False), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("version", PRESETS)
def test_layout_of_memory_is_kept_and_changes_nothing(version: str):
    vae = tiny_vae(version)
    with torch.no_grad():
        for function, x in ((lambda x: vae.posterior(x).moments, clip(5)), (vae.decode, latents(2))):
            expected = function(x)
            assert expected.is_contiguous()
            actual = function(x.contiguous(memory_format=torch.channels_last_3d))
            assert actual.is_contiguous(memory_format=torch.channels_last_3d)
            torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("version", PRESETS)
@pytest.mark.parametrize("num_frames", [1, 5])
def test_every_layer_computes_what_the_unfused_original_does(version: str, num_frames: int):
    vae = tiny_vae(version, hidden_size_mult=(2, 1, 1, 3)).double()
    x, z = clip(num_frames).double(), latents(1 + num_frames // 4).double()
    with torch.no_grad():
        torch.testing.assert_close(vae.posterior(x).moments, plain_causal_vae.encode(vae, x), atol=1e-12, rtol=1e-10)
        torch.testing.assert_close(vae.decode_unscaled(z), plain_causal_vae.decode(vae, z), atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("version", PRESETS)
def test_bf16_weights_and_bf16_autocast_lose_no_more_than_the_unfused_original(version: str):
    """Norms of single channels amplify rounding: the original loses 13 % of this untrained decoder's output."""
    vae = tiny_vae(version).bfloat16()
    x = clip(5).bfloat16()

    def error_of(codec, dtype: torch.dtype) -> float:
        y = codec(vae.to(dtype), x.to(dtype))
        return ((y.double() - truth).norm() / truth.norm()).item()

    def ours(vae: CausalVideoVAE, x: Tensor) -> Tensor:
        return vae.decode_unscaled(vae.posterior(x).mean)

    def plain(vae: CausalVideoVAE, x: Tensor) -> Tensor:
        return plain_causal_vae.decode(vae, plain_causal_vae.encode(vae, x).chunk(2, 1)[0])

    with torch.no_grad():
        truth = plain(vae.double(), x.double())
        limit = 2 * error_of(plain, torch.bfloat16)
        assert error_of(ours, torch.bfloat16) < limit
        assert ours(vae.bfloat16(), x).dtype == torch.bfloat16
        with torch.autocast("cpu", torch.bfloat16):
            assert error_of(ours, torch.float32) < limit


@pytest.mark.parametrize("version", PRESETS)
def test_every_weight_is_trained_and_checkpointing_changes_no_gradient(version: str):
    gradients = []
    for enabled in (False, True):
        vae = tiny_vae(version).train()
        vae.set_gradient_checkpointing(enabled)
        output = vae(clip(5), generator=torch.Generator().manual_seed(0))
        (output.x_rec.square().mean() + 1e-3 * output.posteriors[0].kl().sum()).backward()
        gradients.append({name: p.grad for name, p in vae.named_parameters()})
    assert all(gradient is not None for gradient in gradients[0].values())
    assert vae.last_layer is vae.decoder.conv_out.conv.weight
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda vae: vae.encode(clip(6)), r"1, 5, 9, ... frames \(4 n \+ 1\), got 6; the nearest are 5 and 9"),
        (lambda vae: vae.encode(clip(0)), "frames .*, got 0; the nearest are 1 and 5"),
        (lambda vae: vae.encode(clip(5)[:, :2]), r"x must have shape \(B, 3, T, H, W\), got \(1, 2, 5, 16, 24\)"),
        (lambda vae: vae.encode(clip(5)[0]), r"x must have shape \(B, 3, T, H, W\), got \(3, 5, 16, 24\)"),
        (lambda vae: vae.encode(clip(5, 7)), r"x must have at least 8 x 8 pixels, got \(1, 3, 5, 7, 24\)"),
        (lambda vae: vae.decode(clip(2)[:, :2]), r"z must have shape \(B, 3, T, H, W\) .*, got \(1, 2, 2, 16, 24\)"),
        (lambda vae: vae.decode(latents(0)), r"T, H, W >= 1, got \(1, 3, 0, 2, 3\)"),
        (lambda vae: vae.decode(latents(2), 6), "num_frames must be 5 for 2 frames of latents, got 6"),
        (lambda vae: vae.decode(latents(2), out=torch.empty(1, 3, 5, 16, 8)), r"out must have shape \(1, C, 5, 16, 24"),
    ],
)
def test_errors_name_argument_rule_and_value(call, message: str):
    with pytest.raises(ValueError, match=message):
        call(tiny_vae())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"encoder_attention": "AttnBlock4D"},
            "encoder_attention must be one of .*AttnBlock3DFix.*, got 'AttnBlock4D'",
        ),
        ({"decoder_spatial_upsample": ("",)}, "decoder_spatial_upsample must name one module for each of 4 levels"),
        ({"encoder_resnet_blocks": ("",) * 4}, "encoder_resnet_blocks must be one of ResnetBlock2D, ResnetBlock3D"),
        ({"decoder_temporal_upsample": ("",) * 4}, "encoder and decoder must resample alike"),
        ({"hidden_size": 33}, "widths must be multiples of 32, got 33"),
        ({"double_z": False}, "double_z must be true"),
    ],
)
def test_a_configuration_that_cannot_be_built_is_refused(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        CausalVideoVAE(tiny_config(**changes))


def test_attention_follows_the_blocks_of_a_level_of_that_resolution():
    vae = tiny_vae(attn_resolutions=(64,), resolution=128)
    assert [len(level.attn) for level in vae.encoder.down] == [0, 1, 0, 0]
    assert [len(level.attn) for level in vae.decoder.up] == [0, 2, 0, 0]
    with torch.no_grad():
        assert vae.decode(vae.encode(clip(5))).shape == (1, 3, 5, 16, 24)


# Tiles. The whole driver is compared with upstream's way in tests/test_tiled.py.


def test_tilings_have_upstreams_numbers():
    pixels, latent = TILING_V1_1.of_pixels(), TILING_V1_1.of_latents()
    assert (pixels.tile, pixels.stride, pixels.overlap, pixels.keep) == ((256,) * 2, (192,) * 2, (8,) * 2, (24,) * 2)
    assert (latent.tile, latent.stride, latent.overlap, latent.keep) == ((32,) * 2, (24,) * 2, (64,) * 2, (192,) * 2)
    assert (pixels.window, latent.window) == (65, 17)
    assert (TILING_V1_0.of_pixels().window, TILING_V1_0.of_latents().window) == (None, None)


def test_a_window_is_coded_as_a_clip_of_its_own_and_drops_the_frame_it_shares():
    vae = tiny_vae(tiling=SMALL)
    with torch.no_grad():
        # no larger than one stride, so that a window is one tile
        for function, whole, length in (
            (lambda x: vae.posterior(x).moments, clip(17, 24, 16), 9),
            (vae.decode_unscaled, latents(5), 3),
        ):
            first, second = function(whole[:, :, :length]), function(whole[:, :, length - 1 :])
            joined = torch.cat([first, second[:, :, 1:]], 2)
            torch.testing.assert_close(function(whole), joined, atol=1e-5, rtol=1e-5)


def test_decoding_into_given_memory_tells_of_progress_and_changes_nothing():
    vae, z, done = tiny_vae(tiling=SMALL), torch.randn(1, 3, 5, 5, 6), []
    with torch.no_grad():
        expected = vae.decode(z)
        out = torch.full((1, 17, 40, 48, 3), torch.nan).permute(0, 4, 1, 2, 3)  # as a video file wants its frames
        assert vae.decode(z, out=out, progress=lambda *counts: done.append(counts)) is out
        assert torch.equal(out, expected)
        assert done == [(count, 8) for count in range(1, 9)]
        assert vae.encode(clip(5, 40, 40), progress=lambda *counts: done.append(counts)).shape == (1, 3, 2, 5, 5)
        assert done[-1] == (4, 4)


def test_a_last_tile_too_small_for_a_latent_is_left_out():
    """Upstream raises here: tiles of 52 rows begin at 0, 24 and 48, the last with 4 rows, which is no latent."""
    vae = tiny_vae(tiling=SMALL)
    with torch.no_grad():
        assert vae.encode(clip(5, 52, 24)).shape == (1, 3, 2, 6, 3)


# Loading.


def released_folder(folder: Path, vae: CausalVideoVAE, extra: dict[str, Tensor], *, as_training: bool = False) -> Path:
    """config.json and weights as upstream writes them."""
    fields = {name: value for name, value in asdict(vae.config).items() if name != "scaling_factor"}
    fields |= {"_class_name": "CausalVAEModel", "_diffusers_version": "0.27.2", "loss_params": {"disc_start": 2001}}
    (folder / "config.json").write_text(json.dumps(fields))
    state = {**vae.state_dict(), **extra}
    if as_training:
        torch.save({"epoch": 3, "state_dict": state}, folder / "epoch=3-step=2000.ckpt")
    else:
        save_file(state, folder / "diffusion_pytorch_model.safetensors")
    return folder


LOSS = {"loss.logvar": torch.zeros(()), "loss.discriminator.main.0.weight": torch.ones(2, 3, 4, 4)}


@pytest.mark.parametrize("version", PRESETS)
@pytest.mark.parametrize("as_training", [False, True])
def test_a_released_folder_loads_without_the_weights_of_its_loss(tmp_path: Path, version: str, as_training: bool):
    vae = tiny_vae(version)
    loaded = load_model(
        released_folder(tmp_path, vae, LOSS, as_training=as_training), CausalVideoVAE, CausalVideoVAEConfig
    )
    assert loaded.config == replace(vae.config, loss_params={"disc_start": 2001})
    with torch.no_grad():
        assert torch.equal(loaded.decode(latents(2)), vae.decode(latents(2)))


def test_other_weights_that_the_model_has_not_are_still_refused(tmp_path: Path):
    folder = released_folder(tmp_path, tiny_vae(), {"lossy.weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"1 unexpected \(lossy.weight\)"):
        load_model(folder, CausalVideoVAE, CausalVideoVAEConfig)


def test_of_several_training_checkpoints_one_must_be_named(tmp_path: Path):
    vae = tiny_vae()
    folder = released_folder(tmp_path, vae, LOSS, as_training=True)
    (folder / "last.ckpt").write_bytes((folder / "epoch=3-step=2000.ckpt").read_bytes())
    with pytest.raises(CheckpointError, match=r"several checkpoints.*: epoch=3-step=2000.ckpt, last.ckpt"):
        load_model(folder, CausalVideoVAE, CausalVideoVAEConfig)
    load_model(folder / "last.ckpt", CausalVideoVAE, CausalVideoVAEConfig)


# From images to video.


def image_weights(vae: CausalVideoVAE) -> dict[str, Tensor]:
    """Weights of the image VAE of the same sizes."""
    weights = {}
    for name, tensor in vae.state_dict().items():
        if ".time_" not in name:
            plain = name.replace(".conv.conv.", ".conv!").replace(".conv.", ".").replace("conv!", "conv.")
            is_2d = name in ("encoder.conv_in.weight",) or "downsample.conv.weight" in name
            source = name if tensor.dim() == 4 or is_2d else plain
            weights[source] = torch.randn(tensor.shape[:2] + tensor.shape[-2:] if tensor.dim() > 2 else tensor.shape)
    return weights


def test_tail_initialisation_puts_images_into_the_last_frame_of_each_kernel():
    vae = tiny_vae("1.0")
    weights = image_weights(vae)
    assert tail_initialize(vae, {**weights, "loss.logvar": torch.zeros(())}) == ()
    kernel = vae.decoder.conv_in.conv.weight
    assert not kernel[:, :, :2].any()
    assert torch.equal(kernel[:, :, 2], weights["decoder.conv_in.weight"])
    attention = vae.encoder.mid.attn_1.q.conv.weight
    assert torch.equal(attention[:, :, 0], weights["encoder.mid.attn_1.q.weight"])
    x, changed = clip(9)[:, :, :5], clip(9)[:, :, :5].clone()
    changed[:, :, 2:] = 0
    with torch.no_grad():
        before, after = (vae.encoder.conv_in(value) for value in (x, changed))
    assert torch.equal(before[:, :, 1], after[:, :, 1])


def test_tail_initialisation_changes_nothing_unless_all_weights_fit():
    vae = tiny_vae("1.0")
    before = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    weights = image_weights(vae)
    del weights["quant_conv.bias"]
    weights |= {"encoder.norm_out.bias": torch.zeros(7), "model_ema.decay": torch.zeros(())}
    with pytest.raises(
        ValueError, match=r"norm_out.bias must have shape \(32,\), got \(7,\); quant_conv.bias must"
    ) as e:
        tail_initialize(vae, weights)
    assert "model_ema.decay has no place" in str(e.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in vae.state_dict().items())


# Blocks, against the unfused formulas.


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def repeated_first(x: Tensor, count: int) -> Tensor:
    return torch.cat([x[:, :, :1]] * count + [x], 2)


@pytest.mark.parametrize("num_frames", [1, 2, 3, 4, 5, 9])
def test_time_downsampling_is_a_mean_of_three_and_a_convolution(num_frames: int):
    x = drawn(2, 4, num_frames, 5, 6).requires_grad_()
    pooled = F.avg_pool3d(repeated_first(x, 2), (3, 1, 1), (2, 1, 1))
    torch.testing.assert_close(resampling.TimeDownsample2x(4, 4)(x), pooled)
    block = resampling.TimeDownsampleRes2x(4, 4, mix_factor=0.3).double()
    share = torch.sigmoid(block.mix_factor)
    learned = F.conv3d(repeated_first(x, 2), block.conv.weight, block.conv.bias, (2, 1, 1), (0, 1, 1))
    expected, actual = share * pooled + (1 - share) * learned, block(x)
    torch.testing.assert_close(actual, expected)
    inputs = (x, *block.parameters())
    for wanted, found in zip(*(torch.autograd.grad(y.square().sum(), inputs) for y in (expected, actual)), strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("version", PRESETS)
def test_time_resampling_keeps_the_first_frame_to_itself(version: str):
    names = {"1.0": ("TimeDownsample2x", "TimeUpsample2x"), "1.1": ("TimeDownsampleRes2x", "TimeUpsampleRes2x")}
    x = drawn(1, 4, 5, 4, 4).float()
    changed = x.clone()
    changed[:, :, 1:] = 0
    for name in names[version]:
        block = getattr(resampling, name)(4, 4)
        assert torch.equal(block(x)[:, :, 0], block(changed)[:, :, 0])


def test_attention_of_1_0_mixes_channels_and_frames_and_that_of_1_1_does_not():
    torch.manual_seed(0)
    mixed, fixed = layers.AttnBlock3D(32), layers.AttnBlock3DFix(32)
    fixed.load_state_dict(mixed.state_dict())
    with torch.no_grad():
        image, video = drawn(2, 32, 1, 3, 4).float(), drawn(2, 32, 3, 3, 4).float()
        torch.testing.assert_close(mixed(image), fixed(image), atol=1e-5, rtol=1e-5)
        assert (mixed(video) - fixed(video)).abs().max() > 1e-3


def test_two_dimensional_blocks_see_one_frame_at_a_time():
    torch.manual_seed(0)
    x = drawn(2, 32, 3, 6, 5).float()
    blocks = [
        layers.ResnetBlock2D(in_channels=32, out_channels=64),
        layers.AttnBlock(32),
        resampling.Downsample(32, 32),
        resampling.Upsample(32, 32),
        layers.Conv2d(32, 8, 3, padding=1),
    ]
    with torch.no_grad():
        for block in blocks:
            frames = torch.cat([block(x[:, :, t : t + 1]) for t in range(3)], 2)
            torch.testing.assert_close(block(x), frames, atol=1e-5, rtol=1e-5)


def test_dropout_acts_in_training_only():
    torch.manual_seed(0)
    x = drawn(1, 32, 2, 4, 4).float()
    block = layers.ResnetBlock3D(in_channels=32, dropout=0.5)
    without = layers.ResnetBlock3D(in_channels=32)
    without.load_state_dict(block.state_dict())
    with torch.no_grad():
        assert torch.equal(block.eval()(x), without(x))
        assert not torch.equal(block.train()(x), without(x))
        block.dropout.p = 1e-12  # the same way, with nothing dropped
        torch.testing.assert_close(block(x), without(x), atol=1e-5, rtol=1e-5)


def test_a_causal_convolution_begins_as_asked():
    assert not layers.CausalConv3d(4, 4, 3, padding=1).bias.any()
    assert not layers.CausalConv3d(4, 4, 3, "zero", padding=1).kernel().any()
    x = drawn(1, 4, 5, 2, 2).float()
    mean = layers.CausalConv3d(4, 4, (3, 1, 1), "avg")
    torch.testing.assert_close(mean(x), F.avg_pool3d(repeated_first(x, 2), (3, 1, 1), 1))
    with pytest.raises(ValueError, match=r"'avg' needs a kernel of \(kt, 1, 1\), got 3"):
        layers.CausalConv3d(4, 4, 3, "avg")
