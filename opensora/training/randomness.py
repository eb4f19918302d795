"""Random numbers that depend on the seed and on where the run is, never on what was drawn before."""

from __future__ import annotations

import random

import numpy as np
import torch

from opensora.config import RunConfig

_BETWEEN_STEPS = 1  # the stream of what is drawn outside of steps: samples, validation, exports


def prepare_process(run: RunConfig) -> None:
    """Seeds torch, NumPy and Python and sets the number of threads, if one is asked for.

    Call before the modules are built, so that their weights follow the seed, on every rank the same.
    """
    if run.num_threads is not None:
        torch.set_num_threads(run.num_threads)
    _seed_all(run.seed)


def seed_micro_batch(seed: int, number: int) -> None:
    """Makes what a training step draws a function of `seed` and the number of its batch, counted over all data ranks.

    So ranks which share a batch draw alike, one process that accumulates R batches draws as R ranks do, and a resumed
    run draws as an unbroken one.
    """
    _seed_all(_mixed(seed, number))


def seed_between_steps(seed: int, step: int) -> None:
    """The same for what samples, validation and exports draw after `step` steps."""
    _seed_all(_mixed(seed, step, _BETWEEN_STEPS))


def _mixed(*numbers: int) -> int:
    # Neighbouring seeds of a Mersenne Twister or Philox are fine by themselves; mixing keeps (seed + 1, n) from being
    # (seed, n + 1), which would give two runs of a comparison the same noise.
    first, second = np.random.SeedSequence([abs(number) for number in numbers]).generate_state(2)
    return int(first) << 31 ^ int(second)


def _seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
