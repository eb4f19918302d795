"""The classes behind the families of `opensora.families`, and their keys and shapes without any memory for weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from opensora.config import (
    CausalVideoVAEConfig,
    LatteT2VConfig,
    STDiT2Config,
    STDiT3Config,
    STDiTConfig,
    VideoVAEConfig,
)
from opensora.config_files import ConfigError, config_from_dict
from opensora.families import Family, config_from_shapes
from opensora.models import LatteT2V, STDiT, STDiT2, STDiT3
from opensora.placements import LoadReport, plan
from opensora.vae import CausalVideoVAE, VideoVAE

# The models of this project: family -> class and configuration.
OURS: dict[str, tuple[Callable[[Any], nn.Module], type]] = {
    "STDiT": (STDiT, STDiTConfig),
    "STDiT2": (STDiT2, STDiT2Config),
    "STDiT3": (STDiT3, STDiT3Config),
    "LatteT2V": (LatteT2V, LatteT2VConfig),
    "VideoVAE": (VideoVAE, VideoVAEConfig),
    "CausalVideoVAE": (CausalVideoVAE, CausalVideoVAEConfig),
}


@dataclass(frozen=True)
class Fit:
    """How stored keys and shapes compare with a family's model: parameters of the model, and what differs.

    Without a model (no class here, or no configuration), both are None and `why_not` says why.
    """

    num_parameters: int | None = None
    report: LoadReport | None = None
    why_not: str | None = None


def read_config(family: Family, config: Mapping[str, Any] | None, shapes: Mapping[str, tuple[int, ...]]) -> Any:
    """The configuration of a checkpoint: that of its config.json, or what shapes and releases say of it.

    A dataclass for our models, else the content of config.json. Errors: ConfigError where there is none.
    """
    if family.name not in OURS:
        if config is None and family.name != "PixArt":
            raise ConfigError(f"{family.name}: needs its config.json")
        return config if config is not None else config_from_shapes(family.name, shapes)
    config_type = OURS[family.name][1]
    if config is not None:
        return config_from_dict(config_type, dict(config))
    found = config_from_shapes(family.name, shapes)
    if found is None:
        raise ConfigError(f"{family.name}: needs its config.json, since its weights do not tell its configuration")
    unknown = {"num_heads", "input_size", "space_scale", "time_scale"} if family.name == "STDiT" else {"num_heads"}
    if unknown - found.keys():
        raise ConfigError(
            f"{family.name}: needs its config.json: the weights do not tell {', '.join(sorted(unknown - found.keys()))}"
        )
    return config_from_dict(config_type, found)


def compare(family: Family, config: Any, shapes: Mapping[str, tuple[int, ...]]) -> Fit:
    """Compare keys and shapes with those of the family's model under `config`, as `read_config` gives it.

    Errors: ConfigError for a configuration that no model can be built from.
    """
    model = empty_model(family, config)
    if model is None:
        return Fit(why_not=f"there is no {family.name} here to compare with")
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    not_loaded = (*getattr(model, "keys_not_loaded", ()), *(("decoder.", "lm_head.") if family.name == "T5" else ()))
    stored = {name: shape for name, shape in shapes.items() if not name.startswith(not_loaded)}
    if family.name == "T5":  # the same matrix under two names
        wanted.pop("encoder.embed_tokens.weight", None)
        embedding = stored.pop("encoder.embed_tokens.weight", None)
        if embedding is not None:
            stored.setdefault("shared.weight", embedding)
    return Fit(sum(parameter.numel() for parameter in model.parameters()), plan(stored, wanted)[1])


def empty_model(family: Family, config: Any) -> nn.Module | None:
    """The family's model on the meta device; None where there is no class for it.

    Errors: ConfigError for a configuration that no model can be built from.
    """
    try:
        return _build_empty(family, config)
    except Exception as error:  # libraries raise what they like at a field that does not fit the others
        raise ConfigError(f"{family.name}: cannot be built from its configuration: {error}") from error


def _build_empty(family: Family, config: Any) -> nn.Module | None:
    with torch.device("meta"):
        if family.name in OURS:
            return OURS[family.name][0](config)
        if family.name == "AutoencoderKL":
            from diffusers import AutoencoderKL

            return AutoencoderKL.from_config(dict(config))
        if family.name == "T5":
            from transformers import T5Config, T5EncoderModel

            return T5EncoderModel(T5Config.from_dict(dict(config)))
    return None
