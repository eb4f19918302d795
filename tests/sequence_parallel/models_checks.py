"""What every rank checks of the transformers: outputs and averaged gradients are those of one process.

Weights, inputs and random numbers come from seeds, the same on all ranks. Sites are fewer than ranks, as many as divide
and as many as don't; heads are three, which neither 2 nor 4 ranks share evenly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from opensora.config import LatteT2VConfig, STDiT2Config, STDiT3Config, STDiTConfig
from opensora.models import LatteT2V, STDiT, STDiT2, STDiT3
from opensora_kernels import SequenceShards
from tests.sequence_parallel.shards_checks import layouts
from tests.sequence_parallel.worlds import World

LIMIT = 1e-5  # of outputs and of gradients, in fp32, times the largest entry where that is more than 1
HEADS = 3
OF_ALL = {"hidden_size": 24, "depth": 2, "num_heads": HEADS, "in_channels": 3, "caption_channels": 8}
OF_ALL |= {"model_max_length": 5, "drop_path": 0.5, "class_dropout_prob": 0.5}
# (batch, frames, rows and columns of latents): 15 sites for 3 clips; 12 for one; an image of 6; a single site
SIZES = [(3, 2, 10, 6), (1, 3, 6, 8), (3, 1, 4, 6), (1, 2, 2, 2)]


def stdit3_is_that_of_one_process(world: World) -> None:
    _check_family(world, STDiT3(STDiT3Config(**OF_ALL, input_sq_size=64)))


def stdit2_is_that_of_one_process(world: World) -> None:
    _check_family(world, STDiT2(STDiT2Config(**OF_ALL, input_sq_size=64, qk_norm=True, qk_norm_legacy=True)))


def stdit_is_that_of_one_process(world: World) -> None:
    _check_family(world, STDiT(STDiTConfig(**OF_ALL, input_size=(2, 10, 6))))


def latte_is_that_of_one_process(world: World) -> None:
    for changes in ({"use_rope": True}, {"compress_kv_factor": 2}, {"version": "1.0"}):
        model = _latte(**changes)
        for inputs in _latte_inputs(model):
            model.set_gradient_checkpointing("attention_mask" in inputs)
            _assert_like_one_process(model, inputs, world)


def a_denoiser_serves_conditional_and_null_text(world: World) -> None:
    inputs = _inputs(3, 2, 10, 6)
    y, mask, x, timestep = (inputs.pop(name) for name in ("y", "mask", "x", "timestep"))
    y, x_mask = torch.cat([y, y.flip(0)]), inputs.pop("x_mask")
    stdit3 = _active(STDiT3(STDiT3Config(**OF_ALL, input_sq_size=64))).eval()
    latte = _latte(compress_kv_factor=2, video_length=2, in_channels=3).eval()
    for model, arguments in ((stdit3, inputs), (latte, {})):
        given = x_mask if model is stdit3 else None
        with torch.no_grad():
            expected = model.denoiser(y, mask, **arguments)(x, timestep, given)
            for sequence in layouts(world.num_ranks):
                found = model.denoiser(y, mask, sequence=sequence, **arguments)(x, timestep, given)
                assert_near(found, expected, "denoiser")


CHECKS: list[Callable[[World], None]] = [
    stdit3_is_that_of_one_process,
    stdit2_is_that_of_one_process,
    stdit_is_that_of_one_process,
    latte_is_that_of_one_process,
    a_denoiser_serves_conditional_and_null_text,
]


def _check_family(world: World, model: nn.Module) -> None:
    """Given frames, dropped captions and paths, with recomputation and without."""
    _active(model).train()
    for number, size in enumerate(SIZES):
        model.set_gradient_checkpointing(("full", "none", "selective", "full")[number])
        inputs = _inputs(*size)
        if number == 1:
            del inputs["x_mask"], inputs["mask"]
        _assert_like_one_process(model, inputs, world)


def _active(model: nn.Module) -> nn.Module:
    """With weights that upstream's initial zeros do not hide."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.ndim > 1:
                parameter.normal_(std=0.1)
    return model


