"""A rank of a torchrun that loses one: `torchrun --max-restarts 1 ... -m tests.training.elastic_run FOLDER`."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch

from opensora.config import ParallelConfig
from opensora.parallel import ParallelContext
from tests.training.flow_run import train_flow
from tests.training.rank_checks import NUM_MICRO_BATCHES


def main() -> None:
    torch.set_num_threads(1)
    context = ParallelContext.from_environment(ParallelConfig(timeout=60.0), "cpu")

    def die(step: int) -> None:
        if step == 3 and context.rank == 1 and context.num_restarts == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    train_flow(
        Path(sys.argv[1]) / "restarted",
        context,
        accumulation_steps=NUM_MICRO_BATCHES // context.world_size,
        before_loss=die,
        checkpoint_every=2,
    )
    context.close()


if __name__ == "__main__":
    main()
