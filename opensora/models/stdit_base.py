"""What the STDiT family does alike around its blocks: captions, positions, timesteps and initial weights.

Axes as in layers.py: B batch, C latent channels, T frames, S sites, D hidden, G timestep sets.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn

from opensora.config import STDiT2Config, STDiT3Config, STDiTConfig
from opensora.models.base import Denoiser, VideoTransformer
from opensora.models.layers import (
    CaptionEmbedder,
    CrossAttention,
    FinalLayer,
    PositionEmbedding2D,
    TextContext,
    TimestepEmbedder,
    select_tokens,
)
from opensora.models.patches import PatchEmbed3D
from opensora_kernels import SequenceShards


class STDiTBase(VideoTransformer):
    """Subclasses make the modules named here, under upstream's names, and list who reads the text."""

    takes_frame_mask = True

    config: STDiTConfig | STDiT2Config | STDiT3Config
    x_embedder: PatchEmbed3D
    t_embedder: TimestepEmbedder
    y_embedder: CaptionEmbedder

    @property
    def null_caption(self) -> Tensor:
        return self.y_embedder.y_embedding

    def denoiser(
        self,
        y: Tensor,
        mask: Tensor | None = None,
        *,
        with_variance: bool = False,
        sequence: SequenceShards | None = None,
        **arguments: Any,
    ) -> Denoiser:
        """A function (x, timestep, x_mask=None) -> output for one sampling run, with all that is constant done once.

        Shapes: y (k*B, 1, L, caption_channels) and mask as `forward` takes them, as are `sequence` and `arguments`, the
        numbers of the clip; x (B, C, T, H, W). The output, (k*B, C, T, H, W), has 2C channels with `with_variance`;
        without, the second half is not computed. Errors: ValueError when a number of the clip is missing.
        """
        constants = {**self.constants(arguments), "with_variance": with_variance, "sequence": sequence}
        text = self.prepare_text(y, mask)

        def denoise(x: Tensor, timestep: Tensor, x_mask: Tensor | None = None) -> Tensor:
            return self(x, timestep, text, x_mask=x_mask, **constants)

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
