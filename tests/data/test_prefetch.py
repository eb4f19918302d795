"""Batches read ahead: the same ones in the same order, a position that reading ahead does not move, and errors."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import pytest
import torch

from opensora.data.prefetch import Prefetcher


class Counting:
    """Batches of the numbers from 0; each takes `seconds`, and number `last` fails."""

    def __init__(self, *, seconds: float = 0.0, last: int = 1000) -> None:
        self.number, self.seconds, self.last = 0, seconds, last

    def forever(self) -> Iterator[dict[str, Any]]:
        while True:
            time.sleep(self.seconds)
            if self.number == self.last:
                raise OSError(f"batch {self.number} cannot be read")
            self.number += 1
            yield {"x": torch.tensor([self.number - 1]), "text": [str(self.number - 1)], "pair": (torch.ones(1), None)}

    def state_dict(self) -> dict[str, int]:
        return {"number": self.number}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.number = state["number"]


def numbers(batches: Any, count: int) -> list[int]:
    return [int(batch["x"]) for batch in islice(batches, count)]


@pytest.mark.parametrize("depth", [1, 3])
def test_batches_come_in_order_and_the_position_is_that_of_the_last_one(depth):
    loader = Counting()
    prefetcher = Prefetcher(loader, depth=depth)
    assert prefetcher.state_dict() == {"number": 0}
    assert numbers(prefetcher, 3) == [0, 1, 2]
    deadline = time.monotonic() + 5
    while loader.number < 3 + depth and time.monotonic() < deadline:
        time.sleep(0.001)
    assert 3 + depth <= loader.number <= 4 + depth  # one waits for a place
    assert prefetcher.state_dict() == {"number": 3}
    prefetcher.close()


def test_a_resumed_prefetcher_meets_the_batches_after_the_last_one():
    first = Prefetcher(Counting())
    numbers(first, 4)
    second = Prefetcher(Counting())
    assert numbers(second, 2) == [0, 1]
    second.load_state_dict(first.state_dict())
    assert numbers(second, 3) == [4, 5, 6]
    first.close()
    assert numbers(first, 2) == [4, 5]  # closing throws nothing away
    first.close()
    second.close()


def test_an_error_is_raised_in_its_turn_and_again():
    prefetcher = Prefetcher(Counting(last=2), depth=3)
    assert numbers(prefetcher, 2) == [0, 1]
    for _ in range(2):
        with pytest.raises(OSError, match="batch 2 cannot be read"):
            next(prefetcher)
    assert prefetcher.state_dict() == {"number": 2}
    assert not threads()


def test_waiting_is_measured_and_disappears_where_steps_take_longer():
    prefetcher = Prefetcher(Counting(seconds=0.05))
    next(prefetcher)
    assert prefetcher.data_seconds >= 0.04
    waited = prefetcher.total_data_seconds
    for _ in range(3):
        time.sleep(0.1)
        next(prefetcher)
    assert prefetcher.total_data_seconds - waited < 0.1  # without reading ahead, 0.15
    prefetcher.close()


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "prefetch"]


def test_a_forgotten_prefetcher_ends_its_thread():
    prefetcher = Prefetcher(Counting())
    next(prefetcher)
    assert threads()
    del prefetcher
    assert not threads()


class FakeAccelerator:
    """In place of torch.cuda: notes what is asked of streams and events."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def Stream(self, device: torch.device) -> FakeAccelerator:
        return self

    def Event(self) -> FakeAccelerator:
        return self

    def current_stream(self, device: torch.device) -> FakeAccelerator:
        return self

    @contextmanager
    def stream(self, stream: FakeAccelerator) -> Iterator[None]:
        self.calls.append("copy")
        yield

    def record(self, stream: FakeAccelerator) -> None:
        self.calls.append("record")

    def wait_event(self, event: FakeAccelerator) -> None:
        self.calls.append("wait")


def test_an_accelerator_copies_on_a_stream_of_its_own_and_the_step_waits_for_the_copy(monkeypatch):
    device, kept = FakeAccelerator(), []
    monkeypatch.setattr(torch, "get_device_module", lambda _: device)
    monkeypatch.setattr("opensora.data.prefetch._pinned", lambda tensor: tensor)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: kept.append(tensor))
    prefetcher = Prefetcher(Counting(last=1), "meta")
    batch = next(prefetcher)
    assert (batch["x"].device.type, batch["pair"][0].device.type, batch["text"]) == ("meta", "meta", ["0"])
    assert device.calls == ["copy", "record", "wait"]
    assert [tensor is other for tensor, other in zip(kept, (batch["x"], batch["pair"][0]), strict=True)] == [True, True]
    with pytest.raises(OSError, match="cannot be read"):
        next(prefetcher)


def test_what_is_no_tensor_stays_as_it_is():
    prefetcher = Prefetcher(Counting(), "cpu")
    batch = next(prefetcher)
    assert batch["text"] == ["0"]
    assert batch["pair"][1] is None
    assert prefetcher.forever() is prefetcher
    prefetcher.close()
    with pytest.raises(ValueError, match="depth must be at least 1, got 0"):
        Prefetcher(Counting(), depth=0)
