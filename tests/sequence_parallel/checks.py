"""What every rank of a world checks. Full tensors come from the seed, the same on all ranks; a rank takes its share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import opensora_kernels
from opensora_kernels import (
    gather_sequence,
    qk_norm_attention,
    sequence_all_to_all,
    split_sequence,
    ulysses_attention,
)
from opensora_kernels.sequence_parallel import all_to_all
from tests.ops.accuracy import assert_accurate
from tests.sequence_parallel.worlds import World

# (leading axes, tokens, heads): odd everything, and fewer tokens or heads than ranks
SIZES = [
    ((2,), 11, 7),
    ((), 13, 10),
    ((2, 3), 8, 16),
    ((1,), 9, 4),
    ((2,), 3, 5),
    ((2,), 7, 2),
    ((1,), 1, 1),
    ((0,), 5, 6),
]
HEAD_SIZE = 8


def share(x: Tensor, dim: int, world: World) -> Tensor:
    return x.tensor_split(world.num_ranks, dim)[world.rank]


def tokens_become_heads_and_gradients_return(world: World) -> None:
    for leading, num_tokens, num_heads in SIZES:
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            x = torch.randn(*leading, num_tokens, num_heads, HEAD_SIZE).to(dtype)
            grad = torch.randn(x.shape).to(dtype)
            mine = share(x, -3, world).clone().requires_grad_()
            out = sequence_all_to_all(mine, scatter=-2, gather=-3, length=num_tokens, group=world.group)
            assert torch.equal(out, share(x, -2, world))
            assert out.is_contiguous()
            out.backward(share(grad, -2, world))
            assert torch.equal(mine.grad, share(grad, -3, world))


def without_a_group_a_sequence_is_whole_whatever_the_default_group_is(world: World) -> None:
    x = torch.randn(2, 5, 3, 4)
    assert sequence_all_to_all(x, scatter=2, gather=1, length=5, group=None) is x
    assert split_sequence(x, dim=1, group=None) is x
    assert gather_sequence(x, dim=1, length=5, group=None) is x
    expected = opensora_kernels.attention(x, x, x)
    for overlap in (False, True):
        assert torch.equal(ulysses_attention(x, x, x, sequence_length=5, group=None, overlap=overlap), expected)


def there_and_back_is_the_identity(world: World) -> None:
    for leading, num_tokens, num_heads in SIZES:
        x = share(torch.randn(*leading, num_tokens, num_heads, HEAD_SIZE), -3, world)
        there = sequence_all_to_all(x, scatter=-2, gather=-3, length=num_tokens, group=world.group)
        assert torch.equal(sequence_all_to_all(there, scatter=-3, gather=-2, length=num_heads, group=world.group), x)


def several_tensors_and_any_axes_travel(world: World) -> None:
    qkv = torch.randn(2, 9, 3, 7, HEAD_SIZE)
    parts = sequence_all_to_all(share(qkv, 1, world).unbind(2), scatter=-2, gather=-3, length=9, group=world.group)
    whole = sequence_all_to_all(share(qkv, 1, world), scatter=3, gather=1, length=9, group=world.group)
    for part, expected in zip((*parts, *whole.unbind(2)), 2 * share(qkv, 3, world).unbind(2), strict=True):
        assert torch.equal(part, expected)
    for dtype in (torch.bool, torch.int64):
        x = torch.arange(40).reshape(5, 8).remainder(3).to(dtype)
        assert torch.equal(
            sequence_all_to_all(share(x, 1, world), scatter=0, gather=1, length=8, group=world.group),
            share(x, 0, world),
        )


def second_derivatives_flow(world: World) -> None:
    x = share(torch.randn(2, 5, 7, 3), 1, world).clone().requires_grad_()
    out = sequence_all_to_all(x, scatter=2, gather=1, length=5, group=world.group)
    (first,) = torch.autograd.grad(out.pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(second, 6 * x)


def attention_of_all_ranks_is_that_of_one_process(world: World) -> None:
    for num_heads, num_tokens, has_rope in ((7, 11, True), (10, 13, False), (16, 9, True), (3, 2, True)):
        for lengths in (None, torch.tensor([num_tokens, 1])):
            arguments = _attention_inputs(num_tokens, num_heads, has_rope)
            if lengths is not None:
                arguments["key_lengths"] = lengths
            truth, same = _alone({k: _double(v) for k, v in arguments.items()}), _alone(arguments)
            for overlap in (False, True):
                assert_accurate(_together(arguments, world, overlap), same, truth, f"{num_heads} heads {overlap}")


def overlap_changes_no_bit(world: World) -> None:
    for norm_scope in ("head", "token"):
        arguments = _attention_inputs(11, 7, has_rope=True, norm_scope=norm_scope)
        plain, overlapped = (_together(arguments, world, overlap) for overlap in (False, True))
        assert all(torch.equal(have, want) for have, want in zip(overlapped, plain, strict=True))


def overlap_serves_inference_frozen_values_and_two_backward_passes(world: World) -> None:
    arguments = _attention_inputs(9, 5, has_rope=True)
    q, k, v = (share(arguments[name], 1, world).clone() for name in "qkv")
    with torch.no_grad():
        expected = ulysses_attention(q, k, v, sequence_length=9, group=world.group)
        assert torch.equal(ulysses_attention(q, k, v, sequence_length=9, overlap=True, group=world.group), expected)
    q.requires_grad_()
    ulysses_attention(q, k, v, sequence_length=9, overlap=True, group=world.group).sum().backward()
    v.requires_grad_()
    loss = ulysses_attention(q, k, v, sequence_length=9, overlap=True, group=world.group).square().sum()
    once = torch.autograd.grad(loss, (q, v), retain_graph=True)
    again = torch.autograd.grad(loss, (q, v))
    assert all(torch.equal(have, want) for have, want in zip(again, once, strict=True))


def the_exchange_is_under_way_while_queries_are_normed(world: World) -> None:
    events: list[str] = []
    arguments = _attention_inputs(11, 7, has_rope=True)
    with _spied(events):
        _together(arguments, world, overlap=True)
    if world.num_ranks > 1:
        forward = ["send", "norm", "exchange", "wait", "exchange"]
        backward = ["exchange", "send", "exchange", "wait"]
        assert events == forward + backward, events


def nothing_is_padded_on_the_wire(world: World) -> None:
    for num_tokens, num_heads in ((11, 7), (13, 10), (9, 16), (3, 2)):
        for overlap, num_exchanges in ((False, 2), (True, 3)):
            arguments = _attention_inputs(num_tokens, num_heads, has_rope=True)
            own, headed = share(arguments["q"], 1, world).numel(), share(arguments["q"], 2, world).numel()
            with _counted() as sent:
                _together(arguments, world, overlap)
            there = [(2 * own, 2 * headed), (own, headed)] if overlap else [(3 * own, 3 * headed)]
            back = [(headed, own)]
            gradients = [(received, sending) for sending, received in (*there, *back)]
            assert sorted(sent) == sorted([*there, *back, *gradients])
            assert len(sent) == 2 * num_exchanges
    x = torch.randn(3, 11, 5)
    with _counted() as sent:
        gather_sequence(share(x, 1, world), dim=1, length=11, group=world.group)
    assert sent == [(share(x, 1, world).numel() * world.num_ranks, x.numel())]


def split_and_gather_are_inverse_and_each_others_gradient(world: World) -> None:
    for shape, dim in (((2, 11, 3), 1), ((7,), 0), ((2, 3, 5), -1), ((1, 3, 2), 1), ((0, 5), 1)):
        x = torch.randn(shape).requires_grad_()
        mine = split_sequence(x, dim=dim, group=world.group)
        assert torch.equal(mine, share(x, dim, world))
        gathered = gather_sequence(mine, dim=dim, length=shape[dim], group=world.group)
        assert torch.equal(gathered, x)
        grad = torch.randn(shape)
        gathered.backward(grad)
        assert torch.equal(x.grad, grad)
        for grad_scale, factor in (("none", 1), ("up", world.num_ranks), ("down", 1 / world.num_ranks)):
            (found,) = torch.autograd.grad(
                split_sequence(x, dim=dim, grad_scale=grad_scale, group=world.group), x, share(grad, dim, world)
            )
            torch.testing.assert_close(found, grad * factor)
            leaf = share(x, dim, world).detach().clone().requires_grad_()
            out = gather_sequence(leaf, dim=dim, length=shape[dim], grad_scale=grad_scale, group=world.group)
            (found,) = torch.autograd.grad(out, leaf, grad)
            torch.testing.assert_close(found, share(grad, dim, world) * factor)


def averaged_gradients_are_those_of_one_process(world: World) -> None:
    """Parameters before the split, between, and after the gathering; "down" and "up" as the docstring says."""
    x, target = torch.randn(2, 11, 6, dtype=torch.float64), torch.randn(2, 11, 6, dtype=torch.float64)
    model = torch.nn.ModuleList(torch.nn.Linear(6, 6, dtype=torch.float64) for _ in range(3))

    def loss(is_parallel: bool) -> Tensor:
        hidden = model[0](x).tanh()
        if is_parallel:
            hidden = split_sequence(hidden, dim=1, grad_scale="down", group=world.group)
        hidden = model[1](hidden).tanh()
        if is_parallel:
            hidden = gather_sequence(hidden, dim=1, length=11, grad_scale="up", group=world.group)
        return (model[2](hidden) - target).square().mean()

    expected = torch.autograd.grad(loss(False), list(model.parameters()))
    found = torch.autograd.grad(loss(True), list(model.parameters()))
    for have, want in zip(found, expected, strict=True):
        dist.all_reduce(have)
        torch.testing.assert_close(have / world.num_ranks, want)


def a_group_is_served_apart_from_the_others(world: World) -> None:
    members = list(range(1, world.num_ranks))
    group = dist.new_group(members)
    x = torch.randn(2, 7, 5, 3)
    if world.rank == 0:
        with pytest.raises(ValueError, match="sequence_all_to_all: group must hold this process, global rank 0"):
            sequence_all_to_all(x, scatter=2, gather=1, length=7, group=group)
        with pytest.raises(ValueError, match="split_sequence: group must hold this process"):
            split_sequence(x, dim=1, group=group)
        return
    place = World(members.index(world.rank), len(members), world.folder)
    mine = split_sequence(x, dim=1, group=group)
    assert torch.equal(mine, share(x, 1, place))
    assert torch.equal(sequence_all_to_all(mine, scatter=2, gather=1, length=7, group=group), share(x, 2, place))
    assert torch.equal(gather_sequence(mine, dim=1, length=7, group=group), x)
    expected = share(opensora_kernels.attention(x, x, x), 1, place)
    torch.testing.assert_close(ulysses_attention(mine, mine, mine, sequence_length=7, group=group), expected)


def wrong_shares_are_refused_before_anything_is_sent(world: World) -> None:
    rank, num_ranks = world.rank, world.num_ranks
    x = share(torch.randn(2, 9, 5, 4), 1, world)
    wrong = 9 + num_ranks  # one more on every rank
    told = rf"axis 1 on rank {rank} of {num_ranks}, as torch.tensor_split cuts, got shape \(2, {x.shape[1]}, 5, 4\)"
    right = {"scatter": 2, "gather": 1, "length": 9}
    with _counted() as sent:
        with pytest.raises(ValueError, match=f"sequence_all_to_all: x must hold {x.shape[1] + 1} of {wrong} at {told}"):
            sequence_all_to_all(x, **right | {"length": wrong}, group=world.group)
        with pytest.raises(ValueError, match=f"gather_sequence: x must hold {x.shape[1] + 1} of {wrong} at {told}"):
            gather_sequence(x, dim=1, length=wrong, group=world.group)
        for overlap in (False, True):
            with pytest.raises(ValueError, match=f"ulysses_attention: q must hold {x.shape[1] + 1} of {wrong} at"):
                ulysses_attention(x, x, x, sequence_length=wrong, overlap=overlap, group=world.group)
        with pytest.raises(ValueError, match="ulysses_attention: v must have shape that of q"):
            ulysses_attention(x, x, x[..., :2], sequence_length=9, group=world.group)
        with pytest.raises(TypeError, match="ulysses_attention: k must have q's dtype"):
            ulysses_attention(x, x.half(), x, sequence_length=9, group=world.group)
        with pytest.raises(ValueError, match="scatter and gather must be different axes, got 1 for both"):
            sequence_all_to_all(x, **right | {"scatter": -3}, group=world.group)
        with pytest.raises(ValueError, match="gather must be one of the 4 axes, got 4"):
            sequence_all_to_all(x, **right | {"gather": 4}, group=world.group)
        with pytest.raises(ValueError, match=r"tensors\[1\] must have tensors\[0\]'s shape"):
            sequence_all_to_all([x, x[:1]], **right, group=world.group)
        with pytest.raises(ValueError, match="grad_scale must be one of 'none', 'up', 'down', got 'double'"):
            split_sequence(x, dim=1, grad_scale="double", group=world.group)
    assert not sent


def split_attention_and_gathering_compile_to_one_graph(world: World) -> None:
    group = dist.new_group()
    weight = torch.rand(HEAD_SIZE)

    def layer(qkv: Tensor) -> Tensor:
        q, k, v = split_sequence(qkv, dim=1, group=group, grad_scale="down").unbind(2)
        out = ulysses_attention(q, k, v, weight, weight, sequence_length=5, group=group, overlap=True)
        return gather_sequence(out, dim=1, length=5, group=group, grad_scale="up")

    qkv = torch.randn(2, 5, 3, 3, HEAD_SIZE).requires_grad_()
    grad = torch.randn(2, 5, 3, HEAD_SIZE)
    expected = layer(qkv)
    actual = torch.compile(layer, backend="aot_eager", fullgraph=True)(qkv)
    torch.testing.assert_close(actual, expected)
    gradients = [torch.autograd.grad(out, qkv, grad)[0] for out in (actual, expected)]
    torch.testing.assert_close(*gradients)


CHECKS = [
    without_a_group_a_sequence_is_whole_whatever_the_default_group_is,
    tokens_become_heads_and_gradients_return,
    there_and_back_is_the_identity,
    several_tensors_and_any_axes_travel,
    second_derivatives_flow,
    attention_of_all_ranks_is_that_of_one_process,
    overlap_changes_no_bit,
    overlap_serves_inference_frozen_values_and_two_backward_passes,
    the_exchange_is_under_way_while_queries_are_normed,
    nothing_is_padded_on_the_wire,
    split_and_gather_are_inverse_and_each_others_gradient,
    averaged_gradients_are_those_of_one_process,
    a_group_is_served_apart_from_the_others,
    wrong_shares_are_refused_before_anything_is_sent,
]


def _attention_inputs(num_tokens: int, num_heads: int, has_rope: bool, norm_scope: str = "head") -> dict[str, Any]:
    shape = (2, num_tokens, num_heads, HEAD_SIZE)
    num_weights = HEAD_SIZE if norm_scope == "head" else num_heads * HEAD_SIZE
    inputs = {name: torch.randn(shape) for name in ("q", "k", "v", "grad")}
    inputs |= {name: torch.rand(num_weights) + 0.5 for name in ("q_weight", "k_weight")}
    if has_rope:
        angles = torch.rand(num_tokens, HEAD_SIZE // 2)
        inputs |= {"cos": angles.cos(), "sin": angles.sin()}
    return inputs | {"norm_scope": norm_scope}


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _alone(arguments: dict[str, Any]) -> list[Tensor]:
    """Output and gradients of q, k, v and the weights, in one process."""
    arguments = dict(arguments)
    lengths, grad = arguments.pop("key_lengths", None), arguments.pop("grad")
    leaves = [arguments.pop(name).clone().requires_grad_() for name in ("q", "k", "v", "q_weight", "k_weight")]
    if lengths is None:
        out = qk_norm_attention(*leaves, **arguments)
    else:
        q, k = opensora_kernels.qk_norm_rope(*leaves[:2], *leaves[3:], **arguments)
        out = opensora_kernels.attention(q, k, leaves[2], key_lengths=lengths)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def _together(
    arguments: dict[str, Any], world: World, overlap: bool, function: Any = ulysses_attention
) -> list[Tensor]:
    """The same by all ranks: the full output and gradients, the same on each."""
    arguments = dict(arguments)
    grad, num_tokens = arguments.pop("grad"), arguments["q"].shape[1]
    leaves = [share(arguments.pop(name), 1, world).clone().requires_grad_() for name in "qkv"]
    leaves += [arguments.pop(name).clone().requires_grad_() for name in ("q_weight", "k_weight")]
    for name in {"cos", "sin"} & arguments.keys():
        arguments[name] = share(arguments[name], 0, world)
    out = ulysses_attention(*leaves, sequence_length=num_tokens, overlap=overlap, group=world.group, **arguments)
    found = torch.autograd.grad(out, leaves, share(grad, 1, world))
    for weight in found[3:]:
        dist.all_reduce(weight)
    return [_whole(tensor, 1, num_tokens, world) for tensor in (out.detach(), *found[:3])] + list(found[3:])


def _whole(x: Tensor, dim: int, length: int, world: World) -> Tensor:
    """The shares of all ranks, brought together without the functions under test."""
    shares: list[Any] = [None] * world.num_ranks
    dist.all_gather_object(shares, x)
    return torch.cat(shares, dim)


@contextmanager
def _counted() -> Iterator[list[tuple[int, int]]]:
    """(elements sent, elements received) of each call of dist.all_to_all_single, checked against its split sizes."""
    counts: list[tuple[int, int]] = []
    call = dist.all_to_all_single

    def counting(output: Tensor, x: Tensor, output_sizes: list[int], input_sizes: list[int], **options: Any) -> Any:
        assert (sum(input_sizes), sum(output_sizes)) == (x.numel(), output.numel())
        counts.append((x.numel(), output.numel()))
        return call(output, x, output_sizes, input_sizes, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_to_all_single", counting)
        yield counts


@contextmanager
def _spied(events: list[str]) -> Iterator[None]:
    """Note in `events` the exchanges, the beginnings and ends of those under way, and the norm of queries."""
    from opensora_kernels.sequence_parallel import attention as module

    send, wait, exchange, norm = (
        all_to_all.Flight.send,
        all_to_all.Flight.wait,
        all_to_all._exchange,
        module.qk_norm_rope,
    )

    def spy_exchange(*arguments: Any, async_op: bool = False) -> Any:
        events.append("send" if async_op else "exchange")
        return exchange(*arguments, async_op=async_op)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(all_to_all.Flight, "send", send)
        patch.setattr(all_to_all.Flight, "wait", lambda flight: (events.append("wait"), wait(flight))[1])
        patch.setattr(all_to_all, "_exchange", spy_exchange)
        patch.setattr(module, "qk_norm_rope", lambda *a, **o: (events.append("norm"), norm(*a, **o))[1])
        yield
