"""Causal video VAEs of diffusers compute the same after `apply_opensora_kernels`, and are themselves after undo."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bench.families import FAMILIES, decode, encode
from opensora_kernels import apply_opensora_kernels, cpu_steps
from opensora_kernels.vae.memory import Ledger
from tests.ops.accuracy import assert_accurate

pytest.importorskip("diffusers", reason="the models are those of diffusers")

DTYPES = [torch.float32, torch.bfloat16]
DECODED_BY_STEPS = [name for name, family in FAMILIES.items() if not family.is_noisy]
WITH_TILES = [name for name, family in FAMILIES.items() if family.tile]


@pytest.fixture(scope="module")
def truths() -> dict[str, tuple[Tensor, Tensor]]:
    """Latents and frames of the unpatched models in fp64, computed once for all dtypes."""
    return {}


def truth_of(truths: dict[str, tuple[Tensor, Tensor]], name: str) -> tuple[Tensor, Tensor]:
    if name not in truths:
        vae = FAMILIES[name].build().double()
        with torch.no_grad():
            z = encode(vae, FAMILIES[name].frames().double())
            truths[name] = (z, decode(vae, z))
    return truths[name]


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_patched_vae_encodes_and_decodes_as_before(name: str, dtype: torch.dtype, truths: Any):
    family = FAMILIES[name]
    true_z, true_frames = truth_of(truths, name)
    vae, frames = family.build().to(dtype), family.frames().to(dtype)
    with torch.no_grad():
        z = true_z.to(dtype)
        # avg_pool3d of Cosmos' encoder has no bf16 on a CPU
        can_encode = name != "cosmos" or dtype is torch.float32
        before = encode(vae, frames) if can_encode else true_z, decode(vae, z)
        apply_opensora_kernels(vae)
        after = encode(vae, frames) if can_encode else true_z, decode(vae, z)
    assert_accurate(after[0], before[0], true_z, f"{name} encode", is_chain=True)
    if not family.is_noisy:
        assert_accurate(after[1], before[1], true_frames, f"{name} decode", is_chain=True)
    else:  # the noise itself differs between dtypes
        torch.testing.assert_close(after[1], before[1])


@pytest.mark.parametrize("name", DECODED_BY_STEPS)
def test_steps_of_single_frames_decode_the_same(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cpu_steps, "STEP_BYTES", 1)
    family = FAMILIES[name]
    vae = family.build()
    with torch.no_grad():
        z = encode(vae, family.frames())
        given, before = z.clone(), decode(vae, z)
        apply_opensora_kernels(vae)
        after, again = decode(vae, z), decode(vae, z)
    assert torch.equal(z, given)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4 * before.abs().max().item())
    assert torch.equal(after, again)


@pytest.mark.parametrize("has_gradients", [False, True])
@pytest.mark.parametrize("name", ["wan", "wan_2.2", "qwen_image"])
def test_autocast_takes_a_cached_first_frame_as_it_takes_the_next(name: str, has_gradients: bool):
    vae, frames = FAMILIES[name].build(), FAMILIES[name].frames()
    plain = copy.deepcopy(vae)
    true_z = encode(plain.double(), frames.double())
    true_frames = decode(plain, true_z)
    plain.float()
    apply_opensora_kernels(vae)
    with torch.set_grad_enabled(has_gradients), torch.autocast("cpu", torch.bfloat16):
        z, before = encode(plain, frames), decode(plain, true_z.float())
        after_z, after = encode(vae, frames), decode(vae, true_z.float())
    assert (after_z.dtype, after.dtype) == (z.dtype, before.dtype)
    assert_accurate(after_z, z, true_z, f"{name} encode", is_chain=True)
    assert_accurate(after, before, true_frames, f"{name} decode", is_chain=True)


@pytest.mark.parametrize("name", ["wan", "wan_2.2", "qwen_image"])
def test_steps_hold_less_of_the_last_levels(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cpu_steps, "STEP_BYTES", 1)
    levels = {"dim_mult": [1, 1, 1, 1], "temperal_downsample": [False, True, True]}
    vae = replace(FAMILIES[name], arguments=FAMILIES[name].arguments | levels).build()
    apply_opensora_kernels(vae)
    vae.to("meta")

    def peak() -> int:
        with torch.no_grad(), Ledger(torch.device("cpu")) as ledger:
            decode(vae, torch.empty(1, vae.config.z_dim, 3, 16, 16, device="meta"))
        return ledger.peak

    in_steps = peak()
    del vae.decoder.forward
    assert in_steps < 0.9 * peak()


@pytest.mark.parametrize("name", ["wan", "qwen_image"])
def test_a_decoder_with_caches_compiles_to_one_graph(name: str):
    vae, z = FAMILIES[name].build(), torch.randn(1, 4, 1, 3, 4)
    apply_opensora_kernels(vae)
    num_places = sum(1 for _ in vae.decoder.modules())

    def first_frame(z: Tensor) -> Tensor:
        return vae.decoder(z, [None] * num_places, [0])

    with torch.no_grad():
        found = torch.compile(first_frame, backend="eager", fullgraph=True)(z)
        torch.testing.assert_close(found, first_frame(z), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["wan", "qwen_image"])
def test_an_image_is_not_convolved_with_the_zeros_before_it(name: str):
    vae = FAMILIES[name].build().bfloat16()
    z = torch.randn(1, vae.config.z_dim, 1, 8, 8, dtype=torch.bfloat16)

    def operations() -> int:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            decode(vae, z)
        return counter.get_total_flops()

    theirs = operations()
    apply_opensora_kernels(vae)
    assert operations() < 0.5 * theirs  # a third, and the convolutions of frames alone


@pytest.mark.parametrize("name", WITH_TILES)
def test_its_own_tiling_and_slicing_keep_working(name: str):
    family = FAMILIES[name]
    vae, frames = family.build(), family.frames(batch_size=2 if name == "wan" else 1)
    vae.enable_tiling(tile_sample_min_height=family.tile, tile_sample_min_width=family.tile)
    wanted = {"tile_sample_stride_height": family.stride, "tile_sample_stride_width": family.stride}
    wanted |= {"tile_overlap_factor_height": 1 / 3, "tile_overlap_factor_width": 1 / 3, "tile_overlap_factor": 0.5}
    for attribute, value in wanted.items():
        if hasattr(vae, attribute):
            setattr(vae, attribute, value)
    if hasattr(vae, "enable_slicing"):
        vae.enable_slicing()
    with torch.no_grad():
        z = encode(vae, frames)
        before = decode(vae, z)
        apply_opensora_kernels(vae)
        after_z, after = encode(vae, frames), decode(vae, z)
    torch.testing.assert_close(after_z, z, rtol=1e-4, atol=1e-4 * z.abs().max().item())
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4 * before.abs().max().item())


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_are_those_of_the_unpatched_model(name: str):
    family = FAMILIES[name]
    with torch.no_grad():
        z = torch.randn_like(encode(family.build(), family.frames()))
        z = z if name == "minimax_h3" else z[:, :, :4] if name == "allegro" else z[:, :, :2]  # the fewest they decode

    def gradients(vae: nn.Module, z: Tensor) -> dict[str, Tensor]:
        vae.requires_grad_(True)
        z = z.clone().requires_grad_(True)
        decode(vae, z).square().mean().backward()
        found = {parameter: value.grad for parameter, value in vae.named_parameters() if value.grad is not None}
        return found | {"z": z.grad}

    plain, vae = gradients(family.build(), z), family.build()
    apply_opensora_kernels(vae)
    patched = gradients(vae, z)
    assert patched.keys() == plain.keys()
    if family.is_noisy:
        return
    true = gradients(family.build().double(), z.double())
    # A bias of keys moves all scores of a query alike: its true gradient is zero, and what is found is rounding.
    largest = max(gradient.abs().max() for gradient in true.values())
    nothing = {parameter for parameter, gradient in true.items() if gradient.abs().max() < 1e-12 * largest}
    assert all(patched[parameter].abs().max() < 1e-6 * largest for parameter in nothing)
    # one vector for the model, every parameter at its own scale: of a hundred small ones some are lucky in PyTorch.
    # Those of queries and keys whose scores are almost alike are what is left of larger numbers that cancel.
    scales = {parameter: true[parameter].abs().max().clamp(min=1e-3 * largest) for parameter in true.keys() - nothing}

    def joined(found: dict[str, Tensor]) -> Tensor:
        return torch.cat([(found[name] / scale.to(found[name])).flatten() for name, scale in scales.items()])

    assert_accurate(joined(patched), joined(plain), joined(true), name)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_causal_convolution_is_replaced_and_every_module_is_in_the_report(name: str):
    vae = FAMILIES[name].build()
    report = apply_opensora_kernels(vae)
    assert [entry.name for entry in report.entries] == [name for name, _ in vae.named_modules()]
    modules = dict(vae.named_modules())
    for entry in report.left:
        assert entry.reason
        is_convolution = entry.module_type.endswith("CausalConv3d") or (
            isinstance(modules[entry.name], nn.Conv3d) and max(modules[entry.name].kernel_size) > 1
        )
        assert not is_convolution or "either end of the clip" in entry.reason, str(entry)
    assert any("causal_conv3d" in operator for entry in report.replaced for operator in entry.operators)
    assert f"{len(report.replaced)} modules replaced" in str(report)


@pytest.mark.parametrize("name", FAMILIES)
def test_undo_leaves_nothing_behind(name: str):
    vae = FAMILIES[name].build()
    keys, attributes = list(vae.state_dict()), _attributes(vae)
    parameters = {name: id(parameter) for name, parameter in vae.named_parameters()}
    report = apply_opensora_kernels(vae)
    assert list(vae.state_dict()) == keys
    assert {name: id(parameter) for name, parameter in vae.named_parameters()} == parameters
    assert _attributes(vae) != attributes
    report.undo()
    assert _attributes(vae) == attributes
    report.undo()
    assert _attributes(vae) == attributes


def _attributes(model: nn.Module) -> dict[str, dict[str, int]]:
    return {
        name: {attribute: id(value) for attribute, value in module.__dict__.items()}
        for name, module in model.named_modules()
    }


def test_a_second_patch_changes_nothing_and_says_so():
    vae = FAMILIES["wan"].build()
    first = apply_opensora_kernels(vae)
    attributes = _attributes(vae)
    second = apply_opensora_kernels(vae)
    assert second.is_already_patched
    assert "already patched" in str(second)
    second.undo()
    assert _attributes(vae) == attributes
    first.undo()
    assert not apply_opensora_kernels(vae).is_already_patched


def test_other_models_of_the_class_are_not_touched():
    vae, other = FAMILIES["cogvideox"].build(), FAMILIES["cogvideox"].build()
    attributes = _attributes(other)
    apply_opensora_kernels(vae)
    assert _attributes(other) == attributes
    assert not any("forward" in module.__dict__ for module in FAMILIES["cogvideox"].build().modules())


def test_a_copy_of_a_patched_model_runs_on_its_own_weights():
    vae = FAMILIES["wan"].build()
    apply_opensora_kernels(vae)
    twin = copy.deepcopy(vae)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
        assert decode(twin, torch.ones(1, 4, 2, 4, 4)).abs().max() == 0
        assert decode(vae, torch.ones(1, 4, 2, 4, 4)).abs().max() > 0


def test_hooked_and_replaced_modules_are_left_alone():
    vae = FAMILIES["hunyuan_video"].build()
    seen = []
    vae.decoder.mid_block.resnets[0].norm1.register_forward_hook(lambda *values: seen.append(1))
    own = vae.decoder.conv_in.forward
    vae.decoder.conv_in.forward = own
    report = apply_opensora_kernels(vae)
    reasons = {entry.name: entry.reason for entry in report.left}
    assert "hooks" in reasons["decoder.mid_block.resnets.0"]
    assert "somebody else" in reasons["decoder.conv_in"]
    with torch.no_grad():
        decode(vae, torch.randn(1, 4, 1, 4, 4))
    assert seen
    report.undo()
    assert vae.decoder.conv_in.__dict__["forward"] is own


def test_a_module_that_only_looks_alike_is_left_alone():
    class Shifted(nn.Conv3d):
        """Wan's attributes, but the frames behind are zeros as well."""

        _padding = (1, 1, 1, 1, 2, 0)

        def forward(self, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
            return super().forward(nn.functional.pad(x, (1, 1, 1, 1, 1, 1)))

    report = apply_opensora_kernels(nn.Sequential(Shifted(2, 2, 3)))
    assert not report.replaced
    assert "small input" in str(report)


@pytest.mark.parametrize("name", ["wan", "cogvideox", "hunyuan_video", "ltx"])
def test_a_patched_decoder_compiles_into_one_graph(name: str):
    vae = FAMILIES[name].build().requires_grad_(False)
    apply_opensora_kernels(vae)
    block = vae.decoder.mid_block.resnets[0]
    x = torch.randn(1, next(block.conv1.parameters()).shape[1], 3, 4, 4)
    options = {"zq": torch.randn(1, 4, 3, 4, 4)} if name == "cogvideox" else {}
    torch._dynamo.reset()
    with torch.no_grad():
        eager = block(x, **options)
        compiled = torch.compile(block, backend="eager", fullgraph=True)(x, **options)
    torch.testing.assert_close(compiled, eager)


def test_dropout_stands_between_norm_and_convolution_in_training():
    vae = FAMILIES["wan"].build()
    block = vae.decoder.mid_block.resnets[0]
    block.dropout.p = 0.5
    x = torch.randn(1, block.in_dim, 3, 4, 4)

    def run() -> Tensor:
        torch.manual_seed(5)
        return block.train()(x)

    before = run()
    apply_opensora_kernels(vae)
    torch.testing.assert_close(run(), before)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [(("vae",), {}, "model must be a torch.nn.Module"), ((nn.ReLU(),), {"quality": "best"}, "quality")],
)
def test_bad_input_is_named(arguments: Any, options: Any, message: str):
    with pytest.raises((TypeError, ValueError), match=message):
        apply_opensora_kernels(*arguments, **options)
