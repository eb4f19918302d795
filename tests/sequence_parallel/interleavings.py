"""Every order in which ranks can get through their exchanges: what each reads is what was written for it.

A rank's program is recorded from `peers.PeerBuffers`. GPUs run programs at any speed, so each step of each rank may
come next. A barrier is as in PyTorch's symmetric memory: for each other rank, at the same time, a rank waits until its
flag there is down and raises it, then waits until the other's flag here is up and takes it down.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from opensora_kernels.sequence_parallel.peers import PeerBuffers
from tests.sequence_parallel.simulated_peers import Group

_BEFORE, _RAISED, _DONE = range(3)  # how far a barrier is with one other rank
_NOTHING = -1


class Step(NamedTuple):
    """A "write" into a half of rank `other`, a "barrier", or a "read" of what rank `other` wrote into a half here."""

    kind: str
    exchange: int
    other: int = -1
    half: int = -1


class State(NamedTuple):
    places: tuple[int, ...]  # in each program
    barriers: tuple[tuple[int, ...], ...]  # of each rank, how far it is with each other
    flags: frozenset[tuple[int, int]]  # (from, to) that are up
    contents: tuple[int, ...]  # the exchange that was last written, by rank, half and writer


def recorded(group: Group, num_exchanges: int) -> list[Step]:
    """What this rank does in so many exchanges, by the addresses it writes to and reads from."""
    buffers = PeerBuffers(group, torch.device("cpu"), half_bytes=1024)
    starts, num_ranks = buffers._handle.buffer_ptrs, group.node.num_ranks
    exchange = group.exchange(1, 0, (4, 4 * num_ranks), 4 * num_ranks, 1)
    program: list[Step] = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
            if func is not torch.ops.opensora_kernels.pack_shards_cuda_push.default:
                return func(*args, **(kwargs or {}))
            for other, target in enumerate(args[3]):
                half, offset = divmod(target - starts[other], buffers.half_bytes)
                assert offset == exchange.places[other] * 4
                program.append(Step("write", number, other, half))

    buffers._handle.barrier = lambda channel, timeout_ms: program.append(Step("barrier", number))
    for number in range(num_exchanges):
        with Recorder():
            received = buffers.push([torch.zeros(exchange.shape)], exchange)
        half = (received.data_ptr() - starts[group.rank]) // buffers.half_bytes
        program += [Step("read", number, other, half) for other in range(num_ranks)]
    return program


def fault(programs: list[list[Step]]) -> str | None:
    """What goes wrong in some order of the steps of all ranks, or None: every reachable state is visited."""
    num_ranks = len(programs)
    start = State(
        (0,) * num_ranks, ((_BEFORE,) * num_ranks,) * num_ranks, frozenset(), (_NOTHING,) * (2 * num_ranks**2)
    )
    seen, waiting = {start}, [start]
    while waiting:
        state = waiting.pop()
        following = list(_next(programs, state))
        if not following and any(place < len(program) for place, program in zip(state.places, programs, strict=True)):
            return "a rank waits for ever"
        for found in following:
            if isinstance(found, str):
                return found
            if found not in seen:
                seen.add(found)
                waiting.append(found)
    return None


def _next(programs: list[list[Step]], state: State) -> Iterator[State | str]:
    for rank, (place, program) in enumerate(zip(state.places, programs, strict=True)):
        if place == len(program):
            continue
        step = program[place]
        if step.kind == "barrier":
            yield from _in_barrier(state, rank)
        elif step.kind == "write":
            cell = _cell(step.other, step.half, rank, len(programs))
            yield _moved_on(state, rank)._replace(contents=_with(state.contents, cell, step.exchange))
        else:
            read = state.contents[_cell(rank, step.half, step.other, len(programs))]
            if read == step.exchange:
                yield _moved_on(state, rank)
            else:
                found = "nothing" if read == _NOTHING else f"exchange {read}, not {step.exchange}"
                yield f"rank {rank} finds {found} from rank {step.other}"


def _in_barrier(state: State, rank: int) -> Iterator[State]:
    for other, progress in enumerate(state.barriers[rank]):
        if other == rank:
            continue
        if progress == _BEFORE and (rank, other) not in state.flags:
            yield _further(state._replace(flags=state.flags | {(rank, other)}), rank, other)
        if progress == _RAISED and (other, rank) in state.flags:
            yield _further(state._replace(flags=state.flags - {(other, rank)}), rank, other)


def _further(state: State, rank: int, other: int) -> State:
    """One step with one other rank; once through with all, a rank leaves the barrier."""
    progress = _with(state.barriers[rank], other, state.barriers[rank][other] + 1)
    if all(each == _DONE for index, each in enumerate(progress) if index != rank):
        state = _moved_on(state, rank)
        progress = (_BEFORE,) * len(progress)
    return state._replace(barriers=_with(state.barriers, rank, progress))


def _moved_on(state: State, rank: int) -> State:
    return state._replace(places=_with(state.places, rank, state.places[rank] + 1))


def _cell(rank: int, half: int, writer: int, num_ranks: int) -> int:
    return (rank * 2 + half) * num_ranks + writer


def _with(values: tuple, index: int, value: Any) -> tuple:
    return (*values[:index], value, *values[index + 1 :])
