"""Replays Open-Sora-Plan's cases `discriminators-v*` and `vae-loss-*`: discriminators, and both losses of a step.

Limits (fp32): relative to the largest entry, as sums of up to 10,000 terms of order 1 round.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from opensora.perceptual import LPIPS, Backbone
from opensora.vae import DiagonalGaussian, PatchDiscriminator
from opensora.vae.adversarial import DiscriminatorLoss, GeneratorLoss, adaptive_weight, at_reconstruction
from opensora.vae.losses import kl_loss, reconstruction_loss
from tests.oracles.registry import Case, Check, adapter

RELATIVE_LIMIT = 2e-5
GRADIENT_LIMIT = 1e-3


@adapter("discriminators-v")
def discriminators(case: Case) -> Iterator[Check]:
    is_v1_0 = "v1.0" in case.config["upstream"]
    for name, entry in case.config["cases"].items():
        options = entry["ctor"]
        kind = "2d" if "2d" in name else "3d-v1.0" if is_v1_0 else "3d"
        network = PatchDiscriminator(
            kind,
            in_channels=options["input_nc"],
            channels=options["ndf"],
            num_layers=options["n_layers"],
            use_actnorm=options["use_actnorm"],
        )
        network.load_state_dict(_with_prefix(case.weights, f"{name}."))
        x = case.inputs[f"{name}.x"].float().requires_grad_()
        with torch.no_grad():
            yield _check(f"{name}.eval", network.eval()(x), case.outputs)
        y = network.train()(x)
        yield _check(f"{name}.train", y, case.outputs)
        y.square().mean().backward()
        yield _check(f"{name}.grad_x", x.grad, case.outputs, GRADIENT_LIMIT)
        norm = network.main[3]
        after = {"loc_after_init": "loc", "scale_after_init": "scale"} if options["use_actnorm"] else {}
        after = after or {"running_mean_after": "running_mean", "running_var_after": "running_var"}
        for recorded, attribute in after.items():
            yield _check(f"{name}.{recorded}", getattr(norm, attribute), case.outputs)


@adapter("vae-loss-")
def losses(case: Case) -> Iterator[Check]:
    options = case.config["ctor"]
    perceptual = seeded_lpips() if options["perceptual_weight"] else None
    network = PatchDiscriminator("2d" if "-2d" in case.name else "3d", num_layers=options["disc_num_layers"])
    network.load_state_dict(_with_prefix(case.weights, "discriminator."), strict=False)  # running statistics
    inputs = {name: value.float() for name, value in case.inputs.items()}
    x, posterior = inputs["inputs"], DiagonalGaussian(inputs["moments"])
    if "lpips" in case.outputs:
        frames = (side.transpose(1, 2).flatten(0, 1) for side in (x, _reconstruction(inputs, inputs["last_layer"])))
        yield _check("lpips", perceptual(*frames), case.outputs)
    # upstream keeps the width; ours is its sum for each sample
    yield _check("kl", posterior.kl(), {"kl": case.outputs["kl"].sum(1)})
    for tag, step in (("before", options["disc_start"] - 1), ("after", options["disc_start"])):
        yield from _generator_checks(f"{tag}.g.", case, inputs, network, perceptual, step)
        yield from _discriminator_checks(f"{tag}.d.", case, inputs, network, step)


def _generator_checks(
    prefix: str, case: Case, inputs: dict[str, Tensor], network: PatchDiscriminator, perceptual: LPIPS | None, step: int
) -> Iterator[Check]:
    options, x = case.config["ctor"], inputs["inputs"]
    last_layer = inputs["last_layer"].clone().requires_grad_()
    logvar = torch.tensor(options["logvar_init"], requires_grad=True)
    weight, start, kind = options["perceptual_weight"], options["disc_start"], options["disc_loss"]
    x_rec = _reconstruction(inputs, last_layer)
    nll = reconstruction_loss(x, x_rec, perceptual=perceptual, perceptual_weight=weight, logvar=logvar)
    kl = kl_loss([DiagonalGaussian(inputs["moments"])])
    generator = GeneratorLoss(start=start, factor=options["disc_weight"] * options["disc_factor"], kind=kind)
    score = at_reconstruction(lambda leaf: generator.score(network.train()(leaf)), x_rec)
    d_weight = options["disc_weight"] * adaptive_weight(nll, score, last_layer)
    total = nll + options["kl_weight"] * kl + generator.weighted(score, nll, last_layer, step)
    total.backward()
    # per element: all of it is one mean over channels and pixels less than what nll sums over
    rec = (nll - logvar * math.prod(x.shape[1:]) / x.shape[2]) * logvar.exp() * x.shape[2] / math.prod(x.shape[1:])
    values = {
        "loss": total,
        "total_loss": total,
        "nll_loss": nll,
        "rec_loss": rec,
        "kl_loss": kl,
        "g_loss": score,
        "d_weight": d_weight,
        "disc_factor": torch.tensor(options["disc_factor"] if step >= start else 0.0),
        "logvar": logvar,
        "grad_logvar": logvar.grad,
    }
    for name, value in values.items():
        yield _check(f"{prefix}{name}", value, case.outputs)
    yield _check(f"{prefix}grad_last", last_layer.grad, case.outputs, GRADIENT_LIMIT)
    none = [name for name, parameter in network.named_parameters() if parameter.grad is not None]
    yield Check(f"{prefix}gradients of the discriminator", none, [], exact=True)


def _discriminator_checks(
    prefix: str, case: Case, inputs: dict[str, Tensor], network: PatchDiscriminator, step: int
) -> Iterator[Check]:
    options = case.config["ctor"]
    real = network(inputs["inputs"])
    fake = network(_reconstruction(inputs, inputs["last_layer"]))
    loss = DiscriminatorLoss(start=options["disc_start"], factor=options["disc_factor"], kind=options["disc_loss"])
    value = loss(real, fake, step)
    (gradient,) = torch.autograd.grad(value, network.main[0].weight)
    values = {"loss": value, "disc_loss": value, "logits_real": real.mean(), "logits_fake": fake.mean()}
    for name, actual in values.items():
        yield _check(f"{prefix}{name}", actual, case.outputs)
    yield _check(f"{prefix}grad_main0", gradient, case.outputs, GRADIENT_LIMIT)


def seeded_lpips(seed: int = 4321, backbone: Backbone = "vgg") -> LPIPS:
    """LPIPS with weights from a generator, in the order of its state: those of the recorded answers."""
    generator = torch.Generator().manual_seed(seed)
    distance = LPIPS(backbone)
    for name, tensor in distance.state_dict().items():
        if name.startswith("scaling_layer"):
            continue
        drawn = torch.randn(tensor.shape, generator=generator)
        fan_in = math.prod(tensor.shape[1:])
        size = 0.05 if tensor.dim() == 1 else math.sqrt(2 / fan_in)
        tensor.copy_(drawn.abs() * 0.1 if "lin" in name else drawn * size)
    return distance


def _reconstruction(inputs: dict[str, Tensor], last_layer: Tensor) -> Tensor:
    return F.conv3d(inputs["hid"], last_layer) + 0.9 * inputs["inputs"]


def _with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _check(name: str, actual: Tensor, outputs: dict[str, Tensor], relative: float = RELATIVE_LIMIT) -> Check:
    expected = outputs[name]
    return Check(name, actual, expected, max_abs=relative * max(expected.abs().max().item(), 1e-6))
