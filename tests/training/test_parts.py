"""Learning rates and the order of batches."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
import torch

from opensora.config import OptimizerConfig
from opensora.training import ShuffledBatches, learning_rate
from opensora.training.optimizer import why_not_apex


def test_warmup_rises_linearly_and_reaches_lr_after_it():
    config = OptimizerConfig(lr=1.0, warmup_steps=4)
    rates = [learning_rate(step, config, 100) for step in range(6)]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])


def test_cosine_falls_from_lr_to_its_floor_at_the_last_step():
    config = OptimizerConfig(lr=2.0, warmup_steps=10, decay="cosine", final_lr_ratio=0.1)
    rates = [learning_rate(step, config, 111) for step in range(111)]
    assert rates[10] == 2.0
    assert rates[60] == pytest.approx((2.0 + 0.2) / 2)
    assert rates[110] == pytest.approx(0.2)
    assert all(a >= b for a, b in pairwise(rates[10:]))


def test_apex_says_why_it_does_not_run():
    assert why_not_apex([torch.zeros(1)]) == "apex's FusedAdam runs on CUDA alone, and these weights are on cpu"


def make_batches(**changes: int) -> ShuffledBatches[list[int]]:
    return ShuffledBatches([0] * 8 + [1] * 5 + [2], lambda indices: indices, **({"batch_size": 4, "seed": 7} | changes))


def test_an_epoch_shows_each_sample_once_and_never_mixes_keys():
    batches = make_batches()
    epoch = [next(batches) for _ in range(4)]  # 8 / 4 + 5 // 4, and the lone sample repeated
    kinds = [{0 if i < 8 else 1 if i < 13 else 2 for i in batch} for batch in epoch]
    assert all(len(kind) == 1 for kind in kinds)
    counts = Counter(i for batch in epoch for i in batch)
    assert all(counts[i] == 1 for i in range(8))
    assert counts[13] == 4
    assert [next(batches) for _ in range(4)] != epoch


def test_batches_resume_after_the_last_one_taken():
    unbroken, broken = make_batches(), make_batches()
    expected = [next(unbroken) for _ in range(11)]
    for _ in range(6):
        next(broken)
    resumed = make_batches(seed=99)
    resumed.load_state_dict(broken.state_dict())
    assert [next(resumed) for _ in range(5)] == expected[6:]


def test_batches_resume_on_another_number_of_ranks():
    whole = make_batches()
    expected = [next(whole) for _ in range(14)]
    four = [make_batches(rank=rank, world_size=4) for rank in range(4)]
    taken = [next(share) for _ in range(2) for share in four]
    three = [make_batches(rank=rank, world_size=3) for rank in range(3)]
    for share in three:
        share.load_state_dict(four[0].state_dict())
    assert taken + [next(share) for _ in range(2) for share in three] == expected


def test_ranks_share_an_epoch():
    shares = [make_batches(rank=rank, world_size=2) for rank in range(2)]
    taken = [next(share) for _ in range(2) for share in shares]
    whole = make_batches()
    assert taken == [next(whole) for _ in range(4)]
