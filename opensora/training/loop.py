"""The training loop: gradient accumulation, clipping, averaging, checkpoints, exact resume and clean stops.

One process and many run the same loop; `ParallelContext` says where they differ.
"""

from __future__ import annotations

import platform
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from opensora.config import OptimizerConfig, RunConfig
from opensora.parallel import DTYPES, ParallelContext
from opensora.training.ceiling import ceiling_flops
from opensora.training.checkpoint import Checkpoints
from opensora.training.files import replace_folder
from opensora.training.interrupts import stop_on_interrupt
from opensora.training.job import Adversary, Job, TrainingResult
from opensora.training.players import Player
from opensora.training.randomness import seed_between_steps, seed_micro_batch
from opensora.training.records import Records, write_run_record
from opensora.training.resuming import check_checkpoint, differences, is_restart_of_this_launch, plain, remember_launch
from opensora.training.sums import Sums
from opensora.training.throughput import WORK
from opensora.training.watch import LossWatch, Verdict


def run_job(
    job: Job, optimizer_config: OptimizerConfig, run: RunConfig, context: ParallelContext, *, resume: bool
) -> TrainingResult:
    """Trains until `run.steps`, Ctrl-C on any rank, or an error.

    Leaves in `run.output`: checkpoints/, model/ (averaged weights, replaced as a whole at each checkpoint), losses.csv,
    tensorboard/ and samples/. With `resume`, or when the launcher has restarted this run, it continues from the newest
    checkpoint, if any, on any number of ranks: on the CPU with as many ranks and threads as before, losses are those of
    an unbroken run, bit for bit.

    Errors: ValueError when `output` already holds checkpoints and `resume` is false, or when they are of another
    recipe or model; FloatingPointError at a loss or gradient that is not finite or too large, where `run.on_bad_loss`
    is "stop" or there were too many; OSError when a checkpoint cannot be written; ConnectionError when another rank is
    gone, at most `parallel.timeout` seconds later. In the last three cases the last good checkpoint stays.
    """
    loop = _Loop(job, optimizer_config, run, context)
    loop.restore(resume)
    return loop.run()