def _latte(**changes: Any) -> LatteT2V:
    options = {"num_attention_heads": HEADS, "attention_head_dim": 8, "cross_attention_dim": 24, "num_layers": 2}
    options |= {"sample_size": (8, 8), "caption_channels": 8, "video_length": 3, "model_max_length": 5}
    return _active(LatteT2V(LatteT2VConfig(**{**options, **changes}))).train()


def _inputs(batch: int, frames: int, height: int, width: int) -> dict[str, Tensor]:
    torch.manual_seed(1)
    rows = torch.arange(batch)
    return {
        "x": torch.randn(batch, 3, frames, height, width),
        "timestep": torch.linspace(924.3, 100.0, batch),
        "y": torch.randn(batch, 1, 5, 8),
        "mask": (torch.arange(5) < (rows % 3 + 2)[:, None]).long(),
        "x_mask": (torch.arange(frames) + rows[:, None]) % 2 == 0,
        "num_frames": torch.full((batch,), 16.0),
        "height": torch.full((batch,), 8.0 * height),
        "width": torch.full((batch,), 8.0 * width),
        "ar": torch.full((batch,), height / width),
        "fps": torch.full((batch,), 24.0),
    }


def _latte_inputs(model: LatteT2V) -> Iterator[dict[str, Any]]:
    """Clips; clips with images and masks of both; a single image of fewer sites than ranks."""
    is_first = model.config.version == "1.0"
    torch.manual_seed(1)
    for batch, images, height, width in ((1, 0, 10, 6), (3, 0 if is_first else 2, 8, 6), (1, 0, 4, 4)):
        num_frames = 1 if height == 4 else 3
        x = torch.randn(batch, 4, num_frames + images, height, width)
        texts = (batch, 1 + images, 5) if images else (batch, 5)
        inputs: dict[str, Any] = {"hidden_states": x, "timestep": torch.arange(batch) * 300 + 7}
        inputs |= {"encoder_hidden_states": torch.randn(*texts, 8), "use_image_num": images}
        if batch == 3:
            inputs["encoder_attention_mask"] = (torch.rand(texts) < 0.7).long()
            inputs["attention_mask"] = _picture(x, is_first)
        yield inputs | {"enable_temporal_attentions": num_frames == 3}


def _picture(x: Tensor, is_of_patches: bool) -> Tensor:
    """Where there is picture and not padding: the upper left, of one frame none and of one all."""
    batch, _, frames, height, width = x.shape
    mask = torch.zeros(batch, frames, height, width)
    mask[:, :, : height - 3, : width - 2] = 1
    mask[0, 0], mask[1, 1] = 0, 1
    return mask[..., ::2, ::2].reshape(batch * frames, -1) if is_of_patches else mask


def _assert_like_one_process(model: nn.Module, inputs: dict[str, Any], world: World) -> None:
    expected = _output_and_gradients(model, inputs, None)
    for sequence in layouts(world.num_ranks):
        name = f"{type(model).__name__} {tuple(next(iter(inputs.values())).shape)} {sequence}"
        found = _output_and_gradients(model, inputs, sequence)
        assert_near(found[0], expected[0], f"{name}: output")
        assert_near(found[1], expected[1], f"{name}: gradient of x")
        average = torch.cat([x.flatten() for x in found[2].values()])
        dist.all_reduce(average)
        parts = (average / world.num_ranks).split([x.numel() for x in found[2].values()])
        for (key, true), part in zip(expected[2].items(), parts, strict=True):
            assert_near(part.view_as(true), true, f"{name}: gradient of {key}")


def _output_and_gradients(
    model: nn.Module, inputs: dict[str, Any], sequence: SequenceShards | None
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    first, *_ = inputs
    x = inputs[first].clone().requires_grad_()
    torch.manual_seed(2)
    out = model(**{**inputs, first: x}, sequence=sequence)
    probe = torch.linspace(-1, 1, out.numel()).reshape(out.shape)
    (out * probe).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return out.detach(), x.grad, gradients


def assert_near(found: Tensor, expected: Tensor, what: str) -> None:
    largest = max(1.0, float(expected.abs().max()))
    error = float((found - expected).abs().max())
    assert error <= LIMIT * largest, f"{what}: off by {error:.2e} of {largest:.2e}"
