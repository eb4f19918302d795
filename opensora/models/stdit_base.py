"""What STDiT2 and STDiT3 do alike around their blocks: captions, positions, timesteps and initial weights.

Axes as in layers.py: B batch, C latent channels, T frames, S sites, D hidden, G timestep sets.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn

from opensora.config import STDiT2Config, STDiT3Config
from opensora.models.base import VideoTransformer
from opensora.models.layers import (
    CaptionEmbedder,
    PatchEmbed3D,
    PositionEmbedding2D,
    TextContext,
    TimestepEmbedder,
    select_tokens,
)


class STDiTBase(VideoTransformer):
    """Subclasses make the modules named here, under upstream's names, and list who reads the text."""

    config: STDiT2Config | STDiT3Config
    pos_embed: PositionEmbedding2D
    x_embedder: PatchEmbed3D
    t_embedder: TimestepEmbedder
    y_embedder: CaptionEmbedder

    def embed_text(self, y: Tensor, mask: Tensor | None = None, *, generator: Generator | None = None) -> TextContext:
        """Captions to hidden size, selected tokens first."""
        y = y.to(self.x_embedder.proj.weight.dtype)
        return select_tokens(self.y_embedder(y, generator).squeeze(1), mask)

    def position_table(self, grid: tuple[int, int, int], height: float, width: float) -> Tensor:
        """(1, S, D) for a picture of height x width pixels."""
        _, rows, columns = grid
        scale = (height * width) ** 0.5 / self.config.input_sq_size
        base_size = round((rows * columns) ** 0.5)
        return self.pos_embed(self.x_embedder.proj.weight, rows, columns, scale=scale, base_size=base_size)

    def embed_timestep(self, timestep: Tensor, *, with_zero: bool) -> Tensor:
        """(G, B, D): the samples' own timesteps and, with_zero, timestep 0 for each."""
        if not with_zero:
            return self.t_embedder(timestep)[None]
        own, zero = self.t_embedder(torch.cat([timestep, timestep.new_zeros(1)])).tensor_split([timestep.shape[0]])
        return torch.stack([own, zero.expand_as(own)])

    def initialize_weights(self) -> None:
        """Xavier for linear layers, without biases."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)


def first(value: Tensor | float) -> float:
    """Sample 0 of a per-sample scalar, on the host."""
    return float(value.flatten()[0]) if isinstance(value, Tensor) else float(value)
