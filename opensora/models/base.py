"""What every diffusion transformer does alike around its blocks: text, guidance and recomputation.

Axes as in layers.py: B batch, T frames, S sites, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from opensora.models.layers import TextContext

Denoiser = Callable[..., Tensor]
"""(x, timestep, x_mask=None) -> (rows of text, C or 2C, T, H, W): one evaluation of a sampling run."""


class VideoTransformer(nn.Module):
    """Subclasses embed captions and list who reads them.

    forward and denoiser take `sequence`, the ranks over which the sites of a clip are spread; None: all are here.
    `takes_frame_mask`: forward and denoiser take x_mask (B, T), False where a frame is given clean.
    `only_length`: latent frames of the only clips it makes beside single frames; None for any number.
    `latent_multiple`: what height and width of latents must be multiples of.
    """

    takes_frame_mask = False
    only_length: int | None = None
    latent_multiple = 1

    def __init__(self) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        self.keeps_products = False

    @property
    def null_caption(self) -> Tensor | None:
        """Unprojected features (L, caption_channels) of no caption, where they were learnt; else it is ""."""
        return None

    def text_readers(self) -> list[Any]:
        """The cross-attention of every block, in the order in which `TextContext.for_block` counts."""
        raise NotImplementedError

    def embed_text(self, y: Tensor, mask: Tensor | None = None) -> TextContext:
        """Captions to hidden size, selected tokens first."""
        raise NotImplementedError

    def prepare_text(self, y: Tensor, mask: Tensor | None = None) -> TextContext:
        """Embed captions and project the keys and values of every block; hold the result across steps."""
        text = self.embed_text(y, mask)
        return replace(text, keys_values=tuple(reader.keys_values(text.tokens) for reader in self.text_readers()))

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
            if self.keeps_products:
                contexts = partial(create_selective_checkpoint_contexts, _products())
                return checkpoint(block, *arguments, use_reentrant=False, context_fn=contexts)
            return checkpoint(block, *arguments, use_reentrant=False)
        return block(*arguments)

    def set_gradient_checkpointing(self, mode: bool | Literal["none", "selective", "full"] = "full") -> None:
        """Recompute each block's activations in the backward pass instead of keeping them.

        "selective" keeps the results of matrix products and attention, which take nearly all of the time, and computes
        only the rest again; True is "full", False "none". Errors: ValueError for another mode.
        """
        if mode not in (True, False, "none", "selective", "full"):
            raise ValueError(f"gradient checkpointing: must be none, selective or full, got {mode!r}")
        self.gradient_checkpointing = mode not in (False, "none")
        self.keeps_products = mode == "selective"


def _products() -> list[Any]:
    """Operators whose results "selective" checkpointing keeps."""
    aten, ours = torch.ops.aten, torch.ops.opensora_kernels
    return [
        aten.mm.default,
        aten.addmm.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
        ours.attention.default,
        ours.qk_norm_attention.default,
    ]
