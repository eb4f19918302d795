"""Which samples form the next batch: shuffled every epoch, and resumable from two integers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, Generic, Protocol, TypeVar

import torch

BatchT = TypeVar("BatchT")


class Loader(Protocol):
    """A loader of files: endless, and it knows where it stands."""

    def forever(self) -> Iterator[Any]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class LoaderBatches:
    """The batches of a loader as the training loop takes them: one at a time."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader
        self._batches: Iterator[Any] | None = None

    def __next__(self) -> Any:
        if self._batches is None:
            self._batches = self._loader.forever()
        return next(self._batches)

    def state_dict(self) -> dict[str, Any]:
        return self._loader.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._loader.load_state_dict(state)
        self._batches = None


class ShuffledBatches(Generic[BatchT]):
    """An endless iterator over batches of samples held in memory.

    Only samples with equal `keys` (say, their shapes) share a batch. Each epoch shuffles the samples and then the
    batches with a generator seeded by seed + epoch. A remainder smaller than `batch_size` is dropped, except where a
    key has fewer samples than one batch: those are repeated to fill it.
    Epochs follow each other in one sequence of batches, of which rank r takes every `world_size`-th from the r-th on:
    {seed, number of batches taken by all ranks} is the whole state, for any number of ranks.
    """

    def __init__(
        self,
        keys: Sequence[Hashable],
        load: Callable[[list[int]], BatchT],
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if len(keys) == 0:
            raise ValueError("batches: the data set must hold at least one sample, got none")
        if batch_size < 1:
            raise ValueError(f"batches: batch_size must be at least 1, got {batch_size}")
        groups: defaultdict[Hashable, list[int]] = defaultdict(list)
        for index, key in enumerate(keys):
            groups[key].append(index)
        self._groups = list(groups.values())
        self._load = load
        self._batch_size = batch_size
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        self._num_taken = 0
        self._epoch = 0
        self._order = self._order_of(0)

    def __iter__(self) -> ShuffledBatches[BatchT]:
        return self

    def __next__(self) -> BatchT:
        epoch, position = divmod(self._num_taken + self._rank, len(self._order))  # all epochs have one length
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._order_of(epoch)
        self._num_taken += self._world_size
        return self._load(self._order[position])

    def state_dict(self) -> dict[str, int]:
        return {"seed": self._seed, "num_taken": self._num_taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._seed, self._num_taken = state["seed"], state["num_taken"]
        self._epoch = self._num_taken // len(self._order)
        self._order = self._order_of(self._epoch)

    def _order_of(self, epoch: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(self._seed + epoch)
        batches: list[list[int]] = []
        for group in self._groups:
            shuffled = [group[i] for i in torch.randperm(len(group), generator=generator).tolist()]
            if len(shuffled) < self._batch_size:
                shuffled = (shuffled * self._batch_size)[: self._batch_size]
            stop = len(shuffled) - self._batch_size + 1
            batches += [shuffled[i : i + self._batch_size] for i in range(0, stop, self._batch_size)]
        return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
