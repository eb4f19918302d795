"""What the embedded model makes of pictures and videos that it is given, measured in pixels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from opensora.sampler import Clip, Sampler
from opensora.sampling.guides import Guide
from opensora.video import write_mp4, write_png

PROMPT = "a blue circle moving left"


class Given:
    """Two clips of the embedded model, as files."""

    def __init__(self, sampler: Sampler, folder: Path) -> None:
        self.left, self.up = sampler.sample([PROMPT, "a blue circle moving up"], replace(sampler.defaults, seed=3))
        self.clip = str(write_mp4(folder / "left.mp4", self.left.frames, fps=8, crf=1))
        self.other = str(write_mp4(folder / "up.mp4", self.up.frames, fps=8, crf=1))
        self.first = str(write_png(folder / "first.png", self.left.frames[0]))
        self.last = str(write_png(folder / "last.png", self.left.frames[-1]))


@pytest.fixture(scope="module")
def sampler() -> Sampler:
    torch.set_num_threads(1)
    return Sampler.from_preset("tiny")


@pytest.fixture(scope="module")
def given(sampler, tmp_path_factory) -> Given:
    return Given(sampler, tmp_path_factory.mktemp("given"))


def make(sampler: Sampler, guide: Guide, prompt: str = PROMPT, **options) -> Tensor:
    (clip,) = sampler.sample(prompt, replace(sampler.defaults, **options), seed=9, guide=guide)
    assert isinstance(clip, Clip)
    return clip.frames


def psnr(a: Tensor, b: Tensor) -> float:
    return float(-10 * ((a.float() - b.float()) / 255).square().mean().log10())


def changes(frames: Tensor) -> Tensor:
    """Mean difference of each frame to the one before, in grey levels."""
    return frames.float().diff(dim=0).abs().mean(dim=(1, 2, 3))


def test_a_video_from_an_image_begins_with_that_image(sampler, given):
    frames = make(sampler, Guide(start=given.first))
    assert psnr(frames[0], given.left.frames[0]) >= 24
    assert psnr(frames[-1], given.left.frames[0]) < 24  # and does not stand still


def test_a_video_between_two_images_reaches_both(sampler, given):
    frames = make(sampler, Guide(start=given.first, end=given.last))
    assert psnr(frames[0], given.left.frames[0]) >= 24
    assert psnr(frames[-1], given.left.frames[-1]) >= 24


def test_a_video_goes_on_without_a_jump(sampler, given):
    frames = make(sampler, Guide(start=given.clip))
    count = len(given.left.frames)
    assert len(frames) == 2 * count - 1
    assert psnr(frames[: count - 1], given.left.frames[:-1]) >= 40  # the file's own frames
    own = changes(given.left.frames).max()
    assert changes(frames)[count - 2 : count + 1].max() <= 2 * own


def test_a_video_gets_a_beginning_without_a_jump(sampler, given):
    frames = make(sampler, Guide(end=given.clip))
    count = len(given.left.frames)
    assert len(frames) == 2 * count - 4  # one latent frame at the end of a clip stands for four
    assert psnr(frames[count:], given.left.frames[4:]) >= 40
    assert changes(frames)[count - 5 : count + 1].max() <= 2 * changes(given.left.frames).max()


def test_two_videos_are_connected(sampler, given):
    frames = make(sampler, Guide(start=given.clip, end=given.other), "a blue circle", join_given=False)
    assert psnr(frames[0], given.left.frames[-1]) >= 24
    assert psnr(frames[-1], given.up.frames[3]) >= 24
    joined = make(sampler, Guide(start=given.clip, end=given.other), "a blue circle")
    assert len(joined) == 3 * len(frames) - 1 - 4


def test_an_edit_changes_what_the_prompt_says_and_keeps_where_it_happens(sampler, given):
    edited = make(sampler, Guide(edit=given.clip, edit_ratio=0.9), "a red circle moving left")
    assert redness(edited) > 0.5 > redness(given.left.frames)
    before, after = (frames.float().amax(dim=1) > 110 for frames in (given.left.frames, edited))
    # Of the brighter of the two shapes' pixels, those of both: it is where it was.
    assert float((before & after).sum() / (before & after | after).sum()) > 0.6


def test_a_region_is_edited_and_nothing_beside_it(sampler, given):
    edited = make(sampler, Guide(edit=given.clip, edit_region="0,0,64,32"), "a red circle moving left")
    original = make(sampler, Guide(edit=given.clip, edit_ratio=0.0))
    assert psnr(edited[..., 32:], given.left.frames[..., 32:]) >= 40  # what the file's compression leaves
    assert redness(edited[8:, ..., :32]) > 0.5
    assert psnr(original, given.left.frames) >= 24  # an edit of nothing is the VAE's reconstruction


def test_an_edited_first_frame_is_carried_through_the_region(sampler, given, tmp_path):
    red = given.left.frames[0].flip(0)  # the circle's blue becomes red
    region = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    region[..., 8:56, :] = 255
    mask = write_png(tmp_path / "mask.png", region[0])
    start = write_png(tmp_path / "start.png", red)
    guide = Guide(start=str(start), edit=given.clip, edit_region=str(mask))
    edited = make(sampler, guide, "a red circle moving left")
    assert len(edited) == len(given.left.frames)
    assert psnr(edited[0, :, 8:56], red[:, 8:56]) >= 20
    assert redness(edited[:, :, 12:52]) > 0.5
    assert psnr(edited[..., :8, :], given.left.frames[..., :8, :]) >= 40


def test_a_negative_prompt_moves_the_colour_away(sampler):
    """Of pictures whose prompt leaves the colour open, the one that is named as unwanted goes."""
    config = replace(sampler.defaults, num_frames="1", num_sample=4, batch_size=4, seed=0)
    blueness = []
    for negative in (None, "a blue circle moving left"):
        clips = sampler.sample("a circle moving left", replace(config, negative_prompt=negative))
        blueness.append(float(torch.stack([share(clip.frames, 2) for clip in clips]).mean()))
    assert blueness[0] > 0.25
    assert blueness[1] < 0.3 * blueness[0]


def redness(frames: Tensor) -> float:
    return float(share(frames, 0))


def share(frames: Tensor, channel: int) -> Tensor:
    """Of the light of the shape's pixels, that of one channel."""
    pixels = frames.float().movedim(-3, 0).flatten(1)
    shape = pixels[:, pixels.amax(dim=0) > 110]
    return shape[channel].sum() / shape.sum().clamp(min=1)
