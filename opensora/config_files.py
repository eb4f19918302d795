"""Configurations to and from JSON: our own layout, and the config.json of released models."""

from __future__ import annotations

import types
from dataclasses import asdict, fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from opensora.config import LatteT2VConfig, STDiT2Config, VideoVAEConfig

Config = TypeVar("Config")


class ConfigError(ValueError):
    """A configuration with an unknown field or a value of the wrong kind."""


# In released files, and without effect here: kernels are chosen per call, parallelism when a model is wrapped.
_RELEASED_ONLY = {
    "architectures",
    "auto_map",
    "config_type",
    "dtype",
    "enable_flash_attn",
    "enable_flashattn",
    "enable_layernorm_kernel",
    "enable_sequence_parallelism",
    "force_huggingface",
    "freeze",
    "from_pretrained",
    "model_type",
    "torch_dtype",
    "transformers_version",
    "type",
}


def config_to_dict(config: Any) -> dict[str, Any]:
    """The fields of a configuration, nested, with its class name under `config_type`."""
    return {"config_type": type(config).__name__, **asdict(config)}


def config_from_dict(config_type: type[Config], content: dict[str, Any]) -> Config:
    """Build a (nested) configuration dataclass from JSON content.

    The VAE's released layout (`vae_2d`, `vae_temporal`) is translated; a released LatteT2V gets the version that its
    fields tell, a released STDiT2 its order of rotation and norm. Fields that only steer upstream's own loading are
    dropped; any other unknown field is refused, since it may change what the model computes. Errors: ConfigError.
    """
    if not isinstance(content, dict):
        raise ConfigError(f"{config_type.__name__}: expected an object, got {type(content).__name__}")
    if config_type is VideoVAEConfig and "vae_2d" in content:
        content = _from_released_vae(content)
    if config_type is LatteT2VConfig and "_class_name" in content:
        # Upstream writes every argument, and 1.0 had none for rotations.
        content = {"version": "1.1" if "use_rope" in content else "1.0", **content}
    if config_type is STDiT2Config and "config_type" not in content:
        # Open-Sora 1.1, of which all released weights are, rotated before the norm; the field came with 1.2's code.
        content = {"qk_norm_legacy": content.get("qk_norm", False), **content}
    hints = get_type_hints(config_type)
    known = {item.name for item in fields(config_type)}  # type: ignore[arg-type]
    unknown = sorted(name for name in content if name not in known | _RELEASED_ONLY and not name.startswith("_"))
    if unknown:
        raise ConfigError(
            f"{config_type.__name__}: unknown field {', '.join(unknown)}; known: {', '.join(sorted(known))}"
        )
    values = {
        name: _convert(value, hints[name], f"{config_type.__name__}.{name}")
        for name, value in content.items()
        if name in known
    }
    return config_type(**values)


def _from_released_vae(content: dict[str, Any]) -> dict[str, Any]:
    """hpcai-tech/OpenSora-VAE-v1.2: `vae_2d` and `vae_temporal` name upstream's two VAEs, without their sizes."""
    ours = {name: value for name, value in content.items() if name in ("scale", "shift", "micro_frame_size")}
    spatial = dict(content["vae_2d"])
    if "micro_batch_size" in spatial:
        ours["micro_batch_size"] = spatial.pop("micro_batch_size")
    spatial.pop("subfolder", None)
    spatial.pop("local_files_only", None)
    temporal = dict(content.get("vae_temporal") or {})
    return {**ours, "spatial": spatial, "temporal": temporal}


def _convert(value: Any, hint: Any, where: str) -> Any:
    """Check `value` against a field's type; lists become tuples, and JSON's string keys become numbers again."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _convert_union(value, arguments, where)
    if hint is Any:
        return value
    if is_dataclass(hint):
        return config_from_dict(hint, value)  # type: ignore[arg-type]
    if origin is Literal:
        if value not in arguments:
            raise ConfigError(f"{where}: must be one of {', '.join(map(repr, arguments))}, got {value!r}")
        return value
    if origin is tuple:
        return _convert_tuple(value, arguments, where)
    if origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{where}: must be an object, got {value!r}")
        return {
            _convert_key(k, arguments[0], where): _convert(v, arguments[1], f"{where}[{k}]") for k, v in value.items()
        }
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint in (int, float, str, bool) and (not isinstance(value, hint) or (hint is int and isinstance(value, bool))):
        raise ConfigError(f"{where}: must be {hint.__name__}, got {value!r}")
    return value


def _convert_union(value: Any, arguments: tuple[Any, ...], where: str) -> Any:
    if value is None and type(None) in arguments:
        return None
    reasons = []
    for argument in _fitting(value, [argument for argument in arguments if argument is not type(None)]):
        try:
            return _convert(value, argument, where)
        except ConfigError as error:
            reasons.append(str(error))
    raise ConfigError(" or ".join(reasons))


def _fitting(value: Any, arguments: list[Any]) -> list[Any]:
    """Of several dataclasses those that have all fields of an object, or that it names; all if there are none.

    Whole configurations name one by their fields alone, and its error is then not hidden among those of others.
    """
    if not isinstance(value, dict):
        return arguments
    kinds = [argument for argument in arguments if is_dataclass(argument)]
    named = [kind for kind in kinds if kind.__name__ == value.get("config_type")]
    fitting = [kind for kind in kinds if value.keys() <= {item.name for item in fields(kind)}]
    return named or fitting or arguments


def _convert_tuple(value: Any, arguments: tuple[Any, ...], where: str) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{where}: must be a list, got {value!r}")
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return tuple(_convert(item, arguments[0], where) for item in value)
    if len(value) != len(arguments):
        raise ConfigError(f"{where}: must hold {len(arguments)} values, got {value!r}")
    return tuple(_convert(item, argument, where) for item, argument in zip(value, arguments, strict=True))


def _convert_key(key: Any, hint: Any, where: str) -> Any:
    if hint is int:
        try:
            return int(key)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{where}: keys must be whole numbers, got {key!r}") from error
    return key
