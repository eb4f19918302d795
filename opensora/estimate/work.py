"""How much work a batch is for a transformer: what its throughput and use of the device are measured in."""

from __future__ import annotations

import torch
from torch import Tensor

from opensora.config import TransformerConfig
from opensora.estimate.denoisers import Denoiser, LatentClip
from opensora.training.flops import FORWARD_AND_BACKWARD


class TransformerWork:
    """Counts for a transformer of that configuration; each new shape is run on paper once, in a tenth of a second."""

    def __init__(self, config: TransformerConfig) -> None:
        self._denoiser = Denoiser(config)

    def of(self, latents: Tensor, text: Tensor, num_images: int = 0) -> dict[str, Tensor]:
        """`num_samples`, `num_tokens` and `flops` of a training step, recomputation left out, as scalars on the CPU.

        Shapes: latents (B, C, T + I, H, W), of which the last I = num_images frames are images of their own; text
        (..., L, C), padding included. Images count as samples.
        """
        batch, _, num_frames, *size = latents.shape
        clip = LatentClip(batch, (num_frames - num_images, *size), text.shape[-2])
        parts = [clip]
        if num_images:
            parts.append(LatentClip(batch * num_images, (1, *size), text.shape[-2]))
        values = {
            "num_samples": sum(part.batch for part in parts),
            "num_tokens": sum(self._denoiser.num_tokens(part) for part in parts),
            "flops": FORWARD_AND_BACKWARD * sum(self._denoiser.flops(part) for part in parts),
        }
        return {name: torch.tensor(float(value)) for name, value in values.items()}
