"""Where chunks wait that are needed again a whole clip later: on the device, on the host, or in files.

A chunk is parked once and loaded by each late reader; it is gone when the last of them has passed.
"""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

Place = Literal["device", "host", "file"]


class Parked:
    """A chunk that waits elsewhere than on its device."""

    def load(self) -> Tensor:
        raise NotImplementedError


class Spill:
    """Leaves chunks where they are."""

    num_bytes_written = 0

    def put(self, chunk: Tensor) -> Tensor | Parked:
        return chunk


class HostSpill(Spill):
    """Keeps chunks of an accelerator in the memory of the host."""

    def put(self, chunk: Tensor) -> Tensor | Parked:
        if chunk.device.type == "cpu":
            return chunk
        self.num_bytes_written += chunk.nbytes
        return _OnHost(chunk)


class FileSpill(Spill):
    """Keeps each chunk in a file of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._num_files = folder, 0

    def put(self, chunk: Tensor) -> Tensor | Parked:
        if not chunk.nbytes:
            return chunk
        self.num_bytes_written += chunk.nbytes
        self._num_files += 1
        return _InFile(chunk, self._folder / f"{self._num_files}.frames")


class SpillOnPaper(Spill):
    """For predictions on meta tensors: parked chunks take no memory."""

    def put(self, chunk: Tensor) -> Tensor | Parked:
        self.num_bytes_written += chunk.nbytes
        chunk.permute(_order_in_memory(chunk)).contiguous()  # what is not dense is copied before it is written
        return _OnPaper(chunk)


@contextmanager
def open_spill(place: Place, folder: str | Path | None = None) -> Iterator[Spill]:
    """A spill whose files, below `folder` (None: the system's place for temporary files), are gone afterwards."""
    if place == "file":
        with tempfile.TemporaryDirectory(prefix="opensora-spill-", dir=folder) as name:
            yield FileSpill(Path(name))
    else:
        yield HostSpill() if place == "host" else Spill()


class _OnHost(Parked):
    def __init__(self, chunk: Tensor) -> None:
        self._chunk, self._device = chunk.to("cpu", copy=True), chunk.device

    def load(self) -> Tensor:
        return self._chunk.to(self._device)


class _InFile(Parked):
    def __init__(self, chunk: Tensor, path: Path) -> None:
        self._order = _order_in_memory(chunk)
        self._shape = [chunk.shape[axis] for axis in self._order]
        self._path, self._dtype, self._device = path, chunk.dtype, chunk.device
        weakref.finalize(self, path.unlink, missing_ok=True)
        path.write_bytes(_bytes_of(chunk.permute(self._order).contiguous().cpu()))

    def load(self) -> Tensor:
        # read at once: pages of a mapped file would come in some time later, and with them their memory
        chunk = torch.empty(self._shape, dtype=self._dtype)
        with self._path.open("rb") as file:
            num_read = file.readinto(_bytes_of(chunk))
        if num_read != chunk.nbytes:
            raise OSError(f"{self._path} holds {num_read} of {chunk.nbytes} bytes")
        return chunk.permute([self._order.index(axis) for axis in range(chunk.dim())]).to(self._device)


def _order_in_memory(chunk: Tensor) -> list[int]:
    """Axes from the largest stride to the smallest."""
    return sorted(range(chunk.dim()), key=chunk.stride, reverse=True)


def _bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())


class _OnPaper(Parked):
    def __init__(self, chunk: Tensor) -> None:
        self._shape, self._strides, self._dtype = chunk.shape, torch.empty_like(chunk).stride(), chunk.dtype

    def load(self) -> Tensor:
        return torch.empty_strided(self._shape, self._strides, dtype=self._dtype, device="meta").zero_()  # filled
