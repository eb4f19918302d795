"""What to generate, and with which precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Precision = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class SampleConfig:
    """What to generate. `num_frames` is frames ("51") or seconds ("4s"); `save_fps` None is fps // frame_interval.

    `condition_frame_length` counts latent frames: the overlap of a loop with the one before. `text_dtype` is that of
    the text encoder, `dtype` that of the others. `vae_memory` ("10GiB"): what decoding may take beyond latents and
    weights; None decodes all frames at once.

    `negative_prompt` None is the model's own null caption. `cut_negative` cuts a negative prompt to the tokens of the
    prompt, as Open-Sora-Plan does. `join_given`: a video that a clip begins or ends with is a part of the result.
    """

    num_frames: str = "51"
    resolution: str | None = "240p"
    aspect_ratio: str | None = "9:16"
    image_size: tuple[int, int] | None = None
    fps: float = 24.0
    save_fps: float | None = None
    frame_interval: int = 1
    num_sample: int = 1
    batch_size: int = 1
    loop: int = 1
    condition_frame_length: int = 5
    condition_frame_edit: float = 0.0
    align: int | None = 5
    aes: float | None = 6.5
    flow: float | None = None
    camera_motion: str | None = None
    negative_prompt: str | None = None
    cut_negative: bool = False
    join_given: bool = True
    seed: int = 42
    dtype: Precision = "bf16"
    text_dtype: Precision = "fp32"
    vae_memory: str | None = None
    device: str = "auto"
