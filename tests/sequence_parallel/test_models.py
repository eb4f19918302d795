"""Transformers whose sites are spread over 2 and 4 real processes compute what one process does."""

from __future__ import annotations

import pytest

from tests.sequence_parallel import models_checks
from tests.sequence_parallel.worlds import PASSED, run


@pytest.fixture(scope="module", params=[2, 4], ids=lambda num_ranks: f"{num_ranks}_ranks")
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return run(request.param, models_checks.CHECKS, tmp_path_factory.mktemp(f"models{request.param}"))


@pytest.mark.parametrize("name", [check.__name__ for check in models_checks.CHECKS])
def test_in_every_process(outcomes: dict[str, list[str]], name: str):
    assert outcomes[name] == [PASSED] * len(outcomes[name]), "\n".join(outcomes[name])
