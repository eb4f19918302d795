"""What holds for everything that runs inside a `with`, in this thread alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch


class Flag:
    """On inside `with flag():`. torch.compile, which reads no context variables, always finds it off."""

    def __init__(self, name: str) -> None:
        self._variable: ContextVar[bool] = ContextVar(name, default=False)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        token = self._variable.set(True)
        try:
            yield
        finally:
            self._variable.reset(token)

    def is_on(self) -> bool:
        return not torch.compiler.is_compiling() and self._variable.get()
