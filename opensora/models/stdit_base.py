"""What the STDiT family does alike around its blocks: text, positions, timesteps, guidance and recomputation.

Axes as in layers.py: B batch, C latent channels, T frames, S sites, D hidden, G timestep sets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn
from torch.utils.checkpoint import checkpoint

from opensora.config import STDiT2Config, STDiT3Config, STDiTConfig
from opensora.models.layers import (
    CaptionEmbedder,
    CrossAttention,
    FinalLayer,
    PatchEmbed3D,
    PositionEmbedding2D,
    TextContext,
    TimestepEmbedder,
    select_tokens,
)

Denoiser = Callable[..., Tensor]
"""(x, timestep, x_mask=None) -> fp32 (rows of text, C or 2C, T, H, W): one evaluation of a sampling run."""


class STDiTBase(nn.Module):
    """Subclasses make the modules named here, under upstream's names, and list who reads the text.

    `takes_frame_mask`: forward and denoiser take x_mask (B, T), False where a frame is given clean.
    """

    takes_frame_mask = True

    config: STDiTConfig | STDiT2Config | STDiT3Config
    x_embedder: PatchEmbed3D
    t_embedder: TimestepEmbedder
    y_embedder: CaptionEmbedder

    def __init__(self) -> None:
        super().__init__()
        self.gradient_checkpointing = False

    def text_readers(self) -> list[CrossAttention]:
        """The cross-attention of every block, in the order in which `TextContext.for_block` counts."""
        raise NotImplementedError

    def denoiser(
        self, y: Tensor, mask: Tensor | None = None, *, with_variance: bool = False, **arguments: Any
    ) -> Denoiser:
        """A function (x, timestep, x_mask=None) -> output for one sampling run, with all that is constant done once.

        Shapes: y (k*B, 1, L, caption_channels) and mask as `forward` takes them, as are `arguments`, the numbers of
        the clip; x (B, C, T, H, W). The output, (k*B, C, T, H, W), has 2C channels with `with_variance`; without,
        the second half is not computed. Errors: ValueError when a number of the clip is missing.
        """
        constants = self.constants(arguments)
        text = self.prepare_text(y, mask)

        def denoise(x: Tensor, timestep: Tensor, x_mask: Tensor | None = None) -> Tensor:
            return self(x, timestep, text, x_mask=x_mask, with_variance=with_variance, **constants)

        return denoise

    def constants(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Of a sampling run's `arguments`, those that `forward` reads, prepared as far as they do not change."""
        return {}

    def require(self, clip: dict[str, Any]) -> None:
        """Refuse a clip of which a number is None. Errors: ValueError."""
        missing = [name for name, value in clip.items() if value is None]
        if missing:
            needed = ", ".join(clip)
            raise ValueError(f"{type(self).__name__}: {needed} are required, got no {', '.join(missing)}")

    def prepare_text(self, y: Tensor, mask: Tensor | None = None) -> TextContext:
        """Embed captions and project the keys and values of every block; hold the result across steps."""
        text = self.embed_text(y, mask)
        return replace(text, keys_values=tuple(reader.keys_values(text.tokens) for reader in self.text_readers()))

    def embed_text(self, y: Tensor, mask: Tensor | None = None, *, generator: Generator | None = None) -> TextContext:
        """Captions to hidden size, selected tokens first."""
        y = y.to(self.x_embedder.proj.weight.dtype)
        return select_tokens(self.y_embedder(y, generator).squeeze(1), mask)

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


class AnySizeSTDiT(STDiTBase):
    """With positions that follow the size of the picture: STDiT2 and STDiT3."""

    config: STDiT2Config | STDiT3Config
    pos_embed: PositionEmbedding2D

    def position_table(self, grid: tuple[int, int, int], height: float, width: float) -> Tensor:
        """(1, S, D) for a picture of height x width pixels."""
        _, rows, columns = grid
        scale = (height * width) ** 0.5 / self.config.input_sq_size
        base_size = round((rows * columns) ** 0.5)
        return self.pos_embed(self.x_embedder.proj.weight, rows, columns, scale=scale, base_size=base_size)


class OneStackSTDiT(STDiTBase):
    """With one stack `blocks`, each of which has its temporal attention `attn_temp`: STDiT and STDiT2."""

    t_block: nn.Sequential
    blocks: nn.ModuleList
    final_layer: FinalLayer

    def text_readers(self) -> list[CrossAttention]:
        return [block.cross_attn for block in self.blocks]

    def initialize_weights(self) -> None:
        """Xavier, small timestep and caption layers; temporal attention, the text and the output start at zero."""
        super().initialize_weights()
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        captions = self.y_embedder.y_proj
        for layer in (*self.t_embedder.mlp[::2], self.t_block[1], captions.fc1, captions.fc2):
            nn.init.normal_(layer.weight, std=0.02)
        for block in self.blocks:
            nn.init.zeros_(block.attn_temp.proj.weight)
            nn.init.zeros_(block.cross_attn.proj.weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def freeze(self, what: Literal["not_temporal", "text"] | None) -> None:
        """Leave only temporal attention trainable, or all but the attention to the text."""
        if what == "not_temporal":
            self.requires_grad_(False)
            for block in self.blocks:
                block.attn_temp.requires_grad_(True)
        elif what == "text":
            for reader in self.text_readers():
                reader.requires_grad_(False)


def first(value: Tensor | float) -> float:
    """Sample 0 of a per-sample scalar, on the host."""
    return float(value.flatten()[0]) if isinstance(value, Tensor) else float(value)
