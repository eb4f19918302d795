"""Two sharded processes train a VAE against a discriminator as one does that goes through both batches."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from opensora.config import ParallelConfig, TrainVAEConfig
from opensora.parallel import ParallelContext
from opensora.training.records import read_losses
from opensora.vae_trainer import run_train_vae
from tests.sequence_parallel.worlds import PASSED, World, run
from tests.training.small_models import vae_config, write_clips
from tests.training.test_vae_training import GAN, VAES

STEPS = 2
TERMS = ("loss", "reconstruction", "adversarial", "adversary_loss", "logits_real", "logits_fake")


def config_of(kind: str, clips: Path, output: Path, accumulation_steps: int) -> TrainVAEConfig:
    config = vae_config(clips, output)
    return replace(
        config,
        vae=VAES[kind],
        adversary=replace(GAN, kind="3d") if kind == "causal" else GAN,
        initial_log_variance=-4.0,
        data=replace(config.data, validation=config.data.manifest, batch_size=1),
        optimizer=replace(config.optimizer, accumulation_steps=accumulation_steps),
        parallel=ParallelConfig(sharding="full"),
        run=replace(config.run, steps=STEPS, checkpoint_every=0, sample_every=STEPS, validate_every=STEPS),
        num_validation_clips=2,
        num_statistics_clips=1,
    )


def a_stacked_vae_trains(world: World) -> None:
    _train("stacked", world)


def a_causal_vae_trains(world: World) -> None:
    _train("causal", world)


def _train(kind: str, world: World) -> None:
    config = config_of(kind, world.folder, world.folder / kind, 1)
    run_train_vae(config, context=ParallelContext.of_world(config.parallel, torch.device("cpu")))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_clips(folder)
    outcomes = run(2, [a_stacked_vae_trains, a_causal_vae_trains], folder)
    for outcome in outcomes.values():
        assert outcome == [PASSED] * 2, "\n".join(outcome)
    return folder


@pytest.mark.parametrize("kind", ["stacked", "causal"])
def test_two_sharded_ranks_are_one_process_with_two_batches(folder: Path, tmp_path: Path, kind: str):
    threads = torch.get_num_threads()
    run_train_vae(config_of(kind, folder, tmp_path, 2))
    torch.set_num_threads(threads)
    one, two = read_losses(tmp_path), read_losses(folder / kind)
    assert [row["step"] for row in two] == [str(step + 1) for step in range(STEPS)]
    for expected, actual in zip(one, two, strict=True):
        for name in TERMS:
            # fp32, summed in another order
            assert float(actual[name]) == pytest.approx(float(expected[name]), rel=1e-5, abs=1e-5), name
