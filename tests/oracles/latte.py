"""Replays Open-Sora-Plan's cases `latte-*` and `position-tables`.

Limits (fp32, outputs of order 1): 5e-5 for outputs, 5e-4 where whole frames are masked, since upstream then takes the
softmax of scores lowered by 10,000; 1e-3 of the largest entry for gradients. A bias that a softmax takes away, that of
keys, has the gradient 0, and what is recorded is the rounding of a sum of some thousand terms: two such sums differ by
about sqrt(4000) * 2^-24 = 4e-6 of their terms, which the gradient of the weight beside the bias tells.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from opensora.config import IDDPMConfig, LatteT2VConfig
from opensora.config_files import config_from_dict
from opensora.models.latte import LatteT2V
from opensora.models.latte_positions import LattePositions
from opensora.models.layers import sinusoid
from opensora.schedulers import IDDPM
from tests.oracles.registry import Case, Check, adapter

LIMIT = 5e-5
MASKED_LIMIT = 5e-4
GRADIENT_LIMIT = 1e-3
ROUNDING_OF_A_SUM = 4e-6


@adapter("latte-")
def latte(case: Case) -> Iterator[Check]:
    model = tiny_transformer(case)
    like = torch.empty(0)
    base = model.positions.base_size
    yield Check("buf.pos_embed", model.positions.in_space(base, base, like)[0], case.outputs["buf.pos_embed"], LIMIT)
    yield Check("buf.temp_pos_embed", model.positions.in_time(like)[:, :, 0], case.outputs["buf.temp_pos_embed"], LIMIT)
    for call in case.config["calls"]:
        model.train(call["mode"] == "train").zero_grad()
        model.set_gradient_checkpointing(call["gradient_checkpointing"])
        inputs = _with_prefix(case.inputs, f"{call['case']}.")
        outputs = _with_prefix(case.outputs, f"{call['case']}.")
        replay = _loss if call["case"] == "loss" else _call
        for check in replay(call, model, inputs, outputs):
            yield Check(f"{call['case']}.{check.tensor}", check.actual, check.expected, check.max_abs)


def tiny_transformer(case: Case) -> LatteT2V:
    version = "1.0" if case.name.startswith("latte-v1.0") else "1.1"
    model = LatteT2V(config_from_dict(LatteT2VConfig, {**case.config["ctor"], "version": version}))
    model.load_state_dict(case.weights)
    return model


def _call(
    call: dict[str, Any], model: LatteT2V, inputs: dict[str, Tensor], outputs: dict[str, Tensor]
) -> Iterator[Check]:
    probe = inputs.pop("probe", None)
    assert sorted(inputs) == sorted(call["tensor_kwargs"])
    if probe is not None:
        for name in ("hidden_states", "encoder_hidden_states"):
            inputs[name].requires_grad_()
    sample = model(**inputs, **call["kwargs_non_tensor"])
    yield Check("sample", sample, outputs["sample"], _limit(inputs))
    if probe is not None:
        (100 * (sample * probe).mean()).backward()
        yield from _gradients(model, inputs, outputs)


def _loss(
    call: dict[str, Any], model: LatteT2V, inputs: dict[str, Tensor], outputs: dict[str, Tensor]
) -> Iterator[Check]:
    x_t, mse, vb = _training_loss(model, inputs)
    (mse + vb).mean().backward()
    yield Check("x_t", x_t, outputs["x_t"], LIMIT)
    for name, value in (("mse", mse), ("vb", vb), ("loss", mse + vb)):
        yield Check(name, value, outputs[name], _limit(inputs))
    yield from _gradients(model, inputs, outputs)


def _training_loss(model: LatteT2V, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """x_t, and for each sample the squared error of the noise and the variational bound in bits."""
    diffusion = IDDPM(IDDPMConfig(table_dtype="float64"))
    x0, noise, t = inputs["x0"], inputs["noise"], inputs["t"]
    x_t = diffusion.training_chain.add_noise(x0, noise, t)
    masks = {name: inputs[name] for name in ("attention_mask", "encoder_attention_mask") if name in inputs}
    output = model(x_t, t, inputs["cond"], **masks)
    terms = diffusion.loss_terms(output, x0, x_t, noise, t, loss_mask=inputs.get("attention_mask"))
    return x_t, terms.mse, terms.vb


@adapter("position-tables")
def position_tables(case: Case) -> Iterator[Check]:
    like, outputs = torch.empty(0), case.outputs
    for name, (size, rows, columns) in {
        "256": (32, 16, 16),
        "512": (64, 32, 32),
        "1024": (128, 64, 64),
        "512_other_480x640": (64, 30, 40),
    }.items():
        positions = LattePositions(LatteT2VConfig(sample_size=(size, size)))
        name = f"spatial.{name}" + ("" if "other" in name else "_table")
        table = positions.in_space(rows, columns, like)[0, 0]
        yield Check(name, table[outputs[f"{name}.rows"]], outputs[name], LIMIT)
    for name, version, length in (
        ("v1.0_17x256", "1.0", 5),
        ("v1.0_65", "1.0", 17),
        ("v1.1_65", "1.1", 17),
        ("v1.1_221", "1.1", 56),
        ("v1.1_513", "1.1", 129),
    ):
        table = LattePositions(LatteT2VConfig(video_length=length, version=version)).in_time(like)[0, :, 0]
        yield Check(f"temporal.{name}", table[outputs[f"temporal.{name}.rows"]], outputs[f"temporal.{name}"], LIMIT)
    yield Check("timestep_proj_256", sinusoid(outputs["timestep_proj_256.t"], 256), outputs["timestep_proj_256"], LIMIT)


def _with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Without it; bf16 is how files hold fp32 values that bf16 can hold."""
    found = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    return {name: value.float() if value.is_floating_point() else value for name, value in found.items()}


def _limit(inputs: dict[str, Tensor]) -> float:
    mask = inputs.get("attention_mask")
    has_empty_frame = mask is not None and not bool(mask.flatten(2).any(-1).all())
    return MASKED_LIMIT if has_empty_frame else LIMIT


def _gradients(model: nn.Module, inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> Iterator[Check]:
    tensors = dict(model.named_parameters()) | inputs
    for name, expected in outputs.items():
        if not name.startswith("grad."):
            continue
        name = name.removeprefix("grad.")
        limit = GRADIENT_LIMIT * float(expected.abs().max())
        if name.endswith("to_k.bias"):
            weight = tensors[name.replace("bias", "weight")]
            limit = max(limit, ROUNDING_OF_A_SUM * float(weight.grad.abs().max()))
        yield Check(f"grad.{name}", tensors[name].grad, expected, limit)
