"""pack_shards and unpack_shards: what an all-to-all sends and receives, against torch.tensor_split."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from opensora_kernels import backends, pack_shards, unpack_shards, use
from opensora_kernels.shards import shard_sizes
from tests.ops.contract import strided_copy

BACKENDS = ["reference", "triton"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]
SHAPES = st.lists(st.integers(0, 7), min_size=1, max_size=4)


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """All different, as far as the dtype can tell them apart."""
    return torch.arange(1, torch.Size(shape).numel() + 1).reshape(shape).to(dtype)


def by_tensor_split(tensors: list[Tensor], num_shards: int, dim: int) -> Tensor:
    flat = [tensor.tensor_split(num_shards, dim)[shard].flatten() for shard in range(num_shards) for tensor in tensors]
    return torch.cat(flat)


def test_sizes_are_those_of_tensor_split():
    for total in range(20):
        for num_shards in range(1, 9):
            cut = torch.empty(total).tensor_split(num_shards)
            assert shard_sizes(total, num_shards) == [len(shard) for shard in cut]


@pytest.mark.parametrize("backend", BACKENDS)
@given(
    shape=SHAPES, dim=st.integers(-4, 3), num_shards=st.integers(1, 9), num_tensors=st.integers(1, 3),
    dtype=st.sampled_from(DTYPES), is_strided=st.booleans(),
)  # fmt: skip
def test_shards_are_those_of_tensor_split_and_come_back(
    backend: str, shape: list[int], dim: int, num_shards: int, num_tensors: int, dtype: torch.dtype, is_strided: bool
):
    skip_without(backend)
    dim %= len(shape)
    tensors = list(numbers(num_tensors, *shape, dtype=dtype).unbind())
    if is_strided:
        tensors = [strided_copy(tensor) for tensor in tensors]
    with use(pack_shards=backend, unpack_shards=backend):
        packed = pack_shards(tensors, num_shards=num_shards, dim=dim)
        back = unpack_shards(packed, shape=shape, num_shards=num_shards, dim=dim, num_tensors=num_tensors)
    assert torch.equal(packed, by_tensor_split(tensors, num_shards, dim))
    assert all(torch.equal(now, then) and now.is_contiguous() for now, then in zip(back, tensors, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@given(shape=SHAPES, dim=st.integers(-4, 3), num_shards=st.integers(1, 9), num_tensors=st.integers(1, 3))
def test_gradients_move_the_other_way(backend: str, shape: list[int], dim: int, num_shards: int, num_tensors: int):
    skip_without(backend)
    options = {"num_shards": num_shards, "dim": dim % len(shape)}
    tensors = [tensor.requires_grad_() for tensor in numbers(num_tensors, *shape).unbind()]
    packed = by_tensor_split(tensors, **options).detach().requires_grad_()
    with use(pack_shards=backend, unpack_shards=backend):
        found = torch.autograd.grad(pack_shards(tensors, **options), tensors, packed.detach())
        back = unpack_shards(packed, shape=shape, num_tensors=num_tensors, **options)
        (found_packed,) = torch.autograd.grad(back, packed, [tensor.detach() for tensor in tensors])
    assert all(torch.equal(gradient, tensor) for gradient, tensor in zip(found, tensors, strict=True))
    assert torch.equal(found_packed, packed)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_result_that_nobody_used_gets_a_gradient_of_zero(backend: str):
    skip_without(backend)
    packed = numbers(12).requires_grad_()
    with use(unpack_shards=backend):
        _, second = unpack_shards(packed, shape=(2, 3), num_shards=2, dim=1, num_tensors=2)
        second.backward(torch.ones(2, 3))
    assert packed.grad.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 1, 1]


def test_views_of_one_projection_are_read_in_place(monkeypatch: pytest.MonkeyPatch):
    skip_without("triton")
    from opensora_kernels._triton import shards

    read = []
    monkeypatch.setattr(shards, "launch", lambda kernel, grid, rows, *rest, **constants: read.append(rows))
    qkv = numbers(2, 5, 3, 7, 8)
    shards.pack(list(qkv.unbind(2)), 3, 2)
    assert [rows.data_ptr() for rows in read] == [qkv[:, :, index].data_ptr() for index in range(3)]


def skip_without(backend: str) -> None:
    reason = backends.why_not("unpack_shards", backend, torch.ones(1), [1], 1, 0, 1)
    if reason is not None:
        pytest.skip(reason)
