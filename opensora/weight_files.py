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


class CheckpointError(ValueError):
    """A checkpoint that is absent, damaged, or not the one the model needs."""


class WeightFile(Protocol):
    path: Path

    def shapes(self) -> dict[str, tuple[int, ...]]: ...

    def tensors(self) -> Iterator[tuple[str, Tensor]]: ...


def weight_files(location: Path) -> list[WeightFile]:
    """The weight files of a folder (or the file itself), in reading order. Errors: CheckpointError."""
    if location.is_file():
        return [_weight_file(location)]
    for index in sorted(location.glob("*.index.json")):
        names = sorted(set(json.loads(index.read_text()).get("weight_map", {}).values()))
        absent = [name for name in names if not (location / name).is_file()]
        if absent:
            raise CheckpointError(f"{location}: {index.name} names {', '.join(absent)}, which the folder lacks")
        if names:
            return [_weight_file(location / name) for name in names]
    for suffix in _SUFFIXES:
        whole = [location / f"{stem}{suffix}" for stem in _STEMS]
        for path in whole:
            if path.is_file():
                return [_weight_file(path)]
        shards = sorted(path for stem in _STEMS for path in location.glob(f"{stem}-*-of-*{suffix}"))
        if shards:
            return [_weight_file(path) for path in shards]
    checkpoints = sorted(location.glob("*.ckpt"))  # of a training of Open-Sora-Plan's, under any name
    if len(checkpoints) > 1:
        raise CheckpointError(
            f"{location}: holds several checkpoints, name one: {', '.join(p.name for p in checkpoints)}"
        )
    if checkpoints:
        return [_weight_file(checkpoints[0])]
    raise CheckpointError(
        f"{location}: holds no weights (looked for {', '.join(_STEMS)} with {', '.join(_SUFFIXES)}, and *.ckpt)"
    )


def weight_file_names(folder: Path) -> list[str]:
    pattern = re.compile(rf"({'|'.join(_STEMS)})(-\d+-of-\d+)?\.(safetensors|bin|pt|pth)(\.index\.json)?")
    return [path.name for path in folder.iterdir() if pattern.fullmatch(path.name)]


def _weight_file(path: Path) -> WeightFile:
    return SafetensorsFile(path) if path.suffix == ".safetensors" else PickledFile(path)


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
        self._data_start = 8 + length
        needed = max((entry["data_offsets"][1] for entry in self._header.values()), default=0)
        if self._data_start + needed > size:
            raise CheckpointError(f"{path}: is cut short: {size} bytes, needs {self._data_start + needed}")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(entry["shape"]) for name, entry in self._header.items()}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        with self.path.open("rb", buffering=0) as stream:
            for name, entry in sorted(self._header.items(), key=lambda item: item[1]["data_offsets"][0]):
                if entry["dtype"] not in _SAFETENSORS_DTYPES:
                    raise CheckpointError(f"{self.path}: {name} has the unknown dtype {entry['dtype']}")
                tensor = torch.empty(entry["shape"], dtype=_SAFETENSORS_DTYPES[entry["dtype"]])
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
    """A `torch.save` file of tensors; `weights_only=True`, so that it cannot run code."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._shapes = {name: tuple(tensor.shape) for name, tensor in self._load("meta").items()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return dict(self._shapes)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from self._load("cpu").items()

    def _load(self, device: str) -> dict[str, Tensor]:
        try:
            content = torch.load(self.path, map_location=device, weights_only=True)
        except Exception as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise CheckpointError(f"{self.path}: cannot be read as tensors only: {reason}") from error
        if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
            content = content["state_dict"]  # PixArt's files keep the weights under this key
        if not isinstance(content, dict):
            raise CheckpointError(f"{self.path}: holds {type(content).__name__}, expected a dictionary of tensors")
        return {name: value for name, value in content.items() if isinstance(value, Tensor)}
