"""The training loop: gradient accumulation, clipping, averaging, checkpoints, exact resume and clean stops."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from opensora.config import OptimizerConfig, RunConfig
from opensora.parallel import DTYPES, ParallelContext
from opensora.training.checkpoint import Checkpoints, random_state, replace_folder, set_random_state
from opensora.training.ema import EMA
from opensora.training.optimizer import build_optimizer, learning_rate
from opensora.training.records import Records
from opensora.training.weights import TrainedWeights


class Batches(Protocol):
    """An endless iterator over batches whose position can be saved."""

    def __next__(self) -> Any: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Job:
    """What one training does that others do not.

    `modules` are trained (their parameters that require a gradient); `loss` maps a batch to (scalar, scalars to log).
    `export(folder, states)` writes a model folder from {module: state}; `sample(folder, step)` writes examples and
    returns scalars to log; both run with the averaged weights in the modules. `config` is recorded in every checkpoint.
    """

    modules: Mapping[str, nn.Module]
    batches: Batches
    loss: Callable[[Any], tuple[Tensor, dict[str, Tensor]]]
    export: Callable[[Path, dict[str, dict[str, Tensor]]], None]
    config: Any
    sample: Callable[[Path, int], Mapping[str, float]] | None = None
    validate: Callable[[int], Mapping[str, float]] | None = None


@dataclass(frozen=True)
class TrainingResult:
    """Where a training ended. `was_stopped` means Ctrl-C: the checkpoint is there and resuming goes on exactly."""

    step: int
    loss: float
    was_stopped: bool
    checkpoint: Path
    model: Path


def prepare_process(run: RunConfig) -> None:
    """Seeds torch, NumPy and Python and sets the number of threads, if one is asked for.

    Call before the modules are built, so that their weights follow the seed.
    """
    if run.num_threads is not None:
        torch.set_num_threads(run.num_threads)
    torch.manual_seed(run.seed)
    np.random.seed(run.seed % 2**32)
    random.seed(run.seed)


def run_job(
    job: Job, optimizer_config: OptimizerConfig, run: RunConfig, context: ParallelContext, *, resume: bool
) -> TrainingResult:
    """Trains until `run.steps`, Ctrl-C or an error.

    Leaves in `run.output`: checkpoints/, model/ (averaged weights, replaced as a whole at each checkpoint), losses.csv,
    tensorboard/ and samples/. With `resume` it continues from the newest checkpoint, if any: on the CPU with the same
    number of threads, losses are those of an unbroken run, bit for bit.

    Errors: ValueError when `output` already holds checkpoints and `resume` is false, or when they do not fit the model;
    FloatingPointError at the first loss or gradient that is not finite; OSError when a checkpoint cannot be written.
    In the last two cases the last good checkpoint stays.
    """
    loop = _Loop(job, optimizer_config, run, context)
    loop.restore(resume)
    return loop.run()


class _Loop:
    def __init__(self, job: Job, optimizer_config: OptimizerConfig, run: RunConfig, context: ParallelContext) -> None:
        _check(optimizer_config, run)
        self.job = job
        self.config = optimizer_config
        self.run_config = run
        self.context = context
        self.output = Path(run.output)
        self.weights = TrainedWeights(job.modules, DTYPES[run.dtype])
        self.optimizer = build_optimizer(self.weights.masters, optimizer_config)
        self.ema = EMA(self.weights.masters, optimizer_config.ema_decay)
        self.checkpoints = Checkpoints(self.output / "checkpoints", keep=run.keep_checkpoints)
        self.step = 0
        self.loss = float("nan")
        self.notes: list[str] = []

    def restore(self, resume: bool) -> None:
        latest = self.checkpoints.latest()
        if latest is None:
            return
        if not resume:
            raise ValueError(
                f"output: must be a folder without checkpoints unless resuming, got {self.output} with {latest.name}"
            )
        tensors, state = Checkpoints.load(latest)
        self.weights.load_state_dict(tensors["weights"])
        with torch.no_grad():
            for name, average in zip(self.weights.names, self.ema.averages, strict=True):
                average.copy_(tensors["ema"][name])
        self._load_optimizer(tensors["optimizer"])
        self.job.batches.load_state_dict(state["batches"])
        self.step, self.loss = state["step"], state["loss"]
        self.notes.append(f"resuming after step {self.step} from {latest}")
        self.notes += _differences(state["config"], _plain(self.job.config))
        set_random_state(tensors["rng"], state["random"])

    def run(self) -> TrainingResult:
        run = self.run_config
        records = Records(
            self.output, first_step=self.step, num_steps=run.steps, log_every=run.log_every, tensorboard=run.tensorboard
        )
        saved_step = self.step if self.checkpoints.latest() is not None else -1
        with records, _stop_on_interrupt() as stop:
            for note in self.notes:
                records.note(note)
            for module in self.job.modules.values():
                module.train()
            while self.step < run.steps and not stop.is_set():
                records.step(self.step + 1, self._train_step())
                self.step += 1
                if run.checkpoint_every and self.step % run.checkpoint_every == 0:
                    records.flush()
                    self._save()
                    saved_step = self.step
                if run.sample_every and self.job.sample and self.step % run.sample_every == 0:
                    records.scalars(self.step, self._sample())
                if run.validate_every and self.job.validate and self.step % run.validate_every == 0:
                    with self._averaged():
                        records.scalars(self.step, self.job.validate(self.step))
            records.flush()
            if saved_step != self.step:
                self._save()
            was_stopped = stop.is_set() and self.step < run.steps
            if was_stopped:
                records.note(f"stopped after step {self.step}; resume to go on")
        checkpoint = self.checkpoints.latest()
        assert checkpoint is not None
        return TrainingResult(self.step, self.loss, was_stopped, checkpoint, self.output / "model")

    def _train_step(self) -> dict[str, float]:
        """One optimizer step over `accumulation_steps` batches; returns what to record."""
        start = time.perf_counter()
        sums: dict[str, Tensor] = {}
        for _ in range(self.config.accumulation_steps):
            loss, details = self.job.loss(next(self.job.batches))
            (loss / self.config.accumulation_steps).backward()
            self.weights.collect_gradients()
            for name, value in ({"loss": loss} | details).items():
                value = value.detach().float() / self.config.accumulation_steps
                sums[name] = sums[name] + value if name in sums else value
        sums["grad_norm"] = torch.nn.utils.clip_grad_norm_(self.weights.masters, self.config.grad_clip or float("inf"))
        # One read-back per step: nothing may be updated before the numbers are known to be finite.
        numbers = self.context.mean(torch.stack([value.reshape(()) for value in sums.values()])).tolist()
        values = dict(zip(sums, numbers, strict=True))
        self._stop_unless_finite(values)
        lr = learning_rate(self.step, self.config, self.run_config.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.weights.publish()
        self.ema.update(self.weights.masters)
        self.loss = values["loss"]
        details = {name: value for name, value in values.items() if name not in ("loss", "grad_norm")}
        seconds = time.perf_counter() - start
        return {"loss": self.loss, "grad_norm": values["grad_norm"], "lr": lr, "seconds": seconds} | details

    def _stop_unless_finite(self, values: Mapping[str, float]) -> None:
        for name in ("loss", "grad_norm"):
            if not np.isfinite(values[name]):
                kept = self.checkpoints.latest()
                raise FloatingPointError(
                    f"training: {name} must be finite, got {values[name]} at step {self.step + 1}; "
                    f"last good checkpoint: {kept or 'none'}"
                )

    def _save(self) -> None:
        rng_tensors, rng_values = random_state()
        self.checkpoints.save(
            self.step,
            {
                "weights": self.weights.state_dict(),
                "ema": dict(zip(self.weights.names, self.ema.averages, strict=True)),
                "optimizer": self._optimizer_tensors(),
                "rng": rng_tensors,
            },
            {
                "step": self.step,
                "loss": self.loss,
                "batches": self.job.batches.state_dict(),
                "random": rng_values,
                "config": _plain(self.job.config),
            },
        )
        states = self.weights.export(self.ema.averages)
        with self._averaged():
            replace_folder(self.output / "model", lambda folder: self.job.export(folder, states))

    def _sample(self) -> Mapping[str, float]:
        assert self.job.sample is not None
        folder = self.output / "samples"
        folder.mkdir(exist_ok=True)
        with self._averaged():
            return self.job.sample(folder, self.step)

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Averaged weights in evaluation mode; training afterwards goes on as if the block had not run."""
        rng = random_state()
        for module in self.job.modules.values():
            module.eval()
        with self.weights.replaced_by(self.ema.averages), torch.no_grad():
            yield
        for module in self.job.modules.values():
            module.train()
        set_random_state(*rng)

    def _optimizer_tensors(self) -> dict[str, Tensor]:
        return {
            f"{kind}.{name}": value
            for name, master in zip(self.weights.names, self.weights.masters, strict=True)
            for kind, value in self.optimizer.state[master].items()
        }

    def _load_optimizer(self, tensors: Mapping[str, Tensor]) -> None:
        kinds = ("step", "exp_avg", "exp_avg_sq")
        state = {
            index: {kind: tensors[f"{kind}.{name}"] for kind in kinds}
            for index, name in enumerate(self.weights.names)
            if f"step.{name}" in tensors
        }
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})


