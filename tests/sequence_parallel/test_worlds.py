"""Sequence parallelism among 2, 3 and 4 real processes, and what becomes of the others when one fails."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from opensora_kernels import gather_sequence, sequence_all_to_all, split_sequence, ulysses_attention
from tests.sequence_parallel import checks, peers_checks, shards_checks
from tests.sequence_parallel.worlds import PASSED, World, run

pytestmark = pytest.mark.slow

# Compiling takes longer than all other checks, and nothing in it depends on the number of ranks.
_COMPILED = checks.split_attention_and_gathering_compile_to_one_graph
CHECKS_OF = {
    2: [*checks.CHECKS, *peers_checks.CHECKS, *shards_checks.CHECKS, _COMPILED],
    3: [*checks.CHECKS, *peers_checks.CHECKS, *shards_checks.CHECKS],
    4: [*checks.CHECKS, *shards_checks.CHECKS],
}
PATIENCE = 3  # seconds that a rank waits for the others where one is late on purpose


@pytest.fixture(scope="module", params=list(CHECKS_OF), ids=lambda num_ranks: f"{num_ranks}_ranks")
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return run(request.param, CHECKS_OF[request.param], tmp_path_factory.mktemp(f"world{request.param}"))


@pytest.mark.parametrize("name", [check.__name__ for check in CHECKS_OF[2]])
def test_in_every_process(outcomes: dict[str, list[str]], name: str):
    if name not in outcomes:
        pytest.skip("checked among fewer ranks, for its time")
    assert outcomes[name] == [PASSED] * len(outcomes[name]), "\n".join(outcomes[name])


def a_rank_that_refuses_its_arguments_gives_the_others_a_timeout(world: World) -> None:
    group = dist.new_group(timeout=timedelta(seconds=PATIENCE))
    x = torch.randn(2, 3, 7, 4)
    if world.rank == world.num_ranks - 1:
        with pytest.raises(ValueError, match="must hold 3 of 9"):
            sequence_all_to_all(x[:, :2], scatter=2, gather=1, length=9, group=group)
    else:
        _fails_within(30, lambda: sequence_all_to_all(x, scatter=2, gather=1, length=9, group=group))
    # whoever is through first waits here, so that it is patience that ends, not a connection
    (world.folder / f"through{world.rank}").touch()
    while len(list(world.folder.glob("through*"))) < world.num_ranks:
        time.sleep(0.05)


def a_killed_rank_gives_the_others_an_error(world: World) -> None:
    x = torch.randn(2, 3, 7, 4)
    if world.rank == world.num_ranks - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    _fails_within(30, lambda: ulysses_attention(x, x, x, sequence_length=9, group=world.group))


def _fails_within(seconds: float, call) -> None:
    start = time.monotonic()
    with pytest.raises(RuntimeError):
        call()
    assert time.monotonic() - start < seconds


def test_a_rank_that_fails_leaves_no_other_hanging(tmp_path: Path):
    steps = [a_rank_that_refuses_its_arguments_gives_the_others_a_timeout, a_killed_rank_gives_the_others_an_error]
    refused, killed = run(3, steps, tmp_path).values()
    assert refused == [PASSED] * 3, "\n".join(refused)
    assert killed[:2] == [PASSED] * 2, "\n".join(killed)
    assert killed[2] == "no word from this rank"


@pytest.fixture
def _world_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_world_of_one")
def test_a_group_of_one_rank_returns_the_tensor_itself():
    x = torch.randn(2, 5, 3, 4)
    assert sequence_all_to_all(x, scatter=2, gather=1, length=5, group=dist.group.WORLD) is x
    assert sequence_all_to_all([x], scatter=2, gather=1, length=5, group=dist.group.WORLD) == [x]
    assert split_sequence(x, dim=1, group=dist.group.WORLD) is x
    assert gather_sequence(x, dim=1, length=5, group=dist.group.WORLD) is x
    plain, overlapped = (
        ulysses_attention(x, x, x, sequence_length=5, overlap=overlap, group=dist.group.WORLD)
        for overlap in (False, True)
    )
    assert torch.equal(plain, overlapped)
