"""Samplers that hand each rank its batches, every batch from one bucket, and resume where a run stopped.

They are `batch_sampler`s of a DataLoader: an item is a list of `ClipRequest`, which a dataset takes as its index.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch.utils.data import Sampler

from opensora.data.buckets import BucketKey, Buckets


class ClipRequest(NamedTuple):
    """Row `index` of the manifest, to be cut to `num_frames` frames of `height` x `width` pixels."""

    index: int
    num_frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return "-".join(map(str, self))


class _ResumableBatchSampler(Sampler[list[ClipRequest]]):
    """Deals the batches of an epoch's plan to the ranks: step i gives rank r batch i * num_replicas + r.

    Every rank makes the same plan from (seed, epoch), so that they agree without talking.
    """

    def __init__(self, *, rank: int, num_replicas: int, seed: int, is_shuffled: bool, drop_last: bool) -> None:
        if not 0 <= rank < num_replicas:
            raise ValueError(f"sampler: rank must lie in [0, num_replicas = {num_replicas}), got {rank}")
        self.rank, self.num_replicas = rank, num_replicas
        self.seed, self.epoch = seed, 0
        self.is_shuffled, self.drop_last = is_shuffled, drop_last
        self._num_consumed = 0
        self._plan_epoch: tuple[int, int] | None = None
        self._plan: list[list[ClipRequest]] = []

    def __iter__(self) -> Iterator[list[ClipRequest]]:
        plan = self._planned()
        # With another number of ranks than at the stop, the last started step is repeated rather than cut short.
        first = self._num_consumed // self.num_replicas * self.num_replicas
        self._num_consumed = 0
        yield from plan[first + self.rank :: self.num_replicas]

    def __len__(self) -> int:
        """The number of batches of a whole epoch for each rank."""
        return len(self._planned()) // self.num_replicas

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def state_dict(self, num_steps: int) -> dict[str, int]:
        """What resumes after `num_steps` steps of the current epoch (the loader's workers are ahead of the trainer)."""
        return {
            "seed": self.seed,
            "epoch": self.epoch,
            "last_micro_batch_access_index": num_steps * self.num_replicas,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue at a saved state, also with another number of ranks; only the next iteration is shortened."""
        self.seed, self.epoch = state["seed"], state["epoch"]
        self._num_consumed = state["last_micro_batch_access_index"]

    def _planned(self) -> list[list[ClipRequest]]:
        if self._plan_epoch != (self.seed, self.epoch):
            plan = self._make_plan(torch.Generator().manual_seed(self.seed + self.epoch))
            length = _whole_batches(len(plan), self.num_replicas, self.drop_last)
            if not plan or length == 0:
                raise ValueError(
                    f"sampler: the clips must make at least one batch for each of {self.num_replicas} ranks, got "
                    f"{len(plan)} batches: check the buckets against the clips' sizes and lengths, or the batch sizes"
                )
            plan = _repeat_to(plan, length)
            self._plan_epoch, self._plan = (self.seed, self.epoch), plan
        return self._plan

    def _make_plan(self, generator: torch.Generator) -> list[list[ClipRequest]]:
        raise NotImplementedError

    def _shuffled(self, values: list, generator: torch.Generator) -> list:
        if not self.is_shuffled:
            return values
        return [values[i] for i in torch.randperm(len(values), generator=generator).tolist()]


class VariableVideoBatchSampler(_ResumableBatchSampler):
    """Batches of clips that share a bucket, each bucket with its own batch size.

    Args:
        shapes: (num_frames, height, width) of every row of the manifest.
        buckets: where a clip may go. Rows that no bucket takes are left out; which ones changes with the epoch.
        frame_interval: every how many frames one is used.
        rank, num_replicas: this process among the data-parallel ones.
        drop_last: leave out the clips and batches that do not fill a batch or a step; otherwise repeat some.
        fill_small_buckets: without `drop_last`, repeat clips as often as needed to fill a batch. False repeats them
            once, as the original does, so that buckets with less than half a batch are left out.

    Source: Open-Sora v1.2.0, opensora/datasets/sampler.py. One difference: without `drop_last`, the repeated batches
    that fill the last step are whole (there they can be empty).
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, int, int]],
        buckets: Buckets,
        *,
        frame_interval: int = 1,
        rank: int = 0,
        num_replicas: int = 1,
        seed: int = 0,
        is_shuffled: bool = True,
        drop_last: bool = False,
        fill_small_buckets: bool = True,
    ) -> None:
        super().__init__(rank=rank, num_replicas=num_replicas, seed=seed, is_shuffled=is_shuffled, drop_last=drop_last)
        self.fill_small_buckets = fill_small_buckets
        self.shapes, self.buckets, self.frame_interval = shapes, buckets, frame_interval

    def group_by_bucket(self) -> dict[BucketKey, list[int]]:
        """The rows of each bucket in this epoch, buckets in order of their first row."""
        groups: dict[BucketKey, list[int]] = {}
        num_buckets = len(self.buckets)
        for index, (num_frames, height, width) in enumerate(self.shapes):
            seed = self.seed + self.epoch + index * num_buckets
            key = self.buckets.assign(num_frames, height, width, frame_interval=self.frame_interval, seed=seed)
            if key is not None:
                groups.setdefault(key, []).append(index)
        return groups

    def _make_plan(self, generator: torch.Generator) -> list[list[ClipRequest]]:
        batches_of: dict[BucketKey, list[list[ClipRequest]]] = {}
        for key, rows in self.group_by_bucket().items():
            size = self.buckets.size(key)
            batches_of[key] = [
                [ClipRequest(index, *size) for index in batch]
                for batch in self._batches(rows, self.buckets.batch_size(key), generator)
            ]
        order = self._shuffled([key for key, batches in batches_of.items() for _ in batches], generator)
        remaining = {key: iter(batches) for key, batches in batches_of.items()}
        return [next(remaining[key]) for key in order]

    def _batches(self, rows: list[int], batch_size: int, generator: torch.Generator) -> list[list[int]]:
        length = _whole_batches(len(rows), batch_size, self.drop_last)
        if not self.fill_small_buckets:
            length = min(length, 2 * len(rows))
        rows = self._shuffled(_repeat_to(rows, length), generator)
        return _full_batches(rows, batch_size)


