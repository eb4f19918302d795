"""Ranks that are threads of one process, and PyTorch's symmetric memory among them in plain memory.

All else is what runs on GPUs: who exchanges what, whose half of which buffer it goes to, and the packing kernel, whose
threads are replayed on the CPU.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from opensora_kernels.sequence_parallel import peers
from opensora_kernels.sequence_parallel.all_to_all import Exchange
from tests.csrc import shards_replay

SECONDS = 20  # that a rank waits for the others before it fails


class Node:
    """What ranks of one group share: a meeting point, and the addresses of their buffers."""

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self.meeting = threading.Barrier(num_ranks)
        self.addresses: dict[int, int] = {}


class Group:
    """One rank's view of its process group."""

    def __init__(self, rank: int, node: Node) -> None:
        self.rank, self.node = rank, node

    def exchange(self, scatter: int, gather: int, shape: tuple[int, ...], length: int, num_tensors: int) -> Exchange:
        return Exchange(scatter, gather, shape, length, num_tensors, self.rank, self.node.num_ranks, self, True)


class Handle:
    """Of a buffer that all ranks have found."""

    def __init__(self, memory: Tensor, group: Group) -> None:
        self.rank, self._node = group.rank, group.node
        self._node.addresses[self.rank] = memory.data_ptr()
        self._node.meeting.wait(SECONDS)
        self.buffer_ptrs = [self._node.addresses[rank] for rank in range(self._node.num_ranks)]
        self._node.meeting.wait(SECONDS)

    def barrier(self, channel: int, timeout_ms: int) -> None:
        assert timeout_ms > 0, "a rank that died would leave the others waiting for ever"
        self._node.meeting.wait(SECONDS)


class SymmetricMemory:
    rendezvous = Handle

    @staticmethod
    def empty(size: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.full((size,), 0xA5, dtype=dtype)


class Stream:
    """All work is done when its call returns."""

    def synchronize(self) -> None:
        pass

    def wait_stream(self, other: Stream) -> None:
        pass


@contextmanager
def simulated() -> Iterator[None]:
    stream = Stream()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peers, "_symmetric_memory", lambda: SymmetricMemory)
        patch.setattr(peers, "_GRANULE", 512)  # so that buffers grow
        patch.setattr(torch.cuda, "current_stream", lambda device: stream)
        yield


def on_ranks(num_ranks: int, run: Callable[[Group], Any]) -> list[Any]:
    """What `run` returns on each of the ranks, all at once; each is late in turn."""
    node = Node(num_ranks)
    shards_replay.library()  # compiled once, before the threads all ask for it

    def of_rank(rank: int) -> Any:
        with shards_replay.OnCPU():
            try:
                time.sleep(0.002 * rank)
                return run(Group(rank, node))
            except BaseException:
                node.meeting.abort()
                raise

    with simulated(), ThreadPoolExecutor(num_ranks) as pool:
        return list(pool.map(of_rank, range(num_ranks)))
