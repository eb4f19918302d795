"""What every rank checks of `SequenceShards`: by heads, round a ring, and both at once."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from opensora_kernels import SequenceShards, attention, qk_norm_rope
from opensora_kernels.sequence_parallel import ring
from tests.ops.accuracy import assert_accurate
from tests.sequence_parallel.worlds import World

HEAD_SIZE = 8
# (leading axes, tokens, heads): odd everything, fewer tokens than ranks, fewer heads, real leading axes, no sample
SIZES = [((2,), 11, 3), ((), 13, 5), ((2, 3), 8, 4), ((1,), 3, 2), ((0,), 5, 2)]


@cache
def layouts(num_ranks: int) -> list[SequenceShards]:
    """All ways to share `num_ranks` between heads and a ring."""
    found = []
    for num_along in range(1, num_ranks + 1):
        if num_ranks % num_along == 0:
            mesh = init_device_mesh("cpu", (num_along, num_ranks // num_along), mesh_dim_names=("ring", "ulysses"))
            groups = mesh["ulysses"].get_group(), mesh["ring"].get_group()
            found.append(SequenceShards(*groups, dist.group.WORLD))
    return found


def share(x: Tensor, dim: int, world: World) -> Tensor:
    return x.tensor_split(world.num_ranks, dim)[world.rank]


def attention_and_its_gradients_are_those_of_one_process(world: World) -> None:
    for sequence in layouts(world.num_ranks):
        for leading, num_tokens, num_heads in SIZES:
            for keys in _kinds_of_keys(leading, num_tokens):
                for dtype in (torch.float32, torch.bfloat16):
                    inputs = _inputs(leading, num_tokens, num_tokens, num_heads, dtype)
                    _assert_like_one_process(inputs, keys, sequence, world)


def keys_may_be_fewer_than_queries(world: World) -> None:
    for sequence in layouts(world.num_ranks):
        for num_tokens, num_keys in ((11, 4), (6, 2), (2, 7)):
            for keys in _kinds_of_keys((2,), num_keys):
                inputs = _inputs((2,), num_tokens, num_keys, 3, torch.float32)
                _assert_like_one_process(inputs, keys, sequence, world)


def a_single_key_gives_its_value_and_no_gradient_to_queries(world: World) -> None:
    """A truth of zero has no scale of its own for the accuracy rule: rounding is that of the value's gradient."""
    for sequence in layouts(world.num_ranks):
        q, k, v = (share(torch.randn(2, 1, 3, HEAD_SIZE), 1, world).clone().requires_grad_() for _ in "qkv")
        out = sequence.attention(q, k, v, sequence_length=1)
        assert torch.equal(out, v)
        grad = torch.randn(v.shape)
        of_q, of_k, of_v = torch.autograd.grad(out, (q, k, v), grad)
        torch.testing.assert_close(of_v, grad)
        torch.testing.assert_close(
            torch.cat([of_q, of_k]), torch.zeros_like(torch.cat([of_q, of_k])), atol=1e-6, rtol=0
        )


