"""Replays the `vae_` cases: temporal VAE, stacked VAE with and without chunks, training losses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from opensora.config import SpatialVAEConfig, TemporalVAEConfig, VideoVAEConfig
from opensora.vae import DiscriminatorLoss, GeneratorLoss, TemporalVAE, VideoVAE
from opensora.vae.losses import kl_loss, reconstruction_loss
from tests.oracles.registry import Case, Check, adapter


@adapter("vae_temporal")
@torch.no_grad()
def temporal(case: Case) -> Iterator[Check]:
    vae = TemporalVAE(**case.config["config"]).eval()
    vae.load_state_dict(case.weights)
    for num_frames in case.config["Ts"]:
        tag = f"T{num_frames}"
        posterior = vae.encode(case.inputs[f"x_{tag}"])
        decoded = vae.decode(case.inputs[f"z_{tag}"], num_frames)
        latent_frames = case.config["latent_table"][str(num_frames)]["latent_T"]
        yield Check(f"moments_{tag}", posterior.moments, case.outputs[f"moments_{tag}"], max_abs=5e-5)
        yield Check(f"dec_{tag}", decoded, case.outputs[f"dec_{tag}"], max_abs=5e-5)
        expected_kl = case.outputs[f"kl_{tag}"]
        yield Check(f"kl_{tag}", posterior.kl(), expected_kl, max_abs=2e-6 * expected_kl.max().item())
        yield Check(f"latent_frames_{tag}", vae.latent_frames(num_frames), latent_frames, exact=True)


@adapter("vae_pipeline")
@torch.no_grad()
def pipeline(case: Case) -> Iterator[Check]:
    for run in case.config["runs"]:
        tag, num_frames = run["tag"], run["T"]
        vae = _video_vae(case, micro_frame_size=run["micro_frame_size"], micro_batch_size=run["micro_batch_size"])
        x = case.inputs[f"x_{tag}"]
        tape = _Tape([case.inputs[f"noise_{tag}_{i:02d}"] for i in range(run["n_noise"])])
        z = vae.encode(x, sample_posterior=run["noise"] == "tape", draw_noise=tape)
        expected_z = case.outputs[f"z_{tag}"]
        yield Check(f"z_{tag}", z, expected_z, max_abs=2e-5)
        yield Check(f"noise_left_{tag}", len(tape.noise), 0, exact=True)
        yield Check(f"rec_{tag}", vae.decode(expected_z, num_frames), case.outputs[f"rec_{tag}"], max_abs=5e-4)
        latent_size = vae.latent_size((num_frames, x.shape[3], x.shape[4]))
        yield Check(f"latent_size_{tag}", latent_size, tuple(run["latent_size"]), exact=True)


@adapter("vae_losses_")
def losses(case: Case) -> Iterator[Check]:
    vae, outputs, x = _video_vae(case, micro_frame_size=None, micro_batch_size=None), case.outputs, case.inputs["x"]
    out = vae(x, draw_noise=_Tape([case.inputs["noise_00"], case.inputs["noise_01"]]))
    moments = out.posteriors[0].moments
    for name, actual in {"x_z": out.x_z, "z": out.z, "x_z_rec": out.z_rec, "moments": moments}.items():
        yield Check(name, actual, outputs[name], max_abs=2e-5)
    yield Check("x_rec", out.x_rec, outputs["x_rec"], max_abs=5e-4)

    nll = reconstruction_loss(x, out.x_rec)
    scalars = {
        "nll": nll,
        "nll_logvar0.7": reconstruction_loss(x, out.x_rec, logvar=0.7),
        "weighted_nll": reconstruction_loss(x, out.x_rec, element_weights=torch.ones(1)),
        "weighted_kl": 1e-6 * kl_loss(out.posteriors),
        "z_nll": reconstruction_loss(out.x_z, out.z_rec),
    }
    if "identity" in outputs:
        scalars["identity"] = reconstruction_loss(out.x_z, out.z)
    step, start = case.config["global_step"], case.config["discriminator_start"]
    real, fake = case.inputs["real_logits"], case.inputs["fake_base"]
    for kind in ("hinge", "non-saturating"):
        generator_loss = GeneratorLoss(start=start, kind=kind)
        scalars[f"gen_{kind}"] = generator_loss(fake * vae.last_layer.mean(), nll, vae.last_layer, step)
    for kind in ("hinge", "vanilla", "non-saturating"):
        discriminator_loss = DiscriminatorLoss(start=start, kind=kind)
        scalars[f"disc_{kind}"] = discriminator_loss(real, fake, step)
        scalars[f"disc_before_start_{kind}"] = discriminator_loss(real, fake, start - 1)
    for name, actual in scalars.items():
        expected = outputs[name]
        yield Check(name, actual.detach().reshape(1), expected, max_abs=2e-5 * expected.abs().item())


class _Tape:
    """Recorded noise, in the order it was drawn."""

    def __init__(self, noise: list[Tensor]) -> None:
        self.noise = noise

    def __call__(self, mean: Tensor) -> Tensor:
        noise = self.noise.pop(0)
        assert noise.shape == mean.shape, f"noise {tuple(noise.shape)} was recorded for a mean {tuple(mean.shape)}"
        return noise


def _video_vae(case: Case, *, micro_frame_size: int | None, micro_batch_size: int | None) -> VideoVAE:
    config = VideoVAEConfig(
        spatial=_from_json(SpatialVAEConfig, case.config["cfg2d"]),
        temporal=_from_json(TemporalVAEConfig, case.config["cfg_temporal"]),
        scale=_from_json(tuple, case.config["scale"]),
        shift=_from_json(tuple, case.config["shift"]),
        micro_frame_size=micro_frame_size,
        micro_batch_size=micro_batch_size,
    )
    vae = VideoVAE(config).eval()
    vae.load_state_dict(case.weights)
    return vae


def _from_json(kind: type, value: Any) -> Any:
    if kind is tuple:
        return tuple(value) if isinstance(value, list) else value
    known = {field.name for field in fields(kind)}
    return kind(**{key: _from_json(tuple, entry) for key, entry in value.items() if key in known})
