"""Models that are on the device only while they work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Workplace:
    """The device on which models work, and whether they leave it afterwards.

    With `offload`, the most that the device holds is one model with its activations; each stage then begins with a
    copy of its weights, once for all clips of a run where the stage can wait for all of them.
    """

    def __init__(self, device: torch.device, *, offload: bool = False) -> None:
        self.device = device
        self.offload = offload and device.type != "cpu"

    @contextmanager
    def use(self, model: Any) -> Iterator[None]:
        """Meanwhile `model`, anything with `to(device)`, is on the device."""
        if not self.offload:
            yield
            return
        model.to(self.device)
        try:
            yield
        finally:
            model.to("cpu")
