from itertools import chain

import pytest

from opensora.data.buckets import Buckets
from opensora.data.samplers import ClipRequest, FixedSizeBatchSampler, VariableVideoBatchSampler

TABLE = {"144p": {1: (1.0, 3), 17: (1.0, 2)}, "240p": {17: (1.0, 2)}}
SHAPES = [(20, 144, 256)] * 7 + [(1, 144, 256)] * 4 + [(20, 240, 426)] * 5


def variable(rank: int = 0, num_replicas: int = 1, **options: bool | int) -> VariableVideoBatchSampler:
    return VariableVideoBatchSampler(SHAPES, Buckets(TABLE), rank=rank, num_replicas=num_replicas, **options)


def fixed(rank: int = 0, num_replicas: int = 1, **options: bool | int) -> FixedSizeBatchSampler:
    return FixedSizeBatchSampler(15, (17, 64, 64), 2, rank=rank, num_replicas=num_replicas, **options)


@pytest.mark.parametrize("make", [variable, fixed])
@pytest.mark.parametrize("num_replicas", [1, 2, 3])
@pytest.mark.parametrize("drop_last", [False, True])
def test_ranks_share_an_epoch_in_equal_parts(make, num_replicas: int, drop_last: bool):
    parts = [list(make(rank, num_replicas, drop_last=drop_last)) for rank in range(num_replicas)]
    assert {len(part) for part in parts} == {len(make(0, num_replicas, drop_last=drop_last))}
    indices = [request.index for request in chain(*chain(*parts))]
    if drop_last:
        assert len(set(indices)) == len(indices)
    else:
        assert set(indices) == set(range(16 if make is variable else 15))


def test_batches_hold_one_bucket_and_its_batch_size():
    for batch in variable():
        shapes = {request[1:] for request in batch}
        assert len(shapes) == 1
        assert len(batch) == (3 if shapes == {(1, 144, 256)} else 2)


@pytest.mark.parametrize("make", [variable, fixed])
def test_epochs_differ_and_repeat(make):
    sampler = make(seed=5)
    first = list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) != first
    sampler.set_epoch(0)
    assert list(sampler) == first
    assert list(make(seed=6)) != first


@pytest.mark.parametrize("make", [variable, fixed])
def test_a_resumed_sampler_continues(make):
    whole = list(make(1, 2, seed=5))
    saved = make(1, 2, seed=5).state_dict(num_steps=2)
    resumed = make(1, 2)
    resumed.load_state_dict(saved)
    assert list(resumed) == whole[2:]
    assert list(resumed) == whole  # the next epoch is whole again


def test_a_run_resumes_with_another_number_of_ranks():
    order = list(variable(seed=5, drop_last=True))
    resumed = []
    for rank in range(2):
        sampler = variable(rank, 2, drop_last=True)
        sampler.load_state_dict(variable(seed=5).state_dict(num_steps=3))
        resumed.append(list(sampler))
    # Three of the batches were seen by one rank; two ranks go in steps of two, so the third is seen again.
    assert list(chain(*zip(*resumed, strict=True))) == order[2 : len(order) // 2 * 2]


def test_small_buckets_can_be_left_out_as_in_the_original():
    shapes = [(1, 144, 256)] + [(20, 144, 256)] * 2
    buckets = Buckets({"144p": {1: (1.0, 3), 17: (1.0, 2)}})
    assert [len(batch) for batch in VariableVideoBatchSampler(shapes, buckets, is_shuffled=False)] == [3, 2]
    original = VariableVideoBatchSampler(shapes, buckets, is_shuffled=False, fill_small_buckets=False)
    assert [len(batch) for batch in original] == [2]


def test_a_request_writes_itself_as_the_original_does():
    assert str(ClipRequest(7, 17, 144, 256)) == "7-17-144-256"
    assert next(iter(fixed(is_shuffled=False))) == [ClipRequest(0, 17, 64, 64), ClipRequest(1, 17, 64, 64)]


def test_no_batches_and_bad_ranks_are_refused():
    with pytest.raises(ValueError, match="at least one batch for each of 2 ranks, got 0 batches"):
        list(VariableVideoBatchSampler([(5, 10, 10)], Buckets(TABLE), num_replicas=2))
    with pytest.raises(ValueError, match="at least one batch for each of 8 ranks, got 7 batches"):
        len(fixed(0, 8, drop_last=True))
    with pytest.raises(ValueError, match=r"rank must lie in \[0, num_replicas = 2\), got 2"):
        fixed(2, 2)