@contextmanager
def _stop_on_interrupt() -> Iterator[threading.Event]:
    """Turns the first Ctrl-C (SIGINT) or SIGTERM into a request to stop after the step; a second one interrupts."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, _frame: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _check(optimizer: OptimizerConfig, run: RunConfig) -> None:
    for name, value in (("steps", run.steps), ("log_every", run.log_every)):
        if value < 1:
            raise ValueError(f"run.{name} must be at least 1, got {value}")
    if optimizer.accumulation_steps < 1:
        raise ValueError(f"optimizer.accumulation_steps must be at least 1, got {optimizer.accumulation_steps}")
    if run.dtype == "fp16":
        raise ValueError("run.dtype must be fp32 or bf16 for training (fp16 gradients underflow), got fp16")


def _plain(config: Any) -> Any:
    """The configuration as JSON values."""
    if is_dataclass(config) and not isinstance(config, type):
        return _plain(asdict(config))
    if isinstance(config, Mapping):
        return {str(key): _plain(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [_plain(value) for value in config]
    return config


def _differences(old: Any, new: Any, name: str = "") -> list[str]:
    """One line for each field that is not what the checkpoint was trained with."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        return [line for key in keys for line in _differences(old.get(key), new.get(key), f"{name}.{key}".strip("."))]
    return [] if old == new else [f"changed since the checkpoint: {name} was {old}, now {new}"]
