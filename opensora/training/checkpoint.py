"""Training state on disk: folders `step-00000200/` that are either whole or absent.

A checkpoint holds weights.safetensors, ema.safetensors, optimizer.safetensors, rng.safetensors and state.json
(counters, data position, Python and NumPy random state, configuration). No pickle anywhere.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

Tensors = Mapping[str, Tensor]


class Checkpoints:
    """The checkpoints of one run, newest `keep` of them.

    `save` writes into a temporary folder and renames it, so that a crash, a kill or a full disk never leaves half a
    checkpoint; older ones are removed only after the new one is in place.
    """

    def __init__(self, folder: str | Path, *, keep: int) -> None:
        if keep < 1:
            raise ValueError(f"checkpoints: keep_checkpoints must be at least 1, got {keep}")
        self.folder = Path(folder)
        self.keep = keep

    def all(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return sorted(path for path in self.folder.glob("step-*") if path.is_dir())

    def latest(self) -> Path | None:
        return max(self.all(), default=None)

    def save(self, step: int, tensors: Mapping[str, Tensors], state: Mapping[str, Any]) -> Path:
        """Writes {name: tensors} as name.safetensors and `state` as state.json; returns the new folder.

        Raises OSError when it cannot be written (say, a full disk); the checkpoints before it stay as they were.
        """

        def write(folder: Path) -> None:
            for name, named_tensors in tensors.items():
                write_tensors(folder / f"{name}.safetensors", named_tensors)
            write_json(folder / "state.json", state)

        path = self.folder / f"step-{step:08d}"
        try:
            replace_folder(path, write)
        except OSError as error:
            kept = self.latest()
            raise OSError(
                f"checkpoint: cannot write {path}: {error}; last good checkpoint: {kept or 'none'}"
            ) from error
        for old in self.all()[: -self.keep]:
            shutil.rmtree(old)
        return path

    @staticmethod
    def load(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """({name: tensors}, state) of one checkpoint."""
        tensors = {file.stem: load_file(file) for file in sorted(path.glob("*.safetensors"))}
        return tensors, json.loads((path / "state.json").read_text())


def replace_folder(path: Path, write: Callable[[Path], None]) -> None:
    """Runs write(temporary folder), then puts that folder in the place of `path`; on failure `path` is untouched.

    Raises what `write` raises, except that a failure inside safetensors becomes an OSError.
    """
    temporary = path.with_name(f".{path.name}.writing")
    replaced = path.with_name(f".{path.name}.replaced")
    for leftover in (temporary, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        write(temporary)
        _sync_folder(temporary)
        if path.exists():
            path.rename(replaced)
        temporary.rename(path)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if replaced.exists() and not path.exists():
            replaced.rename(path)
        if isinstance(error, SafetensorError):  # how safetensors reports a full disk
            raise OSError(str(error)) from error
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def write_tensors(path: Path, tensors: Tensors) -> None:
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")


def random_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of every generator a training step may draw from: (torch tensors, JSON values)."""
    tensors = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        tensors |= {f"cuda.{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    _, keys, position, has_gauss, gauss = np.random.get_state()
    tensors["numpy"] = torch.from_numpy(np.asarray(keys).astype(np.int64))
    version, words, gauss_next = random.getstate()
    values = {"python": [version, list(words), gauss_next], "numpy": [int(position), int(has_gauss), float(gauss)]}
    return tensors, values


def set_random_state(tensors: Tensors, values: Mapping[str, Any]) -> None:
    """Undoes whatever was drawn since `random_state` gave these values."""
    torch.set_rng_state(tensors["cpu"])
    for name, state in tensors.items():
        if name.startswith("cuda.") and torch.cuda.is_available():
            torch.cuda.set_rng_state(state, int(name.removeprefix("cuda.")))
    position, has_gauss, gauss = values["numpy"]
    np.random.set_state(("MT19937", tensors["numpy"].numpy().astype(np.uint32), position, has_gauss, gauss))
    version, words, gauss_next = values["python"]
    random.setstate((version, tuple(words), gauss_next))


def _sync_folder(folder: Path) -> None:
    # A rename may reach the disk before the data it names; after a power cut the folder would hold empty files.
    for file in folder.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
