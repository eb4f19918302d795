"""Shared by all tests: where there is no GPU, its tests skip, with the reason, and Triton kernels are interpreted."""

from __future__ import annotations

import gc
import os

import pytest
import torch
from hypothesis import settings

from opensora_kernels import _triton

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported
if _triton.is_interpreted() and _triton.why_not_installed() is None:
    from tests.interpreter import repair
    from tests.interpreter_speed import quicken

    repair()
    quicken()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Files with slow tests first, whole: what is left at the end is short, so that no process waits for another, and
    # the end of the queue, of which idle processes steal half, cuts through no file whose tests share a long beginning.
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """What is alive between two files stays so, modules above all: a garbage collection that visits it takes 0.3 s."""
    if nextitem is None or nextitem.path != item.path:
        gc.collect()
        gc.freeze()


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()


# HYPOTHESIS_PROFILE=long for 200 examples of every property; fixed examples, so that a failure comes back.
settings.register_profile("ci", max_examples=20, deadline=None, derandomize=True, database=None)
settings.register_profile("long", max_examples=200, deadline=None, derandomize=True, database=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
