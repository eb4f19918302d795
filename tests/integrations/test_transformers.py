"""Video transformers of diffusers on this package's attention, rotation and modulation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from opensora_kernels import apply_opensora_kernels
from tests.ops.accuracy import assert_accurate

diffusers = pytest.importorskip("diffusers", reason="the models are those of diffusers")

_HEADS = {"num_attention_heads": 2, "in_channels": 4, "out_channels": 4}
ARGUMENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "wan": (
        "WanTransformer3DModel",
        _HEADS | {"attention_head_dim": 12, "text_dim": 16, "freq_dim": 16, "ffn_dim": 32, "num_layers": 2}
        | {"patch_size": (1, 2, 2), "cross_attn_norm": True, "rope_max_seq_len": 32},
    ),
    "hunyuan_video": (
        "HunyuanVideoTransformer3DModel",
        _HEADS | {"attention_head_dim": 10, "num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1}
        | {"patch_size": 1, "text_embed_dim": 16, "pooled_projection_dim": 8, "rope_axes_dim": (2, 4, 4)},
    ),
    "cogvideox": (
        "CogVideoXTransformer3DModel",
        _HEADS | {"attention_head_dim": 16, "time_embed_dim": 8, "text_embed_dim": 16, "num_layers": 1}
        | {"sample_width": 8, "sample_height": 8, "sample_frames": 9, "max_text_seq_length": 8},
    ),
    "ltx": (
        "LTXVideoTransformer3DModel",
        _HEADS | {"attention_head_dim": 16, "cross_attention_dim": 32, "num_layers": 1, "caption_channels": 16},
    ),
    "mochi": (
        "MochiTransformer3DModel",
        {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "pooled_projection_dim": 16}
        | {"in_channels": 4, "text_embed_dim": 16, "time_embed_dim": 4, "max_sequence_length": 16},
    ),
}  # fmt: skip
WANTED = {
    "wan": {"WanAttention", "WanTransformerBlock"},
    "hunyuan_video": {"Attention", "AdaLayerNormZero", "AdaLayerNormZeroSingle", "AdaLayerNormContinuous"},
    "cogvideox": {"CogVideoXLayerNormZero"},
    "ltx": {"LTXAttention"},
    "mochi": {"AdaLayerNormContinuous"},
}


def build(name: str) -> nn.Module:
    model, arguments = ARGUMENTS[name]
    torch.manual_seed(0)
    return getattr(diffusers, model)(**arguments).eval()


def run(model: nn.Module, name: str, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    options: dict[str, Any] = {"timestep": torch.tensor([500])}
    if name == "ltx":
        options |= {"hidden_states": noise(1, 32, 4), "num_frames": 2, "height": 4, "width": 4}
    elif name == "cogvideox":
        options |= {"hidden_states": noise(1, 3, 4, 8, 8)}
    else:
        options |= {"hidden_states": noise(1, 4, 2, 8, 8)}
    options["encoder_hidden_states"] = noise(1, 16 if name == "mochi" else 8, 16)
    if name in ("ltx", "mochi", "hunyuan_video"):
        options["encoder_attention_mask"] = torch.ones(options["encoder_hidden_states"].shape[:2])
    if name == "mochi":
        options["encoder_attention_mask"] = options["encoder_attention_mask"].bool()
    if name == "hunyuan_video":
        options |= {"pooled_projections": noise(1, 8), "guidance": torch.tensor([6000.0]).to(dtype)}
    return model(**options)[0]


@pytest.mark.parametrize("quality", ["lossless", "high"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_patched_transformer_predicts_the_same_noise(name: str, dtype: torch.dtype, quality: Any):
    with torch.no_grad():
        true = run(build(name).double(), name, torch.float64)
        model = build(name).to(dtype)
        before = run(model, name, dtype)
        report = apply_opensora_kernels(model, quality=quality)
        after = run(model, name, dtype)
    assert {entry.module_type for entry in report.replaced} >= WANTED[name]
    assert_accurate(after, before, true, name)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_undo_gives_modules_and_processors_back(name: str):
    def attributes(model: nn.Module) -> list[dict[str, int]]:
        owners = [*model.modules(), *(m.processor for m in model.modules() if hasattr(m, "processor"))]
        return [{name: id(value) for name, value in owner.__dict__.items()} for owner in owners]

    model = build(name)
    before = attributes(model)
    report = apply_opensora_kernels(model)
    assert attributes(model) != before
    report.undo()
    assert attributes(model) == before


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_second_patch_changes_nothing(name: str):
    model = build(name)
    apply_opensora_kernels(model)
    second = apply_opensora_kernels(model)
    assert second.is_already_patched
    assert not second.replaced


@pytest.mark.parametrize("name", ["wan", "hunyuan_video"])
def test_gradients_reach_every_parameter_as_before(name: str):
    def gradients(model: nn.Module, dtype: torch.dtype) -> Tensor:
        run(model.to(dtype), name, dtype).square().mean().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    plain, true, model = gradients(build(name), torch.float32), gradients(build(name), torch.float64), build(name)
    apply_opensora_kernels(model)
    assert_accurate(gradients(model, torch.float32), plain, true, name)


def test_another_processor_takes_over_again():
    model = build("wan")
    apply_opensora_kernels(model)
    seen = []

    class Processor:
        def __call__(self, attn: nn.Module, hidden_states: Tensor, *others: Any) -> Tensor:
            seen.append(attn)
            return hidden_states

    model.blocks[0].attn1.set_processor(Processor())
    with torch.no_grad():
        run(model, "wan", torch.float32)
    assert seen


def test_the_attention_backend_can_be_chosen_by_name():
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    import opensora_kernels.integrations.diffusers_transformers as ours

    member = ours.register_attention_backend()
    assert ours.register_attention_backend() is member
    q, k, v = torch.randn(3, 2, 7, 2, 8)

    def attend(**options: Any) -> Callable[[str], Tensor]:
        return lambda backend: dispatch_attention_fn(q, k, v, backend=backend, **options)

    mask = torch.ones(2, 1, 7, 7).bool().tril()
    for options in ({}, {"scale": 0.3}, {"attn_mask": mask}, {"is_causal": True}):
        found = attend(**options)
        torch.testing.assert_close(found("opensora_kernels"), found("native"))
