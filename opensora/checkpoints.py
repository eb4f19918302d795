"""Load and save models: a local folder or file, or a hub id; our config.json and the released one.

A folder holds `config.json` and one of

* `model.safetensors` or `diffusion_pytorch_model.safetensors`, whole or in shards with an `.index.json`;
* `pytorch_model.bin` (`.pt`, `.pth`), whole or in shards, read with `weights_only=True`;
* one `*.ckpt` of Open-Sora-Plan's VAE training, read likewise.

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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from opensora.config_files import ConfigError, config_from_dict, config_to_dict
from opensora.weight_files import CheckpointError, WeightFile, weight_file_names, weight_files

Config = TypeVar("Config")
Model = TypeVar("Model", bound=nn.Module)

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES = ("*.json", "*.safetensors", "*.bin", "*.pt", "*.pth", "*.model", "*.txt")


def load_model(
    source: str | Path,
    model_type: Callable[[Config], Model],
    config_type: type[Config],
    *,
    config: Config | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> Model:
    """Build `model_type(config)` without allocating its weights, then read them from `source`; returned in eval mode.

    Shapes: those of the model. dtype: floating-point weights become `dtype`; None keeps what is stored.
    Errors: CheckpointError naming every missing, unexpected and mis-shaped key, before any weight is read.
    Source: loading rules of Open-Sora v1.2.0 (opensora/utils/ckpt_utils.py), made strict.
    """
    location = resolve(source)
    if config is None:
        config = load_config(location, config_type)
    with _empty_parameters():
        model = model_type(config)
    _fill(model, weight_files(location), location, strict=True, dtype=dtype, device=torch.device(device))
    return model.eval()


def load_weights(model: nn.Module, source: str | Path, *, strict: bool = True) -> LoadReport:
    """Copy the weights of `source` into an existing model, in the model's dtypes and devices.

    With `strict=False` missing and unexpected keys are reported, not refused (a PixArt checkpoint has no temporal
    blocks); a wrong shape is always refused, and so is a file of which no key fits. Errors: CheckpointError.
    """
    location = resolve(source)
    return _fill(model, weight_files(location), location, strict=strict, dtype=None, device=None)


def save_model(
    folder: str | Path,
    model: nn.Module | Mapping[str, Tensor],
    config: Any,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 << 30,
) -> None:
    """Write config.json and model.safetensors (in shards above `max_shard_bytes`) into `folder`.

    `model` is a module or its state dict.
    Every file is complete under a temporary name before the first one is renamed: a full disk or a kill leaves the
    previous checkpoint as it was. `dtype` converts floating-point weights in the file, not in the model.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = dict(model.state_dict() if isinstance(model, nn.Module) else model)
    shards = _split(state, max_shard_bytes, dtype)
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    with replace_files(folder) as temporary:
        for name, keys in zip(names, shards, strict=True):
            save_file({key: _stored(state[key], dtype) for key in keys}, temporary / name, metadata={"format": "pt"})
        if len(shards) > 1:
            weight_map = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
            index = {"metadata": {}, "weight_map": weight_map}
            (temporary / "model.safetensors.index.json").write_text(json.dumps(index, indent=1, sort_keys=True))
        save_config(temporary, config)
        for name in names:  # safetensors writes files that their owner alone may read
            (temporary / name).chmod((temporary / "config.json").stat().st_mode)
    for stale in weight_file_names(folder):
        if stale not in (*names, "model.safetensors.index.json" if len(shards) > 1 else ""):
            (folder / stale).unlink()


def save_config(folder: Path, config: Any) -> None:
    """Write `config` (a dataclass) as folder/config.json, with its class name under `config_type`."""
    (folder / "config.json").write_text(json.dumps(config_to_dict(config), indent=1) + "\n")


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
    """The local folder or file of `source`; a hub id ("owner/name") that is not a local path is downloaded."""
    path = Path(source).expanduser()
    if path.exists():
        return path
    if not _HUB_ID.fullmatch(str(source)):
        raise CheckpointError(
            f"checkpoint {str(source)!r} is neither an existing folder or file nor a hub id (owner/name)"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(source), allow_patterns=list(_HUB_FILES)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"checkpoint {str(source)!r} is no local folder and the hub does not give it: {reason}"
        ) from error


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


