"""What every training shares: the loop, the optimizer and its schedule, averaged weights, checkpoints and records.

This room knows no model: a trainer hands the loop a `Job` (modules, batches, a loss) and gets back where it ended.
"""

from opensora.training.batches import LoaderBatches, ShuffledBatches
from opensora.training.checkpoint import Checkpoints
from opensora.training.ema import EMA
from opensora.training.job import Adversary, Batches, Job, TrainingResult
from opensora.training.loop import check_options, run_job
from opensora.training.optimizer import build_optimizer, learning_rate
from opensora.training.randomness import prepare_process
from opensora.training.weights import TrainedWeights

__all__ = [
    "EMA",
    "Adversary",
    "Batches",
    "Checkpoints",
    "Job",
    "LoaderBatches",
    "ShuffledBatches",
    "TrainedWeights",
    "TrainingResult",
    "build_optimizer",
    "check_options",
    "learning_rate",
    "prepare_process",
    "run_job",
]
