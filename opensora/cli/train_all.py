"""`opensora train-all`: every training stage of every preset, scaled down, one after the other."""

from __future__ import annotations

import csv
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from opensora import presets
from opensora.cli.options import Parser
from opensora.config import TrainConfig, TrainVAEConfig
from opensora.presets.scaling import scaled

Training = TrainConfig | TrainVAEConfig


@dataclass(frozen=True)
class Stage:
    """One stage; `before` is the run folder, at full size, that it begins from."""

    name: str
    config: Training
    before: str | None

    @property
    def folder(self) -> str:
        return self.name.replace(" ", "-")


@dataclass(frozen=True)
class Row:
    """What a stage did: losses of the first and last step, seconds a step, held-out loss before and after."""

    stage: str
    first: float
    last: float
    seconds: float
    before: float | None = None
    after: float | None = None

    def __str__(self) -> str:
        held_out = "       -        -" if self.before is None else f"{self.before:8.4f} {self.after:8.4f}"
        return f"{self.stage:<42} {self.first:9.4f} {self.last:9.4f} {self.seconds:7.2f} {held_out}"


HEADER = f"{'stage':<42} {'first':>9} {'last':>9} {'s/step':>7} {'before':>8} {'after':>8}"


def run(arguments: Sequence[str]) -> int:
    parser = Parser(
        "train-all",
        "Train the tiny twin of every stage for a few steps, each from the one before where that has run, now or "
        "earlier, on clips and with VAEs that are made beside the runs. Prints the losses of the first and last step, "
        "and those of held-out clips before and after.",
    )
    parser.add_argument("--scale", type=Literal["tiny"], default="tiny", help="how far stages are scaled down")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps of each stage")
    parser.add_argument("--only", type=str, default="", help="stages whose name begins so, as open-sora-v1.2")
    parser.add_argument("--vae", type=bool, default=True, help="the stages of train-vae too")
    parser.add_argument(
        "--output", "-o", type=str, default="outputs/tiny", help="where the runs go; each replaces its last"
    )
    options = parser.parse(arguments)
    stages = [stage for stage in all_stages(with_vae=options["vae"]) if stage.name.startswith(options["only"])]
    if not stages:
        names = ", ".join(stage.name for stage in all_stages(with_vae=options["vae"]))
        raise ValueError(f"only: must be the beginning of one of {names}, got {options['only']!r}")

    from transformers.utils import logging

    logging.disable_progress_bar()
    print(HEADER, flush=True)
    failures: list[str] = []
    output = Path(options["output"])
    folders = {stage.config.run.output: output / stage.folder for stage in all_stages()}
    for stage in stages:
        shutil.rmtree(output / stage.folder, ignore_errors=True)
        try:
            row = _train(stage, output / stage.folder, folders, steps=options["steps"], scale=options["scale"])
        except (ValueError, OSError, RuntimeError, FloatingPointError) as error:  # the others shall run all the same
            failures.append(stage.name)
            print(f"{stage.name:<42} failed: {' '.join(str(error).split())}", flush=True)
            continue
        print(row, flush=True)
    if failures:
        print(f"opensora train-all: {len(failures)} of {len(stages)} stages failed", file=sys.stderr)
    return 1 if failures else 0


def all_stages(*, with_vae: bool = True) -> list[Stage]:
    """Every stage of every release once, each after the one it begins from."""
    found: dict[str, Stage] = {}
    for name in presets.names():
        if name == "tiny":  # it is tiny already, and its stages take an hour
            continue
        preset = presets.get(name)
        for stage, config in preset.training.items():
            found.setdefault(config.run.output, Stage(f"{name} {stage}", config, config.initial_transformer))
        for stage, config in preset.vae_training.items() if with_vae else ():
            found.setdefault(config.run.output, Stage(f"{name} vae {stage}", config, config.initial_vae))
    ordered: dict[str, Stage] = {}

    def add(output: str) -> None:
        before = _run_of(found[output].before, found)
        if before is not None and before not in ordered:
            add(before)
        ordered[output] = found[output]

    for output in found:
        if output not in ordered:
            add(output)
    return list(ordered.values())


def _run_of(source: str | None, runs: Iterable[str]) -> str | None:
    """The run whose exported model `source` names, if any."""
    return next((output for output in runs if source is not None and source.startswith(f"{output}/model/")), None)


def _train(stage: Stage, folder: Path, folders: dict[str, Path], *, steps: int, scale: str) -> Row:
    from opensora.tiny_parts import complete

    config = scaled(stage.config, scale)
    if isinstance(config, TrainVAEConfig):  # the discriminator comes in as early in these steps as in all
        start = config.adversary.start * steps // config.run.steps
        config = replace(config, adversary=replace(config.adversary, start=start))
    changes = {"output": str(folder), "steps": steps, "validate_every": steps, "sample_every": 0, "tensorboard": False}
    config = replace(config, run=replace(config.run, **changes, log_every=steps))
    before = _run_of(stage.before, folders)
    part = "transformer" if isinstance(config, TrainConfig) else "vae"
    if before is not None and (model := folders[before] / "model" / part).is_dir():
        config = replace(config, **{f"initial_{part}": str(model)})
        if isinstance(config, TrainVAEConfig):
            config = replace(config, image_vae=None)
    config = complete(config, folder.parent / "parts")
    if isinstance(config, TrainConfig):
        from opensora.trainer import run_train

        run_train(config)
    else:
        from opensora.vae_trainer import run_train_vae

        run_train_vae(config)
    return _row(stage.name, folder, steps)


def _row(name: str, folder: Path, steps: int) -> Row:
    with (folder / "losses.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    losses, seconds = [float(row["loss"]) for row in rows], [float(row["seconds"]) for row in rows]
    means = dict(_validation(folder / "validation.csv"))
    later = seconds[1:] or seconds  # the first step compiles and allocates
    return Row(name, losses[0], losses[-1], sum(later) / len(later), means.get(0), means.get(steps))


def _validation(path: Path) -> Iterator[tuple[int, float]]:
    """The mean over buckets and timesteps for each step that was measured."""
    if not path.exists():
        return
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for step in dict.fromkeys(row["step"] for row in rows):
        losses = [float(row["loss"]) for row in rows if row["step"] == step]
        yield int(step), sum(losses) / len(losses)
