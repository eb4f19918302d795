"""The next batches, on the device before they are asked for."""

from __future__ import annotations

import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor


class Loader(Protocol):
    """`ClipLoader`: endless, and it knows where it stands."""

    def forever(self) -> Iterator[Any]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Prefetcher:
    """Takes batches from a loader in a thread and moves their tensors to `device`, up to `depth` batches ahead.

    An endless iterator. `state_dict()` is the position after the batch handed out last, however many were read ahead,
    so that a resumed run meets the same batches. `data_seconds` is how long the last batch was waited for,
    `total_data_seconds` all of them. On an accelerator, tensors are copied from pinned memory on a stream of their own.
    What the loader raises, `next` raises. `close()` ends the thread and the loader's workers; so do the end of the
    process and that of the last reference to the prefetcher.
    """

    def __init__(self, loader: Loader, device: torch.device | str = "cpu", *, depth: int = 2) -> None:
        if depth < 1:
            raise ValueError(f"Prefetcher: depth must be at least 1, got {depth}")
        self._loader, self._device, self._depth = loader, torch.device(device), depth
        self._state = loader.state_dict()
        self._worker: _Worker | None = None
        self._stop: Callable[[], Any] = lambda: None
        self.data_seconds = 0.0
        self.total_data_seconds = 0.0

    def __iter__(self) -> Prefetcher:
        return self

    def __next__(self) -> Any:
        if self._worker is None:
            self._worker = _Worker(self._loader, self._device, self._depth)
            # Also at exit, while threads still run; a __del__ could come when they no longer do, and wait for ever.
            self._stop = weakref.finalize(self, self._worker.stop)
        start = time.perf_counter()
        try:
            batch, self._state = self._worker.take()
        except BaseException:
            self.close()
            raise
        self.data_seconds = time.perf_counter() - start
        self.total_data_seconds += self.data_seconds
        return batch

    def forever(self) -> Iterator[Any]:
        """Itself, where a loader is expected."""
        return self

    def state_dict(self) -> dict[str, Any]:
        return dict(self._state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the batch at which `state_dict` was called; what was read ahead is thrown away."""
        self.close()
        self._loader.load_state_dict(state)
        self._state = dict(state)

    def close(self) -> None:
        """Stop reading ahead. The next batch, if any is asked for, is the one after the last one handed out."""
        if self._worker is not None:
            self._stop()
            self._worker = None
            self._loader.load_state_dict(self._state)


class _Worker:
    """One run of the thread; a new position needs a new one, so that nothing of the old one is handed out."""

    def __init__(self, loader: Loader, device: torch.device, depth: int) -> None:
        self._loader, self._device = loader, device
        self._ready: queue.Queue[tuple[Any, Any, Any]] = queue.Queue(maxsize=depth)
        self._is_stopped = threading.Event()
        self._stream = None if device.type == "cpu" else torch.get_device_module(device).Stream(device)
        self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)
        self._thread.start()

    def take(self) -> tuple[Any, dict[str, Any]]:
        batch, state, event = self._ready.get()
        if isinstance(batch, BaseException):
            raise batch
        if event is not None:
            stream = torch.get_device_module(self._device).current_stream(self._device)
            stream.wait_event(event)
            # Its memory must not be given to another copy while this stream still reads it.
            _for_each_tensor(batch, lambda tensor: tensor.record_stream(stream) or tensor)
        return batch, state

    def stop(self) -> None:
        self._is_stopped.set()
        self._thread.join()

    def _run(self) -> None:
        batches = self._loader.forever()
        try:
            while not self._is_stopped.is_set():
                batch = next(batches)
                state = dict(self._loader.state_dict())
                self._hand_over((*self._moved(batch), state))
        except BaseException as error:  # whatever it is, it belongs to the thread that waits
            self._hand_over((error, None, None))
        finally:
            batches.close()  # ends worker processes

    def _hand_over(self, entry: tuple[Any, Any, Any]) -> None:
        batch, event, state = entry
        while not self._is_stopped.is_set():
            try:
                self._ready.put((batch, state, event), timeout=0.1)
                return
            except queue.Full:
                continue

    def _moved(self, batch: Any) -> tuple[Any, Any]:
        if self._stream is None:
            return batch, None
        module = torch.get_device_module(self._device)
        with module.stream(self._stream):
            moved = _for_each_tensor(batch, lambda tensor: _pinned(tensor).to(self._device, non_blocking=True))
            event = module.Event()
            event.record(self._stream)
        return moved, event


def _pinned(tensor: Tensor) -> Tensor:
    return tensor if tensor.device.type != "cpu" or tensor.is_pinned() else tensor.pin_memory()


def _for_each_tensor(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The batch with its tensors changed, in dicts, lists and tuples as deep as they go."""
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, dict):
        return {key: _for_each_tensor(value, change) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)) and any(isinstance(value, (Tensor, dict, list, tuple)) for value in batch):
        return type(batch)(_for_each_tensor(value, change) for value in batch)
    return batch
