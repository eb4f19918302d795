"""Training state on disk: folders `step-00000200/` that are either whole or absent.

A checkpoint holds safetensors files in the layout of torch.distributed.checkpoint, where each rank has written its
shards, and state.json (counters, data position, configuration). Any number of ranks can read it. No pickle anywhere.
"""

from __future__ import annotations

import json
import shutil
import threading
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter

from opensora.parallel import ParallelContext
from opensora.training.files import remove_folder, sync_folder, write_json

_ALONE = "torch.distributed is disabled, unavailable or uninitialized"


class Checkpoints:
    """The checkpoints of one run, newest `keep` of them.

    `save` returns while a thread writes into a temporary folder, which the main rank renames when all ranks have
    written: a crash, a kill or a full disk never leaves half a checkpoint. Older ones are removed after that.
    All ranks call its methods alike, on a file system that they share.
    """

    def __init__(self, folder: str | Path, *, keep: int, context: ParallelContext) -> None:
        if keep < 1:
            raise ValueError(f"checkpoints: keep_checkpoints must be at least 1, got {keep}")
        self.folder = Path(folder)
        self.keep = keep
        self.context = context
        self._writing: _Writing | None = None
        # One process is no mistake. For the whole process: the thread that writes can't do it for itself alone.
        warnings.filterwarnings("ignore", message=_ALONE)

    def all(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return sorted(path for path in self.folder.glob("step-*") if path.is_dir())

    def latest(self) -> Path | None:
        """The newest complete one, as this rank sees it now."""
        return max(self.all(), default=None)

    def agreed_latest(self) -> Path | None:
        """The newest complete one as the main rank sees it: the same for all ranks."""
        return self.context.from_main(self.latest())

    def remove_unfinished(self) -> None:
        """What a killed run was writing or removing; on the main rank, before anything is saved."""
        for path in self.folder.glob(".step-*"):
            shutil.rmtree(path, ignore_errors=True)

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Starts to write `tensors`, in host memory and not touched any more, and `state` as state.json.

        Waits for the save before. Errors: OSError when that one could not be written, see `wait`.
        """
        self.wait()
        self._writing = _Writing(self, self.folder / f"step-{step:08d}", dict(tensors), state)
        self._writing.start()

    def check(self) -> None:
        """Raises what `wait` would raise, without waiting."""
        if self._writing is not None and not self._writing.is_alive():
            self.wait()

    def wait(self) -> None:
        """Until what `save` has started is in place.

        Raises OSError when it cannot be written (say, a full disk); the checkpoints before it stay as they were.
        """
        writing, self._writing = self._writing, None
        if writing is None:
            return
        writing.join()
        if writing.error is not None:
            raise OSError(
                f"checkpoint: cannot write {writing.path}: {_reason(writing.error)}; "
                f"last good checkpoint: {self.latest() or 'none'}"
            ) from writing.error

    def load(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        """Fills `tensors`, in host memory, each with its part; see `shapes_in` for what there is."""
        dcp.load(
            dict(tensors),
            storage_reader=HuggingFaceStorageReader(str(path)),
            process_group=self.context.checkpoint_group,
            no_dist=self.context.world_size == 1,
        )

    def _keep_newest(self) -> None:
        for old in self.all()[: -self.keep]:
            remove_folder(old)


class _Writing(threading.Thread):
    """One save. A daemon: a rank that must end does not wait for ranks that are gone."""

    def __init__(
        self, checkpoints: Checkpoints, path: Path, tensors: dict[str, Tensor], state: Mapping[str, Any]
    ) -> None:
        super().__init__(name=f"write {path.name}", daemon=True)
        self.path = path
        self.error: BaseException | None = None
        self._checkpoints = checkpoints
        self._tensors = tensors
        self._state = state

    def run(self) -> None:
        temporary = self.path.with_name(f".{self.path.name}.writing")
        try:
            self._write(temporary)
        except BaseException as error:  # kept for the thread that waits; dcp's own error is no Exception
            self.error = error
            if self._checkpoints.context.is_main:
                shutil.rmtree(temporary, ignore_errors=True)

    def _write(self, temporary: Path) -> None:
        context = self._checkpoints.context
        temporary.mkdir(parents=True, exist_ok=True)
        # Returns on the main rank when every rank has written its file and synchronised it with the disk.
        dcp.save(
            self._tensors,
            storage_writer=HuggingFaceStorageWriter(str(temporary), save_distributed=True),
            process_group=context.checkpoint_group,
            no_dist=context.world_size == 1,
        )
        if context.is_main:
            write_json(temporary / "state.json", self._state)
            sync_folder(temporary)
            temporary.rename(self.path)
            self._checkpoints._keep_newest()
        self._tensors = {}


def read_state(path: Path) -> dict[str, Any]:
    """The state.json of a checkpoint."""
    return json.loads((path / "state.json").read_text())


def shapes_in(path: Path) -> dict[str, tuple[int, ...]]:
    """{name: whole shape} of the tensors of a checkpoint."""
    found = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    return {name: tuple(entry.size) for name, entry in found.items()}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, whole."""
    reader = HuggingFaceStorageReader(str(path))
    entries = reader.read_metadata().state_dict_metadata
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=_ALONE)
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def _reason(error: BaseException) -> str:
    """Without the tracebacks of all ranks that dcp puts into its text."""
    if isinstance(error, dcp.CheckpointException):
        reasons = {rank: _reason(failure) for rank, (failure, _) in error.failures.items()}
        return "; ".join(f"rank {rank}: {reason}" for rank, reason in reasons.items())
    if isinstance(error, SafetensorError):  # how safetensors reports a full disk
        return str(error).removeprefix("Error while serializing: ")
    return str(error)
