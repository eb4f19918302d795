"""Losses of a VAE: reconstruction, perceptual and KL terms, all in fp32; `adversarial` has the others.

Axes: B batch, C channels, T frames, H height, W width; N = B * T frames.
Source: hpcaitech/Open-Sora v1.2.0, opensora/models/vae/losses.py (behaviour).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from opensora.config import VAELossConfig
from opensora.vae.adversarial import at_reconstruction
from opensora.vae.distributions import DiagonalGaussian
from opensora.vae.output import VAEOutput

PerceptualDistance = Callable[[Tensor, Tensor], Tensor]
"""Maps two batches of frames (N, C, H, W) in [-1, 1] to one distance per frame, any shape of N values (LPIPS)."""


@dataclass(frozen=True)
class VAELossOutput:
    """The loss of one step and its terms, every one a scalar and already weighted; a term that is off is None."""

    total: Tensor
    reconstruction: Tensor | None
    kl: Tensor | None
    z_reconstruction: Tensor | None
    identity: Tensor | None


class VAELoss(nn.Module):
    """The terms that `config` switches on, summed.

    * `use_real_rec_loss`: reconstruction(x, x_rec) with the perceptual distance, and `kl_weight` times the divergence;
    * `use_z_rec_loss`: reconstruction(x_z, z_rec);
    * `use_image_identity_loss`: reconstruction(x_z, z), for clips of one frame only.

    The last two are of the stacked VAE alone. `logvar` is a number: upstream's parameter belongs to no optimizer.
    """

    def __init__(self, config: VAELossConfig, *, perceptual: PerceptualDistance | None = None) -> None:
        super().__init__()
        if config.perceptual_weight and perceptual is None:
            raise ValueError(
                f"VAELoss: perceptual must be given when perceptual_weight is not 0, got {config.perceptual_weight}"
            )
        self.config = config
        self.perceptual = perceptual

    def forward(self, x_BCTHW: Tensor, output: VAEOutput) -> VAELossOutput:
        """Losses of a VAE's output for x. Raises ValueError for a term of what was not decoded or is not there."""
        config = self.config
        terms: dict[str, Tensor | None] = dict.fromkeys(("reconstruction", "kl", "z_reconstruction", "identity"))
        if config.use_real_rec_loss:
            if output.x_rec is None:
                raise ValueError("VAELoss: output.x_rec must be decoded when use_real_rec_loss is on, got None")
            terms["reconstruction"] = self._pixels(x_BCTHW, output.x_rec)
            if output.posteriors:
                terms["kl"] = config.kl_weight * kl_loss(output.posteriors)
        if config.use_z_rec_loss or config.use_image_identity_loss:
            if output.x_z is None or output.z_rec is None:
                raise ValueError(
                    "VAELoss: use_z_rec_loss and use_image_identity_loss need a VAE with latents of frames, as the "
                    "stacked one, got an output without x_z and z_rec"
                )
            if config.use_z_rec_loss:
                terms["z_reconstruction"] = reconstruction_loss(output.x_z, output.z_rec, logvar=config.logvar)
            if config.use_image_identity_loss and x_BCTHW.shape[2] == 1:
                terms["identity"] = reconstruction_loss(output.x_z, output.z, logvar=config.logvar)
        present = [term for term in terms.values() if term is not None]
        total = torch.stack(present).sum() if present else x_BCTHW.new_zeros(())
        return VAELossOutput(total=total, **terms)

    def _pixels(self, x_BCTHW: Tensor, x_rec: Tensor) -> Tensor:
        def loss(x_rec: Tensor) -> Tensor:
            options = {"perceptual_weight": self.config.perceptual_weight, "logvar": self.config.logvar}
            return reconstruction_loss(x_BCTHW, x_rec, perceptual=self.perceptual, **options)

        return at_reconstruction(loss, x_rec) if x_rec.requires_grad and torch.is_grad_enabled() else loss(x_rec)


def reconstruction_loss(
    target_BCTHW: Tensor,
    output_BCTHW: Tensor,
    *,
    perceptual: PerceptualDistance | None = None,
    perceptual_weight: float = 0.0,
    logvar: float | Tensor = 0.0,
    element_weights: Tensor | None = None,
) -> Tensor:
    """Negative log likelihood (|a - b| + perceptual_weight * distance of the frame) / exp(logvar) + logvar, a scalar.

    Summed over all elements and divided by the number of frames B * T, not by pixels: the scale of the loss grows with
    the size of the frame. `element_weights` (broadcastable to the frames (N, C, H, W)) multiplies each element.
    """
    target_NCHW = target_BCTHW.transpose(1, 2).flatten(0, 1).float()
    output_NCHW = output_BCTHW.transpose(1, 2).flatten(0, 1).float()
    error_NCHW = (target_NCHW - output_NCHW).abs()
    num_frames = error_NCHW.shape[0]
    if perceptual is not None and perceptual_weight:
        distance = perceptual(target_NCHW, output_NCHW).float().reshape(num_frames, 1, 1, 1)
        error_NCHW = error_NCHW + perceptual_weight * distance
    nll_NCHW = error_NCHW / torch.exp(torch.as_tensor(logvar, dtype=torch.float32, device=error_NCHW.device)) + logvar
    if element_weights is not None:
        nll_NCHW = nll_NCHW * element_weights
    return nll_NCHW.sum() / num_frames


def kl_loss(posteriors: list[DiagonalGaussian]) -> Tensor:
    """Mean over the batch of the KL divergence, summed over all temporal chunks (upstream: of the last chunk only)."""
    return torch.stack([posterior.kl() for posterior in posteriors]).sum(dim=0).mean()
