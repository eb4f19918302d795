"""What each of the five systems can be asked for; README's table of capabilities names these tests."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from opensora.config import DPMSolverConfig, IDDPMConfig
from opensora.data.reading import read_frames
from opensora.sampler import Sampler
from opensora.sampling import generation
from opensora.sampling.guides import Guide
from opensora.sampling.requests import clip_size
from opensora.video import write_mp4, write_png
from tests.tiny_systems import SYSTEMS, load_system, sampling, save_system

PROMPT = "a red circle moving left"
SCORED = ("open-sora-v1.2",)  # trained with scores in the caption
ANY_SIZE = ("open-sora-v1.0", "open-sora-v1.1", "open-sora-v1.2")  # Open-Sora-Plan has weights for each length
PREDICTS_NOISE = tuple(name for name in SYSTEMS if name != "open-sora-v1.2")


@pytest.fixture(scope="module", params=list(SYSTEMS))
def system(request, tmp_path_factory) -> Sampler:
    return prepared(request.param, tmp_path_factory)


@pytest.fixture(scope="module")
def some_system(request, tmp_path_factory) -> Sampler:
    return prepared(request.param, tmp_path_factory)


_ready: dict[str, Sampler] = {}


def prepared(name: str, tmp_path_factory) -> Sampler:
    torch.set_num_threads(1)
    if name not in _ready:
        _ready[name] = load_system(name, tmp_path_factory.mktemp(name))
        _ready[name].name = name
    return _ready[name]


@pytest.fixture
def files(system, tmp_path) -> dict[str, str]:
    return written(system, tmp_path)


def written(sampler: Sampler, folder: Path) -> dict[str, str]:
    """An image and a video of the clip's size and frame rate."""
    side, count = sampler.defaults.image_size[0], int(sampler.defaults.num_frames)
    frames = torch.randint(0, 256, (count, 3, side, side), generator=torch.Generator().manual_seed(1)).byte()
    image = write_png(folder / "image.png", frames[0])
    return {
        "image": str(image),
        "video": str(write_mp4(folder / "video.mp4", frames, fps=clip_size(sampler.defaults).save_fps, crf=1)),
    }


def make(sampler: Sampler, prompt: str = PROMPT, seed: int = 1, guide: Guide | None = None, **options) -> Tensor:
    (clip,) = sampler.sample(prompt, replace(sampler.defaults, **options), seed=seed, guide=guide)
    return clip.frames


def reconstructed(sampler: Sampler, frames: Tensor) -> Tensor:
    """Frames uint8 (T, 3, H, W) through the VAE and back."""
    x = frames.permute(1, 0, 2, 3)[None].float() / 127.5 - 1
    with torch.no_grad():
        z = sampler.vae.encode(x)
        return sampler.vae.decode(z, frames.shape[0])[0].permute(1, 0, 2, 3)


def test_text_to_video(system):
    frames = make(system)
    assert len(frames) == int(system.defaults.num_frames)
    assert torch.equal(frames, make(system))
    assert not torch.equal(frames, make(system, seed=2))


def test_text_to_image(system):
    assert len(make(system, num_frames="1")) == 1


def test_image_to_video(system, files):
    frames, free = make(system, guide=Guide(start=files["image"])), make(system)
    other = make(system, "a blue square moving down", seed=7, guide=Guide(start=files["image"]))
    # The first frame is the VAE's copy of the image whatever the prompt, up to norms that span the clip.
    near = (frames[0].int() - other[0].int()).float().abs().mean()
    far = (frames[0].int() - free[0].int()).float().abs().mean()
    assert near < 0.5 * far


def test_first_and_last_frame(system, files, monkeypatch):
    guide, decoded = Guide(start=files["image"], end=files["image"]), []
    decode = generation.decode
    monkeypatch.setattr(generation, "decode", lambda run, z, **options: decoded.append(z) or decode(run, z, **options))
    make(system, guide=guide)
    make(system, "a blue square moving down", seed=7, guide=guide)
    between = (decoded[0] - decoded[1]).abs().mean(dim=(0, 1, 3, 4))  # of latent frames
    # IDDPM takes given frames through its last step, whose noise is 0.01.
    assert max(between[0], between[-1]) < 0.05
    assert between[1:-1].min() > 0.1


def test_a_video_goes_on(system, files):
    frames, count = make(system, guide=Guide(start=files["video"])), int(system.defaults.num_frames)
    assert len(frames) == 2 * count - 1


def test_a_video_gets_a_beginning(system, files):
    frames, count = make(system, guide=Guide(end=files["video"])), int(system.defaults.num_frames)
    assert len(frames) == 2 * count - min(system.vae.time_factor, 4)


def test_two_videos_are_connected(system, files):
    frames = make(system, guide=Guide(start=files["video"], end=files["video"]))
    assert len(frames) == 3 * int(system.defaults.num_frames) - 1 - min(system.vae.time_factor, 4)


