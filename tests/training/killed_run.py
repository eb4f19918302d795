"""Trains in a process of its own and kills it: `python -m tests.training.killed_run {vae,flow} FOLDER STEP`.

The process ends with SIGKILL right after STEP, between two checkpoints, as from a power cut.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from opensora.training import loop
from tests.training.small_models import train_small


def main() -> None:
    kind, folder, last_step = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    step = loop._Loop._train_step

    def step_then_die(self: loop._Loop) -> dict[str, float]:
        if self.step == last_step:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self)

    loop._Loop._train_step = step_then_die
    train_small(kind, folder, folder / "broken")


if __name__ == "__main__":
    main()
