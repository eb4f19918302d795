"""Exchanges inside one node without a library between: each rank packs straight into the other ranks' memory.

The packing kernel writes every shard to where its rank reads it, so that what crosses the wire is the packing itself; a
barrier on the GPU then tells all ranks that all is there, and each unpacks. Receive buffers are PyTorch's symmetric
memory (`torch.distributed._symmetric_memory`): it exports allocations to the other processes and has the barrier, with
release and acquire across GPUs and a time limit. CUDA's IPC handles of our own would do less (no fabric handles) and be
one more thing to keep; that its interface may still change is why `why_not_peer_to_peer` looks for what is used here.
"""

from __future__ import annotations

import socket
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from opensora_kernels import _extension

from .ranks import rank_and_size

if TYPE_CHECKING:
    from .all_to_all import Exchange

MAX_RANKS = 8  # the addresses that one launch carries: kMaxTargets of csrc/pack_shards_maps.h
_CHANNEL = 0  # of the barrier; an allocation has its own, and nobody else uses ours
_TIMEOUT_MS = 600_000  # as long as NCCL waits by default; the GPU then reports an error
_GRANULE = 2 << 20  # bytes; CUDA maps memory in pieces of this size


def why_not_peer_to_peer(group: dist.ProcessGroup | None, device: torch.device | str) -> str | None:
    """Why `sequence_all_to_all(..., route="peer")` can't serve tensors of `device` between the ranks of `group`.

    A sentence, or None. All ranks call it, each with its own device, and all get the same answer: what is wrong on the
    first rank where something is. It asks for CUDA tensors, the compiled CUDA library, PyTorch's symmetric memory, two
    to eight ranks on one host with a GPU each, and that each rank sees the others' GPUs and can reach their memory.
    Errors: ValueError for a group without this process.
    """
    rank, num_ranks = rank_and_size("why_not_peer_to_peer", group)
    if num_ranks == 1:
        return "there is no other rank to exchange with"
    if num_ranks > MAX_RANKS:
        return f"a launch writes to {MAX_RANKS} ranks at most, the group has {num_ranks}"
    device = torch.device(device)
    reason = why_not_here(device)
    told = _told_by_all(group, (reason, socket.gethostname(), "" if reason else _uuid(device)))
    reasons, hosts, uuids = zip(*told, strict=True)
    if any(reasons):
        return _first(reasons)
    if len(set(hosts)) > 1:
        return f"the ranks are on more than one host: {', '.join(sorted(set(hosts)))}"
    return _first(_told_by_all(group, _why_not_reached(device, rank, uuids)))


def why_not_here(device: torch.device) -> str | None:
    """What stands against it on this machine, whatever the other ranks are."""
    if device.type != "cuda":
        return f"it needs CUDA tensors, got tensors on {device.type}"
    if (reason := _extension.why_not_loaded("cuda") or _extension.why_not_this_gpu(device)) is not None:
        return reason
    if torch.cuda.device_count() < 2:
        return "this process sees one GPU, and must see those of its peers too"
    memory = _symmetric_memory()
    if memory is None:
        return f"torch {torch.__version__} has no symmetric memory with `empty` and `rendezvous`"
    backend = memory.get_backend(device) if hasattr(memory, "get_backend") else "CUDA"
    if backend != "CUDA":
        return f"PyTorch's symmetric memory has the backend {backend}, and only its CUDA backend is used here"
    return None


def prepare(op: str, exchange: Exchange, like: Tensor) -> None:
    """Make the group's buffers ready for `exchange`. Raises ValueError, on all ranks, where it can't be done."""
    refusal = f"{op}: route must be 'auto' or 'collective' here, got 'peer': "
    if torch.compiler.is_compiling():
        raise ValueError(f"{refusal}torch.compile would bake this exchange's half of the buffers into its graph")
    if like.is_cuda and torch.cuda.is_current_stream_capturing():
        raise ValueError(f"{refusal}a CUDA graph would write to the same half of the buffers whenever it is replayed")
    if like.device not in _buffers.get(exchange.group, {}):
        reason = why_not_peer_to_peer(exchange.group, like.device)
        if reason is not None:
            raise ValueError(f"{refusal}{reason}")
    _buffers_for(exchange, like)


def push(tensors: list[Tensor], exchange: Exchange) -> Tensor:
    """Pack into all ranks' buffers; what this rank received, (elements,), to be read before its next exchange."""
    return _buffers_for(exchange, tensors[0]).push(tensors, exchange)


