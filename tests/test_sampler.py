"""The sampler: same seed, same clip; prompts are checked before work; references and loops keep what they are given."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from opensora import presets
from opensora.checkpoints import CheckpointError, load_model
from opensora.config import RectifiedFlowConfig, SampleConfig, VideoVAEConfig
from opensora.sampler import Clip, Sampler
from opensora.sampling.requests import PromptError, clip_size, read_requests
from opensora.text.tiny import build_tiny_text_encoder
from opensora.vae import VideoVAE
from opensora.video import write_mp4
from opensora_kernels import SequenceShards
from tests.tiny_models import SAMPLE, VAE, save_tiny_models

FLOW = RectifiedFlowConfig(num_sampling_steps=3, cfg_scale=4.0, use_timestep_transform=False)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    return save_tiny_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def sampler(models) -> Sampler:
    torch.set_num_threads(1)
    loaded = Sampler.from_preset(
        "tiny", vae=models / "vae", transformer=models / "transformer", text_encoder=models / "text_encoder"
    )
    return Sampler(loaded.vae, loaded.transformer, loaded.text_encoder, scheduler=FLOW, defaults=SAMPLE)


@pytest.fixture
def video(tmp_path) -> Path:
    generator = torch.Generator().manual_seed(1)
    frames = torch.randint(0, 256, (17, 3, 16, 16), generator=generator, dtype=torch.uint8)
    return write_mp4(tmp_path / "reference.mp4", frames, fps=8)


def one(clips: list[Clip]) -> Clip:
    assert len(clips) == 1
    return clips[0]


def test_same_seed_same_clip_and_another_seed_another(sampler):
    first = one(sampler.sample("a red circle moving left", seed=3))
    again = one(sampler.sample("a red circle moving left", seed=3))
    other = one(sampler.sample("a red circle moving left", seed=4))
    assert first.frames.shape == (17, 3, 16, 16)
    assert first.fps == 8
    assert torch.equal(first.frames, again.frames)
    assert not torch.equal(first.frames, other.frames)
    assert list(sampler.costs) == ["text", "denoise", "decode"]


def test_a_clip_depends_on_its_seed_not_on_its_neighbours(sampler):
    prompts = ["a blue square moving down", "a red circle moving left", "a green triangle moving up"]
    together = sampler.sample(prompts, replace(SAMPLE, batch_size=3, seed=10))
    assert [clip.seed for clip in together] == [10, 11, 12]
    alone = one(sampler.sample(prompts[1], seed=11))
    # Rows of a batch may be rounded differently by a matrix product: one grey level.
    assert (together[1].frames.int() - alone.frames.int()).abs().max() <= 1


def test_the_ranks_of_a_sequence_reach_the_transformer(sampler, monkeypatch):
    expected, told, denoiser = one(sampler.sample("a red circle", seed=3)), [], sampler.transformer.denoiser
    monkeypatch.setattr(
        sampler.transformer, "denoiser", lambda *a, **o: (told.append(o["sequence"]), denoiser(*a, **o))[1]
    )
    parts = (sampler.vae, sampler.transformer, sampler.text_encoder)
    sequence = SequenceShards()  # one process; tests/sequence_parallel has several
    shared = Sampler(*parts, scheduler=FLOW, defaults=SAMPLE, sequence=sequence)
    assert torch.equal(one(shared.sample("a red circle", seed=3)).frames, expected.frames)
    assert told == [sequence]


def test_num_sample_repeats_a_prompt_with_further_seeds(sampler):
    clips = sampler.sample(["a red circle", "a blue square"], replace(SAMPLE, num_sample=2, seed=0))
    assert [(clip.index, clip.sample, clip.seed) for clip in clips] == [(0, 0, 0), (0, 1, 1), (1, 0, 2), (1, 1, 3)]


def test_one_frame_is_an_image(sampler, tmp_path):
    clip = one(sampler.sample("a red circle", replace(SAMPLE, num_frames="1")))
    assert clip.frames.shape[0] == 1
    assert clip.save(tmp_path / "out.png").stat().st_size > 0


def test_guidance_of_one_needs_no_null_caption_and_a_negative_prompt_changes_the_clip(sampler):
    plain = one(sampler.sample("a red circle", scheduler=replace(FLOW, cfg_scale=1.0)))
    guided = one(sampler.sample("a red circle"))
    negative = one(sampler.sample("a red circle", replace(SAMPLE, negative_prompt="a blue square moving down")))
    assert not torch.equal(plain.frames, guided.frames)
    assert not torch.equal(guided.frames, negative.frames)


def test_a_given_first_frame_comes_back_as_the_vae_makes_it(sampler, video):
    config = replace(SAMPLE, seed=5)
    prompt = "a red circle " + json.dumps({"reference_path": str(video), "mask_strategy": "0,0,0,0,5,0"})
    given = one(sampler.sample(prompt, config))
    assert list(sampler.costs) == ["text", "references", "denoise", "decode"]
    # All 5 latent frames given: the clip is the reference through the VAE, whatever the prompt.
    other = one(sampler.sample("a blue square", config, reference_paths=[str(video)], mask_strategies=["0,0,0,0,5"]))
    assert torch.equal(given.frames, other.frames)
    free = one(sampler.sample("a red circle", config))
    assert not torch.equal(given.frames, free.frames)


def test_a_reference_without_a_strategy_is_the_first_frame(sampler, video):
    default = one(sampler.sample("a red circle", reference_paths=[str(video)]))
    explicit = one(sampler.sample("a red circle", reference_paths=[str(video)], mask_strategies=["0"]))
    assert torch.equal(default.frames, explicit.frames)


@pytest.mark.parametrize(
    ("num_frames", "length", "total"), [("17", 1, 17 + 2 * 16), ("17", 3, 17 + 2 * 8), ("34", 5, 34 + 2 * 17)]
)
def test_loops_go_on_from_the_clip_before(sampler, num_frames, length, total):
    config = replace(SAMPLE, loop=3, num_frames=num_frames, condition_frame_length=length)
    clip = one(sampler.sample("|0|a red circle|2|a blue square", config))
    assert clip.frames.shape[0] == total
    # The first loop is the clip that would have come without loops.
    single = one(sampler.sample("a red circle", replace(config, loop=1)))
    assert torch.equal(clip.frames[: int(num_frames)], single.frames)


def test_an_overlap_as_long_as_the_clip_is_refused(sampler):
    with pytest.raises(ValueError, match="condition_frame_length: must lie between 1 and 4"):
        sampler.sample("a red circle", replace(SAMPLE, loop=2, condition_frame_length=5))


def test_bf16_models_with_the_timestep_transform_sample_too(models):
    loaded = Sampler.from_preset(
        "tiny",
        vae=models / "vae",
        transformer=models / "transformer",
        text_encoder=models / "text_encoder",
        config=replace(SAMPLE, dtype="bf16", loop=2),
    )
    assert loaded.dtype == torch.bfloat16
    clip = one(loaded.sample("a red circle", scheduler=replace(FLOW, use_timestep_transform=True)))
    assert clip.frames.shape[0] == 17 + 16


def test_progress_counts_every_step(sampler):
    seen: list[tuple[str, int, int]] = []
    prompts = ["a red circle", "a blue square"]
    sampler.sample(prompts, on_progress=lambda *step: seen.append(step))
    assert [step for step in seen if step[0] == "denoise"] == [("denoise", i, 6) for i in range(1, 7)]
    assert seen[0] == ("text", 1, 1)
    assert seen[-1] == ("decode", 2, 2)


def test_texts_get_scores_then_cleaning_and_change_with_the_loop():
    config = replace(SAMPLE, aes=6.5, flow=2.0, camera_motion="Pan Right", loop=3)
    requests = read_requests(["|0|A Red CIRCLE.|2|A square. aesthetic score: 4.0."], config)
    first = "a red circle. aesthetic score: 6.5. motion score: 2.0. camera motion: pan right."
    second = "a square. aesthetic score: 4.0. motion score: 2.0. camera motion: pan right."
    assert requests[0].texts == (first, first, second)


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ('a circle {"reference_path": 3}', "reference_path must be a string"),
        ('a circle {"seed": "3"}', "JSON keys must be among"),
        ("a circle {oops", "must be JSON"),
        ("|0|a circle|two|a square", "loops must be written"),
        ('a circle {"mask_strategy": "0,0,0,0,1,2"}', "edit_ratio must lie in"),
        ('a circle {"mask_strategy": "0"}', "names reference 0, but loop 0 has 0"),
        ('a circle {"reference_path": "absent.png"}', "no such file"),
        ("   ", "must not be empty"),
    ],
)
def test_a_prompt_that_cannot_be_used_is_numbered_before_any_work(sampler, prompt, reason):
    steps: list[str] = []
    with pytest.raises(PromptError, match=reason) as failure:
        sampler.sample(["a red circle", prompt], on_progress=lambda *step: steps.append(step))
    assert failure.value.index == 1
    assert str(failure.value).startswith("prompt 2: ")
    assert steps == []


def test_a_mask_that_starts_outside_the_clip_is_found_before_any_work(sampler, video):
    with pytest.raises(PromptError, match="target_start must lie in"):
        sampler.sample("a circle", reference_paths=[str(video)], mask_strategies=["0,0,0,7"])


def test_sizes_follow_names_and_impossible_ones_are_refused(sampler):
    release = SampleConfig(num_frames="4s", resolution="240p", aspect_ratio="9:16")
    size = clip_size(release)
    assert (size.num_frames, size.height, size.width, size.fps, size.save_fps) == (102, 240, 426, 24, 24)
    assert clip_size(replace(release, num_frames="1")).fps == 120
    assert clip_size(replace(release, frame_interval=3)).save_fps == 8
    assert clip_size(replace(SAMPLE, num_frames="2s")).num_frames == 17
    assert clip_size(replace(SAMPLE, num_frames="4s")).num_frames == 34
    for change, reason in (
        ({"num_frames": "0"}, "num_frames: must be a positive number"),
        ({"num_frames": "soon"}, "num_frames: must be a positive number"),
        ({"resolution": "241p"}, "resolution: must be one of"),
        ({"aspect_ratio": "9:1"}, "aspect_ratio: 240p must be given one of"),
        ({"aspect_ratio": None}, "resolution and aspect_ratio: must be given together"),
        ({"image_size": (0, 64)}, "image_size: must be a positive height and width"),
    ):
        with pytest.raises(ValueError, match=reason):
            clip_size(replace(release, **change))
    with pytest.raises(ValueError, match="smaller than one latent"):
        sampler.sample("a circle", replace(SAMPLE, image_size=(1, 16)))
    with pytest.raises(ValueError, match="num_frames must be 1 or at least 17"):
        sampler.sample(
            "a circle", replace(SAMPLE, num_frames="9"), scheduler=replace(FLOW, use_timestep_transform=True)
        )


def test_presets_are_known_by_name_and_unknown_ones_list_the_known():
    assert presets.get("Open-Sora-v1.2").transformer == "hpcai-tech/OpenSora-STDiT-v3"
    assert presets.names()[0] == "tiny"
    with pytest.raises(ValueError, match=r"preset: must be one of tiny, open-sora-v1\.2, .*, got 'huge'"):
        Sampler.from_preset("huge")


def test_models_that_do_not_belong_together_say_so(models, sampler):
    with pytest.raises(CheckpointError, match="does not fit VideoVAE"):
        load_model(models / "transformer" / "model.safetensors", VideoVAE, VideoVAEConfig, config=VAE)
    longer = build_tiny_text_encoder(["a red circle"], model_max_length=13)
    with pytest.raises(ValueError, match="model_max_length must equal the text encoder's, got 12 and 13"):
        Sampler(sampler.vae, sampler.transformer, longer)


METER = """
import torch
from opensora.sampling.stages import StageMeter

