"""Trains in forks of this process and kills each at a random moment: `python -m tests.training.kills FOLDER COUNT`.

Every fork resumes what the one before has left and writes a checkpoint after every step. After each kill, every
checkpoint named complete is read whole. Prints the last step after each.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
import torch._dynamo  # what an optimizer imports at its first step: before the forks, and not in each

from opensora.training.checkpoint import read_state, read_tensors
from opensora.training.records import read_losses
from tests.training.toy import Hooks, constant, train


def main() -> None:
    output, count = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    moments = random.Random(0)
    for _ in range(count):
        child = os.fork()
        if child == 0:
            _train_until_killed(output)
        # From the first moment of a run to its tenth or so checkpoint, so that many are killed while one is written.
        time.sleep(moments.uniform(0.05, 0.6))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WTERMSIG(status) == signal.SIGKILL, "it ended by itself"
        print(_last_step(output), flush=True)


def _train_until_killed(output: Path) -> None:
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (until the kill)
    try:
        train(output, steps=10**6, resume=True, checkpoint_every=1, optimizer=constant(), hooks=Hooks(noise=0.0))
    finally:
        os._exit(1)


def _last_step(output: Path) -> int:
    steps = [0]
    for path in sorted((output / "checkpoints").glob("step-*")):
        steps.append(int(path.name.removeprefix("step-")))
        assert read_state(path)["step"] == steps[-1]
        tensors = read_tensors(path)
        assert len(tensors) == 16  # 4 weights, each with its average and two moments
        assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
    read_losses(output)
    return steps[-1]


if __name__ == "__main__":
    main()
