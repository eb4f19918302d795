"""The CUDA packing kernels without a GPU: their index map, and every thread's work, against torch.tensor_split."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from opensora_kernels._extension import why_not_loaded
from opensora_kernels.ops.pack_shards import cuda_kernel as packing
from opensora_kernels.ops.unpack_shards import cuda_kernel as unpacking
from tests.csrc import host, shards_replay
from tests.ops.test_shards import by_tensor_split, numbers

pytestmark = pytest.mark.skipif(host.why_not() is not None, reason=str(host.why_not()))
on_cpu = pytest.mark.skipif(shards_replay.why_not_on_cpu() is not None, reason=str(shards_replay.why_not_on_cpu()))
DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.complex128]


def test_every_index_map_is_right_at_small_sizes_and_at_the_edges_of_large_ones(tmp_path: Path):
    ran = subprocess.run([host.program("pack_shards_maps.cpp", tmp_path)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout


@given(data=st.data())
def test_threads_move_every_byte_once_and_to_its_place(data: st.DataObject):
    """Any sizes, axes in any order in memory, and steps between elements."""
    shape = data.draw(st.lists(st.sampled_from([1, 2, 3, 5, 8]), min_size=1, max_size=5))
    dim, num_shards = data.draw(st.integers(0, len(shape) - 1)), data.draw(st.integers(1, 9))
    dtype, num_tensors = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from([1, 2, 3, 11]))
    force_wide = data.draw(st.booleans())
    tensors = [_laid_out(tensor, data) for tensor in numbers(num_tensors, *shape, dtype=dtype).unbind()]
    packed = shards_replay.pack(tensors, num_shards, dim, force_wide=force_wide)
    assert torch.equal(packed, by_tensor_split(tensors, num_shards, dim))
    back = shards_replay.unpack(packed, shape, num_shards, dim, num_tensors, force_wide=force_wide)
    assert all(torch.equal(now, then) for now, then in zip(back, tensors, strict=True))


@pytest.mark.parametrize("force_wide", [False, True])
@pytest.mark.parametrize(("shape", "dtype"), [((5, 7, 3, 151), torch.uint8), ((3, 97, 10, 72), torch.bfloat16)])
def test_shards_of_many_blocks_are_whole(shape: tuple[int, ...], dtype: torch.dtype, force_wide: bool):
    """A block moves 1,024 vectors, 256 at a time; of 16 bytes for heads of 72."""
    qkv = list(numbers(*shape[:2], 3, *shape[2:], dtype=dtype).unbind(2))
    for num_shards, dim in ((1, 1), (2, 2), (3, 1), (4, 2)):
        packed = shards_replay.pack(qkv, num_shards, dim, force_wide=force_wide)
        assert torch.equal(packed, by_tensor_split(qkv, num_shards, dim))
        back = shards_replay.unpack(packed, list(shape), num_shards, dim, 3, force_wide=force_wide)
        assert all(torch.equal(now, then) for now, then in zip(back, qkv, strict=True))


@given(data=st.data())
def test_a_push_leaves_each_shard_at_its_own_address_and_nothing_around_it(data: st.DataObject):
    shape = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    dim, num_shards = data.draw(st.integers(0, len(shape) - 1)), data.draw(st.integers(1, 8))
    margin = data.draw(st.sampled_from([1, 2, 3, 8]))  # so that addresses are aligned to any number of bytes
    tensors = list(numbers(data.draw(st.integers(1, 3)), *shape, dtype=torch.int16).unbind())
    shards = [by_tensor_split([tensor[None] for tensor in cut], 1, 0) for cut in _cuts(tensors, num_shards, dim)]
    memory = [torch.full((len(shard) + 2 * margin,), -1, dtype=torch.int16) for shard in shards]
    shards_replay.push(tensors, num_shards, dim, [each[margin:].data_ptr() for each in memory])
    for each, shard in zip(memory, shards, strict=True):
        assert torch.equal(each, torch.cat([each.new_full((margin,), -1), shard, each.new_full((margin,), -1)]))


def test_vectors_are_as_wide_as_sizes_and_addresses_permit():
    def width(x: Tensor, dim: int, num_shards: int = 3) -> int:
        return shards_replay.copy_by_threads([x], num_shards, dim, torch.empty(x.numel(), dtype=x.dtype))

    qkv = torch.zeros(2, 9, 3, 16, 72, dtype=torch.bfloat16)  # STDiT's heads of 72, views of one projection
    assert width(qkv[:, :, 1], 2) == 16
    assert width(torch.zeros(2, 16, 9, 72, dtype=torch.bfloat16).transpose(1, 2), 1) == 16  # attention's result
    assert [width(torch.zeros(4, 6, size, dtype=torch.bfloat16), 1) for size in (8, 4, 6, 7)] == [16, 8, 4, 2]
    assert width(torch.zeros(4 * 6 * 8 + 1, dtype=torch.bfloat16)[1:].view(4, 6, 8), 1) == 2
    assert width(torch.zeros(3, 5, dtype=torch.uint8), 0) == 1
    assert width(torch.zeros(4, 6, 8).mT, 1) == 4  # elements a step apart
    assert width(torch.zeros(2, 3, 2, 3, 2, 2).permute(4, 2, 0, 1, 3, 5), 3) == 0  # too many axes: a copy comes first


@on_cpu
@pytest.mark.parametrize("num_shards", [1, 3, 8])
def test_calls_fit_the_schemas_and_gradients_move_the_other_way(num_shards: int):
    tensors = list(numbers(2, 3, 7, 4, dtype=torch.bfloat16).unbind())
    with shards_replay.OnCPU():
        packed = packing.forward(tensors, num_shards, 1)
        (grads, *rest) = packing.backward([packed], [True], [], tensors, num_shards, 1)
        back = unpacking.forward(packed, [3, 7, 4], num_shards, 1, 2)
        (grad, *others) = unpacking.backward([tensors[0], None], [True], [], packed, [3, 7, 4], num_shards, 1, 2)
    assert torch.equal(packed, by_tensor_split(tensors, num_shards, 1))
    assert rest == [None] * 2
    assert others == [None] * 4
    for found in (grads, back):
        assert all(torch.equal(now, then) for now, then in zip(found, tensors, strict=True))
    assert torch.equal(grad, by_tensor_split([tensors[0], torch.zeros_like(tensors[1])], num_shards, 1))


@pytest.mark.gpu
@pytest.mark.parametrize("num_shards", [3, 8])
def test_a_gpu_packs_unpacks_and_pushes_what_the_replay_does(num_shards: int):
    """STDiT's heads, odd ones, a transposed result, and strides of more axes than the kernel follows."""
    if (reason := why_not_loaded("cuda")) is not None:
        pytest.skip(reason)
    many = torch.randn(2, 3, 2, 3, 2, 2).permute(4, 2, 0, 1, 3, 5)
    for tensors, dim in (
        (list(torch.randn(2, 97, 3, 16, 72).bfloat16().unbind(2)), 2),
        (list(torch.randn(11, 3, 13, 7, 5).half().unbind()), 1),
        ([torch.randn(2, 16, 33, 72).bfloat16().transpose(1, 2)], 1),
        ([many], 3),
    ):
        on_gpu = [tensor.to("cuda") for tensor in tensors]
        packed = packing.forward(on_gpu, num_shards, dim)
        assert torch.equal(packed.cpu(), shards_replay.pack(tensors, num_shards, dim))
        back = unpacking.forward(packed, list(tensors[0].shape), num_shards, dim, len(tensors))
        assert all(torch.equal(now.cpu(), then) for now, then in zip(back, tensors, strict=True))
        sizes = [sum(map(Tensor.numel, cut)) for cut in _cuts(tensors, num_shards, dim)]
        memory = [packed.new_zeros(size) for size in sizes]
        targets = [each.data_ptr() for each in memory]
        torch.ops.opensora_kernels.pack_shards_cuda_push(on_gpu, num_shards, dim, targets)
        assert torch.equal(torch.cat(memory), packed)


def _cuts(tensors: list[Tensor], num_shards: int, dim: int) -> list[list[Tensor]]:
    return [[tensor.tensor_split(num_shards, dim)[shard] for tensor in tensors] for shard in range(num_shards)]


def _laid_out(x: Tensor, data: st.DataObject) -> Tensor:
    """The same values with the axes in another order in memory, and perhaps every second element of it."""
    order = data.draw(st.permutations(range(x.dim())))
    step = data.draw(st.sampled_from([1, 1, 2]))
    inverse = [order.index(axis) for axis in range(x.dim())]
    memory = x.permute(order).contiguous()
    if step == 2:
        memory = torch.stack([memory, memory], -1)[..., 0]
    return memory.permute(inverse)