meter = StageMeter(torch.device("cpu"))
with meter.stage("large"):
    torch.ones(40 << 20, dtype=torch.uint8)
with meter.stage("small"):
    pass
print(meter.costs["large"].peak_bytes - meter.costs["small"].peak_bytes, meter.costs["large"].seconds > 0)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the peak since a moment")
def test_the_meter_sees_time_and_memory_of_its_stage_alone():
    # In a process of its own: a large one has freed memory to give out again, and its peak does not move.
    answer = subprocess.run([sys.executable, "-c", METER], capture_output=True, text=True, check=True)
    growth, took_time = answer.stdout.split()
    assert int(growth) > 20 << 20
    assert took_time == "True"


def test_importing_the_sampler_touches_no_device_and_prints_nothing():
    code = "import opensora.sampler, torch; assert not torch.cuda.is_initialized()"
    root = str(Path(__file__).parents[1])
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert answer.stdout == answer.stderr == ""


def test_a_budget_for_decoding_changes_how_but_not_what(sampler):
    config = replace(SAMPLE, num_frames="34")
    whole = one(sampler.sample("a red circle moving left", config, seed=3))
    plan = sampler.plan(["a red circle moving left"], replace(config, vae_memory="1GiB"))
    assert str(plan.decoding).startswith("whole")
    least = next(plan for budget in range(11, 200) if (plan := _fits(sampler, config, f"{budget}MiB")))
    assert str(least.decoding).startswith("streaming")
    streamed = one(sampler.sample("a red circle moving left", least.config, seed=3))
    assert (whole.frames.int() - streamed.frames.int()).abs().max() <= 1
    with pytest.raises(ValueError, match="budget must be at least"):
        sampler.plan(["a red circle moving left"], replace(config, vae_memory="1KiB"))


def _fits(sampler, config: SampleConfig, budget: str):
    try:
        return sampler.plan(["a red circle moving left"], replace(config, vae_memory=budget))
    except ValueError:
        return None
