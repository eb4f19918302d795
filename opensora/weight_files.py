"""Weight files: which ones a folder holds, and reading them one tensor at a time."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

_STEMS = ("model", "diffusion_pytorch_model", "pytorch_model")
_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
_NAMED = re.compile(rf"({'|'.join(_STEMS)})(-\d+-of-\d+)?\.(safetensors|bin|pt|pth)(\.index\.json)?")
# Beside weights in training checkpoints.
_OTHER_STATE = re.compile(r"(?i).*optim.*|.*scheduler.*|sampler.*|rng.*|random_states.*|scaler.*|training_args.*")
_EMA_FILE, _EMA_FOLDER, _MODEL_FOLDER = "ema.pt", "model_ema", "model"
# Where training code keeps weights inside a pickled dictionary; averaged ones, then plain ones.
_EMA_ENTRIES = ("ema_state_dict", "state_dict_ema", "model_ema", "ema")
_ENTRIES = ("state_dict", "model_state_dict", "model", "module", "gen_model")
# What wrappers for parallel training and compilation put before every name.
_WRAPPERS = ("module.", "_orig_mod.")


class CheckpointError(ValueError):
    """A checkpoint that is absent, damaged, or not the one the model needs."""


class WeightFile(Protocol):
    """`entry`: under which key of a pickled dictionary the weights are, "" for at its top."""

    path: Path
    entry: str

    def shapes(self) -> dict[str, tuple[int, ...]]: ...

    def dtypes(self) -> dict[str, torch.dtype]: ...

    def tensors(self) -> Iterator[tuple[str, Tensor]]: ...


def weight_files(location: Path, *, prefer_ema: bool = False) -> list[WeightFile]:
    """The weight files of a folder (or the file itself), in reading order.

    A folder holds weights under a usual name, whole or in shards; or a folder `model` that does, as a training
    checkpoint; or a single file of weights under any name. With `prefer_ema`, weights that training has averaged come
    before the last ones, where there are any: `ema.pt`, a folder `model_ema`, or an entry of a pickled dictionary.
    Errors: CheckpointError.
    """
    if location.is_file():
        return [_weight_file(location, prefer_ema)]
    if prefer_ema and (location / _EMA_FILE).is_file():
        return [_weight_file(location / _EMA_FILE, prefer_ema)]
    if prefer_ema and (location / _EMA_FOLDER).is_dir():
        return weight_files(location / _EMA_FOLDER)
    paths = _named_weights(location)
    if not paths and (location / _MODEL_FOLDER).is_dir():
        return weight_files(location / _MODEL_FOLDER)
    if not paths:
        paths = loose_weights(location)
        if len(paths) > 1:
            names = ", ".join(path.name for path in paths)
            raise CheckpointError(f"{location}: holds several checkpoints, name one: {names}")
    if not paths:
        raise CheckpointError(
            f"{location}: holds no weights (looked for {', '.join(_STEMS)} with {', '.join(_SUFFIXES)}, a folder "
            f"{_MODEL_FOLDER}, and a file of any name)"
        )
    return [_weight_file(path, prefer_ema) for path in paths]


def has_named_weights(folder: Path) -> bool:
    """Whether a folder holds weights, or an index of them, under a usual name."""
    return bool(weight_file_names(folder))


def loose_weights(folder: Path) -> list[Path]:
    """Files of weights under other names than the usual ones: OpenSora-v1-HQ-16x256x256.pth, a trainer's *.ckpt."""
    suffixes = {*_SUFFIXES, ".ckpt"}
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_file()
        and path.suffix in suffixes
        and not _OTHER_STATE.fullmatch(path.name)
        and not _NAMED.fullmatch(path.name)
    )


def weight_file_names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if _NAMED.fullmatch(path.name)]


def _named_weights(location: Path) -> list[Path]:
    for index in sorted(path for stem in _STEMS for path in location.glob(f"{stem}.*index.json")):
        names = _indexed_files(index)
        absent = [name for name in names if not (location / name).is_file()]
        if absent:
            raise CheckpointError(f"{location}: {index.name} names {', '.join(absent)}, which the folder lacks")
        if names:
            return [location / name for name in names]
    for suffix in _SUFFIXES:
        whole = [location / f"{stem}{suffix}" for stem in _STEMS]
        for path in whole:
            if path.is_file():
                return [path]
        shards = sorted(path for stem in _STEMS for path in location.glob(f"{stem}-*-of-*{suffix}"))
        if shards:
            return shards
    return []


def _indexed_files(index: Path) -> list[str]:
    try:
        content = json.loads(index.read_text())
    except ValueError as error:  # no JSON, or no text
        raise CheckpointError(f"{index}: {error}") from error
    weight_map = content.get("weight_map", {}) if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index}: must hold an object whose weight_map gives each weight its file")
    return sorted(set(weight_map.values()))