class _Loop:
    def __init__(self, job: Job, optimizer_config: OptimizerConfig, run: RunConfig, context: ParallelContext) -> None:
        check_options(optimizer_config, run)
        if job.adversary is not None:
            _check_adversary(job.adversary)
        self.job = job
        self.num_micro_batches = optimizer_config.accumulation_steps
        self.run_config = run
        self.context = context
        self.output = Path(run.output)
        dtype = DTYPES[run.dtype]
        self.player = Player("", job.modules, optimizer_config, dtype, context)
        self.players = [self.player]
        if job.adversary is not None:
            modules, config = job.adversary.modules, job.adversary.optimizer
            self.players.append(Player("adversary.", modules, config, dtype, context, averages=False))
        self.checkpoints = Checkpoints(self.output / "checkpoints", keep=run.keep_checkpoints, context=context)
        self.watch = LossWatch(run)
        self.step = 0
        self.saved_step = self.exported_step = -1
        self.loss = float("nan")
        self.is_stopping = False
        self.notes: list[str] = []

    def restore(self, resume: bool) -> None:
        if self.context.is_main:
            self.checkpoints.remove_unfinished()
        latest = self.checkpoints.agreed_latest()
        is_restart = self.context.from_main(is_restart_of_this_launch(self.output, self.context))
        if latest is not None and not (resume or is_restart):
            raise ValueError(
                f"output: must be a folder without checkpoints unless resuming, got {self.output} with {latest.name}"
            )
        if self.context.is_main:
            remember_launch(self.output, self.context)
        if latest is None:
            return
        state = self._load(latest)
        self.job.batches.load_state_dict(state["batches"])
        self.saved_step = self.step
        self.notes.append(f"resuming after step {self.step} from {latest}")
        changes = differences(state["config"], plain(self.job.config))
        self.notes += [f"changed since the checkpoint: {change}" for change in changes]

    def run(self) -> TrainingResult:
        self._write_record()
        try:
            with stop_on_interrupt() as stop:
                while not self._run_until_done(stop):
                    self._roll_back()
                self.checkpoints.wait()  # in here: a signal must not cut off what it asks for
        except Exception as error:
            with suppress(OSError):  # the first error counts; what is being written is finished where that is possible
                self.checkpoints.wait()
            if isinstance(error, FloatingPointError):
                raise FloatingPointError(f"{error}; last good checkpoint: {self._last_good()}") from error
            if self.context.world_size > 1 and _is_about_peers(error):
                raise ConnectionError(self._lost_touch(error)) from error
            raise
        checkpoint = self.checkpoints.agreed_latest()
        assert checkpoint is not None
        was_stopped = self.step < self.run_config.steps
        return TrainingResult(self.step, self.loss, was_stopped, checkpoint, self.output / "model")

    def _run_until_done(self, stop: threading.Event) -> bool:
        """Trains to the end or to a stop; False when the last checkpoint must be loaded first."""
        run = self.run_config
        with self._records() as records:
            for note in self.notes:
                records.note(note)
            self.notes = []
            for player in self.players:
                player.train()
            while self.step < run.steps and not self.is_stopping:
                values, verdict = self._train_step(stop)
                if verdict != "good":
                    records.note(f"step {self.step + 1}: {self.watch.reason}; {verdict.replace('_', ' ')}")
                if verdict == "roll_back":
                    return False
                self.step += 1
                records.step(self.step, values)
                self.checkpoints.check()
                if run.checkpoint_every and self.step % run.checkpoint_every == 0:
                    records.flush()
                    self._save()
                self._show(records)
            records.flush()
            if self.saved_step != self.step:
                self._save()
            elif self.exported_step != self.step:  # a kill may have come between a checkpoint and its model
                self._export()
            if self.step < run.steps:
                records.note(f"stopped after step {self.step}; resume to go on")
        return True

    def _train_step(self, stop: threading.Event) -> tuple[dict[str, float], Verdict]:
        """One optimizer step over `accumulation_steps` batches of each data rank; returns what to record."""
        start = time.perf_counter()
        data_seconds = 0.0
        sums = Sums()
        for index in range(self.num_micro_batches):
            before = time.perf_counter()
            batch = next(self.job.batches)
            data_seconds += time.perf_counter() - before
            self._micro_batch(batch, index, sums)
        sums.add({f"{player.prefix}grad_norm".replace(".", "_"): player.clip() for player in self.players})
        # One read-back per step: nothing may be updated before the numbers are known to be good.
        gathered = self.context.gather((sums.read(), stop.is_set()))
        values = Sums.mean([of_rank for of_rank, _ in gathered])
        self.is_stopping = any(wants_to_stop for _, wants_to_stop in gathered)
        verdict = self.watch.judge(values, self.step + 1)
        lrs = [0.0]
        if verdict == "good":
            lrs = [player.step(self.step, self.run_config.steps) for player in self.players]
        for player in self.players:
            player.weights.clear_gradients()
        self.loss = values.pop("loss")
        norm, seconds = values.pop("grad_norm"), time.perf_counter() - start
        times = {"seconds": seconds, "data_seconds": data_seconds}
        for name in WORK:  # means of micro-batches of one data rank: here those of all
            if name in values:
                values[name] *= self.num_micro_batches * self.context.data_world_size
        return {"loss": self.loss, "grad_norm": norm, "lr": lrs[0]} | times | values, verdict

    def _micro_batch(self, batch: Any, index: int, sums: Sums) -> None:
        """Gradients of one batch of this data rank."""
        context = self.context
        number = (self.step * self.num_micro_batches + index) * context.data_world_size + context.data_rank
        is_last = index + 1 == self.num_micro_batches
        if isinstance(batch, dict):
            batch["step"] = self.step
        seed_micro_batch(self.run_config.seed, number)
        adversary = self.players[1] if len(self.players) > 1 else None
        with adversary.frozen() if adversary is not None else nullcontext():
            loss, details = self.job.loss(batch)
            self.player.backward(loss / self.num_micro_batches, is_last=is_last)
        sums.add({"loss": loss} | details)
        if adversary is not None:
            assert self.job.adversary is not None
            loss, details = self.job.adversary.loss(batch)
            adversary.backward(loss / self.num_micro_batches, is_last=is_last)
            sums.add({"adversary_loss": loss} | details)

    def _save(self) -> None:
        tensors: dict[str, Tensor] = {}
        for player in self.players:
            tensors |= player.tensors()
        state = {
            "step": self.step,
            "loss": self.loss,
            "batches": self.job.batches.state_dict(),
            "num_updates": [player.num_updates for player in self.players],
            "watch": self.watch.state_dict(),
            "recipe": self.run_config.recipe,
            "modules": self._module_names(),
            "config": plain(self.job.config),
        }
        self.checkpoints.save(self.step, tensors, state)
        self.saved_step = self.step
        self.watch.saved()
        self._export()

    def _export(self) -> None:
        states = self.player.export()
        with self._averaged():
            if self.context.is_main:
                replace_folder(self.output / "model", lambda folder: self.job.export(folder, states))
        self.exported_step = self.step

    def _show(self, records: Records) -> None:
        """Samples and validation, where they are due."""
        for every, function in (
            (self.run_config.sample_every, self.job.sample and self._sample),
            (self.run_config.validate_every, self.job.validate),
        ):
            if every and function and self.step % every == 0:
                with self._averaged():
                    values = function(self.step)
                records.scalars(self.step, values)

    def _sample(self, step: int) -> Mapping[str, float]:
        assert self.job.sample is not None
        folder = self.output / "samples"
        if self.context.is_main:
            folder.mkdir(exist_ok=True)
            return self.job.sample(folder, step)
        with tempfile.TemporaryDirectory() as unseen:
            return self.job.sample(Path(unseen), step)

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        seed_between_steps(self.run_config.seed, self.step)
        with self.player.averaged():
            yield

    def _load(self, path: Path) -> dict[str, Any]:
        """Takes weights, optimizer and counters of a checkpoint; returns its state."""
        state = check_checkpoint(path, self.run_config.recipe, self._module_names(), self.players)
        for player, num_updates in zip(self.players, state["num_updates"], strict=True):
            tensors = player.empty_tensors(num_updates)
            self.checkpoints.load(path, tensors)
            player.load(tensors, num_updates)
        self.watch.load_state_dict(state["watch"])
        self.step, self.loss = state["step"], state["loss"]
        return state

    def _roll_back(self) -> None:
        """Back to the last checkpoint, but on with the batches after the bad one."""
        self.checkpoints.wait()
        latest = self.checkpoints.agreed_latest()
        if latest is None:
            raise FloatingPointError(
                f"training: {self.watch.reason} at step {self.step + 1}, with nothing to go back to"
            )
        self._load(latest)
        self.saved_step = self.step
        self.notes.append(f"back to step {self.step} from {latest}")

    def _write_record(self) -> None:
        context = self.context
        num_hosts = len(set(context.gather(platform.node())))
        if context.is_main:
            place = {"device": context.device, "world_size": context.world_size, "num_hosts": num_hosts}
            write_run_record(self.output, self.job.config, first_step=self.step, **place)

    def _records(self) -> Records:
        run, context = self.run_config, self.context
        return Records(
            self.output,
            first_step=self.step,
            num_steps=run.steps,
            log_every=run.log_every,
            tensorboard=run.tensorboard,
            wandb_project=run.wandb_project,
            config=self.job.config,
            is_main=context.is_main,
            device=context.device,
            ceiling_flops=lambda: ceiling_flops(DTYPES[run.dtype], context.device) * context.world_size,
        )

    def _module_names(self) -> dict[str, str]:
        return {
            player.prefix + name: next(kind.__name__ for kind in type(module).__mro__ if not _is_wrapper(kind))
            for player in self.players
            for name, module in player.weights.modules.items()
        }

    def _last_good(self) -> Path | str:
        return self.checkpoints.latest() or "none"

    def _lost_touch(self, error: Exception) -> str:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].split(". ")[0]
        return (
            f"training: rank {self.context.rank} of {self.context.world_size} lost touch with another rank after step "
            f"{self.step}: {reason}; last good checkpoint: {self._last_good()}, from which --resume goes on"
        )


