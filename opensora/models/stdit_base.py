"""What STDiT2 and STDiT3 do alike around their blocks: text, positions, timesteps, guidance and recomputation.

Axes as in layers.py: B batch, C latent channels, T frames, S sites, D hidden, G timestep sets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.utils.checkpoint import checkpoint

from opensora.config import STDiT2Config, STDiT3Config
from opensora.models.layers import (
    CaptionEmbedder,
    CrossAttention,
    PatchEmbed3D,
    PositionEmbedding2D,
    TextContext,
    TimestepEmbedder,
    select_tokens,
)


class STDiTBase(nn.Module):
    """Subclasses make the modules named here, under upstream's names, and list who reads the text."""

    config: STDiT2Config | STDiT3Config
    pos_embed: PositionEmbedding2D
    x_embedder: PatchEmbed3D
    t_embedder: TimestepEmbedder
    y_embedder: CaptionEmbedder

    def __init__(self) -> None:
        super().__init__()
        self.gradient_checkpointing = False

    def text_readers(self) -> list[CrossAttention]:
        """The cross-attention of every block, in the order in which `TextContext.for_block` counts."""
        raise NotImplementedError

    def prepare_text(self, y: Tensor, mask: Tensor | None = None) -> TextContext:
        """Embed captions and project the keys and values of every block; hold the result across steps."""
        text = self.embed_text(y, mask)
        return replace(text, keys_values=tuple(reader.keys_values(text.tokens) for reader in self.text_readers()))

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

    def for_each_text(
        self, text: TextContext, x_BTSD: Tensor, timestep: Tensor, x_mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Tokens, timestep and x_mask of B samples, repeated for text of k*B rows (conditional and null captions)."""
        copies = text.tokens.shape[0] // x_BTSD.shape[0]
        if copies > 1:
            x_BTSD = x_BTSD.repeat(copies, 1, 1, 1)
            timestep = timestep.repeat(copies)
        if x_mask is not None and x_mask.shape[0] != x_BTSD.shape[0]:
            x_mask = x_mask.repeat(copies, 1)
        return x_BTSD, timestep, x_mask

    def run_block(self, block: Callable[..., Tensor], *arguments: Any) -> Tensor:
        """block(*arguments), recomputed in the backward pass if that was asked for."""
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(block, *arguments, use_reentrant=False)
        return block(*arguments)

    def set_gradient_checkpointing(self, is_enabled: bool = True) -> None:
        """Recompute each block's activations in the backward pass instead of keeping them."""
        self.gradient_checkpointing = is_enabled

    def initialize_weights(self) -> None:
        """Xavier for linear layers, without biases."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)


def first(value: Tensor | float) -> float:
    """Sample 0 of a per-sample scalar, on the host."""
    return float(value.flatten()[0]) if isinstance(value, Tensor) else float(value)
