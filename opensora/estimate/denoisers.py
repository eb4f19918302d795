"""Diffusion transformers on paper: operations and memory of an evaluation and of a training step.

Blocks are alike, so a model of one and one of two blocks tell what all of them take. Axes: B batch, T, H, W latent
frames, height and width, L text tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from math import prod
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from opensora.config import LatteT2VConfig, STDiT2Config, STDiT3Config, STDiTConfig, TransformerConfig
from opensora.estimate.paper import LiveBytes, StepMemory, on_paper, peak_bytes, step_memory
from opensora.loading import MODEL_OF
from opensora.training.flops import count_flops
from opensora_kernels import meta_as

Checkpointing = Literal["none", "selective", "full"]
Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class LatentClip:
    """A batch of clips as the transformer sees it: latents (B, C, T, H, W), text of `num_text_tokens` for each."""

    batch: int
    size: tuple[int, int, int]
    num_text_tokens: int
    pixels: tuple[int, int] = (512, 512)
    has_frame_mask: bool = False


@dataclass(frozen=True)
class Denoiser:
    """A transformer of `config` with weights of `dtype`, on an accelerator of type `device_type`."""

    config: TransformerConfig
    dtype: torch.dtype = torch.bfloat16
    device_type: str = "cuda"

    def num_tokens(self, clip: LatentClip) -> int:
        """Patches of a batch."""
        return clip.batch * prod(self.grid(clip))

    def grid(self, clip: LatentClip) -> tuple[int, int]:
        """Frames and sites of a clip, in patches."""
        patch = self.config.patch_size
        steps = (self.config.patch_size_t, patch, patch) if isinstance(patch, int) else patch
        num_frames, rows, columns = (-(-size // step) for size, step in zip(clip.size, steps, strict=True))
        return num_frames, rows * columns

    def clip_of(self, batch: int, grid: tuple[int, int], num_text_tokens: int, **options: Any) -> LatentClip:
        """A clip of so many frames and sites, in one row of patches or the few that compressed keys need."""
        patch, thinning = self.config.patch_size, getattr(self.config, "compress_kv_factor", 1)
        steps = (self.config.patch_size_t, patch, patch) if isinstance(patch, int) else patch
        columns = thinning * -(-grid[1] // thinning**2)
        size = (grid[0] * steps[0], thinning * steps[1], columns * steps[2])
        return LatentClip(batch, size, num_text_tokens, **options)

    def flops(self, clip: LatentClip) -> int:
        """Operations of one evaluation."""
        one = replace(clip, batch=1, pixels=(512, 512), has_frame_mask=False)
        return clip.batch * self._of_all(*(_flops(self, one, depth) for depth in (self._unit, 2 * self._unit)))

    def training_memory(self, clip: LatentClip, checkpointing: Checkpointing) -> StepMemory:
        """Activations of a training step, beyond weights, latents and text."""
        small, large = (self._training_memory(clip, checkpointing, depth) for depth in (self._unit, 2 * self._unit))
        return StepMemory(self._of_all(small.kept, large.kept), self._of_all(small.peak, large.peak))

    def sampling_memory(self, clip: LatentClip) -> int:
        """Bytes that an evaluation without gradients takes beyond weights and latents; two or three blocks show all.

        Keys and values of the text, which a sampling run keeps for every block, are among them.
        """
        small, large = (self._sampling_memory(clip, depth) for depth in (2 * self._unit, 3 * self._unit))
        return large + (large - small) * (self._depth - 3 * self._unit) // self._unit

    def build(self, depth: int | None = None, num_frames: int | None = None) -> nn.Module:
        """The model on meta, of `depth` layers and for clips of `num_frames` latent frames where that is given."""
        config = self.config
        if depth is not None:
            field = "num_layers" if isinstance(config, LatteT2VConfig) else "depth"
            config = replace(config, **{field: depth})
        if isinstance(config, LatteT2VConfig) and num_frames is not None:
            config = replace(config, video_length=num_frames)
        with torch.device("meta"):
            return MODEL_OF[type(config)](config).to(self.dtype)

    @property
    def num_heads(self) -> int:
        is_latte = isinstance(self.config, LatteT2VConfig)
        return self.config.num_attention_heads if is_latte else self.config.num_heads

    @property
    def hidden_size(self) -> int:
        is_latte = isinstance(self.config, LatteT2VConfig)
        return self.num_heads * self.config.attention_head_dim if is_latte else self.config.hidden_size

    @property
    def _depth(self) -> int:
        return self.config.num_layers if isinstance(self.config, LatteT2VConfig) else self.config.depth

    @property
    def _unit(self) -> int:
        """Layers that repeat: where keys are compressed, a plain one and a compressed one."""
        return 2 if getattr(self.config, "compress_kv_factor", 1) > 1 else 1

    def _of_all(self, small: Number, large: Number) -> Number:
        """A quantity of all layers, from those of one unit and of two."""
        return small + (large - small) * (self._depth - self._unit) // self._unit

    def _training_memory(self, clip: LatentClip, checkpointing: Checkpointing, depth: int) -> StepMemory:
        model = _built(self, depth, clip.size[0]).train()
        model.set_gradient_checkpointing(checkpointing)
        arguments = self._arguments(clip)
        with meta_as(self.device_type):
            return step_memory(model, lambda: self._evaluate(model, clip, arguments))

    def _sampling_memory(self, clip: LatentClip, depth: int) -> int:
        model, arguments = _built(self, depth, clip.size[0]).eval(), self._arguments(clip)
        with on_paper(self.device_type):
            return peak_bytes(lambda: self._evaluate(model, clip, arguments))

    def _arguments(self, clip: LatentClip) -> dict[str, Tensor]:
        empty: Callable[..., Tensor] = partial(torch.empty, device="meta")
        channels, features = self.config.in_channels, self.config.caption_channels
        x_BCTHW = empty(clip.batch, channels, *clip.size, dtype=self.dtype)
        y_B1LC = empty(clip.batch, 1, clip.num_text_tokens, features, dtype=self.dtype)
        numbers = {name: empty(clip.batch) for name in ("timestep", "fps", "height", "width", "ar", "num_frames")}
        return {"x": x_BCTHW, "y": y_B1LC, "mask": empty(clip.batch, clip.size[0], dtype=torch.bool)} | numbers

    def _evaluate(self, model: nn.Module, clip: LatentClip, arguments: dict[str, Tensor]) -> Tensor:
        x, y, timestep = arguments["x"], arguments["y"], arguments["timestep"]
        if isinstance(self.config, LatteT2VConfig):
            return model(x, timestep, y, enable_temporal_attentions=clip.size[0] > 1)
        given: dict[str, Any] = {"x_mask": arguments["mask"] if clip.has_frame_mask else None}
        if isinstance(self.config, STDiT2Config):
            given |= {name: arguments[name] for name in ("fps", "height", "width", "ar", "num_frames")}
            given["pixels"] = clip.pixels
        elif isinstance(self.config, STDiT3Config):
            given |= {"fps": arguments["fps"], "height": clip.pixels[0], "width": clip.pixels[1]}
        else:
            assert isinstance(self.config, STDiTConfig)
        return model(x, timestep, y, **given)


@lru_cache(maxsize=8)
def _built(denoiser: Denoiser, depth: int, num_frames: int) -> nn.Module:
    """One model serves many clips: building it takes as long as an evaluation."""
    return denoiser.build(depth, num_frames if isinstance(denoiser.config, LatteT2VConfig) else None)


@cache
def _flops(denoiser: Denoiser, clip: LatentClip, depth: int) -> int:
    model, arguments = _built(denoiser, depth, clip.size[0]).eval(), denoiser._arguments(clip)
    with torch.no_grad(), meta_as(denoiser.device_type), LiveBytes():  # which knows repeated operators
        return count_flops(lambda: denoiser._evaluate(model, clip, arguments))
