"""Trains in a process of its own and kills it: `python -m tests.training.killed_run {vae,flow} FOLDER STEP`.

The process ends with SIGKILL right after STEP, between two checkpoints, as from a power cut.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path

from opensora.training import loop
from tests.training.small_models import train_small


def main() -> None:
    kind, folder, last_step = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    step = loop._Loop._train_step

    def step_then_die(self: loop._Loop, stop: threading.Event) -> tuple[dict[str, float], str]:
        if self.step == last_step:
            self.checkpoints.wait()  # of the save under way nothing would be left, which is tested elsewhere
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, stop)

    loop._Loop._train_step = step_then_die
    train_small(kind, folder, folder / "broken")


if __name__ == "__main__":
    main()
