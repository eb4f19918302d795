"""What a clip is made from, refused before any work where it cannot be used, and the devices on which models work."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from opensora.sampler import Sampler
from opensora.sampling.guides import Guide, cross_faded, frames_at_rate
from opensora.sampling.offload import Workplace
from opensora.sampling.requests import PromptError
from opensora.video import write_mp4, write_png
from tests.test_sampler import FLOW
from tests.tiny_models import SAMPLE, save_tiny_models

PROMPT = "a red circle moving left"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_tiny_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def sampler(folder) -> Sampler:
    torch.set_num_threads(1)
    parts = {name: folder / name for name in ("vae", "transformer", "text_encoder")}
    loaded = Sampler.from_preset("tiny", **parts)
    return Sampler(loaded.vae, loaded.transformer, loaded.text_encoder, scheduler=FLOW, defaults=SAMPLE)


def video(path: Path, num_frames: int) -> str:
    frames = torch.randint(0, 256, (num_frames, 3, 16, 16), generator=torch.Generator().manual_seed(0)).byte()
    return str(write_mp4(path, frames, fps=8))


@pytest.mark.parametrize(
    ("guide", "options", "message"),
    [
        (Guide(start="nowhere.png"), {}, r"start: nowhere\.png.*no such file"),
        (Guide(start="SHORT"), {"condition_frame_length": 3}, r"start: .* must have at least 9 frames .* got 4"),
        (Guide(end="SHORT"), {"condition_frame_length": 2}, r"end: .* must have at least 8 frames .* got 4"),
        (Guide(edit="SHORT"), {}, r"edit: .* must have at least 17 frames .* got 4"),
        (Guide(edit="LONG", edit_ratio=1.5), {}, r"edit_ratio: must lie in \[0, 1\], got 1\.5"),
        (Guide(edit_region="0,0,4,4"), {}, "edit: edit_region and edit_ratio need a video to edit"),
        (Guide(edit="LONG", edit_region="0,0,4,x"), {}, "width must be a whole number of pixels, got 'x'"),
        (Guide(edit="LONG", edit_region="0,0,17,4"), {}, "must lie inside of 16 x 16 pixels"),
        (Guide(edit="LONG", edit_region="nowhere.png"), {}, "edit_region: must be .* or a picture or video"),
        (Guide(edit="LONG", edit_region="BLACK"), {}, "edit_region: .* must be bright somewhere, got nothing to edit"),
        (
            Guide(start="LONG", end="LONG"),
            {"condition_frame_length": 3},
            "must leave something to generate of 5 latent",
        ),
        (Guide(edit="LONG"), {"loop": 2}, "loop: an edit, and a clip between two others, has one part, got loop 2"),
        (Guide(start="LONG"), {"num_frames": "1"}, "a single picture has nothing else to begin or end with"),
    ],
)
def test_what_cannot_be_used_is_refused_before_any_work(sampler, tmp_path, guide, options, message):
    files = {"SHORT": video(tmp_path / "short.mp4", 4), "LONG": video(tmp_path / "long.mp4", 17)}
    files["BLACK"] = str(write_png(tmp_path / "black.png", torch.zeros(3, 16, 16, dtype=torch.uint8)))
    guide = replace(
        guide,
        **{
            part: files.get(getattr(guide, part), getattr(guide, part))
            for part in ("start", "end", "edit", "edit_region")
        },
    )
    with pytest.raises(PromptError, match=message):
        sampler.plan([PROMPT], replace(SAMPLE, **options), guides=[guide])


def test_guides_and_mask_strategies_exclude_each_other(sampler, tmp_path):
    with pytest.raises(PromptError, match="must not be given beside reference_path and mask_strategy"):
        sampler.plan([PROMPT], SAMPLE, guides=[Guide(start="a.png")], mask_strategies=["0"])


def test_a_prompt_carries_its_own_guide_and_negative_prompt(sampler, tmp_path):
    picture = write_png(tmp_path / "start.png", torch.zeros(3, 16, 16, dtype=torch.uint8))
    options = json.dumps({"start": str(picture), "negative_prompt": "A  BLUE square"})
    plan = sampler.plan([f"{PROMPT} {options}", PROMPT], SAMPLE)
    assert plan.requests[0].guide == Guide(start=str(picture))
    assert plan.requests[0].negative == "a blue square"  # cleaned like any text
    assert plan.requests[1].guide == Guide()
    with pytest.raises(PromptError, match="edit_ratio must be a number, got 'x'"):
        sampler.plan([PROMPT + ' {"edit_ratio": "x"}'], SAMPLE)


def test_a_clip_grows_backwards_when_only_its_end_is_given(sampler, tmp_path):
    end = video(tmp_path / "end.mp4", 17)
    config = replace(SAMPLE, loop=3, join_given=False)
    (clip,) = sampler.sample(PROMPT, config, guide=Guide(end=end))
    assert len(clip.frames) == 17 + 2 * (17 - 4)
    (last,) = sampler.sample(PROMPT, replace(config, loop=1), guide=Guide(end=end))
    # The first part made is the last of the clip; its first latent's worth of frames is cross-faded with the next.
    assert torch.equal(clip.frames[-13:], last.frames[-13:])


@pytest.mark.parametrize("loop", [1, 2])
def test_clips_of_a_batch_depend_on_their_own_guides_alone(sampler, tmp_path, loop):
    edit, start = video(tmp_path / "edit.mp4", 17), video(tmp_path / "start.mp4", 5)
    guides = [Guide(edit=edit, edit_region="0,0,8,8"), None, Guide(start=start), Guide(edit=edit, edit_ratio=0.5)]
    guides = guides if loop == 1 else guides[1:3]
    config = replace(SAMPLE, batch_size=4, seed=4, join_given=False, loop=loop)
    together = sampler.sample([PROMPT] * len(guides), config, guide=guides)
    for number, guide in enumerate(guides):
        (alone,) = sampler.sample(PROMPT, config, seed=4 + number, guide=guide)
        assert (together[number].frames.int() - alone.frames.int()).abs().max() <= 1


def test_a_video_of_another_frame_rate_is_shown_at_the_clips():
    assert frames_at_rate(9, 24.0, 8.0) == [0, 3, 6]
    assert frames_at_rate(9, 24.0, 8.0, from_end=True) == [2, 5, 8]
    assert frames_at_rate(4, 8.0, 8.0) == [0, 1, 2, 3]
    assert frames_at_rate(3, 8.0, 16.0) == [0, 0, 1, 2, 2]


def test_a_model_without_a_null_caption_takes_the_empty_text(sampler, monkeypatch):
    assert sampler.plan([PROMPT], SAMPLE).requests[0].negative is None
    monkeypatch.setattr(type(sampler.transformer), "null_caption", None)
    assert sampler.plan([PROMPT], SAMPLE).requests[0].negative == ""


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        ("0,0,0,0,50", "group 0 asks for 50 latent frames from 0 on, but reference 0 has 2"),
        ("0;5,0", "group 1 is for loop 5, but there are loops 0 to 0"),
    ],
)
def test_a_mask_strategy_that_asks_for_too_much_is_refused(sampler, tmp_path, strategy, message):
    path = video(tmp_path / "short.mp4", 5)
    with pytest.raises(PromptError, match=message):
        sampler.plan([PROMPT], SAMPLE, reference_paths=[path], mask_strategies=[strategy])


def test_videos_are_cross_faded_where_they_overlap():
    before, after = torch.zeros(3, 4, 1, 1), torch.ones(3, 5, 1, 1)
    assert cross_faded(before, after, 3)[0, :, 0, 0].tolist() == [0, 0.25, 0.5, 0.75, 1, 1]


class Model:
    def __init__(self) -> None:
        self.devices: list[str] = []

    def to(self, device: object) -> None:
        self.devices.append(str(device))


def test_an_offloaded_model_is_on_the_device_only_while_it_works():
    model = Model()

    def fail() -> None:
        with Workplace(torch.device("cuda"), offload=True).use(model):
            assert model.devices == ["cuda"]
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert model.devices == ["cuda", "cpu"]
    for workplace in (Workplace(torch.device("cuda")), Workplace(torch.device("cpu"), offload=True)):
        with workplace.use(model):
            assert model.devices == ["cuda", "cpu"]


def test_offloading_changes_no_clip(folder, sampler):
    parts = {name: folder / name for name in ("vae", "transformer", "text_encoder")}
    offloaded = Sampler.from_preset("tiny", **parts, offload=True)
    again = Sampler(
        offloaded.vae, offloaded.transformer, offloaded.text_encoder, scheduler=FLOW, defaults=SAMPLE, offload=True
    )
    assert torch.equal(again.sample(PROMPT, seed=1)[0].frames, sampler.sample(PROMPT, seed=1)[0].frames)