def _is_wrapper(kind: type) -> bool:
    return issubclass(kind, FSDPModule)


def _is_about_peers(error: BaseException) -> bool:
    """Whether a collective failed; gloo says so by a plain RuntimeError."""
    text = str(error).lower()
    is_from_gloo = isinstance(error, RuntimeError) and ("gloo" in text or "connection" in text or "timed out" in text)
    return is_from_gloo or isinstance(error, dist.DistError)


def check_options(optimizer: OptimizerConfig, run: RunConfig) -> None:
    """Refuses what no model is needed to see: trainers ask before they load any, and `run_job` asks again.

    Errors: ValueError for a number out of range, and for fp16.
    """
    counts = {"steps": run.steps, "log_every": run.log_every, "keep_checkpoints": run.keep_checkpoints}
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"run.{name} must be at least 1, got {value}")
    if optimizer.accumulation_steps < 1:
        raise ValueError(f"optimizer.accumulation_steps must be at least 1, got {optimizer.accumulation_steps}")
    if run.dtype == "fp16":
        raise ValueError("run.dtype must be fp32 or bf16 for training (fp16 gradients underflow), got fp16")
    if run.spike_factor and run.spike_factor <= 1:
        raise ValueError(f"run.spike_factor must be above 1, or 0 for no check, got {run.spike_factor}")


def _check_adversary(adversary: Adversary) -> None:
    for name, module in adversary.modules.items():
        if any(isinstance(part, FSDPModule) for part in module.modules()):
            raise ValueError(f"adversary: modules must be whole on each rank (is_sharded=False), got a sharded {name}")
