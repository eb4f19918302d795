"""The optimizer of a training, how long it runs, and how ranks share its work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from opensora.config.sampling import Precision


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, its schedule, and the averaged copy of the weights.

    The rate rises over `warmup_steps` and then stays, or falls on a cosine to `final_lr_ratio` of itself at the last
    step. `grad_clip` is the largest global norm of the gradient; 0 clips nothing.
    """

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-15
    weight_decay: float = 0.0
    warmup_steps: int = 0
    decay: Literal["constant", "cosine"] = "constant"
    final_lr_ratio: float = 0.0
    grad_clip: float = 1.0
    accumulation_steps: int = 1
    ema_decay: float = 0.99


@dataclass(frozen=True)
class RunConfig:
    """How long a training runs and what it leaves behind in `output`.

    `wandb_project` names a project of Weights & Biases to send scalars to, where that package is installed.
    `grad_checkpoint` says what is computed again in the backward pass: "full", all of a block but its input (or true);
    "selective", all but the results of matrix products and attention; "none" (or false).
    `validate_every` and `sample_every` count steps; 0 never does. A bad loss is one that is not finite, whose gradient
    is not, or that exceeds `spike_factor` x the running mean (0: no such check); `on_bad_loss` says whether the run
    then stops, leaves that update out, or goes back to the last checkpoint with the batches after the bad one;
    after more than `max_bad_steps` of them in a row it stops. `recipe` names the preset and stage: a checkpoint of
    another recipe is refused.
    """

    output: str = "outputs"
    steps: int = 1000
    seed: int = 42
    dtype: Precision = "bf16"
    device: str = "auto"
    log_every: int = 10
    checkpoint_every: int = 200
    keep_checkpoints: int = 2
    sample_every: int = 0
    grad_checkpoint: bool | Literal["none", "selective", "full"] = False
    validate_every: int = 0
    on_bad_loss: Literal["stop", "skip", "roll_back"] = "stop"
    spike_factor: float = 0.0
    max_bad_steps: int = 10
    recipe: str = ""
    tensorboard: bool = True
    wandb_project: str = ""
    num_threads: int | None = None

    @property
    def checkpointing(self) -> Literal["none", "selective", "full"]:
        """`grad_checkpoint` in words."""
        words: dict[bool, Literal["none", "full"]] = {False: "none", True: "full"}
        return words[self.grad_checkpoint] if isinstance(self.grad_checkpoint, bool) else self.grad_checkpoint


@dataclass(frozen=True)
class ParallelConfig:
    """How the ranks of a run share its work; one process needs none of it.

    `ulysses` x `ring` ranks cut the tokens of each clip among them (the first by heads inside attention, the second by
    passing keys round); the other ranks read other batches. `sharding` "full" spreads weights, gradients, optimizer
    state and averages over all ranks (FSDP2), "none" leaves a copy on each. `cpu_offload` keeps shards in host memory
    between uses. `timeout` is how many seconds a rank waits for the others before it fails; the main
    rank's export of a model must take less.
    """

    ulysses: int = 1
    ring: int = 1
    sharding: Literal["none", "full"] = "full"
    cpu_offload: bool = False
    timeout: float = 600.0
