"""Training a VAE against a discriminator: what either side minimises, in fp32.

Axes: B batch, C channels, T frames, H height, W width.
Source: Open-Sora-Plan v1.1.0, opensora/models/ae/videobase/losses/perceptual_loss.py, and hpcaitech/Open-Sora v1.2.0,
opensora/models/vae/losses.py (behaviour), after Esser et al. 2021.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MAX_ADAPTIVE_WEIGHT = 1e4


def at_reconstruction(function: Callable[[Tensor], Tensor], x_rec: Tensor) -> Tensor:
    """function(x_rec), a scalar, whose gradient with respect to x_rec is found here and now.

    What `function` keeps for its gradient (a discriminator, VGG16) is free again when this returns, parameters it uses
    get no gradient, and however often the graph behind the result is walked, `function` was walked once.
    """
    leaf = x_rec.detach().requires_grad_()
    value = function(leaf)
    (gradient,) = torch.autograd.grad(value, leaf)
    return _WithGradient.apply(x_rec, value.detach(), gradient)


def adaptive_weight(nll: Tensor, loss: Tensor, last_layer: Tensor) -> Tensor:
    """||d nll / d last_layer|| / (||d loss / d last_layer|| + 1e-4), at most 1e4: a scalar without gradient.

    It gives the adversarial gradient the size of the reconstruction's where the decoder ends. Both graphs stay alive.
    Where several ranks train, each has a weight of its own, from its own batch: what one process computes that goes
    through their batches one after the other, and what upstream does. So `last_layer` must be the whole weight that the
    forward pass multiplied by, not a shard of it.
    """
    norms = [torch.autograd.grad(value, last_layer, retain_graph=True)[0].float().norm() for value in (nll, loss)]
    return (norms[0] / (norms[1] + 1e-4)).clamp(0.0, MAX_ADAPTIVE_WEIGHT).detach()


class GeneratorLoss(nn.Module):
    """Adversarial term of the VAE: `factor` * adaptive weight * score, zero before `start`.

    `factor` is the product of upstream's disc_weight and disc_factor.
    """

    def __init__(
        self, *, start: int = 2001, factor: float = 0.5, kind: Literal["hinge", "vanilla", "non-saturating"] = "hinge"
    ) -> None:
        super().__init__()
        _check_kind("GeneratorLoss", kind)
        self.start, self.factor, self.kind = start, factor, kind

    def forward(self, fake_logits: Tensor, nll: Tensor, last_layer: Tensor, step: int) -> Tensor:
        """Scalar loss from the discriminator's logits of reconstructions and the reconstruction loss `nll`.

        Both must depend on `last_layer`, and their graphs stay alive for the step's own backward pass.
        """
        return self.weighted(self.score(fake_logits), nll, last_layer, step)

    def score(self, fake_logits: Tensor) -> Tensor:
        """How little the discriminator believes: -mean of logits; "non-saturating", the mean of softplus(-logits).

        Upstream's "vanilla" discriminator goes with the first.
        """
        if self.kind == "non-saturating":
            return F.softplus(-fake_logits.float()).mean()
        return -fake_logits.float().mean()

    def weighted(self, score: Tensor, nll: Tensor, last_layer: Tensor, step: int) -> Tensor:
        if step < self.start:
            return score * 0.0
        return self.factor * adaptive_weight(nll, score, last_layer) * score


class DiscriminatorLoss(nn.Module):
    """Loss of a discriminator from its logits of real and of reconstructed clips, zero before `start`.

    `lecam_weight` adds LeCam's regulariser (Tseng et al. 2021), which pulls the logits towards running means of their
    counterparts; the means move with `lecam_decay` at every call in training mode.
    """

    lecam_real: Tensor
    lecam_fake: Tensor

    def __init__(
        self,
        *,
        start: int = 2001,
        factor: float = 1.0,
        kind: Literal["hinge", "vanilla", "non-saturating"] = "hinge",
        lecam_weight: float = 0.0,
        lecam_decay: float = 0.999,
    ) -> None:
        super().__init__()
        _check_kind("DiscriminatorLoss", kind)
        self.start, self.factor, self.kind = start, factor, kind
        self.lecam_weight, self.lecam_decay = lecam_weight, lecam_decay
        self.register_buffer("lecam_real", torch.zeros(()))
        self.register_buffer("lecam_fake", torch.zeros(()))

    def forward(self, real_logits: Tensor, fake_logits: Tensor, step: int) -> Tensor:
        real, fake = real_logits.float(), fake_logits.float()
        if self.kind == "hinge":
            loss = 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())
        else:  # the vanilla loss and cross-entropy against ones and zeros are the same function
            loss = 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())
        if step < self.start:
            return loss * 0.0
        loss = self.factor * loss
        if self.lecam_weight:
            loss = loss + self.lecam_weight * self._lecam(real, fake)
        return loss

    def _lecam(self, real: Tensor, fake: Tensor) -> Tensor:
        if self.training:
            self.lecam_real.lerp_(real.detach().mean(), 1.0 - self.lecam_decay)
            self.lecam_fake.lerp_(fake.detach().mean(), 1.0 - self.lecam_decay)
        return F.relu(real - self.lecam_fake).square().mean() + F.relu(self.lecam_real - fake).square().mean()


class _WithGradient(torch.autograd.Function):
    """A scalar that is known, and its gradient with respect to x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return (grad * gradient).to(gradient.dtype), None, None


def _check_kind(name: str, kind: str) -> None:
    if kind not in ("hinge", "vanilla", "non-saturating"):
        raise ValueError(f"{name}: kind must be 'hinge', 'vanilla' or 'non-saturating', got {kind!r}")
