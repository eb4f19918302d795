"""What is patched was compared, what was patched can be saved, and undo takes back what a patch put there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.families import FAMILIES, decode, encode
from opensora_kernels import apply_opensora_kernels, causal_conv3d, cpu_convolution, cpu_steps, upsample_conv3d
from opensora_kernels.integrations.comparison import likeness
from opensora_kernels.integrations.recipes import recipe_of
from opensora_kernels.integrations.report import is_patched

pytest.importorskip("diffusers", reason="the models are those of diffusers")
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanCausalConv3d,
    WanDecoder3d,
    WanResidualBlock,
    WanRMS_norm,
    WanUpBlock,
)


class ByAttribute(WanResidualBlock):
    def __init__(self, change: float) -> None:
        super().__init__(4, 4)
        self.res_scale = change

    def forward(self, x: Tensor, *cache: Any) -> Tensor:
        return super().forward(x, *cache) * self.res_scale


class ByBuffer(WanResidualBlock):
    def __init__(self, change: float) -> None:
        super().__init__(4, 4)
        self.register_buffer("gate", torch.tensor(change))

    def forward(self, x: Tensor, *cache: Any) -> Tensor:
        return super().forward(x, *cache) * self.gate


class ByFunction(WanResidualBlock):
    def __init__(self, change: float) -> None:
        super().__init__(4, 4)
        self.act = torch.clone if change == 1 else torch.tanh

    def forward(self, x: Tensor, *cache: Any) -> Tensor:
        return self.act(super().forward(x, *cache))


class ByParameter(WanResidualBlock):
    """The factor begins as 0, where nothing shows what it is for."""

    def __init__(self, change: float) -> None:
        super().__init__(4, 4)
        self.alpha = nn.Parameter(torch.tensor(0.0))

    def forward(self, x: Tensor, *cache: Any) -> Tensor:
        return super().forward(x, *cache) + self.alpha * x


class Loud(WanRMS_norm):
    def forward(self, x: Tensor, *cache: Any) -> Tensor:
        return super().forward(x, *cache) * 2


class AcrossFrames(WanUpBlock):
    def forward(self, x: Tensor, *cache: Any, **options: Any) -> Tensor:
        x = super().forward(x, *cache, **options)
        return x + x.mean(2, keepdim=True)


class OfAnyArguments(WanDecoder3d):
    def forward(self, *args: Any, **options: Any) -> Tensor:
        return super().forward(*args, **options)


@pytest.mark.parametrize("block", [ByAttribute, ByBuffer, ByFunction])
def test_of_two_modules_of_a_class_the_one_that_computes_something_else_is_left_alone(block: type[nn.Module]):
    torch.manual_seed(0)
    model, x = nn.Sequential(block(1.0), block(0.5)), torch.randn(1, 4, 3, 5, 5)
    with torch.no_grad():
        before = model(x)
        report = apply_opensora_kernels(model)
        torch.testing.assert_close(model(x), before)
    assert is_patched(model[0])
    assert not is_patched(model[1])
    assert "small input" in next(entry.reason for entry in report.entries if entry.name == "1")


def test_a_parameter_that_begins_as_zero_hides_nothing_and_stays_itself():
    model = nn.Sequential(ByParameter(0.0))
    parameters = {name: (id(value), value.clone()) for name, value in model.named_parameters()}
    apply_opensora_kernels(model)
    assert not is_patched(model[0])
    for name, value in model.named_parameters():
        assert id(value) == parameters[name][0]
        assert torch.equal(value, parameters[name][1])


@pytest.mark.parametrize("change", ["buffer", "attribute", "hook"])
def test_modules_are_only_alike_if_nothing_but_their_size_differs(change: str):
    small, large, other = WanResidualBlock(4, 4), WanResidualBlock(8, 8), WanResidualBlock(4, 4)
    if change == "buffer":
        small.register_buffer("table", torch.zeros(2))
        large.register_buffer("table", torch.zeros(2))
        other.register_buffer("table", torch.ones(2))
    elif change == "attribute":
        other.dropout.like = torch.tanh
    else:
        other.conv_shortcut.register_forward_hook(lambda *values: None)
    recipe = recipe_of(small)
    assert likeness(small, recipe) == likeness(large, recipe) != likeness(other, recipe)
    assert likeness(ByAttribute(1.0), recipe) is None


def test_a_norm_of_another_class_at_the_end_of_a_decoder_keeps_its_forward():
    vae = FAMILIES["wan"].build()
    norm = vae.decoder.norm_out
    vae.decoder.norm_out = Loud(norm.gamma.numel(), images=False)
    z = torch.randn(1, 4, 2, 4, 4)
    with torch.no_grad():
        before = decode(vae, z)
        apply_opensora_kernels(vae)
        torch.testing.assert_close(decode(vae, z), before, rtol=1e-4, atol=1e-4)
    assert not is_patched(vae.decoder.norm_out)


def test_a_norm_of_the_last_axis_at_the_end_of_a_decoder_runs_a_few_frames_at_a_time(monkeypatch: pytest.MonkeyPatch):
    vae = FAMILIES["ltx"].build()
    norm = vae.decoder.norm_out
    x = torch.randn(2, 8, 5, 4, 6).movedim(1, -1)
    expected = norm(x)
    apply_opensora_kernels(vae)
    assert is_patched(norm)
    monkeypatch.setattr(cpu_steps, "STEP_BYTES", 2 * x[:, 0].nbytes)
    with torch.no_grad():
        found = norm(x)
    torch.testing.assert_close(found, expected)
    assert found.stride() == x.stride()  # frames stay behind one another, as the convolution wants them


def test_a_decoder_whose_last_level_looks_across_frames_is_not_taken_in_steps(monkeypatch: pytest.MonkeyPatch):
    vae, z = FAMILIES["wan"].build(), torch.randn(1, 4, 3, 4, 4)
    vae.decoder.up_blocks[-1].__class__ = AcrossFrames
    with torch.no_grad():
        before = decode(vae, z)
        apply_opensora_kernels(vae)
        monkeypatch.setattr(cpu_steps, "STEP_BYTES", 1)
        torch.testing.assert_close(decode(vae, z), before, rtol=1e-4, atol=1e-4)
    assert not is_patched(vae.decoder)


def test_a_decoder_that_leaves_other_caches_keeps_its_forward():
    vae, z = FAMILIES["wan"].build(), torch.randn(1, 4, 3, 4, 4)
    conv = vae.decoder.conv_out
    vae.decoder.conv_out = WanCausalConv3d(conv.in_channels, conv.out_channels, (1, 3, 3), padding=(0, 1, 1))
    with torch.no_grad():
        before = decode(vae, z)
        report = apply_opensora_kernels(vae)
        torch.testing.assert_close(decode(vae, z), before, rtol=1e-4, atol=1e-4)
    assert "caches" in next(entry.reason for entry in report.entries if entry.name == "decoder")


def test_a_decoder_that_hands_all_arguments_on_is_told_of_the_first_chunk():
    vae, z = FAMILIES["wan_2.2"].build(), torch.randn(1, 4, 3, 4, 4)
    vae.decoder.__class__ = OfAnyArguments
    with torch.no_grad():
        before = decode(vae, z)
        apply_opensora_kernels(vae)
        assert is_patched(vae.decoder)
        torch.testing.assert_close(decode(vae, z), before, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(decode(vae, z), before, rtol=1e-4, atol=1e-4)  # with gradients, by its own forward


@pytest.mark.parametrize("comes_later", [False, True])
@pytest.mark.parametrize("part", ["conv_in", "up_blocks.1", "up_blocks.1.resnets.0", "conv_out"])
def test_a_hook_inside_a_decoder_sees_whole_chunks(part: str, comes_later: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cpu_steps, "STEP_BYTES", 1)
    vae, z, seen = FAMILIES["wan"].build(), torch.randn(1, 4, 3, 4, 4), []
    if comes_later:
        apply_opensora_kernels(vae)
    vae.decoder.get_submodule(part).register_forward_hook(lambda module, inputs, out: seen.append(out.shape[2]))
    if not comes_later:
        report = apply_opensora_kernels(vae)
        assert not seen
        assert f"{part}: it has forward hooks" in next(e.reason for e in report.left if e.name == "decoder")
    with torch.no_grad():
        decode(vae, z)
    assert seen == ([1, 1, 1] if part == "conv_in" else [1, 2, 2])


def test_dropout_inside_a_decoder_draws_for_whole_chunks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cpu_steps, "STEP_BYTES", 1)
    vae, z = FAMILIES["wan"].build().train(), torch.randn(1, 4, 3, 4, 4)
    for block in vae.decoder.modules():
        if isinstance(block, WanResidualBlock):
            block.dropout.p = 0.5

    def run() -> Tensor:
        torch.manual_seed(5)
        with torch.no_grad():
            return decode(vae, z)

    before = run()
    apply_opensora_kernels(vae)
    torch.testing.assert_close(run(), before, rtol=1e-4, atol=1e-4)


def test_undo_leaves_what_others_put_on_top_and_names_the_module():
    vae = FAMILIES["hunyuan_video"].build()
    report = apply_opensora_kernels(vae)
    ours = vae.decoder.conv_in.forward

    def wrapped(*args: Any, **options: Any) -> Tensor:
        return ours(*args, **options)

    vae.decoder.conv_in.forward = wrapped
    with pytest.warns(UserWarning, match="forward of decoder.conv_in has been replaced"):
        report.undo()
    assert vae.decoder.conv_in.forward is wrapped
    assert [name for name, module in vae.named_modules() if "forward" in module.__dict__] == ["decoder.conv_in"]


def test_undo_leaves_an_attention_backend_that_was_chosen_since():
    from diffusers.models.attention_dispatch import AttentionBackendName

    model = _transformer()
    report = apply_opensora_kernels(model)
    processor = model.blocks[0].attn1.processor
    processor._attention_backend = AttentionBackendName.NATIVE
    with pytest.warns(UserWarning, match=r"_attention_backend of blocks\.0\.attn1"):
        report.undo()
    assert processor._attention_backend is AttentionBackendName.NATIVE


def test_a_patch_of_the_decoder_is_completed_by_one_of_the_model():
    vae, family = FAMILIES["wan"].build(), FAMILIES["wan"]
    everything = [entry.name for entry in apply_opensora_kernels(FAMILIES["wan"].build()).replaced]
    with torch.no_grad():
        before = decode(vae, encode(vae, family.frames()))
    first, second = apply_opensora_kernels(vae.decoder), apply_opensora_kernels(vae)
    assert not second.is_already_patched
    of_first = {f"decoder.{entry.name}".rstrip(".") for entry in first.replaced}
    assert of_first | {entry.name for entry in second.replaced} == set(everything)
    assert {entry.reason for entry in second.entries if entry.name in of_first} == {"already patched"}
    assert is_patched(vae.encoder.conv_in)
    with torch.no_grad():
        torch.testing.assert_close(decode(vae, encode(vae, family.frames())), before, rtol=1e-4, atol=1e-4)
    second.undo()
    assert not any(is_patched(module) for module in vae.encoder.modules())
    assert is_patched(vae.decoder.conv_in)
    first.undo()
    assert not any("forward" in module.__dict__ for module in vae.modules())


def test_a_part_that_was_patched_alone_does_not_keep_its_block_from_being_patched():
    vae = FAMILIES["hunyuan_video"].build()
    apply_opensora_kernels(vae.decoder.up_blocks[0].upsamplers[0].conv)
    apply_opensora_kernels(vae)
    assert is_patched(vae.decoder.up_blocks[0].upsamplers[0])


def test_a_patched_model_is_loaded_whole_by_another_process(tmp_path: Path):
    vae, transformer = FAMILIES["wan"].build(), _transformer()
    z = torch.randn(1, 4, 2, 4, 4)
    for model in (vae, transformer):
        apply_opensora_kernels(model)
    with torch.no_grad():
        torch.save([vae, transformer, z, decode(vae, z)], tmp_path / "models.pt")
    code = (
        "import sys, torch\n"
        "vae, transformer, z, expected = torch.load(sys.argv[1], weights_only=False)\n"
        "from opensora_kernels import apply_opensora_kernels\n"
        "with torch.no_grad():\n"
        "    torch.testing.assert_close(vae.decode(z).sample, expected, rtol=1e-4, atol=1e-4)\n"
        "    transformer(torch.randn(1, 4, 2, 8, 8), torch.tensor([5]), torch.randn(1, 8, 16))\n"
        "print([apply_opensora_kernels(model).is_already_patched for model in (vae, transformer)])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "models.pt")],
        capture_output=True, text=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.stdout.strip() == "[True, True]", done.stderr


@pytest.mark.parametrize("run", [causal_conv3d, upsample_conv3d])
@pytest.mark.parametrize("size", [(1, 8, 8), (3, 8, 8), (25, 64, 160)], ids=str)
@pytest.mark.parametrize("kernel", [(3, 3, 3), (1, 3, 3)], ids=str)
def test_an_fp32_clip_of_any_size_is_not_unfolded(run: Any, size: tuple[int, ...], kernel: tuple[int, ...]):
    x, weight = torch.randn(1, 8, *size), torch.randn(8, 8, *kernel)
    with torch.no_grad(), torch.profiler.profile() as profile:
        run(x, weight)
    names = {event.key for event in profile.key_averages()}
    assert "aten::mkldnn_convolution" in names
    assert not any("slow_conv" in name for name in names)


@pytest.mark.parametrize(
    ("num_channels", "size", "is_reordered"),
    [(1024, (1, 31, 33), False), (1024, (1, 32, 32), True), (512, (1, 4, 4), True)],
)
def test_weights_are_not_reordered_for_fewer_positions_than_outputs(
    num_channels: int, size: tuple[int, ...], is_reordered: bool
):
    weight = torch.empty(num_channels, num_channels, 3, 3, 3, device="meta")
    x = torch.empty(1, num_channels, *size, device="meta")
    assert cpu_convolution.is_for_onednn(x, weight, None) is is_reordered


def _transformer() -> nn.Module:
    from tests.integrations.test_transformers import build

    return build("wan")
