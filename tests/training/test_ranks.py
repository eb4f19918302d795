"""Training on 4 and then 2 real processes against one process, and what becomes of a world that loses a rank."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.sequence_parallel.worlds import PASSED, run
from tests.training import rank_checks, recipe_rank_checks

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
CHECKS = [(4, check.__name__) for check in rank_checks.IN_FOUR] + [(2, check.__name__) for check in rank_checks.IN_TWO]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, list[str]]]:
    """{number of ranks: {check: outcome on each rank}}; the world of two goes on from a run of the world of four."""
    four, two = (tmp_path_factory.mktemp(name) for name in ("four", "two"))
    rank_checks.whole_run(four)
    recipe_rank_checks.whole_runs(four)
    found = {4: run(4, rank_checks.IN_FOUR, four)}
    shutil.copytree(four / "whole", two / "whole")
    shutil.copytree(four / "half", two / "half")
    return found | {2: run(2, rank_checks.IN_TWO, two)}


@pytest.mark.parametrize(("num_ranks", "name"), CHECKS)
def test_on_every_rank(outcomes: dict[int, dict[str, list[str]]], num_ranks: int, name: str):
    found = outcomes[num_ranks][name]
    if name == rank_checks.a_killed_rank_ends_the_others_with_an_error.__name__:
        assert found.pop() == "no word from this rank"
    assert found == [PASSED] * len(found), "\n".join(found)


def test_torchrun_restarts_a_run_that_lost_a_rank_and_nothing_is_lost(
    outcomes: dict[int, dict[str, list[str]]], tmp_path_factory: pytest.TempPathFactory
):
    folder = next(tmp_path_factory.getbasetemp().glob("two*"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", "1", "-m", "tests.training.elastic_run", str(folder)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stderr
    assert "resuming after step" in ended.stderr
    rank_checks.assert_equal_runs(folder / "restarted", folder / "whole")


def test_every_complete_checkpoint_loads_after_kills_at_any_moment(tmp_path: Path):
    command = [sys.executable, "-m", "tests.training.kills", str(tmp_path), "20"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stderr
    steps = [int(line) for line in ended.stdout.split()]
    assert len(steps) == 20
    assert steps == sorted(steps)
    assert steps[-1] > 5
