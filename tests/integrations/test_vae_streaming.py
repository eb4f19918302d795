"""diffusers' video autoencoders stream: the frames of their own `decode` and `encode`, in the memory of a few."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.families import FAMILIES
from opensora_kernels import apply_opensora_kernels
from opensora_kernels.cpu_steps import frame_by_frame
from opensora_kernels.vae import (
    Streaming,
    Tiled,
    TilePlan,
    Tiling,
    decode,
    decoder_of,
    encode,
    encoder_of,
    gather,
    plan_tiles,
)
from opensora_kernels.vae.memory import Ledger
from tests.ops.accuracy import assert_accurate
from tests.vae.live_bytes import LiveBytes

pytest.importorskip("diffusers", reason="the models are those of diffusers")

BY_FRAME = TilePlan(Streaming(1))
# Latent frames of a short clip and a longer one: enough for windows and segments to repeat.
LENGTHS = {"hunyuan_video": (9, 15), "kvae": (9, 13), "kandinsky_6": (9, 17), "cogvideox": (5, 9), "mochi": (4, 8)}
LENGTHS |= {"ltx": (9, 13), "ltx_0.9.5": (4, 8), "ltx_2": (9, 13), "minimax_h3": (13, 25)}
# Allegro decodes in tiles alone, the refiner takes images, and the other Magvit steps through frames as Magvit does.
DECODING = [name for name in FAMILIES if name not in ("allegro", "hunyuan_image_refiner", "magvit_clip_norm")]
# Those that keep no cache between calls are streamed layer by layer, which sums in another order.
RECORDED = ("hunyuan_video_1.5", "ltx", "ltx_2", "cosmos", "minimax_h3", "vidtok")
# The others that keep none may be told to decode window by window.
WINDOWS = {"mochi": {"use_framewise_decoding": True}, "ltx_0.9.5": {"use_framewise_decoding": True}}
ENCODING = {
    "wan": 9, "wan_2.2": 9, "qwen_image": 9, "cogvideox": 17, "hunyuan_video": 29, "magvit": 9, "kvae": 33,
    "kandinsky_6": 33, "cosmos": 17, "vidtok": 17,
}  # fmt: skip
# A 1 x 1 x 1 convolution over all latents, taken step by step: a library may sum products of other sizes otherwise.
ENDS_ON_ALL_LATENTS = ("wan", "wan_2.2", "qwen_image", "magvit")


def build(name: str, *, is_patched: bool = True) -> Any:
    vae = FAMILIES[name].build().requires_grad_(False)
    for attribute, value in WINDOWS.get(name, {}).items():
        setattr(vae, attribute, value)
    if is_patched:
        apply_opensora_kernels(vae)
    return vae


def options_of(vae: Any) -> dict[str, Tensor]:
    return {"temb": torch.tensor([0.05])} if getattr(vae.config, "timestep_conditioning", False) else {}


def latents(name: str, num_frames: int) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(1, 8 if name.startswith("ltx") else 4, num_frames, 3, 4)


def whole(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    torch.manual_seed(2)  # LTX 0.9.5 draws noise
    with torch.no_grad():
        return function(x)


def peak_of(chunks: Iterator[Tensor]) -> tuple[int, list[Tensor]]:
    """Most bytes alive at once while the chunks are made, and copies of them."""
    gc.collect()
    found = []
    with LiveBytes() as counted:
        for chunk in chunks:
            found.append(chunk.numpy().copy())  # not counted
            del chunk
    return counted.peak, [torch.from_numpy(chunk) for chunk in found]


@pytest.mark.parametrize("name", DECODING)
def test_a_patched_vae_decodes_frame_after_frame_in_memory_that_does_not_grow(name: str):
    vae = build(name)
    decoder = decoder_of(vae, **options_of(vae))
    short, long = (latents(name, length) for length in LENGTHS.get(name, (5, 9)))
    expected = whole(decoder, short)
    torch.manual_seed(2)
    peak, chunks = peak_of(decode(decoder, short, plan=BY_FRAME))
    assert len(chunks) > 1
    if name in RECORDED:
        truth = whole(decoder_of(build(name, is_patched=False).double()), short.double())
        assert_accurate(gather(chunks), expected, truth, name)
    else:
        assert torch.equal(gather(chunks), expected)
    longer_peak, _ = peak_of(decode(decoder, long, plan=BY_FRAME))
    assert longer_peak <= 1.05 * peak  # attention keeps the keys and values of earlier frames


@pytest.mark.parametrize("name", ENCODING)
def test_a_patched_vae_encodes_frame_after_frame(name: str):
    encoder = encoder_of(build(name))
    torch.manual_seed(1)
    x = torch.randn(1, 3, ENCODING[name], 16, 16)
    expected = whole(encoder, x)
    chunks = list(encode(encoder, x, plan=BY_FRAME))
    assert len(chunks) > 1
    if name in RECORDED or name in ENDS_ON_ALL_LATENTS:
        truth = whole(encoder_of(build(name, is_patched=False).double()), x.double())
        assert_accurate(gather(chunks), expected, truth, name)
    else:
        assert torch.equal(gather(chunks), expected)


@pytest.mark.parametrize("name", ["wan", "kvae"])  # steps of the one can be recorded, those of the other cannot
def test_an_unpatched_vae_steps_through_the_clip_too(name: str):
    vae, z = build(name, is_patched=False), latents(name, 9)
    seen = []
    chunks = list(decode(vae, z, plan=BY_FRAME, progress=lambda *counts: seen.append(counts)))
    assert len(chunks) > 1
    assert torch.equal(gather(chunks), whole(lambda z: vae.decode(z).sample, z))
    assert seen[-1] == (gather(chunks).shape[2],) * 2


def test_its_bound_methods_stand_for_it():
    vae, z, x = build("wan"), latents("wan", 3), torch.rand(1, 3, 5, 16, 16)
    assert torch.equal(gather(decode(vae.decode, z, plan=BY_FRAME)), gather(decode(vae, z, plan=BY_FRAME)))
    assert torch.equal(gather(encode(vae.encode, x, plan=BY_FRAME)), gather(encode(vae, x, plan=BY_FRAME)))
    plan = plan_tiles(vae.encode, tuple(x.shape), "1GiB", x.dtype)
    assert torch.equal(gather(encode(vae, x, plan=plan)), whole(lambda x: vae.encode(x).latent_dist.mode(), x))


def test_without_a_plan_the_models_own_decode_runs_as_it_is():
    vae, z = build("wan"), latents("wan", 3)
    vae.enable_tiling(tile_sample_min_height=4, tile_sample_min_width=4)
    vae.tile_sample_stride_height = vae.tile_sample_stride_width = 4
    (frames,) = decode(vae, z)
    assert torch.equal(frames, whole(lambda z: vae.decode(z).sample, z))


@pytest.mark.parametrize("name", ["wan", "magvit", "vidtok", "kandinsky_6"])
def test_streams_keep_their_caches_to_themselves(name: str):
    vae, (z, other) = build(name), latents(name, 9).mul(2).chunk(2, 3)[0].split([5, 4], 2)
    z, other = torch.cat([z, other], 2), torch.cat([other, z], 2)
    expected = [whole(decoder_of(vae), each) for each in (z, other)]
    attributes = _attributes(vae)
    first, second = (decode(vae, each, plan=BY_FRAME) for each in (z, other))
    made = [next(first)], [next(second)]  # turn by turn
    assert torch.equal(whole(decoder_of(vae), z), expected[0])
    made[0].extend(first)
    second.close()  # half-way
    torch.testing.assert_close(gather(made[0]), expected[0])  # frames of the other clip differ in the first digit
    torch.testing.assert_close(made[1][0], expected[1][:, :, : made[1][0].shape[2]])
    assert _attributes(vae) == attributes


def _attributes(vae: nn.Module) -> dict[str, list[Any]]:
    """What modules keep beside their weights, and is no list that the model makes anew for every call."""
    kept = {}
    for name, module in vae.named_modules():
        values = {key: value for key, value in vars(module).items() if "conv_idx" not in key and "feat_map" not in key}
        kept[name] = [(key, id(value)) for key, value in values.items() if not isinstance(value, (bool, int, float))]
    return kept


def test_a_budget_is_kept_to_by_the_models_own_steps():
    vae, z = build("wan"), latents("wan", 9)
    plan = plan_tiles(vae, tuple(z.shape), "1GiB", z.dtype)
    assert str(plan).startswith("streaming: ")
    assert "steps through the clip by itself" in str(plan)
    assert plan.relative_time == 1
    assert plan_tiles(vae, (1, 4, 900, 3, 4), "1GiB", z.dtype).peak_bytes == plan.peak_bytes
    assert len(list(decode(vae, z, memory_budget=plan.peak_bytes))) == 9
    assert plan_tiles(vae, tuple(z.shape), plan.peak_bytes - 1, z.dtype).strategy.by_layer
    with pytest.raises(ValueError, match=rf"budget must be at least {plan.peak_bytes} bytes"):
        decode(vae, z.repeat(1, 1, 3, 1, 1), memory_budget=plan.peak_bytes - 1)  # too many steps to record


def test_layers_stream_where_the_models_own_steps_do_not_fit():
    vae = build("cogvideox", is_patched=False)
    z = torch.randn(1, 4, 4, 12, 12, generator=torch.Generator().manual_seed(0))
    budget = plan_tiles(vae, tuple(z.shape), "1GiB", z.dtype).peak_bytes // 3
    plan = plan_tiles(vae, tuple(z.shape), budget, z.dtype)
    assert plan.strategy.by_layer
    assert "streaming: layer by layer" in str(plan)
    expected = whole(decoder_of(vae), z)
    vae.double()
    truth = whole(decoder_of(vae), z.double())
    vae.float()
    seen = []
    chunks = decode(vae, z, plan=plan, progress=lambda *counts: seen.append(counts))
    assert_accurate(gather(chunks), expected, truth, "cogvideox")
    assert seen[-1] == (expected.shape[2],) * 2


# What is alive at once, as a share of that in the model's own steps: the frames that convolutions keep stay in memory
# unless they are spilled, and of Wan's four frames, here two, that is the most.
@pytest.mark.parametrize(
    ("name", "spill", "share", "counts"),
    [
        ("cogvideox", "device", 0.8, (3,)),
        ("cogvideox", "file", 0.5, (3, 4)),
        ("wan", "device", 1.0, (5, 9)),
        ("wan", "file", 0.75, (3,)),
    ],
)
def test_layers_stream_from_step_to_step_in_memory_that_does_not_grow(name, spill, share, counts, monkeypatch):
    monkeypatch.setattr("opensora_kernels.vae.plan._LIBRARIES", 0)
    vae = build(name)
    strategy, peaks = Streaming(Fraction(1, 4), spill, by_layer=True), []
    for num_steps in counts:
        z = latents(name, 2 * num_steps + 1 if name == "cogvideox" else num_steps)
        own, _ = peak_of(decode(vae, z, plan=BY_FRAME))
        plan = plan_tiles(vae, tuple(z.shape), "1GiB", z.dtype, strategies=[strategy])
        peak, chunks = peak_of(decode(vae, z, plan=plan))
        assert peak <= min(share * own, plan.peak_bytes)
        assert not any("on the whole clip" in remark for remark in plan.remarks)
        peaks.append(peak)
        expected = whole(decoder_of(vae), z)
        if name == "wan":
            assert torch.equal(gather(chunks), expected)
        elif num_steps == 3:
            truth = whole(decoder_of(build(name, is_patched=False).double()), z.double())
            assert_accurate(gather(chunks), expected, truth, name)
    assert peaks[-1] <= 1.05 * peaks[-2:][0]  # there are more latents


def test_an_encoder_streams_from_step_to_step_too():
    encoder = encoder_of(build("wan"))
    x = torch.rand(1, 3, 13, 16, 16, generator=torch.Generator().manual_seed(0))
    own, chunks = peak_of(encode(encoder, x, plan=BY_FRAME))
    peak, streamed = peak_of(encode(encoder, x, plan=TilePlan(Streaming(1, by_layer=True))))
    assert peak <= 0.8 * own
    torch.testing.assert_close(gather(streamed), gather(chunks))  # fewer frames at once are summed in another order


def test_a_plan_counts_the_steps_that_a_patched_decoder_takes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("opensora_kernels.vae.plan._LIBRARIES", 0)
    levels = {"dim_mult": [1, 1, 1, 1], "temperal_downsample": [False, True, True]}
    vae = replace(FAMILIES["wan"], arguments=FAMILIES["wan"].arguments | levels).build().requires_grad_(False)
    apply_opensora_kernels(vae)
    shape = (1, 4, 4, 16, 16)

    with frame_by_frame():
        planned = plan_tiles(vae, shape, "1GiB", torch.float32, strategies=[Streaming(1)]).peak_bytes
        loop, state = decoder_of(vae.to("meta")), None
        with torch.no_grad(), Ledger(torch.device("cpu")) as ledger:
            for _ in range(shape[2]):
                made, state = loop.step(torch.empty(1, 4, 1, 16, 16, device="meta"), state)
                del made
    assert 0.95 < planned / ledger.peak < 1.1


def test_a_clip_of_many_steps_is_not_recorded_to_plan_it():
    vae, shape = build("wan", is_patched=False), (1, 4, 40, 3, 4)
    with pytest.raises(ValueError, match="budget must be at least") as refused:
        plan_tiles(vae, shape, 1000, torch.float32)
    assert "layer by layer" not in str(refused.value)


@pytest.mark.parametrize("plan", [None, BY_FRAME, TilePlan(Streaming(1, by_layer=True))], ids=str)
@pytest.mark.parametrize(("name", "valid"), [("wan", "1, 5, 9, 13, 17"), ("magvit", "1, 5, 9, 13, 17")])
def test_frames_that_an_encoder_would_leave_out_are_refused_with_the_counts_that_it_takes(name, valid, plan):
    message = rf"encode: x must have a shape that the model takes \(frames near 8: {valid}\), got \(1, 3, 8, 16, 16\)"
    with pytest.raises(ValueError, match=message):
        encode(build(name), torch.zeros(1, 3, 8, 16, 16), plan=plan)


def test_planning_draws_no_random_numbers():
    vae = build("ltx_0.9.5")
    decoder, z = decoder_of(vae, **options_of(vae)), latents("ltx_0.9.5", 4)
    before = torch.get_rng_state()
    plan_tiles(decoder, tuple(z.shape), "1GiB", torch.float32)
    for plan in (None, BY_FRAME):
        decode(decoder, z, plan=plan)
    assert torch.equal(torch.get_rng_state(), before)


def test_weights_without_data_are_enough_to_plan():
    vae = build("wan")
    plan = plan_tiles(vae, (1, 4, 5, 3, 4), "1GiB", torch.float32)
    assert plan_tiles(vae.to("meta"), (1, 4, 5, 3, 4), "1GiB", torch.float32) == plan


def test_tiling_of_a_model_that_steps_by_itself_stands_against_streaming():
    vae = build("wan")
    vae.enable_tiling()
    with pytest.raises(ValueError, match=r"tiling of AutoencoderKLWan must be off.* disable_tiling\(\)"):
        decode(vae, latents("wan", 3), plan=BY_FRAME)


@pytest.mark.parametrize("is_framewise", [True, False])
def test_tiles_that_cannot_be_recorded_name_what_to_switch_off(is_framewise: bool):
    vae, z, x = build("hunyuan_video"), torch.randn(1, 4, 5, 3, 1), torch.rand(1, 3, 17, 24, 8)
    vae.use_framewise_decoding = vae.use_framewise_encoding = is_framewise
    vae.enable_tiling(16, 16, 16, 8, 8, 12)
    for run in (
        lambda: plan_tiles(vae, tuple(z.shape), "10GiB", z.dtype),
        lambda: decode(vae, z, plan=TilePlan(Streaming(by_layer=True))),
        lambda: encode(vae, x, memory_budget="10GiB"),
        *([] if is_framewise else [lambda: decode(vae, z, plan=BY_FRAME)]),
    ):
        with pytest.raises(
            TypeError, match=r"tiling of AutoencoderKLHunyuanVideo must be off.* disable_tiling\(\).*=True"
        ):
            run()


def test_windows_of_a_model_are_tiled_as_it_does():
    vae, z = build("hunyuan_video"), latents("hunyuan_video", 9)
    vae.enable_tiling(tile_sample_min_height=16, tile_sample_min_width=16)
    vae.tile_sample_stride_height = vae.tile_sample_stride_width = 8
    chunks = list(decode(vae, z, plan=BY_FRAME))
    assert len(chunks) == 3
    assert torch.equal(gather(chunks), whole(lambda z: vae.decode(z).sample, z))
    vae.disable_tiling()
    assert not torch.equal(gather(chunks), whole(lambda z: vae.decode(z).sample, z))


def test_qwen_image_2_1_takes_single_images_and_keeps_its_numbers():
    diffusers = pytest.importorskip("diffusers")
    if not hasattr(diffusers, "AutoencoderKLQwenImage21"):
        pytest.skip("this diffusers has no AutoencoderKLQwenImage21")
    torch.manual_seed(0)
    sizes = {"base_dim": 8, "decoder_base_dim": 8, "z_dim": 4, "dim_mult": [1, 2, 2], "num_res_blocks": 1}
    sizes |= {"temperal_downsample": [False, True], "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    vae = diffusers.AutoencoderKLQwenImage21(**sizes, scale_factor_spatial=4).eval().requires_grad_(False)
    z = torch.randn(1, 4, 1, 4, 4)
    before, truth = whole(decoder_of(vae), z), whole(decoder_of(copy.deepcopy(vae).double()), z.double())
    assert apply_opensora_kernels(vae).replaced
    after = whole(decoder_of(vae), z)
    assert_accurate(after, before, truth, "qwen_image_2.1")
    assert torch.equal(gather(decode(vae, z, plan=BY_FRAME)), after)
    with pytest.raises(ValueError, match=r"decode: z must have a shape that the model takes \(frames near 2: 1\)"):
        decode(vae, torch.randn(1, 4, 2, 4, 4), plan=BY_FRAME)


def test_latents_that_do_not_fit_are_refused_before_any_frame():
    with pytest.raises(ValueError, match=r"decode: z must have a shape that the model takes \(channels: 4\)"):
        decode(build("wan"), torch.zeros(1, 5, 3, 4, 4), plan=BY_FRAME)
    with pytest.raises(TypeError, match="decoder_of: vae must be an autoencoder of diffusers, got Linear"):
        decoder_of(nn.Linear(2, 2))


def test_hooks_that_bring_weights_to_a_device_run_before_each_step():
    vae, seen = build("wan"), []

    class Hook:
        def pre_forward(self, module: nn.Module) -> None:
            seen.append(module)

    vae._hf_hook = Hook()
    list(decode(vae, latents("wan", 3), plan=BY_FRAME))
    assert len(seen) >= 3
    assert all(module is vae for module in seen)


def test_tiles_take_the_steps_of_a_model_that_has_its_own():
    vae, z = build("wan"), latents("wan", 5)
    one_tile = Tiling((3, 4), (3, 4), (0, 0), (1000, 1000), window=5)
    assert torch.equal(gather(decode(vae, z, plan=TilePlan(Tiled(one_tile)))), whole(lambda z: vae.decode(z).sample, z))
    z = torch.randn(1, 4, 5, 24, 24)
    plan = plan_tiles(
        vae, z.shape, "1GiB", torch.float32, strategies=[Tiled(Tiling((12, 24), (8, 24), (8, 0), (16, 48)))]
    )
    assert plan.peak_bytes < plan_tiles(vae, z.shape, "1GiB", torch.float32).peak_bytes
    assert gather(decode(vae, z, plan=plan)).shape == vae.decode(z).sample.shape
