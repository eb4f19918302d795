"""Real processes that talk through gloo on the CPU, started once for all checks of a world.

A check is a function `check(world)` that every rank runs; the ranks write what became of each to a file.
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import multiprocessing

PASSED = "passed"
# Far more than a check takes on a busy machine; a rank that waits for one which failed gives up after this.
SECONDS = 60


@dataclass(frozen=True)
class World:
    rank: int
    num_ranks: int
    folder: Path

    @property
    def group(self) -> dist.ProcessGroup:
        return dist.group.WORLD


def run(num_ranks: int, checks: list[Callable[[World], None]], folder: Path) -> dict[str, list[str]]:
    """What became of each check on each rank: PASSED, a traceback, or that it was not run or the process died."""
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=_run_rank, args=(World(rank, num_ranks, folder), checks), daemon=True)
        for rank in range(num_ranks)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + 4 * SECONDS
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
    found = [json.loads(path.read_text()) if path.exists() else {} for path in _results(folder, num_ranks)]
    return {
        check.__name__: [of_rank.get(check.__name__, "no word from this rank") for of_rank in found] for check in checks
    }


def _run_rank(world: World, checks: list[Callable[[World], None]]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{world.folder}/meeting", rank=world.rank, world_size=world.num_ranks,
        timeout=timedelta(seconds=SECONDS),
    )  # fmt: skip
    found: dict[str, str] = {}
    result = _results(world.folder, world.num_ranks)[world.rank]
    for check in checks:
        try:
            torch.manual_seed(0)
            check(world)
            found[check.__name__] = PASSED
        except Exception:
            # the other ranks may be anywhere by now: nothing later can be trusted
            found |= {
                later.__name__: f"not run after {check.__name__}" for later in checks if later.__name__ not in found
            }
            found[check.__name__] = traceback.format_exc()
            break
        finally:
            result.write_text(json.dumps(found))
    if PASSED in found.values() and len(set(found.values())) == 1:
        dist.destroy_process_group()


def _results(folder: Path, num_ranks: int) -> list[Path]:
    return [folder / f"rank{rank}.json" for rank in range(num_ranks)]
