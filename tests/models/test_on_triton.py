"""The models run unchanged on Triton kernels: outputs and gradients of the reference, and the kernels really ran."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from opensora.config import LatteT2VConfig, STDiT2Config
from opensora.models.latte import LatteT2V
from opensora.models.stdit2 import STDiT2
from opensora.models.stdit3 import STDiT3
from opensora.vae import VideoVAE
from opensora_kernels import _triton, use
from tests.oracles.__main__ import load_adapters, replay
from tests.oracles.registry import Case
from tests.tiny_models import TRANSFORMER, VAE

RECORDED = Path(__file__).parents[1] / "oracles" / "data" / "open-sora"

pytestmark = pytest.mark.skipif(
    not _triton.is_interpreted(), reason="Triton kernels are not interpreted here (TRITON_INTERPRET=1)"
)


def outputs_and_gradients(model: nn.Module, run: Callable[[], Tensor]) -> tuple[Tensor, list[Tensor | None]]:
    output = run()
    cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return output, list(torch.autograd.grad(output, parameters, cotangent, allow_unused=True))


def assert_same_on_triton(model: nn.Module, run: Callable[[], Tensor]) -> set[str]:
    """Compare with the reference; returns the names of the kernels that ran."""
    ran: Counter[str] = Counter()

    def count(kernel: Any, *_: Any) -> None:
        ran[kernel.fn.__name__] += 1

    with use("reference"):
        expected, expected_gradients = outputs_and_gradients(model, run)
    with use("triton"), _triton.recorded_launches(count):
        actual, gradients = outputs_and_gradients(model, run)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    # fp32 sums over a few thousand terms in another order; some, such as a bias before a norm, cancel to nothing
    rounding = 1e-6 * max(float(want.abs().max()) for want in expected_gradients if want is not None)
    for have, want in zip(gradients, expected_gradients, strict=True):
        assert (have is None) == (want is None)
        if want is not None:
            torch.testing.assert_close(have, want, rtol=1e-3, atol=1e-4 * float(want.abs().max()) + rounding)
    return set(ran)


def transformer_run(model: STDiT2 | STDiT3, **sizes: Tensor) -> Callable[[], Tensor]:
    """A forward pass with captions of two lengths and a frame that is given clean, with every layer active."""
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    x_BCTHW = torch.randn(2, TRANSFORMER.in_channels, 3, 4, 4)
    captions = torch.randn(2, 1, TRANSFORMER.model_max_length, TRANSFORMER.caption_channels)
    caption_mask = torch.ones(2, TRANSFORMER.model_max_length, dtype=torch.long)
    caption_mask[1, 5:] = 0
    inputs = {
        "timestep": torch.tensor([200.0, 700.0]),
        "mask": caption_mask,
        "x_mask": torch.tensor([[False, True, True], [True, True, True]]),
        "fps": torch.tensor([8.0, 8.0]),
        "height": torch.tensor([16.0, 16.0]),
        "width": torch.tensor([16.0, 16.0]),
    }
    return lambda: model(x_BCTHW, y=captions, **inputs, **sizes)


def test_stdit2_with_conditioning_frames():
    torch.manual_seed(0)
    names = (
        "input_sq_size",
        "in_channels",
        "hidden_size",
        "depth",
        "num_heads",
        "caption_channels",
        "model_max_length",
    )
    sizes = {name: getattr(TRANSFORMER, name) for name in names}
    model = STDiT2(STDiT2Config(**sizes, qk_norm=True, qk_norm_legacy=True)).eval()
    # Equal weights would commute with the rotation and hide its order.
    nn.init.uniform_(model.blocks[0].attn_temp.q_norm.weight, 0.5, 2.0)
    run = transformer_run(model, num_frames=torch.tensor([3.0, 3.0]), ar=torch.tensor([1.0, 1.0]))
    ran = assert_same_on_triton(model, run)
    assert "_qk_norm_attention_backward_kernel" in ran


def test_stdit3_with_conditioning_frames():
    torch.manual_seed(0)
    model = STDiT3(TRANSFORMER).eval()
    ran = assert_same_on_triton(model, transformer_run(model))
    assert any("backward" in name for name in ran)


@pytest.mark.parametrize("changes", [{"use_rope": True}, {"compress_kv_factor": 2}], ids=["rope", "compressed"])
def test_latte_with_masks_and_images(changes: dict[str, Any]):
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "cross_attention_dim": 16, "num_layers": 1}
    model = LatteT2V(LatteT2VConfig(**sizes, caption_channels=8, video_length=2, sample_size=(8, 8), **changes)).train()
    mask = torch.ones(1, 3, 4, 4)
    mask[:, 0, 2:] = 0
    inputs = torch.randn(1, 4, 3, 4, 4), torch.tensor([500]), torch.randn(1, 2, 3, 8)
    ran = assert_same_on_triton(model, lambda: model(*inputs, attention_mask=mask, use_image_num=1))
    assert any("backward" in name for name in ran)


def test_video_vae():
    torch.manual_seed(0)
    vae = VideoVAE(VAE).eval()
    x_BCTHW = torch.randn(1, 3, 2, 4, 4)

    def run() -> Tensor:
        return vae.decode(vae.encode(x_BCTHW, sample_posterior=False), x_BCTHW.shape[2])

    ran = assert_same_on_triton(vae, run)
    assert any("backward" in name for name in ran)


@pytest.mark.parametrize(("case", "is_rope_first"), [("stdit2_xmask", True), ("stdit3_xmask", False)])
def test_recorded_answers_of_both_rotation_orders(case: str, is_rope_first: bool):
    load_adapters()
    ran: set[str] = set()
    rotations: list[bool] = []

    def note(kernel: Any, grid: Any, arguments: Any, options: dict[str, Any]) -> None:
        ran.add(kernel.fn.__name__)
        if options.get("HAS_ROPE"):
            rotations.append(options["IS_ROPE_FIRST"])

    with use("triton"), _triton.recorded_launches(note):
        results = list(replay(Case(RECORDED / case)))
    failures = [f"{tensor}: max abs {r.max_abs:.2e}, {r.reason}" for tensor, r in results if not r.is_pass]
    assert results
    assert not failures, "\n".join(failures)
    assert ran >= {f"_{op}_forward_kernel" for op in ("modulate", "gate_residual", "qk_norm_attention", "attention")}
    assert rotations == [is_rope_first] * 2  # the temporal attention of two layers
