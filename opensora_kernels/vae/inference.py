"""How models are run here: without gradients, and in the dtypes of their own weights."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor


@contextmanager
def inference(device: torch.device) -> Iterator[None]:
    """No gradients and no autocast: what is on where a caller asks for the next chunk must not change its numbers."""
    with torch.no_grad(), _without_autocast(device):
        yield


@contextmanager
def on_paper(device: torch.device) -> Iterator[None]:
    """`inference` for tensors without data, which compiled parts of a model are not to be compiled for."""
    is_compiled = "torch._dynamo" in sys.modules
    with inference(device), torch.compiler.set_stance("force_eager") if is_compiled else nullcontext():
        yield


def made_one_by_one(chunks: Iterator[Tensor], device: torch.device) -> Iterator[Tensor]:
    """`chunks`, each made under `inference`, which is off at the yield: what the caller does there is not ours."""
    while True:
        with inference(device):
            chunk = [next(chunks, None)]
        if chunk[0] is None:
            return
        yield chunk.pop()  # not held while the next one is made


def own_random_numbers(device: torch.device) -> AbstractContextManager[None]:
    """What is drawn inside leaves the generators of the caller as they were."""
    devices = [device] if device.type == "cuda" and torch.cuda.is_available() else []  # plans are made without one too
    return torch.random.fork_rng(devices)


def _without_autocast(device: torch.device) -> AbstractContextManager[object]:
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
