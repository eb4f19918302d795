"""`opensora train`: a diffusion transformer on encoded clips."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from opensora.cli import main
from opensora.cli.training import run_training
from opensora.config import TrainConfig

if TYPE_CHECKING:
    from opensora.parallel import ParallelContext
    from opensora.training import TrainingResult


def run(arguments: Sequence[str]) -> int:
    return run_training(
        "train",
        "Train a diffusion transformer. Ctrl-C saves a checkpoint and stops; --resume goes on from it exactly.",
        arguments,
        stages=lambda preset: preset.training,
        train=_train,
    )


def _train(config: TrainConfig, resume: bool, context: ParallelContext) -> TrainingResult:
    from transformers.utils import logging

    from opensora.trainer import run_train  # imports the models: not for --help

    logging.disable_progress_bar()
    return run_train(config, resume=resume, context=context)


if __name__ == "__main__":  # torchrun -m opensora.cli.train
    sys.exit(main(["train", *sys.argv[1:]]))
