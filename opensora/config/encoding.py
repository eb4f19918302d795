"""Encoding of clips and captions before a training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from opensora.config.data import DataConfig
from opensora.config.sampling import Precision
from opensora.config.vaes import VAEKind


@dataclass(frozen=True)
class EncodeConfig:
    """`opensora encode`: what a training of `data` would encode in its first `windows` epochs, into folder `output`.

    `store` "mean" keeps the posterior's mean, "moments" its standard deviation too, so that a training can sample.
    `storage` is the type on disk, `dtype` and `text_dtype` those of the models. Embeddings are cut to the tokens of
    their caption unless `keep_padding`. `batch_size` clips of one size are encoded at once; `shard_bytes` is the size
    at which a shard is written. `text_encoder` "" encodes no captions. `tile_vae` is that of the training.
    `retry_unread` tries clips again that could not be read before.
    """

    output: str = ""
    data: DataConfig = field(default_factory=DataConfig)
    vae: str = ""
    vae_kind: VAEKind = "stacked"
    tile_vae: bool = False
    text_encoder: str = ""
    model_max_length: int = 300
    windows: int = 1
    store: Literal["mean", "moments"] = "mean"
    storage: Literal["bf16", "fp32"] = "bf16"
    keep_padding: bool = False
    batch_size: int = 1
    shard_bytes: int = 1 << 30
    retry_unread: bool = False
    seed: int = 42
    dtype: Precision = "bf16"
    text_dtype: Precision = "bf16"
    device: str = "auto"
