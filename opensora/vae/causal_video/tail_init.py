"""CausalVideoVAE from the weights of an image VAE: every frame begins as the image VAE's."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from opensora.vae.causal_video.layers import CausalConv3d
from opensora.vae.causal_video.model import CausalVideoVAE


@torch.no_grad()
def tail_initialize(vae: CausalVideoVAE, image_weights: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Copy the weights of a 2-D VAE into the last frame of each causal kernel, zero the others; returns what is left.

    `image_weights`: keys of a latent diffusion model's first stage (`encoder.down.0.block.0.conv1.weight`, ...), shapes
    (O, C, kh, kw). The last frame of a causal kernel is the current one, so that every frame is coded by itself, except
    that norms span the clip and resampling in time averages. The keys returned keep their values: those of trainable
    resampling in time, which an image VAE has not; with them an image only comes out as from the image VAE once their
    `mix_factor` is large.
    Errors: ValueError that names weights which are missing, of another shape, or of no use (`loss.*` aside).
    Source: docs and issue 168 of Open-Sora-Plan; its script was never released.
    """
    inner = {
        f"{prefix}.conv.{leaf}": f"{prefix}.{leaf}"
        for prefix, module in vae.named_modules()
        if isinstance(module, CausalConv3d)
        for leaf in ("weight", "bias")
    }
    targets = vae.state_dict()
    left, faults, sources = [], [], {}
    for name, target in targets.items():
        if any(part.startswith("time_") for part in name.split(".")):
            left.append(name)
            continue
        source = inner.get(name, name)
        weight = image_weights.get(source)
        shape = (*target.shape[:2], *target.shape[3:]) if target.dim() == 5 else tuple(target.shape)
        if weight is None or tuple(weight.shape) != shape:
            found = "nothing" if weight is None else str(tuple(weight.shape))
            faults.append(f"{source} must have shape {shape}, got {found}")
            continue
        sources[name] = source
    unused = set(image_weights) - set(sources.values())
    faults += [f"{name} has no place" for name in sorted(unused) if not name.startswith("loss.")]
    if faults:
        shown = "; ".join(faults[:8]) + (f"; and {len(faults) - 8} more" if len(faults) > 8 else "")
        raise ValueError(f"tail_initialize: image_weights do not fit: {shown}")
    for name, source in sources.items():
        target = targets[name]
        if target.dim() == 5:
            target.zero_()
            target = target[:, :, -1]
        target.copy_(image_weights[source])
    return tuple(left)