@dataclass(frozen=True)
class LoadReport:
    """Keys that did not find their place: model keys without weights, weights without a key, and wrong shapes."""

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mis_shaped: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.mis_shaped)

    def __str__(self) -> str:
        parts = []
        for title, keys in (
            ("missing", self.missing),
            ("unexpected", self.unexpected),
            ("mis-shaped", self.mis_shaped),
        ):
            if keys:
                shown = ", ".join(keys[:12]) + (f", and {len(keys) - 12} more" if len(keys) > 12 else "")
                parts.append(f"{len(keys)} {title} ({shown})")
        return "; ".join(parts) or "every key found its place"


@dataclass(frozen=True)
class _Placement:
    """Where a stored tensor goes, and how it must be changed on the way."""

    target: str
    shape: tuple[int, ...]
    change: Callable[[Tensor], Tensor] = field(default=lambda tensor: tensor)


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
    plan, report = _plan(stored, wanted)
    if report.mis_shaped or not plan or (strict and report):
        raise CheckpointError(f"{location}: does not fit {type(model).__name__}: {report}")
    owners = {
        f"{prefix}.{name}" if prefix else name: (module, name)
        for prefix, module in model.named_modules()
        for name in (*module._parameters, *module._buffers)
    }
    dtypes = set()
    for file in files:
        for name, tensor in file.tensors():
            if name not in plan:
                continue
            module, leaf = owners[plan[name].target]
            tensor = plan[name].change(tensor)
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


def _plan(
    stored: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]
) -> tuple[dict[str, _Placement], LoadReport]:
    plan: dict[str, _Placement] = {}
    unexpected, mis_shaped = [], []
    kept = {name for name in wanted if name.startswith("pos_embed")}  # computed by the model, never loaded
    for name, shape in stored.items():
        if name.startswith("pos_embed"):
            continue
        placement = _place(name, shape, wanted)
        if placement.target not in wanted:
            unexpected.append(name)
        elif placement.shape != wanted[placement.target]:
            mis_shaped.append(f"{name} {list(shape)} for {list(wanted[placement.target])}")
        else:
            plan[name] = placement
    found = {placement.target for placement in plan.values()} | kept
    bad = {entry.split(" ")[0] for entry in mis_shaped}
    missing = [name for name in wanted if name not in found and name not in bad]
    return plan, LoadReport(tuple(missing), tuple(unexpected), tuple(mis_shaped))


def _place(name: str, shape: tuple[int, ...], wanted: dict[str, tuple[int, ...]]) -> _Placement:
    """Upstream's rules: the null caption's length, PixArt's 2-D patch embedding, PixArt's block names."""
    target = name
    if name.startswith("blocks.") and name not in wanted:
        target = f"spatial_{name}"
    goal = wanted.get(target)
    if goal is None or goal == shape:
        return _Placement(target, shape)
    if name.endswith("y_embedder.y_embedding") and len(shape) == 2 and shape[1:] == goal[1:]:
        return _Placement(target, goal, lambda tensor: _with_length(tensor, goal[0]))
    if name.endswith("x_embedder.proj.weight") and (*shape[:2], 1, *shape[2:]) == goal:
        return _Placement(target, goal, lambda tensor: tensor.unsqueeze(2))
    return _Placement(target, shape)


def _with_length(table_LC: Tensor, length: int) -> Tensor:
    """Cut to `length` rows, or repeat the last row up to it."""
    extra = max(0, length - table_LC.shape[0])
    return torch.cat([table_LC[:length], table_LC[-1:].expand(extra, -1)])


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