def _weight_file(path: Path, prefer_ema: bool) -> WeightFile:
    return SafetensorsFile(path) if path.suffix == ".safetensors" else PickledFile(path, prefer_ema=prefer_ema)


_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


class SafetensorsFile:
    """Reads without memory-mapping: mapped pages count as resident, so a mapped file doubles the peak while copied."""

    entry = ""

    def __init__(self, path: Path) -> None:
        self.path = path
        size = path.stat().st_size
        with path.open("rb") as stream:
            start = stream.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
            if not 0 < length <= size - 8:
                raise CheckpointError(f"{path}: is no safetensors file, or it is cut short")
            try:
                self._header = json.loads(stream.read(length))
            except ValueError as error:
                raise CheckpointError(f"{path}: has a damaged header ({error})") from error
        self._header.pop("__metadata__", None)
        self._header = _unwrapped(self._header)
        self._data_start = 8 + length
        needed = max((entry["data_offsets"][1] for entry in self._header.values()), default=0)
        if self._data_start + needed > size:
            raise CheckpointError(f"{path}: is cut short: {size} bytes, needs {self._data_start + needed}")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(entry["shape"]) for name, entry in self._header.items()}

    def dtypes(self) -> dict[str, torch.dtype]:
        for name, entry in self._header.items():
            if entry["dtype"] not in _SAFETENSORS_DTYPES:
                raise CheckpointError(f"{self.path}: {name} has the unknown dtype {entry['dtype']}")
        return {name: _SAFETENSORS_DTYPES[entry["dtype"]] for name, entry in self._header.items()}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        dtypes = self.dtypes()
        with self.path.open("rb", buffering=0) as stream:
            for name, entry in sorted(self._header.items(), key=lambda item: item[1]["data_offsets"][0]):
                tensor = torch.empty(entry["shape"], dtype=dtypes[name])
                first, last = entry["data_offsets"]
                if tensor.nbytes != last - first:
                    raise CheckpointError(
                        f"{self.path}: {name} holds {last - first} bytes, its shape needs {tensor.nbytes}"
                    )
                stream.seek(self._data_start + first)
                _read_into(stream, tensor)
                yield name, tensor


def _read_into(stream: Any, tensor: Tensor) -> None:
    view = memoryview(tensor.view(-1).view(torch.uint8).numpy()) if tensor.numel() else memoryview(bytearray())
    done = 0
    while done < len(view):  # one read returns at most 2 GiB on Linux
        count = stream.readinto(view[done:])
        if not count:
            raise CheckpointError(f"{stream.name}: ended while it was read")
        done += count


class PickledFile:
    """A `torch.save` file of tensors; `weights_only=True`, so that it cannot run code.

    Training code keeps weights under a key of its own, or under two: the last and the averaged ones.
    """

    def __init__(self, path: Path, *, prefer_ema: bool = False) -> None:
        self.path = path
        self._prefer_ema = prefer_ema
        self.entry, self._empty = self._load("meta")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self._empty.items()}

    def dtypes(self) -> dict[str, torch.dtype]:
        return {name: tensor.dtype for name, tensor in self._empty.items()}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from self._load("cpu")[1].items()

    def _load(self, device: str) -> tuple[str, dict[str, Tensor]]:
        with self.path.open("rb") as stream:
            if stream.read(1) not in (b"P", b"\x80"):  # an archive, or a pickle of PyTorch before 1.6
                raise CheckpointError(f"{self.path}: is no file of weights")
        try:
            content = torch.load(self.path, map_location=device, weights_only=True)
        except Exception as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise CheckpointError(f"{self.path}: cannot be read as tensors only: {reason}") from error
        if not isinstance(content, dict):
            raise CheckpointError(f"{self.path}: holds {type(content).__name__}, expected a dictionary of tensors")
        entries = (*_EMA_ENTRIES, *_ENTRIES) if self._prefer_ema else (*_ENTRIES, *_EMA_ENTRIES)
        entry, tensors = _find_tensors(content, entries)
        return entry, _unwrapped(tensors)


def _find_tensors(content: dict[str, Any], entries: tuple[str, ...]) -> tuple[str, dict[str, Tensor]]:
    """The tensors under the first of `entries` that has any, as "state_dict.gen_model", else those at the top."""
    for entry in entries:
        if isinstance(content.get(entry), dict):
            below, tensors = _find_tensors(content[entry], entries)
            if tensors:
                return f"{entry}.{below}".rstrip("."), tensors
    return "", {name: value for name, value in content.items() if isinstance(value, Tensor)}


def _unwrapped(named: dict[str, Any]) -> dict[str, Any]:
    """Without what a wrapper has put before all names."""
    for prefix in _WRAPPERS:
        while named and all(name.startswith(prefix) for name in named):
            named = {name[len(prefix) :]: value for name, value in named.items()}
    return named
