"""Load and save models: a local folder or file, or a hub id; our config.json and the released one.

A folder holds `config.json` and one of

* `model.safetensors` or `diffusion_pytorch_model.safetensors`, whole or in shards with an `.index.json`;
* `pytorch_model.bin` (`.pt`, `.pth`), whole or in shards, read with `weights_only=True`;
* a folder `model` with one of these, as the training checkpoints of Open-Sora 1.1 and 1.2;
* one file of another name: Open-Sora 1.0's `*.pth`, the `*.ckpt` of Open-Sora-Plan's VAE training; read likewise.

Names and shapes are compared before the first weight is read; then each tensor is read straight into its place, so
that the peak is the weights plus one tensor (safetensors) or plus one shard (pickles).
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from opensora.config_files import ConfigError, config_from_dict, config_to_dict
from opensora.families import recognise
from opensora.placements import LoadReport, plan
from opensora.weight_files import CheckpointError, WeightFile, weight_file_names, weight_files

Config = TypeVar("Config")
Model = TypeVar("Model", bound=nn.Module)

_HUB_ID = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(:(?P<part>[\w.-][\w./-]*))?")
_HUB_FILES = ("*.json", "*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.model", "*.txt")


def load_model(
    source: str | Path,
    model_type: Callable[[Config], Model],
    config_type: type[Config],
    *,
    config: Config | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    prefer_ema: bool = False,
) -> Model:
    """Build `model_type(config)` without allocating its weights, then read them from `source`; returned in eval mode.

    Shapes: those of the model. dtype: floating-point weights become `dtype`; None keeps what is stored. prefer_ema:
    take the weights that training has averaged, where the checkpoint has them beside the last ones.
    Errors: CheckpointError naming every missing, unexpected and mis-shaped key, before any weight is read, and of which
    other model the checkpoint seems to be.
    Source: loading rules of Open-Sora v1.2.0 (opensora/utils/ckpt_utils.py), made strict.
    """
    location = resolve(source)
    if config is None:
        try:
            config = load_config(location, config_type)
        except CheckpointError as error:
            raise CheckpointError(f"{error}{_other_family(location, model_type)}") from error
    with _empty_parameters():
        model = model_type(config)
    files = weight_files(location, prefer_ema=prefer_ema)
    _fill(model, files, location, strict=True, dtype=dtype, device=torch.device(device))
    return model.eval()


def load_weights(model: nn.Module, source: str | Path, *, strict: bool = True, prefer_ema: bool = False) -> LoadReport:
    """Copy the weights of `source` into an existing model, in the model's dtypes and devices.

    With `strict=False` missing and unexpected keys are reported, not refused (a PixArt checkpoint has no temporal
    blocks); a wrong shape is always refused, and so is a file of which no key fits. Errors: CheckpointError.
    """
    location = resolve(source)
    files = weight_files(location, prefer_ema=prefer_ema)
    return _fill(model, files, location, strict=strict, dtype=None, device=None)


def save_model(
    folder: str | Path,
    model: nn.Module | Mapping[str, Tensor],
    config: Any,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 << 30,
    stem: str = "model",
) -> None:
    """Write config.json and model.safetensors (in shards above `max_shard_bytes`) into `folder`.

    `model` is a module or its state dict; `config` a dataclass, or the content of config.json; `stem` another file
    name, such as diffusers' diffusion_pytorch_model.
    Every file is complete under a temporary name before the first one is renamed: a full disk or a kill leaves the
    previous checkpoint as it was. `dtype` converts floating-point weights in the file, not in the model.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = dict(model.state_dict() if isinstance(model, nn.Module) else model)
    shards = _split(state, max_shard_bytes, dtype)
    names, index_name = [f"{stem}.safetensors"], f"{stem}.safetensors.index.json"
    if len(shards) > 1:
        names = [f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    with replace_files(folder) as temporary:
        for name, keys in zip(names, shards, strict=True):
            save_file({key: _stored(state[key], dtype) for key in keys}, temporary / name, metadata={"format": "pt"})
        if len(shards) > 1:
            weight_map = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
            index = {"metadata": {}, "weight_map": weight_map}
            (temporary / index_name).write_text(json.dumps(index, indent=1, sort_keys=True))
        save_config(temporary, config)
        for name in names:  # safetensors writes files that their owner alone may read
            (temporary / name).chmod((temporary / "config.json").stat().st_mode)
    for stale in weight_file_names(folder):
        if stale not in (*names, index_name if len(shards) > 1 else ""):
            (folder / stale).unlink()


def save_config(folder: Path, config: Any) -> None:
    """Write folder/config.json: a dataclass with its class name under `config_type`, a mapping as it is."""
    content = dict(config) if isinstance(config, Mapping) else config_to_dict(config)
    (folder / "config.json").write_text(json.dumps(content, indent=1) + "\n")


def load_config(source: str | Path, config_type: type[Config]) -> Config:
    """Read config.json of a folder or hub id: our layout or the released one. Errors: CheckpointError."""
    location = resolve(source)
    path = (location if location.is_dir() else location.parent) / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{location}: has no config.json")
    try:
        return config_from_dict(config_type, json.loads(path.read_text()))
    except (json.JSONDecodeError, ConfigError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def resolve(source: str | Path) -> Path:
    """The local folder or file of `source`; a hub id that is not a local path is downloaded.

    "owner/name" is a whole repository, "owner/name:vae" a folder and "owner/name:weights.pth" a file of one.
    """
    path = Path(source).expanduser()
    if path.exists():
        return path
    hub_id = _HUB_ID.fullmatch(str(source))
    if hub_id is None:
        raise CheckpointError(
            f"checkpoint {str(source)!r} is neither an existing folder or file nor a hub id (owner/name)"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    part = (hub_id["part"] or "").strip("/")
    patterns = [part, *(f"{part}/{pattern}" for pattern in _HUB_FILES)] if part else list(_HUB_FILES)
    try:
        found = Path(snapshot_download(hub_id["id"], allow_patterns=patterns)) / part
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"checkpoint {str(source)!r} is no local folder and the hub does not give it: {reason}"
        ) from error
    if not found.exists():
        raise CheckpointError(f"checkpoint {str(source)!r}: {hub_id['id']} on the hub has no {part}")
    return found


@contextmanager
def replace_files(folder: Path) -> Iterator[Path]:
    """A temporary folder whose files move into `folder` when the block ends well, and vanish when it does not."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder))
    try:
        yield temporary
        for path in sorted(temporary.iterdir()):
            _flush_to_disk(path)
        for path in sorted(temporary.iterdir()):
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _fill(
    model: nn.Module,
    files: list[WeightFile],
    location: Path,
    *,
    strict: bool,
    dtype: torch.dtype | None,
    device: torch.device | None,
) -> LoadReport:
    """Compare, then move each tensor to its place; `device=None` copies into what the model already has."""
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict(keep_vars=True).items()}
    stored: dict[str, tuple[int, ...]] = {}
    for file in files:
        stored.update(file.shapes())
    not_loaded = getattr(model, "keys_not_loaded", ())  # prefixes of what training alone needs
    stored = {name: shape for name, shape in stored.items() if not name.startswith(not_loaded)}
    placements, report = plan(stored, wanted)
    if report.mis_shaped or not placements or (strict and report):
        hint = _other_family(location, type(model), stored)
        raise CheckpointError(f"{location}: does not fit {type(model).__name__}: {report}{hint}")
    owners = {
        f"{prefix}.{name}" if prefix else name: (module, name)
        for prefix, module in model.named_modules()
        for name in (*module._parameters, *module._buffers)
    }
    dtypes = set()
    for file in files:
        for name, tensor in file.tensors():
            if name not in placements:
                continue
            module, leaf = owners[placements[name].target]
            tensor = placements[name].change(tensor)
            if device is None:
                with torch.no_grad():
                    getattr(module, leaf).copy_(tensor)
                continue
            target_dtype = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
            dtypes.add(target_dtype)
            _assign(module, leaf, tensor.to(device=device, dtype=target_dtype))
    if device is not None:
        floating = {kind for kind in dtypes if kind.is_floating_point}
        model.to(device=device, dtype=floating.pop() if len(floating) == 1 else None)  # buffers that are not stored
    return report


def _other_family(
    location: Path, model_type: Callable[..., nn.Module], stored: Mapping[str, tuple[int, ...]] | None = None
) -> str:
    """ "; looks like STDiT2 of Open-Sora 1.1" where the keys are of another model than `model_type`, else ""."""
    if stored is None:
        try:
            stored = {name: shape for file in weight_files(location) for name, shape in file.shapes().items()}
        except CheckpointError:  # the caller has an error to raise already
            return ""
    family = recognise(stored)
    is_other = family is not None and family.name != getattr(model_type, "__name__", family.name)
    return f"; looks like {family}" if is_other else ""


def _assign(module: nn.Module, leaf: str, tensor: Tensor) -> None:
    if leaf in module._parameters:
        requires_grad = module._parameters[leaf].requires_grad and tensor.is_floating_point()
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=requires_grad)
    else:
        module._buffers[leaf] = tensor


@contextmanager
def _empty_parameters() -> Iterator[None]:
    """Parameters made inside land on the meta device; buffers stay real: those that no file holds keep their value.

    A whole-model `torch.device("meta")` would lose the buffers that are computed, not stored. The memory behind a
    parameter is released untouched, before its initialisation could write to it.
    """

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None:
            return None
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)

    handle = register_module_parameter_registration_hook(to_meta)
    try:
        yield
    finally:
        handle.remove()


def _split(state: dict[str, Tensor], max_bytes: int, dtype: torch.dtype | None) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in state.items():
        width = dtype.itemsize if dtype is not None and tensor.is_floating_point() else tensor.element_size()
        size = math.prod(tensor.shape) * width
        if shards[-1] and filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _stored(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    tensor = tensor.to(device="cpu", dtype=dtype if tensor.is_floating_point() else None).contiguous()
    return tensor.clone() if tensor.untyped_storage().nbytes() != tensor.nbytes else tensor


def _flush_to_disk(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