class FixedSizeBatchSampler(_ResumableBatchSampler):
    """Batches of clips that are all cut to one (num_frames, height, width)."""

    def __init__(
        self,
        num_rows: int,
        size: tuple[int, int, int],
        batch_size: int,
        *,
        rank: int = 0,
        num_replicas: int = 1,
        seed: int = 0,
        is_shuffled: bool = True,
        drop_last: bool = False,
    ) -> None:
        super().__init__(rank=rank, num_replicas=num_replicas, seed=seed, is_shuffled=is_shuffled, drop_last=drop_last)
        if batch_size < 1:
            raise ValueError(f"sampler: batch_size must be positive, got {batch_size}")
        self.num_rows, self.size, self.clips_per_batch = num_rows, size, batch_size

    def _make_plan(self, generator: torch.Generator) -> list[list[ClipRequest]]:
        rows = self._shuffled(list(range(self.num_rows)), generator)
        length = _whole_batches(len(rows), self.clips_per_batch, self.drop_last)
        requests = [ClipRequest(index, *self.size) for index in _repeat_to(rows, length)]
        return _full_batches(requests, self.clips_per_batch)


def _whole_batches(num_rows: int, batch_size: int, drop_last: bool) -> int:
    """`num_rows` rounded to a multiple of `batch_size`, down with `drop_last`, else up."""
    return (num_rows if drop_last else num_rows + batch_size - 1) // batch_size * batch_size


def _repeat_to(values: list, length: int) -> list:
    """The first `length` of the values repeated end to end."""
    return [values[i % len(values)] for i in range(length)]


def _full_batches(values: list, batch_size: int) -> list[list]:
    return [values[i : i + batch_size] for i in range(0, len(values) - batch_size + 1, batch_size)]
