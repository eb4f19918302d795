"""Replays the recorded forward passes and gradients of the diffusion transformers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from opensora.config import STDiT2Config, STDiT3Config, STDiTConfig
from opensora.models.stdit import STDiT
from opensora.models.stdit2 import STDiT2
from opensora.models.stdit3 import STDiT3
from tests.oracles.registry import Case, Check, adapter

FORWARD_LIMIT = 2e-5
GRADIENT_LIMIT = 2e-5  # of the largest value of the gradient


@adapter("stdit3_")
def stdit3(case: Case) -> Iterator[Check]:
    dtype = getattr(torch, case.config["dtype"])
    model = STDiT3(STDiT3Config(**case.config["config"])).eval()
    model.load_state_dict(case.weights)
    model.to(dtype)
    inputs = {name: case.inputs[name] for name in ("x", "timestep", "y", "mask", "fps", "height", "width")}
    inputs["x_mask"] = case.inputs.get("x_mask")
    if dtype != torch.float32:
        inputs |= {name: inputs[name].to(dtype) for name in ("x", "y", "fps", "height", "width")}

    taps = record(model, [name[len("tap.") :] for name in case.outputs if name.startswith("tap.")])
    out = model(**inputs)
    if dtype == torch.float32:
        yield Check("out", out, case.outputs["out"], max_abs=FORWARD_LIMIT)
    else:
        yield Check("out", out, case.outputs["out"], max_abs=0.06, mean_abs=0.01)
    for name, value in taps.items():
        expected = case.outputs[f"tap.{name}"]
        yield Check(f"tap.{name}", like_recorded(name, value, expected), expected, max_abs=FORWARD_LIMIT)
    if "loss" in case.outputs:
        yield from gradients(case, model, out)


@adapter("stdit2_")
def stdit2(case: Case) -> Iterator[Check]:
    model = STDiT2(STDiT2Config(**case.config["config"])).eval()
    model.load_state_dict(case.weights)
    yield Check("out", model(**case.inputs), case.outputs["out"], max_abs=FORWARD_LIMIT)


@adapter("stdit_")
def stdit(case: Case) -> Iterator[Check]:
    model = STDiT(STDiTConfig(**case.config["config"])).eval()
    for name in ("pos_embed", "pos_embed_temporal"):
        # Both are fp32 roundings of values in [-1, 1] that fp64 gives.
        yield Check(name, getattr(model, name), case.weights[name], max_abs=2**-23)
    model.load_state_dict(case.weights)
    yield Check("out", model(**case.inputs), case.outputs["out"], max_abs=FORWARD_LIMIT)


def gradients(case: Case, model: nn.Module, out: Tensor) -> Iterator[Check]:
    loss = (out * case.inputs["loss_weight"]).mean()
    yield Check("loss", loss[None], case.outputs["loss"], max_abs=FORWARD_LIMIT)
    names = [name[len("grad.") :] for name in case.outputs if name.startswith("grad.")]
    found = torch.autograd.grad(loss, [model.get_parameter(name) for name in names])
    for name, grad in zip(names, found, strict=True):
        expected = case.outputs[f"grad.{name}"]
        limit = GRADIENT_LIMIT * float(expected.abs().max())
        yield Check(f"grad.{name}", grad, expected, max_abs=limit)


def record(model: nn.Module, names: list[str]) -> dict[str, Tensor]:
    """The outputs of sub-modules, filled in by the next forward pass."""
    taps: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, arguments: Any, output: Tensor) -> None:
            taps[name] = output.detach().float()

        return hook

    for name in names:
        model.get_submodule(name).register_forward_hook(keep(name))
    return taps


def like_recorded(name: str, value: Tensor, expected: Tensor) -> Tensor:
    """Our sub-modules keep the frame and site axes apart and run both timestep sets at once; the original merged axes,
    put sites before frames in temporal attention, and its last recorded embedding is that of timestep 0."""
    if name.endswith(".attn"):
        value = value.transpose(1, 2) if name.startswith("temporal_blocks") else value
        return value.flatten(0, 1)
    if name in ("t_embedder", "t_block"):
        value = value.flatten(0, -2)
        rows = expected.shape[0]
        return value[-1:].expand(rows, -1) if name == "t_embedder" and len(value) > rows else value[-rows:]
    return value.reshape(expected.shape)
