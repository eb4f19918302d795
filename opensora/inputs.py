"""A batch of clips and captions as a transformer is trained on it: latents, embeddings and the clips' numbers.

Axes: B batch, C channels, T latent frames, I images beside each clip, H, W latent height and width, L text tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from opensora.conditioning.prompts import append_scores
from opensora.data.datasets import IMAGE_FPS
from opensora.text.cleaning import clean_caption
from opensora.text.t5 import TextEncoder

# What some transformers are told about a clip, each (B,).
SIZES = ("height", "width", "num_frames", "fps", "ar")


@dataclass(frozen=True)
class Inputs:
    """One batch.

    x0 (B, C, T + I, H, W): clean latents of the clips, then of their images. y (B, 1 + I, L, channels) and text_mask
    (B, 1 + I, L): the clip's text, then those of its images. sizes: what `SIZES` names, (B,) each. attention_mask
    (B, T + I, H, W): 0 where latents are padding; None where none are.
    """

    x0: Tensor
    y: Tensor
    text_mask: Tensor | None
    sizes: dict[str, Tensor]
    num_images: int = 0
    attention_mask: Tensor | None = None

    def first_frames(self) -> Inputs:
        """The first frame of every clip, as the still image that a causal VAE makes of it."""
        sizes = self.sizes | {
            "num_frames": torch.ones_like(self.sizes["num_frames"]),
            "fps": torch.full_like(self.sizes["fps"], IMAGE_FPS),
        }
        mask = None if self.attention_mask is None else self.attention_mask[:, :1]
        return replace(
            self, x0=self.x0[:, :, :1], y=self.y[:, :1], text_mask=_first(self.text_mask), sizes=sizes, num_images=0,
            attention_mask=mask,
        )  # fmt: skip

    def copies(self, count: int) -> Inputs:
        """Of a batch of one, a batch of `count` alike, without copies in memory."""

        def repeated(x: Tensor) -> Tensor:
            return x.expand(count, *x.shape[1:])

        return replace(
            self,
            x0=repeated(self.x0),
            y=repeated(self.y),
            text_mask=None if self.text_mask is None else repeated(self.text_mask),
            sizes={name: repeated(value) for name, value in self.sizes.items()},
            attention_mask=None if self.attention_mask is None else repeated(self.attention_mask),
        )


@dataclass(frozen=True)
class Encoders:
    """VAE and text encoder of a training; either may be None where the data set holds what it would make.

    `trains_text`: embeddings keep their gradients. `keeps_texts`: each caption is encoded once and kept in memory.
    """

    vae: Any | None
    text: TextEncoder | None
    device: torch.device
    trains_text: bool = False
    keeps_texts: bool = False
    known_texts: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __call__(self, batch: Mapping[str, Any], *, sample_posterior: bool = True) -> Inputs:
        """Encode what is not encoded yet.

        batch: `video` (B, 3, T, H, W), or `latents` and perhaps `latents_std`, their posterior's; `text`, or `y` with
        `mask`; beside the clips `images` (B, I, 3, H, W), or `image_latents` (B, I, C, H, W) and `image_latents_std`,
        with `image_text` (B lists of I) or `image_y` and `image_mask`. Scores are appended to captions, see
        `captions_of`.
        Errors: ValueError where an encoder is needed that is None.
        """
        x0 = self.latents(batch, sample_posterior=sample_posterior)
        num_images = 0
        images = self._image_latents(batch, sample_posterior=sample_posterior)
        if images is not None:
            x0, num_images = torch.cat([x0, images.to(x0)], dim=2), images.shape[2]
        y, text_mask = self._texts(batch, num_images)
        sizes = {name: batch[name].to(self.device) for name in SIZES if name in batch}
        sizes.setdefault("ar", sizes["height"] / sizes["width"])
        attention_mask = batch.get("attention_mask")
        if attention_mask is not None:
            # Where nothing is padding a mask changes no number, and costs a slower attention.
            attention_mask = None if (attention_mask != 0).all() else attention_mask.to(self.device)
        return Inputs(x0, y, text_mask, sizes, num_images, attention_mask)

    def latents(self, batch: Mapping[str, Any], *, sample_posterior: bool = True) -> Tensor:
        """(B, C, T, H, W) fp32 where they are made, as they are where they are read."""
        if "latents" in batch:
            z_BCTHW = batch["latents"].to(self.device)
            if sample_posterior and "latents_std" in batch:
                z_BCTHW = z_BCTHW + batch["latents_std"].to(self.device) * torch.randn_like(z_BCTHW)
            return z_BCTHW
        return self.encode_pixels(batch["video"], sample_posterior=sample_posterior)

    @torch.no_grad()
    def encode_pixels(self, x_BCTHW: Tensor, *, sample_posterior: bool = True) -> Tensor:
        if self.vae is None:
            raise ValueError("train: vae must name a folder, file or hub id for clips in pixels, got ''")
        weight = next(self.vae.parameters())
        x_BCTHW = x_BCTHW.to(weight.device, weight.dtype, non_blocking=True)
        return self.vae.encode(x_BCTHW, sample_posterior=sample_posterior).float()

    def _image_latents(self, batch: Mapping[str, Any], *, sample_posterior: bool) -> Tensor | None:
        """(B, C, I, H, W), each image a clip of one frame; None without images."""
        if "image_latents" in batch:
            names = {"latents": "image_latents", "latents_std": "image_latents_std"}
            stored = {name: batch[key] for name, key in names.items() if key in batch}
            return self.latents(stored, sample_posterior=sample_posterior).transpose(1, 2)
        if "images" not in batch:
            return None
        images_BICHW = batch["images"]
        frames = images_BICHW.flatten(0, 1).unsqueeze(2)
        z_NC1HW = self.encode_pixels(frames, sample_posterior=sample_posterior)
        return z_NC1HW.squeeze(2).unflatten(0, images_BICHW.shape[:2]).transpose(1, 2)

    def _texts(self, batch: Mapping[str, Any], num_images: int) -> tuple[Tensor, Tensor | None]:
        if "y" in batch:
            y_BRLC, mask_BRL = batch["y"], batch["mask"][:, None]
            if num_images:
                y_BRLC = torch.cat([y_BRLC, batch["image_y"]], dim=1)
                mask_BRL = torch.cat([mask_BRL, batch["image_mask"]], dim=1)
            return y_BRLC.to(self.device), mask_BRL.to(self.device)
        captions = captions_of(batch)
        if num_images:
            pairs = zip(captions, batch["image_text"], strict=True)
            captions = [text for clip, images in pairs for text in (clip, *map(clean_caption, images))]
        y_R1LC, mask_RL = self._embed(captions)
        rows = (-1, 1 + num_images)
        return y_R1LC.squeeze(1).unflatten(0, rows), mask_RL.unflatten(0, rows)

    def _embed(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Embeddings (R, 1, L, C), with gradients if the encoder is trained, and mask (R, L)."""
        if self.text is None:
            raise ValueError("train: text_encoder must name a folder or hub id for captions as text, got ''")
        if self.trains_text:
            ids_RL, mask_RL = self.text.tokenize(captions)
            return self.text(ids_RL, mask_RL), mask_RL.to(self.device)
        if not self.keeps_texts:
            return self.text.encode(captions)
        new = sorted(set(captions) - self.known_texts.keys())
        if new:
            y_R1LC, mask_RL = self.text.encode(new)
            self.known_texts.update(zip(new, zip(y_R1LC, mask_RL, strict=True), strict=True))
        pairs = [self.known_texts[caption] for caption in captions]
        return torch.stack([y for y, _ in pairs]), torch.stack([mask for _, mask in pairs])


def captions_of(batch: Mapping[str, Any]) -> list[str]:
    """Captions with the scores that a batch has for them, as at sampling, and cleaned."""
    captions = batch["text"]
    absent = [None] * len(captions)
    scores = zip(
        captions,
        _numbers(batch.get("aes"), absent),
        _numbers(batch.get("flow"), absent),
        batch.get("camera_motion") or absent,
        strict=True,
    )
    return [
        clean_caption(append_scores(text, aes=aes, flow=flow, camera_motion=motion or None))
        for text, aes, flow, motion in scores
    ]


def _numbers(values: Any, absent: list[None]) -> list[float | None]:
    """Scores of a batch; NaN stands for none."""
    if values is None:
        return absent
    numbers = [None if value is None else float(value) for value in values]
    return [None if number is None or math.isnan(number) else number for number in numbers]


def _first(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask[:, :1]
