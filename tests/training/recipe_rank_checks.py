"""Twins of four systems train on four ranks, two for each clip, as one process does that reads all their batches."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from opensora import presets
from opensora.config import ParallelConfig, TrainConfig
from opensora.parallel import ParallelContext
from opensora.presets.scaling import scaled
from opensora.tiny_parts import complete
from opensora.trainer import run_train
from opensora.training.records import read_losses
from tests.sequence_parallel.worlds import World

STEPS = 2
SEQUENCE_RANKS = 2
# STDiT, STDiT2 with given frames, STDiT3 and LatteT2V with images beside clips, and the frames of a clip.
KINDS = {
    "open-sora-v1.0-stage1": 4,
    "open-sora-v1.1-stage1": 4,
    "open-sora-v1.2-stage1": 17,
    "open-sora-plan-v1.1-65x512x512": 9,
}
# Held-out loss too, from before the first step on: that of one bucket.
VALIDATED = ("open-sora-plan-v1.1-65x512x512",)


def whole_runs(folder: Path) -> None:
    """The answers: one process, of which each step takes the batches of two data ranks."""
    for name in KINDS:
        config = _config(name, folder, "whole")
        optimizer = replace(config.optimizer, accumulation_steps=2)
        run_train(replace(config, optimizer=optimizer), context=ParallelContext.single_process("cpu"))


def every_system_trains_on_ranks_as_in_one_process(world: World) -> None:
    """Losses, gradient norms and held-out losses agree within 1e-5, as fp32 sums in another order do."""
    for name in KINDS:
        config = _config(name, world.folder, "ranks")
        run_train(config, context=ParallelContext.of_world(config.parallel, torch.device("cpu")))
        if world.rank == 0:
            outputs = [world.folder / f"{name}-{where}" for where in ("ranks", "whole")]
            rows, expected = (read_losses(output) for output in outputs)
            assert len(rows) == len(expected) == STEPS
            for row, of_whole in zip(rows, expected, strict=True):
                for key in ("loss", "grad_norm"):
                    assert float(row[key]) == pytest.approx(float(of_whole[key]), rel=1e-5, abs=1e-5), (name, key)
            if name in VALIDATED:
                losses, expected_losses = (_held_out(output) for output in outputs)
                assert losses == pytest.approx(expected_losses, rel=1e-5, abs=1e-5), name


def weights_that_some_ranks_alone_use_are_refused_where_they_are_spread(world: World) -> None:
    """LatteT2V leaves temporal attention out for an image; ranks with clips would wait for its weights."""
    config = _config("open-sora-plan-v1.1-65x512x512", world.folder, "refused")
    context = ParallelContext.of_world(config.parallel, torch.device("cpu"))
    buckets = {"32": {1: (1.0, 1), 9: (1.0, 1)}}
    for changes in ({"image_ratio": 0.5}, {"data": replace(config.data, use_image_num=0, buckets=buckets)}):
        with pytest.raises(ValueError, match=r"sharding must be .none. for LatteT2V where some ranks have clips"):
            run_train(replace(config, **changes), context=context)


def _config(name: str, folder: Path, where: str) -> TrainConfig:
    preset, stage = presets.get_with_stage(name)
    config = complete(scaled(preset.training[stage or next(iter(preset.training))], "tiny"), folder / "parts")
    data = replace(config.data, batch_size=1, cache_in_memory=False)
    if data.buckets:
        data = replace(data, buckets={"32": {1: (1.0, 1), KINDS[name]: (1.0, 1)}})
    run = {"output": str(folder / f"{name}-{where}"), "steps": STEPS, "sample_every": 0}
    run["validate_every"] = STEPS if name in VALIDATED else 0
    return replace(
        config,
        data=data,
        # eps: Adam's first steps are lr * sign(gradient), which a gradient of rounding errors must not decide.
        optimizer=replace(config.optimizer, eps=1e-4, warmup_steps=0),
        run=replace(config.run, **run, checkpoint_every=0, log_every=1, tensorboard=False, device="cpu"),
        parallel=ParallelConfig(ulysses=SEQUENCE_RANKS, sharding="full"),
        num_validation_clips=1,
    )


def _held_out(output: Path) -> list[float]:
    with (output / "validation.csv").open(newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


CHECKS = [
    every_system_trains_on_ranks_as_in_one_process,
    weights_that_some_ranks_alone_use_are_refused_where_they_are_spread,
]
