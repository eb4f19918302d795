"""The models of a preset, each loaded by the class that its release is of."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from opensora.checkpoints import load_model, resolve
from opensora.config import CausalVideoVAEConfig, Precision, Preset, TransformerConfig, VAEKind, VideoVAEConfig
from opensora.family_models import OURS
from opensora.parallel import DTYPES
from opensora.text.cache import CachedTextEncoder, TextCache, identity_of
from opensora.text.t5 import TextEncoder
from opensora.vae import CausalVideoVAE, FrameVAE, VideoVAE

MODEL_OF: dict[type, Callable[[Any], nn.Module]] = {config: model for model, config in OURS.values()}
"""The class of each configuration."""


@dataclass(frozen=True)
class Models:
    """What a sampler joins."""

    vae: Any
    transformer: nn.Module
    text_encoder: Any


def load_models(
    preset: Preset,
    *,
    dtype: Precision,
    text_dtype: Precision,
    device: torch.device,
    vae: str | Path | None = None,
    transformer: str | Path | None = None,
    text_encoder: str | Path | None = None,
    text_cache: str | Path | None = None,
) -> Models:
    """The models of a preset; a folder, file or hub id given here takes the place of the preset's.

    text_cache: a folder for embeddings of texts; the text encoder is loaded only for texts that are not in it.
    Errors: CheckpointError, ValueError or OSError for weights that are absent or do not fit.
    """
    place = {"dtype": DTYPES[dtype], "device": device}
    diffusion = load_transformer(transformer or preset.transformer, preset.transformer_config, **place)
    encoder = load_text_encoder(
        text_encoder or preset.text_encoder,
        diffusion.config.model_max_length,
        dtype=DTYPES[text_dtype],
        device=device,
        cache=text_cache,
    )
    return Models(load_vae(vae or preset.vae, preset.vae_kind, **place), diffusion, encoder)


def load_transformer(
    source: str | Path, config: TransformerConfig, *, dtype: torch.dtype, device: torch.device
) -> nn.Module:
    """The transformer of `config`'s class. A config.json beside the weights is read; without one `config` holds."""
    location = resolve(source)
    folder = location if location.is_dir() else location.parent
    given = None if (folder / "config.json").is_file() else config
    return load_model(location, MODEL_OF[type(config)], type(config), config=given, dtype=dtype, device=device)


def load_vae(source: str | Path, kind: VAEKind, *, dtype: torch.dtype, device: torch.device) -> Any:
    """The VAE of that kind."""
    if kind == "frames":
        return FrameVAE.from_pretrained(resolve(source), dtype=dtype, device=device)
    if kind == "causal":
        return load_model(source, CausalVideoVAE, CausalVideoVAEConfig, dtype=dtype, device=device)
    return load_model(source, VideoVAE, VideoVAEConfig, dtype=dtype, device=device)


def load_text_encoder(
    source: str | Path,
    model_max_length: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    cache: str | Path | None = None,
) -> TextEncoder | CachedTextEncoder:
    """A T5 encoder; with a cache, one that is loaded when it is needed."""
    if cache is None:
        return TextEncoder.from_pretrained(source, model_max_length=model_max_length, dtype=dtype, device=device)
    folder = resolve(source)
    encoder = identity_of(folder, known=Path(cache) / "encoder_digests.json")
    identity = f"{encoder}-{model_max_length}-{dtype}"
    config = json.loads((folder / "config.json").read_text())
    load = partial(TextEncoder.from_pretrained, folder, model_max_length=model_max_length, dtype=dtype, device=device)
    return CachedTextEncoder(
        load, TextCache(cache, identity), output_dim=config["d_model"], model_max_length=model_max_length
    )
