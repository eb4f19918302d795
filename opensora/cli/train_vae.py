"""`opensora train-vae`: a video VAE, with or without a discriminator."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from opensora.cli import main
from opensora.cli.training import run_training
from opensora.config import TrainVAEConfig

if TYPE_CHECKING:
    from opensora.parallel import ParallelContext
    from opensora.training import TrainingResult


def run(arguments: Sequence[str]) -> int:
    return run_training(
        "train-vae",
        "Train a video VAE. Ctrl-C saves a checkpoint and stops; --resume goes on from it exactly.",
        arguments,
        stages=lambda preset: preset.vae_training,
        train=_train,
    )


def _train(config: TrainVAEConfig, resume: bool, context: ParallelContext) -> TrainingResult:
    from transformers.utils import logging

    from opensora.vae_trainer import run_train_vae  # imports the models: not for --help

    logging.disable_progress_bar()
    return run_train_vae(config, resume=resume, context=context)


if __name__ == "__main__":  # torchrun -m opensora.cli.train_vae
    sys.exit(main(["train-vae", *sys.argv[1:]]))
