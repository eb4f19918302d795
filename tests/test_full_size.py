"""The released sizes load without a second copy and run on a CPU."""

from __future__ import annotations

import pytest

from tests.full_size import MODELS, measure


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_full_size_model_loads_at_its_own_size_and_runs(name: str):
    figures = measure(name)
    assert figures["load_growth_bytes"] <= 1.2 * figures["weight_bytes"], figures
    assert figures["forward_seconds"] > 0