def release_peer_buffers(group: dist.ProcessGroup) -> None:
    """Give back the memory that exchanges with route="peer" keep for `group`; the next one takes it anew.

    All ranks call it. It also goes back with the group itself.
    """
    for buffers in _buffers.pop(group, {}).values():
        buffers.finish()


class PeerBuffers:
    """This rank's receive buffer and the addresses of the others': two halves, used in turn.

    One barrier an exchange is enough with two: a rank passes the next barrier only after all ranks have come to it, and
    they come to it after they have read their half of this exchange; so nobody writes there before it is read.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device, half_bytes: int) -> None:
        memory = _symmetric_memory()
        self.half_bytes = half_bytes
        self._memory = memory.empty(2 * half_bytes, dtype=torch.uint8, device=device)
        self._handle = memory.rendezvous(self._memory, group)
        pointers = self._handle.buffer_ptrs  # of allocations; a buffer lies as far into each
        offset = self._memory.data_ptr() - pointers[self._handle.rank]
        self._pointers = [pointer + offset for pointer in pointers]
        self._num_exchanges = 0
        self._stream: Any = None

    def push(self, tensors: list[Tensor], exchange: Exchange) -> Tensor:
        self._follow_last_exchange()
        start = self._num_exchanges % 2 * self.half_bytes
        self._num_exchanges += 1
        first = tensors[0]
        size = first.element_size()
        targets = [
            pointer + start + place * size for pointer, place in zip(self._pointers, exchange.places, strict=True)
        ]
        torch.ops.opensora_kernels.pack_shards_cuda_push(tensors, exchange.num_ranks, exchange.scatter, targets)
        self._handle.barrier(channel=_CHANNEL, timeout_ms=_TIMEOUT_MS)
        return self._memory[start : start + sum(exchange.receive_sizes) * size].view(first.dtype)

    def finish(self) -> None:
        """Wait until this rank has read what it received."""
        if self._stream is not None:
            self._stream.synchronize()

    def _follow_last_exchange(self) -> None:
        """Exchanges of one rank come one after another, whatever streams they are on: the halves rely on it."""
        stream = torch.cuda.current_stream(self._memory.device)
        if self._stream is not None and self._stream != stream:
            stream.wait_stream(self._stream)
        self._stream = stream


def _buffers_for(exchange: Exchange, like: Tensor) -> PeerBuffers:
    """The group's, made or made larger where needed: all ranks know the largest share, so they do it together."""
    known = _buffers.setdefault(exchange.group, {})
    num_bytes = exchange.most_received * like.element_size()
    buffers = known.get(like.device)
    if buffers is None or buffers.half_bytes < num_bytes:
        if buffers is not None:
            buffers.finish()
            known.pop(like.device)
            del buffers  # before the larger ones are taken
        half_bytes = max(1, -(-num_bytes // _GRANULE)) * _GRANULE
        known[like.device] = PeerBuffers(exchange.group, like.device, half_bytes)
    return known[like.device]


def _why_not_reached(device: torch.device, rank: int, uuids: tuple[str, ...]) -> str | None:
    """Whether this rank can write into the memory of all the others, on GPUs of these names."""
    visible = {_uuid(torch.device("cuda", index)): index for index in range(torch.cuda.device_count())}
    for other, uuid in enumerate(uuids):
        if other == rank:
            continue
        if uuid == uuids[rank]:
            return f"ranks {rank} and {other} share a GPU"
        if uuid not in visible:
            return f"rank {rank} does not see the GPU of rank {other}: CUDA_VISIBLE_DEVICES must name both"
        if not torch.cuda.can_device_access_peer(device, visible[uuid]):
            return f"the GPU of rank {rank} can't reach the memory of rank {other}'s"
    return None


def _told_by_all(group: dist.ProcessGroup, told: Any) -> list[Any]:
    answers: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(answers, told, group=group)
    return answers


def _first(reasons: Any) -> str | None:
    """The reason of the first rank that has one: the same for all who were told the same."""
    return next((f"on rank {rank}, {reason}" for rank, reason in enumerate(reasons) if reason is not None), None)


def _uuid(device: torch.device) -> str:
    return str(torch.cuda.get_device_properties(device).uuid)


def _symmetric_memory() -> ModuleType | None:
    try:
        module = import_module("torch.distributed._symmetric_memory")
    except ImportError:
        return None
    return module if hasattr(module, "empty") and hasattr(module, "rendezvous") else None


# Kept for a group as NCCL keeps its communicators, and gone with it: whoever exchanges in a group shares them.
_buffers: WeakKeyDictionary[dist.ProcessGroup, dict[torch.device, PeerBuffers]] = WeakKeyDictionary()