def norms_and_rotations_come_before_the_exchange(world: World) -> None:
    angles = torch.rand(11, HEAD_SIZE // 2)
    q, k, v = torch.randn(2, 11, 3, 3, HEAD_SIZE).unbind(2)  # views of one projection
    weights = torch.rand(2, HEAD_SIZE).unbind()
    expected = attention(*qk_norm_rope(q, k, *weights, cos=angles.cos(), sin=angles.sin()), v)
    turned = {"cos": share(angles.cos(), 0, world), "sin": share(angles.sin(), 0, world)}
    mine = [share(x, 1, world) for x in (q, k, v)]
    for sequence in layouts(world.num_ranks):
        for overlap in (False, True):
            out = sequence.attention(*mine, *weights, sequence_length=11, overlap=overlap, **turned)
            torch.testing.assert_close(out, share(expected, 1, world))


def under_autocast_the_ring_computes_in_its_dtype(world: World) -> None:
    q, k, v = torch.randn(3, 2, 7, 2, HEAD_SIZE).unbind()
    mine = [share(x, 1, world).clone().requires_grad_() for x in (q, k, v)]
    with torch.autocast("cpu", torch.bfloat16):
        expected = share(attention(q, k, v), 1, world)
        for sequence in layouts(world.num_ranks):
            out = sequence.attention(*mine, sequence_length=7)
            assert out.dtype == expected.dtype == torch.bfloat16
            torch.testing.assert_close(out, expected, atol=2e-2, rtol=2e-2)
            assert all(grad.dtype == torch.float32 for grad in torch.autograd.grad(out.sum(), mine))


def a_sum_over_ranks_and_its_gradient_are_exact(world: World) -> None:
    sequence = layouts(world.num_ranks)[0]
    for shape, dim in (((2, 11, 3), 1), ((3, 2), 0), ((1, 5), 0), ((0, 5), 1)):
        parts = torch.randn(world.num_ranks, *shape, dtype=torch.float64)
        mine = parts[world.rank].clone().requires_grad_()
        out = sequence.sum(mine, dim=dim)
        torch.testing.assert_close(out, share(parts.sum(0), dim, world))
        grad = torch.randn(shape, dtype=torch.float64)
        (found,) = torch.autograd.grad(out, mine, share(grad, dim, world))
        assert torch.equal(found, grad)


def the_next_keys_are_under_way_while_these_are_attended_to(world: World) -> None:
    events: list[str] = []
    sequence = layouts(world.num_ranks)[-1]  # the ring alone
    mine = [share(torch.randn(1, 9, 2, HEAD_SIZE), 1, world).clone().requires_grad_() for _ in "qkv"]
    with pytest.MonkeyPatch.context() as patch:
        _note(patch, events)
        sequence.attention(*mine, sequence_length=9).sum().backward()
    num_more = world.num_ranks - 1
    forward = ["send", "attend", "wait"] * num_more + ["attend"]
    first = ["send", "gradients", "send", "wait"]
    between = ["send", "gradients", "wait", "send", "wait"] * (num_more - 1)
    assert events == [*forward, *first, *between, "gradients", "wait", "send", "wait"], events


def groups_that_do_not_fit_are_refused(world: World) -> None:
    sequence = layouts(world.num_ranks)[-1]
    with pytest.raises(ValueError, match=f"hold all ranks of ulysses and ring, 1 x {world.num_ranks}, got 1"):
        SequenceShards(ring=sequence.ring)
    if world.num_ranks == 4:
        mixed = next(one for one in layouts(4) if dist.get_world_size(one.ring) == 2)
        if world.rank in (1, 2):
            with pytest.raises(ValueError, match="group must list the 2 ranks of ulysses one after another"):
                SequenceShards(ulysses=mixed.ring, ring=mixed.ulysses, group=mixed.group)


def wrong_arguments_are_refused_before_anything_is_sent(world: World) -> None:
    sequence = layouts(world.num_ranks)[-1]
    x = share(torch.randn(2, 9, 2, 4), 1, world)
    lengths, mask = torch.tensor([1, 2]), torch.ones(2, 9, dtype=torch.bool)
    with pytest.MonkeyPatch.context() as patch:
        events: list[str] = []
        _note(patch, events)
        with pytest.raises(ValueError, match=f"q must hold .* of {9 + world.num_ranks} at axis 1"):
            sequence.attention(x, x, x, sequence_length=9 + world.num_ranks)
        with pytest.raises(ValueError, match=f"k must hold .* of {9 + world.num_ranks} at axis 1"):
            sequence.attention(x, x, x, sequence_length=9, num_keys=9 + world.num_ranks)
        with pytest.raises(ValueError, match="key_mask must be None where key_lengths are given"):
            sequence.attention(x, x, x, sequence_length=9, key_lengths=lengths, key_mask=mask)
        with pytest.raises(ValueError, match=r"key_mask must have shape \(\*, num_keys\) = \(2, 9\)"):
            sequence.attention(x, x, x, sequence_length=9, key_mask=mask[:, 1:])
        with pytest.raises(TypeError, match="key_lengths must be int32 or int64"):
            sequence.attention(x, x, x, sequence_length=9, key_lengths=lengths.float())
        assert not events


CHECKS = [
    attention_and_its_gradients_are_those_of_one_process,
    keys_may_be_fewer_than_queries,
    a_single_key_gives_its_value_and_no_gradient_to_queries,
    norms_and_rotations_come_before_the_exchange,
    under_autocast_the_ring_computes_in_its_dtype,
    a_sum_over_ranks_and_its_gradient_are_exact,
    the_next_keys_are_under_way_while_these_are_attended_to,
    groups_that_do_not_fit_are_refused,
    wrong_arguments_are_refused_before_anything_is_sent,
]


def _kinds_of_keys(leading: tuple[int, ...], num_keys: int) -> Iterator[dict[str, Tensor]]:
    """All keys; the first ones of each sample, of one sample none; any of them."""
    yield {}
    lengths = torch.arange(max(1, torch.Size(leading).numel())) * 5 % (num_keys + 1)
    yield {"key_lengths": lengths[: torch.Size(leading).numel()].reshape(leading)}
    yield {"key_mask": torch.arange(torch.Size((*leading, num_keys)).numel()).reshape(*leading, num_keys) % 3 != 1}


def _inputs(
    leading: tuple[int, ...], num_queries: int, num_keys: int, num_heads: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    sizes = {"q": num_queries, "k": num_keys, "v": num_keys, "grad": num_queries}
    return {name: torch.randn(*leading, size, num_heads, HEAD_SIZE).to(dtype) for name, size in sizes.items()}


def _assert_like_one_process(
    inputs: dict[str, Tensor], keys: dict[str, Tensor], sequence: SequenceShards, world: World
) -> None:
    """Each rank's share of the output and of the gradients, by the accuracy rule."""
    truth = _alone({name: x.double() for name, x in inputs.items()}, keys)
    same = _alone(inputs, keys)
    mine = {name: share(x, x.dim() - 3, world) for name, x in inputs.items()}
    leaves = [mine[name].clone().requires_grad_() for name in "qkv"]
    lengths = {"sequence_length": inputs["q"].shape[-3], "num_keys": inputs["k"].shape[-3]}
    out = sequence.attention(*leaves, **lengths, **keys)
    found = [out.detach(), *torch.autograd.grad(out, leaves, mine["grad"])]
    truth, same = ([share(x, x.dim() - 3, world) for x in tensors] for tensors in (truth, same))
    # every part of the ring rounds the log-sum-exp of its scores once more, which shifts all weights of a query
    num_parts = dist.get_world_size(sequence.ring) if sequence.ring else 1
    assert_accurate(found, same, truth, f"{tuple(inputs['q'].shape)} {[*keys]} {sequence}", leniency=num_parts)


def _alone(inputs: dict[str, Tensor], keys: dict[str, Tensor]) -> list[Tensor]:
    """In one process by the operator, which knows no masks: of each sample, the keys that its mask keeps."""
    leaves = [inputs[name].clone().requires_grad_() for name in "qkv"]
    q, k, v = leaves
    lengths = keys.get("key_lengths")
    if (mask := keys.get("key_mask")) is not None:
        order = (~mask).long().argsort(dim=-1, stable=True)[..., None, None].expand(k.shape)
        k, v, lengths = k.gather(-3, order), v.gather(-3, order), mask.sum(-1)
    out = attention(q, k, v, key_lengths=lengths)
    return [out.detach(), *torch.autograd.grad(out, leaves, inputs["grad"])]


def _note(patch: pytest.MonkeyPatch, events: list[str]) -> None:
    """What the ring does, in order."""

    def noted(event: str, call: Any) -> Any:
        return lambda *arguments, **options: (events.append(event), call(*arguments, **options))[1]

    patch.setattr(ring, "attend", noted("attend", ring.attend))
    patch.setattr(ring, "gradients", noted("gradients", ring.gradients))
    patch.setattr(ring._Passing, "wait", noted("wait", ring._Passing.wait))
    patch.setattr(dist, "batch_isend_irecv", noted("send", dist.batch_isend_irecv))
