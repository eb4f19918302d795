"""Replays Open-Sora-Plan's cases `vae-v*`, `vae-blocks` and `tail-init`.

Limits (fp32, outputs of order 1): 5e-5 for outputs, 1e-3 of the largest entry for gradients. A bias that a norm or a
softmax takes away has the gradient 0, and what is recorded is the rounding of a sum of up to 4000 terms: two such sums
differ by about sqrt(4000) * 2^-24 = 4e-6 of their terms, which the gradient of the weight beside the bias tells.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from opensora.config import CausalVideoVAEConfig
from opensora.config_files import config_from_dict
from opensora.presets import open_sora_plan_v1_0, open_sora_plan_v1_1
from opensora.vae import CausalVideoVAE, VAETiling, tail_initialize
from opensora.vae.causal_video import layers, resampling
from tests.oracles.registry import Case, Check, adapter

LIMIT = 5e-5
GRADIENT_LIMIT = 1e-3
ROUNDING_OF_A_SUM = 4e-6


@adapter("vae-v")
def whole_model(case: Case) -> Iterator[Check]:
    vae = tiny_vae(case)
    with torch.no_grad():
        for name, expected in case.outputs.items():
            if match := re.fullmatch(r"(enc\.T\d+)\.moments", name):
                x = case.inputs[f"{match[1]}.x"].float()
                yield Check(name, vae.posterior(x).moments, expected, max_abs=LIMIT)
            elif match := re.fullmatch(r"(dec\.t\d+)\.y", name):
                z = case.inputs[f"{match[1]}.z"].float()
                yield Check(name, vae.decode_unscaled(z), expected, max_abs=LIMIT)
        yield from _tiled(case, vae)
    yield from _posterior_and_gradients(case, vae)


def _tiled(case: Case, vae: CausalVideoVAE) -> Iterator[Check]:
    for call in case.config["calls"]:
        if not call.startswith("tile"):
            continue
        name = call.split(":")[0]
        number = {key: ast.literal_eval(value) for key, value in re.findall(r"(tile_\w+)=([\d.]+)", call)}
        vae.tiling = VAETiling(
            number["tile_sample_min_size"],
            number["tile_latent_min_size"],
            number["tile_overlap_factor"],
            number["tile_sample_min_size_t"],
            number["tile_latent_min_size_t"],
        )
        if "kind=enc" in call:
            moments = vae.posterior(case.inputs[f"{name}.x"].float()).moments
            yield Check(f"{name}.moments", moments, case.outputs[f"{name}.moments"], max_abs=LIMIT)
        else:
            y = vae.decode_unscaled(case.inputs[f"{name}.z"].float())
            yield Check(f"{name}.y", y, case.outputs[f"{name}.y"], max_abs=LIMIT)
    vae.tiling = None


def _posterior_and_gradients(case: Case, vae: CausalVideoVAE) -> Iterator[Check]:
    outputs = case.outputs
    x = case.inputs["grad.x"].float().requires_grad_()
    posterior = vae.train().posterior(x)
    kl = posterior.kl()
    y = vae.decode_unscaled(posterior.mode())
    loss = 10 * (y * case.inputs["grad.probe"].float()).mean() + 1e-3 * kl.sum()
    loss.backward()
    values = {
        "post.mean": posterior.mean,
        "post.logvar_clamped": posterior.logvar,
        "post.std": torch.exp(0.5 * posterior.logvar),
        "grad.y": y,
        "grad.loss": loss,
    }
    for name, actual in values.items():
        yield Check(name, actual, outputs[name], max_abs=LIMIT * max(1.0, outputs[name].abs().max().item()))
    # upstream keeps the width; ours is its sum for each sample
    expected_kl = outputs["grad.kl"].flatten(1).sum(1)
    yield Check("grad.kl", kl, expected_kl, max_abs=2e-6 * expected_kl.max().item())
    yield _gradient_check("grad.d_x", x, outputs)
    yield from _parameter_checks("grad.p.", vae, outputs)


@adapter("vae-blocks")
def blocks(case: Case) -> Iterator[Check]:
    for name, entry in case.config["blocks"].items():
        block = _block(entry["what"])
        prefix = f"{name}."
        block.load_state_dict(_with_prefix(case.weights, prefix))
        for num_frames in entry["T"]:
            tag = f"{name}.T{num_frames}"
            x = case.inputs[f"{tag}.x"].float().requires_grad_()
            y = block(x)
            yield Check(f"{tag}.y", y, case.outputs[f"{tag}.y"], max_abs=LIMIT)
            if f"{tag}.grad_x" not in case.outputs:
                continue
            block.zero_grad()
            (y * case.inputs[f"{tag}.probe"].float()).sum().backward()
            yield _gradient_check(f"{tag}.grad_x", x, case.outputs)
            yield from _parameter_checks(f"{tag}.grad.", block, case.outputs)


@adapter("tail-init")
@torch.no_grad()
def tail_init(case: Case) -> Iterator[Check]:
    image_weights = _with_prefix(case.weights, "2d.")
    image_config = _image_config(CausalVideoVAEConfig(hidden_size=32, hidden_size_mult=(1, 1, 2, 1), num_res_blocks=1))
    image_vae = CausalVideoVAE(image_config).eval()
    image_vae.load_state_dict(image_weights)
    frames = case.inputs["x"].float().transpose(1, 2).flatten(0, 1).unsqueeze(2)  # each a clip of its own
    posterior = image_vae.posterior(frames)
    outputs = case.outputs
    yield Check("2d.moments_per_frame", posterior.moments[:, :, 0], outputs["2d.moments_per_frame"], max_abs=LIMIT)
    decoded = image_vae.decode_unscaled(posterior.mode())[:, :, 0]
    expected = outputs["2d.decode_per_frame"]  # reaches 2.5, and the limit is for values of order 1
    yield Check("2d.decode_per_frame", decoded, expected, max_abs=LIMIT * float(expected.abs().max()))

    for version, preset in (("v1.0", open_sora_plan_v1_0), ("v1.1", open_sora_plan_v1_1)):
        vae = CausalVideoVAE(
            replace(preset.vae(), hidden_size=32, hidden_size_mult=(1, 1, 2, 1), num_res_blocks=1)
        ).eval()
        left = tail_initialize(vae, image_weights)
        yield Check(f"{version} keys left", sorted(left), sorted(case.config["unmapped_3d_keys"][version]), exact=True)
        state = vae.state_dict()
        for name in outputs:
            if name.startswith(f"{version}.map."):
                yield Check(name, state[name.removeprefix(f"{version}.map.")], outputs[name], exact=True)
        suffix = "_mix60" if version == "v1.1" else ""
        for name, parameter in vae.named_parameters():
            if name.endswith("mix_factor"):
                parameter.fill_(60)
        posterior = vae.posterior(frames[:1])
        name = f"{version}.image_moments{suffix}"
        yield Check(name, posterior.moments, outputs[name], max_abs=LIMIT)
        name = f"{version}.image_decode{suffix}"
        # what differs in the moments is decoded: 5.8e-5 with AVX512's exponentials
        yield Check(name, vae.decode_unscaled(posterior.mode()), outputs[name], max_abs=2 * LIMIT)


def tiny_vae(case: Case) -> CausalVideoVAE:
    return _vae(case.config["ctor"], case.weights)


def _vae(arguments: dict[str, Any], weights: dict[str, Tensor]) -> CausalVideoVAE:
    vae = CausalVideoVAE(config_from_dict(CausalVideoVAEConfig, arguments)).eval()
    vae.load_state_dict(weights)
    return vae


def _image_config(config: CausalVideoVAEConfig) -> CausalVideoVAEConfig:
    """The 2-D VAE of the same sizes: our modules cover that too."""
    return replace(
        config,
        q_conv="Conv2d",
        **{f"{half}_{part}": "Conv2d" for half in ("encoder", "decoder") for part in ("conv_in", "conv_out")},
        **{f"{half}_attention": "AttnBlock" for half in ("encoder", "decoder")},
        **{f"{half}_mid_resnet": "ResnetBlock2D" for half in ("encoder", "decoder")},
        **{f"{half}_resnet_blocks": ("ResnetBlock2D",) * 4 for half in ("encoder", "decoder")},
        encoder_spatial_downsample=("Downsample",) * 3 + ("",),
        decoder_spatial_upsample=("",) + ("Upsample",) * 3,
        encoder_temporal_downsample=("",) * 4,
        decoder_temporal_upsample=("",) * 4,
    )


def _block(call: str) -> nn.Module:
    """The module that a call like "CausalConv3d(6,8,3,padding=1)" at the head of a description makes."""
    depth = [call[: end + 1].count("(") - call[: end + 1].count(")") for end in range(len(call))]
    node = ast.parse(call[: depth.index(0, call.index("(")) + 1], mode="eval").body
    assert isinstance(node, ast.Call)
    assert isinstance(node.func, ast.Name)
    kind = getattr(layers, node.func.id, None) or getattr(resampling, node.func.id)
    arguments = [ast.literal_eval(argument) for argument in node.args]
    return kind(*arguments, **{keyword.arg: ast.literal_eval(keyword.value) for keyword in node.keywords})


def _with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value.float() for name, value in tensors.items() if name.startswith(prefix)}


def _parameter_checks(prefix: str, module: nn.Module, outputs: dict[str, Tensor]) -> Iterator[Check]:
    parameters = dict(module.named_parameters())
    for name, parameter in parameters.items():
        if f"{prefix}{name}" in outputs:
            weight = parameters.get(f"{name.removesuffix('.bias')}.weight", parameter)
            yield _gradient_check(f"{prefix}{name}", parameter, outputs, ROUNDING_OF_A_SUM * weight.grad.abs().max())
    unknown = [name for name in outputs if name.startswith(prefix) and name.removeprefix(prefix) not in parameters]
    yield Check(f"{prefix}* of no parameter", unknown, [], exact=True)


def _gradient_check(name: str, tensor: Tensor, outputs: dict[str, Tensor], floor: Tensor | float = 0.0) -> Check:
    expected = outputs[name]
    return Check(name, tensor.grad, expected, max_abs=max(GRADIENT_LIMIT * expected.abs().max().item(), float(floor)))
