"""Exchanges by route="peer": bit for bit among simulated ranks, and writes and reads in every order there can be."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from opensora_kernels.sequence_parallel import peers
from opensora_kernels.sequence_parallel.all_to_all import _AllToAll
from opensora_kernels.shards import shard_sizes
from tests.csrc import shards_replay
from tests.sequence_parallel import interleavings, peers_checks, simulated_peers
from tests.sequence_parallel.checks import SIZES
from tests.sequence_parallel.simulated_peers import Group, Node
from tests.sequence_parallel.worlds import PASSED, run

on_cpu = pytest.mark.skipif(shards_replay.why_not_on_cpu() is not None, reason=str(shards_replay.why_not_on_cpu()))


@pytest.mark.parametrize("num_ranks", [2, 3, 8])
def test_what_ranks_send_fills_what_each_receives(num_ranks: int):
    groups = [Group(rank, Node(num_ranks)) for rank in range(num_ranks)]
    for leading, num_tokens, num_heads in SIZES:
        exchanges = []
        for group, share in zip(groups, shard_sizes(num_tokens, num_ranks), strict=True):
            axis = len(leading)
            exchanges.append(group.exchange(axis + 1, axis, (*leading, share, num_heads, 9), num_tokens, 3))
        for each in (exchanges, [exchange.inverse() for exchange in exchanges]):
            for receiver, exchange in enumerate(each):
                ends = [0]
                for sender in each:
                    assert sender.places[receiver] == ends[-1]
                    ends.append(ends[-1] + sender.send_sizes[receiver])
                assert ends[-1] == sum(exchange.receive_sizes)
            assert each[0].most_received == max(sum(exchange.receive_sizes) for exchange in each)


@on_cpu
@pytest.mark.parametrize("num_ranks", [2, 3, 8])
def test_tokens_become_heads_and_gradients_return(num_ranks: int):
    """One exchange after another in the same buffers: of any sizes, which make them grow, and of any dtype."""

    def exchanges(group: Group) -> None:
        draw = torch.Generator().manual_seed(0)  # threads share the default one
        for leading, num_tokens, num_heads in SIZES:
            for dtype, num_tensors in ((torch.float32, 1), (torch.bfloat16, 3), (torch.float64, 2)):
                shape = (2, num_tensors, *leading, num_tokens, num_heads, 9)
                whole, grads = torch.randn(shape, generator=draw).to(dtype).unbind()
                mine, wanted = _shares(whole, -3, group), _shares(whole, -2, group)
                leaves = [x.requires_grad_() for x in mine]
                dim = whole.dim() - 1
                exchange = group.exchange(dim - 2, dim - 3, tuple(mine[0].shape), num_tokens, num_tensors)
                found = _AllToAll.apply(exchange, *leaves)
                assert all(torch.equal(have, want) for have, want in zip(found, wanted, strict=True))
                back = torch.autograd.grad(found, leaves, [x.mT.contiguous().mT for x in _shares(grads, -2, group)])
                assert all(torch.equal(have, want) for have, want in zip(back, _shares(grads, -3, group), strict=True))

    simulated_peers.on_ranks(num_ranks, exchanges)


@on_cpu
def test_what_was_received_is_kept_through_later_exchanges():
    """A result is no view of a buffer, though the first rows of one lie there in their final order."""

    def exchanges(group: Group) -> None:
        found, wanted = [], []
        for number in range(4):
            whole = torch.arange(216.0).view(1, 9, 6, 4) + 1000 * number
            mine = whole.tensor_split(2, 1)[group.rank]
            (there,) = _AllToAll.apply(group.exchange(2, 1, tuple(mine.shape), 9, 1), mine)
            found.append(there)
            wanted.append(whole.tensor_split(2, 2)[group.rank])
        assert all(torch.equal(have, want) for have, want in zip(found, wanted, strict=True))

    simulated_peers.on_ranks(2, exchanges)


@on_cpu
def test_buffers_go_back_when_asked_and_with_their_group():
    known = []

    def exchange(group: Group) -> None:
        _AllToAll.apply(group.exchange(1, 0, (2, 4), 4, 1), torch.zeros(2, 4))
        assert group in peers._buffers
        if group.rank == 0:
            peers.release_peer_buffers(group)
            assert group not in peers._buffers
        known.append(weakref.ref(peers._buffers[group][torch.device("cpu")]) if group.rank else None)

    simulated_peers.on_ranks(2, exchange)
    gc.collect()
    assert [each() for each in known if each is not None] == [None]


@on_cpu
def test_exchanges_on_two_streams_follow_one_another(monkeypatch: pytest.MonkeyPatch):
    waited: list[tuple[Any, Any]] = []
    monkeypatch.setattr(simulated_peers.Stream, "wait_stream", lambda *streams: waited.append(streams))
    first, second = simulated_peers.Stream(), simulated_peers.Stream()

    def exchanges(group: Group) -> None:
        for stream in (first, first, second, first):
            monkeypatch.setattr(torch.cuda, "current_stream", lambda device, stream=stream: stream)
            _AllToAll.apply(group.exchange(1, 0, (4, 4), 4, 1), torch.zeros(4, 4))

    simulated_peers.on_ranks(1, exchanges)
    assert waited == [(second, first), (first, second)]


@on_cpu
@pytest.mark.parametrize(("num_ranks", "num_exchanges"), [(2, 6), (3, 4)])
def test_nothing_is_read_before_it_is_written_or_overwritten_before_it_is_read(num_ranks: int, num_exchanges: int):
    programs = simulated_peers.on_ranks(num_ranks, lambda group: interleavings.recorded(group, num_exchanges))
    assert interleavings.fault(programs) is None


@on_cpu
def test_a_protocol_with_a_fault_is_found_out():
    programs = simulated_peers.on_ranks(2, lambda group: interleavings.recorded(group, 3))
    one_half = [[step._replace(half=0) for step in program] for program in programs]
    assert "finds exchange 1, not 0" in interleavings.fault(one_half)
    no_barrier = [[step for step in program if step.kind != "barrier"] for program in programs]
    assert "finds nothing" in interleavings.fault(no_barrier)
    barrier_first = [[program[index] for index in (2, 0, 1, *range(3, len(program)))] for program in programs]
    assert "finds nothing" in interleavings.fault(barrier_first)
    one_less = [programs[0], [step for step in programs[1] if step.exchange < 2]]
    assert "waits for ever" in interleavings.fault(one_less)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_peers_write_into_each_others_gpus(tmp_path: Path):
    num_ranks = min(torch.cuda.device_count(), peers.MAX_RANKS)
    (told,) = run(num_ranks, [peers_checks.peers_write_into_each_others_gpu], tmp_path).values()
    assert told == [PASSED] * num_ranks, "\n".join(told)


def _shares(whole: Tensor, dim: int, group: Group) -> list[Tensor]:
    return [x.tensor_split(group.node.num_ranks, dim)[group.rank].clone() for x in whole]
