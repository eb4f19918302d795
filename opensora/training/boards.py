"""Where scalars of a run are drawn: TensorBoard, and Weights & Biases where it is installed."""

from __future__ import annotations

import importlib
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from opensora.training.files import replace_file


class Board(Protocol):
    """Takes the scalars of a step."""

    def add(self, step: int, values: Mapping[str, float]) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


class TensorBoard:
    """Events in `folder`/tensorboard; those after `first_step`, from before a resume, are not shown any more."""

    def __init__(self, folder: Path, *, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # 1 s to import: only when asked for

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A run of Weights & Biases, the same one after a resume: its id is kept in `folder`/wandb_run.txt.

    Errors: ImportError where the package is absent; what wandb.init raises, such as for a missing login.
    """

    def __init__(self, folder: Path, *, project: str, config: Any) -> None:
        wandb = importlib.import_module("wandb")
        path = folder / "wandb_run.txt"
        run_id = path.read_text().strip() if path.exists() else secrets.token_hex(8)
        self._run = wandb.init(
            project=project, name=folder.name, id=run_id, dir=str(folder), config=config, resume="allow"
        )
        # Its own count of steps never falls: values of a run that went back would be dropped until it is passed again.
        self._run.define_metric("*", step_metric="step")
        replace_file(path, run_id + "\n")

    def add(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def flush(self) -> None:
        """Nothing: it sends by itself."""

    def close(self) -> None:
        self._run.finish()