def test_loops_of_any_length(system):
    frames, count = make(system, loop=3), int(system.defaults.num_frames)
    assert len(frames) == count + 2 * (count - 1)
    assert torch.equal(frames[:count], make(system))


def test_an_edit_of_nothing_is_a_copy_and_an_edit_of_all_is_not(system, files):
    kept, changed = (make(system, guide=Guide(edit=files["video"], edit_ratio=ratio)) for ratio in (0.0, 1.0))
    copy = reconstructed(system, read_frames(files["video"]))
    copy = ((copy.clamp(-1, 1) + 1) * 127.5).round()
    assert (kept.float() - copy).abs().mean() < 0.5 * (changed.float() - copy).abs().mean()
    assert torch.equal(changed, make(system))  # of an edit of everything nothing of the video is left


def test_a_region_is_edited_and_the_rest_stays(system, files):
    side = system.defaults.image_size[0]
    frames = make(system, guide=Guide(edit=files["video"], edit_region=f"0,0,{side},{side // 2}"))
    original = read_frames(files["video"])
    assert (frames[..., side // 2 :].int() - original[..., side // 2 :].int()).abs().max() <= 1
    assert not torch.equal(frames[..., : side // 2], original[..., : side // 2])


def test_a_mask_strategy_places_latent_frames(system, files):
    latents = system.vae.latent_size((int(system.defaults.num_frames), *system.defaults.image_size))[0]
    options = {"reference_paths": [files["video"]], "mask_strategies": [f"0,0,0,0,{latents},0"]}
    (all_given,) = system.sample(PROMPT, seed=3, **options)
    (other,) = system.sample("a blue square moving down", seed=3, **options)
    # IDDPM takes given frames through its last step, whose noise is 0.01: a few of 256 grey levels.
    assert (all_given.frames.int() - other.frames.int()).abs().max() <= 4


def test_a_negative_prompt_changes_the_clip(system):
    assert not torch.equal(make(system), make(system, negative_prompt="a blue square moving down"))


def test_a_prompt_brings_options_of_its_own(system, files):
    text = f"{PROMPT} " + json.dumps({"start": files["image"]})
    assert torch.equal(make(system, text), make(system, guide=Guide(start=files["image"])))


def test_prompts_in_batches(system):
    config = replace(system.defaults, batch_size=3, seed=5)
    together = system.sample([PROMPT, "a blue square moving down", "a green triangle"], config)
    alone = make(system, "a green triangle", seed=7)
    assert (together[2].frames.int() - alone.int()).abs().max() <= 1


@pytest.mark.parametrize("some_system", ["open-sora-v1.1", "open-sora-v1.2", "open-sora-plan-v1.1"], indirect=True)
def test_decoding_within_a_memory_budget(some_system):
    """A generous one decodes as a whole: what is checked is that every VAE can be planned for."""
    assert torch.equal(make(some_system, vae_memory="4GiB"), make(some_system))


@pytest.mark.parametrize("some_system", ANY_SIZE, indirect=True)
def test_any_duration_size_and_aspect_ratio(some_system):
    count = int(some_system.defaults.num_frames) * 2
    frames = make(some_system, num_frames=str(count), image_size=(18, 26), fps=12.0)
    factor = some_system.vae.space_factor
    assert frames.shape == (count, 3, 18 // factor * factor, 26 // factor * factor)


@pytest.mark.parametrize("some_system", [name for name in SYSTEMS if name not in ANY_SIZE], indirect=True)
def test_clips_of_another_length_or_size_are_refused(some_system):
    with pytest.raises(ValueError, match="num_frames: this transformer makes clips of 1 or 9 frames, got 13"):
        make(some_system, num_frames="13")
    with pytest.raises(ValueError, match="image_size: must be multiples of 16 pixels for this transformer, got 40 32"):
        make(some_system, image_size=(40, 32))


@pytest.mark.parametrize("some_system", SCORED, indirect=True)
def test_scores_and_camera_motion_reach_the_text_encoder(some_system):
    config = replace(some_system.defaults, aes=6.5, flow=3.0, camera_motion="pan right")
    (request,) = some_system.plan([PROMPT], config).requests
    assert request.texts[0].endswith("aesthetic score: 6.5. motion score: 3.0. camera motion: pan right.")


@pytest.mark.parametrize("some_system", PREDICTS_NOISE, indirect=True)
@pytest.mark.parametrize("scheduler", [IDDPMConfig(2), IDDPMConfig(2, sampler="ddim"), DPMSolverConfig(2)])
def test_other_ways_of_sampling(some_system, scheduler):
    (clip,) = some_system.sample(PROMPT, scheduler=scheduler)
    assert len(clip.frames) == int(some_system.defaults.num_frames)


def test_a_checkpoint_of_another_system_is_named(tmp_path):
    other = save_system("open-sora-plan-v1.1", tmp_path)
    with pytest.raises(ValueError, match="looks like LatteT2V"):
        Sampler.from_preset("open-sora-v1.1", **other, config=sampling("open-sora-v1.1"))
