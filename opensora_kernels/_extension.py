"""Loads the compiled libraries on first use and remembers why one can't be loaded."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Literal

import torch

_FOLDER = Path(__file__).resolve().parent


@cache
def why_not_loaded(library: Literal["cpu", "cuda"]) -> str | None:
    """Load the compiled library once. None when its operators are there, else a sentence that says why not."""
    path = _FOLDER / f"_{library}_library.so"
    if not path.exists():
        return (
            f"the compiled {library} library was not built (install says why; OPENSORA_BUILD_CUDA=auto|on|off decides)"
        )
    if library == "cuda" and torch.version.cuda is None:
        return "this torch is a CPU build, which lacks the symbols the compiled CUDA library needs"
    if library == "cuda" and (reason := why_not_loaded("cpu")) is not None:
        return reason  # the schemas are defined there
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"the compiled {library} library does not load: {error}"
    return None
