"""The embedded model does what the README says of it; `python -m tests.embedded_model` measures more pairs."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from opensora.data.tiny_dataset import make_tiny_dataset
from opensora.presets import tiny
from opensora.presets.tiny import ASSETS
from opensora.sampler import Sampler
from tests.embedded_model import follow_prompts, reconstruction_psnr

NUM_PAIRS = 16


@pytest.fixture(scope="module")
def sampler() -> Sampler:
    return Sampler.from_preset("tiny")


@pytest.mark.slow
def test_clips_have_the_colour_and_direction_of_their_prompts(sampler: Sampler):
    outcomes = list(follow_prompts(sampler, NUM_PAIRS))
    wrong = [outcome for outcome in outcomes if not (outcome.color_is_right and outcome.direction_is_right)]
    # 95 % and 90 % of 64 in the record; of 16, one wrong colour and two wrong directions are within those
    assert sum(not outcome.color_is_right for outcome in outcomes) <= 1, wrong
    assert sum(not outcome.direction_is_right for outcome in outcomes) <= 2, wrong


def test_vae_keeps_held_back_frames_at_24_db(sampler: Sampler, tmp_path: Path):
    make_tiny_dataset(tmp_path, num_shapes=0, num_real=0, num_shapes_heldout=0)
    assert reconstruction_psnr(sampler.vae, tmp_path / "heldout.csv") >= 24


def test_recorded_figures_meet_their_thresholds():
    figures = json.loads((ASSETS / "quality.json").read_text())
    assert figures["pairs"] >= 64
    assert figures["color_right"] >= 0.95
    assert figures["direction_right"] >= 0.90
    assert figures["psnr_heldout_db"] >= 24


def test_model_is_at_most_12_megabytes():
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) <= 12_000_000


def test_recipe_names_data_seed_steps_and_losses():
    recipe = json.loads((ASSETS / "recipe.json").read_text())
    for part in ("vae", "transformer"):
        for stage in recipe[part]:
            assert {"steps", "seed", "data", "mean_losses", "config"} <= stage.keys()
            losses = list(stage["mean_losses"].values())
            assert losses[-1] < losses[0]


# What ran and what the preset holds; see the README.
KNOWN_DIFFERENCES = {
    "spatial": {"vae.temporal.embed_dim", "vae.temporal.latent_embed_dim", "vae.temporal.filters"},
    "temporal": set(),
    "clips": set(),
    "uniform": {"run.steps", "scheduler.cfg_scale"},
    "shifted": {"run.steps", "scheduler.cfg_scale"},
    "motion": {"scheduler.cfg_scale"},
}


def test_recipe_is_the_presets_but_for_known_differences():
    recipe = json.loads((ASSETS / "recipe.json").read_text())
    preset = tiny.preset()
    stages = {**preset.vae_training, **preset.training}
    ran = dict(zip(stages, (*recipe["vae"], *recipe["transformer"]), strict=True))
    for name, config in stages.items():
        planned, actual = (
            flat({key: value for key, value in values.items() if key != "sample"})
            for values in (json.loads(json.dumps(asdict(config))), ran[name]["config"])
        )
        # The field was named after the one scheduler that there was to train with.
        actual = {key.replace("flow.", "scheduler.", 1): value for key, value in actual.items()}
        differ = {key for key in planned.keys() & actual.keys() if planned[key] != actual[key]}
        paths = {key for key in differ if "/" in str(planned[key])}
        assert differ - paths - {"run.num_threads", "run.sample_every"} == KNOWN_DIFFERENCES[name], name


def flat(values: dict, prefix: str = "") -> dict[str, object]:
    found = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found
