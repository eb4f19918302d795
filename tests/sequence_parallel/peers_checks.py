"""What every rank of a world checks of exchanges by route="peer": refused alike on all ranks, or right."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist

from opensora_kernels import SequenceShards, sequence_all_to_all, ulysses_attention, why_not_peer_to_peer
from opensora_kernels.sequence_parallel import peers
from tests.sequence_parallel.worlds import World

EXCHANGE = {"scatter": 2, "gather": 1, "length": 9}


def peers_are_refused_for_one_reason_on_all_ranks_and_nothing_hangs(world: World) -> None:
    x = torch.randn(2, 9, 5, 4).tensor_split(world.num_ranks, 1)[world.rank]
    reason = why_not_peer_to_peer(world.group, x.device)
    assert reason == "on rank 0, it needs CUDA tensors, got tensors on cpu"
    sequence = SequenceShards(ulysses=world.group, group=world.group, route="peer")
    for call in (
        lambda: sequence_all_to_all(x, **EXCHANGE, group=world.group, route="peer"),
        lambda: ulysses_attention(x, x, x, sequence_length=9, group=world.group, route="peer", overlap=True),
        lambda: sequence.attention(x, x, x, sequence_length=9),
    ):
        with pytest.raises(ValueError, match="sequence_all_to_all: route must be 'auto' or 'collective'") as refused:
            call()
        messages = _told(world, str(refused.value))
        assert set(messages) == {f"{messages[0].split(' here')[0]} here, got 'peer': {reason}"}
    with pytest.raises(ValueError, match="route must be one of 'auto', 'collective', 'peer', got 'nccl'"):
        sequence_all_to_all(x, **EXCHANGE, group=world.group, route="nccl")
    with pytest.raises(ValueError, match="SequenceShards: route must be one of"):
        SequenceShards(route="p2p")
    there = sequence_all_to_all(x, **EXCHANGE, group=world.group)  # the ranks are still together
    assert torch.equal(there, sequence_all_to_all(x, **EXCHANGE, group=world.group, route="collective"))


def what_is_wrong_on_one_rank_is_told_to_all(world: World) -> None:
    last = world.num_ranks - 1
    group = world.group
    with _gpus(world):
        assert _answer(world) is None
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(peers, "why_not_here", lambda device: "it is tired" if world.rank == last else None)
            assert _answer(world) == f"on rank {last}, it is tired"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(peers.socket, "gethostname", lambda: f"host{min(world.rank, 1)}")
            assert _answer(world) == "the ranks are on more than one host: host0, host1"
        with pytest.MonkeyPatch.context() as patch:
            reaches = lambda own, other: not (world.rank == last and other == 0)  # noqa: E731
            patch.setattr(torch.cuda, "can_device_access_peer", reaches)
            assert _answer(world) == f"on rank {last}, the GPU of rank {last} can't reach the memory of rank 0's"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.cuda, "device_count", lambda: world.num_ranks - (world.rank == 0))
            assert f"on rank 0, rank 0 does not see the GPU of rank {last}" in _answer(world)
        shared = why_not_peer_to_peer(group, "cuda:0")
        assert shared == "on rank 0, ranks 0 and 1 share a GPU"
    assert why_not_peer_to_peer(None, "cuda") == "there is no other rank to exchange with"


def peers_write_into_each_others_gpu(world: World) -> None:
    """On real GPUs: forward, gradients, growing buffers and two streams, bit for bit."""
    device = torch.device("cuda", world.rank)
    torch.cuda.set_device(device)
    assert why_not_peer_to_peer(world.group, device) is None
    side = torch.cuda.Stream(device)
    for index, (tokens, heads, size) in enumerate([(11, 7, 8), (9, 16, 72), (3, 5, 3), (450, 16, 72), (11, 7, 8)] * 2):
        for dtype in (torch.bfloat16, torch.float32, torch.uint8):
            whole = [torch.randn(2, tokens, heads, size).mul(50).to(dtype).to(device) for _ in range(2)]
            mine, wanted = ([x.tensor_split(world.num_ranks, dim)[world.rank].clone() for x in whole] for dim in (1, 2))
            stream = side if index % 2 else torch.cuda.current_stream(device)
            stream.wait_stream(torch.cuda.default_stream(device))
            options = {"scatter": 2, "gather": 1, "length": tokens, "group": world.group, "route": "peer"}
            with torch.cuda.stream(stream):
                leaves = [x.requires_grad_(dtype.is_floating_point) for x in mine]
                found = sequence_all_to_all(leaves, **options)
                grads = torch.autograd.grad(found, leaves, wanted) if dtype.is_floating_point else mine
            stream.synchronize()
            for have, want in zip((*found, *grads), (*wanted, *mine), strict=True):
                assert torch.equal(have, want)
    peers.release_peer_buffers(world.group)


CHECKS = [peers_are_refused_for_one_reason_on_all_ranks_and_nothing_hangs, what_is_wrong_on_one_rank_is_told_to_all]


@contextmanager
def _gpus(world: World) -> Iterator[None]:
    """As many GPUs as ranks, all within reach, as far as the questions that are asked about them go."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peers, "why_not_here", lambda device: None)
        patch.setattr(peers, "_uuid", lambda device: f"GPU-{device.index}")
        patch.setattr(torch.cuda, "device_count", lambda: world.num_ranks)
        patch.setattr(torch.cuda, "can_device_access_peer", lambda own, other: True)
        yield


def _answer(world: World) -> str | None:
    """The one answer that all ranks got."""
    (answer,) = set(_told(world, why_not_peer_to_peer(world.group, f"cuda:{world.rank}")))
    return answer


def _told(world: World, mine: str | None) -> list[str | None]:
    answers: list[str | None] = [None] * world.num_ranks
    dist.all_gather_object(answers, mine)
    return answers
