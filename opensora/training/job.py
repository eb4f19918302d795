"""What a trainer hands the loop, and what it gets back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from opensora.config import OptimizerConfig


class Batches(Protocol):
    """An endless iterator over batches whose position, counted over all ranks, can be saved."""

    def __next__(self) -> Any: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


Loss = Callable[[Any], tuple[Tensor, dict[str, Tensor]]]


@dataclass(frozen=True)
class Adversary:
    """What is trained against the job's modules, such as a discriminator.

    After each backward pass of the job's loss, `loss` maps the same batch to (scalar, scalars to log), usually from
    what the job's loss has kept, detached; a scalar without a gradient trains nothing. While the job's own loss and its
    backward pass run, the weights of `modules` require no gradient. `modules` must be whole on each rank.
    `optimizer` gives the rate, clipping and so on; its accumulation_steps and ema_decay are not read.
    """

    modules: Mapping[str, nn.Module]
    loss: Loss
    optimizer: OptimizerConfig


@dataclass(frozen=True)
class Job:
    """What one training does that others do not.

    `modules` are trained (their parameters that require a gradient); `loss` maps a batch to (scalar, scalars to log);
    `num_samples`, `num_tokens` and `flops` of the batch among these become rates. A batch that is a dict gets `step`,
    the 0-based number of the step. `export(folder, states)` writes a model folder from {module: state} and runs on the
    main rank alone; `sample(folder, step)` writes examples and returns scalars to log, `validate(step)` returns
    scalars; both run on all ranks, of which the main one's files and scalars are kept. All three run with the averaged
    weights in the modules, whole on each rank, without gradients. `config` is recorded in every checkpoint.
    """

    modules: Mapping[str, nn.Module]
    batches: Batches
    loss: Loss
    export: Callable[[Path, dict[str, dict[str, Tensor]]], None]
    config: Any
    sample: Callable[[Path, int], Mapping[str, float]] | None = None
    adversary: Adversary | None = None
    validate: Callable[[int], Mapping[str, float]] | None = None


@dataclass(frozen=True)
class TrainingResult:
    """Where a training ended. `was_stopped` means Ctrl-C: the checkpoint is there and resuming goes on exactly."""

    step: int
    loss: float
    was_stopped: bool
    checkpoint: Path
    model: Path
