"""What several tests of csrc/ share: shared objects are compiled once."""

from __future__ import annotations

import pytest

from tests.csrc.sm80_replay import Replay


@pytest.fixture(scope="session")
def sm80_replay(tmp_path_factory: pytest.TempPathFactory) -> Replay:
    """The mma.sync kernels of causal_conv3d, on the host."""
    return Replay(tmp_path_factory.mktemp("sm80_replay"))
