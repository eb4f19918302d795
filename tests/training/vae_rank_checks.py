"""Sharded ranks train a VAE against a discriminator as one process does that goes through all their batches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from opensora.config import AdversaryConfig, ParallelConfig, VAEConfig
from opensora.parallel import ParallelContext
from opensora.training.records import read_losses
from opensora.vae_trainer import run_train_vae
from tests.sequence_parallel.worlds import World
from tests.training.small_models import CAUSAL_VAE, VAE, vae_config, write_clips

STEPS = 2  # without the discriminator, and with it
TERMS = ("loss", "grad_norm", "reconstruction", "adversarial", "adversary_loss", "logits_real", "logits_fake")


def a_stacked_vae_and_a_2d_discriminator_train_as_in_one_process(world: World) -> None:
    _check(world, VAE, "2d")


def a_causal_vae_and_a_3d_discriminator_train_as_in_one_process(world: World) -> None:
    _check(world, CAUSAL_VAE, "3d")


def _check(world: World, vae: VAEConfig, kind: str) -> None:
    clips = world.folder / f"clips-{world.rank}"
    clips.mkdir(exist_ok=True)
    write_clips(clips)
    config = vae_config(clips, world.folder / f"{kind}-ranks")
    config = replace(
        config,
        vae=vae,
        adversary=AdversaryConfig(kind, start=2, channels=4, num_layers=1),
        initial_log_variance=-4.0,
        data=replace(config.data, validation=config.data.manifest, batch_size=1),
        optimizer=replace(config.optimizer, accumulation_steps=1),
        parallel=ParallelConfig(sharding="full"),
        run=replace(config.run, steps=STEPS, checkpoint_every=0, sample_every=STEPS, validate_every=STEPS),
        num_validation_clips=2,
        num_statistics_clips=1,
    )
    run_train_vae(config, context=ParallelContext.of_world(config.parallel, torch.device("cpu")))
    if world.rank == 0:
        output = world.folder / f"{kind}-whole"
        whole = replace(
            config,
            optimizer=replace(config.optimizer, accumulation_steps=world.num_ranks),
            run=replace(config.run, output=str(output)),
        )
        run_train_vae(whole, context=ParallelContext.single_process("cpu"))
        rows, expected = read_losses(world.folder / f"{kind}-ranks"), read_losses(output)
        assert len(rows) == len(expected) == STEPS
        for row, of_whole in zip(rows, expected, strict=True):
            for name in TERMS:
                # fp32, summed in another order
                assert float(row[name]) == pytest.approx(float(of_whole[name]), rel=1e-5, abs=1e-5), name
    dist.barrier()


CHECKS = [
    a_stacked_vae_and_a_2d_discriminator_train_as_in_one_process,
    a_causal_vae_and_a_3d_discriminator_train_as_in_one_process,
]
