"""Generated clips of moving shapes show what their captions say, and the measurement can tell when they do not."""

import pytest
import torch

from opensora.data.shapes import COLORS, DIRECTIONS, ShapeClip, all_shape_clips, generate, measure_clip, render_clip


def test_there_are_72_captions_and_each_reads_like_english():
    captions = [clip.caption for clip in all_shape_clips()]
    assert len(set(captions)) == 72
    assert "a red circle moving left" in captions


def test_a_series_shows_every_combination_equally_often_and_repeats_bit_for_bit():
    assert [generate(index, num_frames=1, height=8, width=8)[0] for index in range(72)] == [
        clip.caption for clip in all_shape_clips()
    ]
    caption, frames = generate(100, seed=3)
    assert (frames.shape, frames.dtype) == ((17, 3, 64, 64), torch.uint8)
    again = generate(100, seed=3)
    assert again[0] == caption
    assert torch.equal(again[1], frames)
    assert not torch.equal(generate(100, seed=4)[1], frames)


def test_every_generated_clip_measures_as_its_caption():
    for index, clip in enumerate(all_shape_clips()):
        assert measure_clip(render_clip(clip, seed=index)) == (clip.color, clip.direction)


@pytest.mark.parametrize(("num_frames", "height", "width"), [(2, 64, 64), (5, 33, 71), (24, 96, 40)])
def test_other_sizes_measure_too(num_frames, height, width):
    for index, clip in enumerate(all_shape_clips()[::5]):
        frames = render_clip(clip, seed=index, num_frames=num_frames, height=height, width=width)
        assert frames.shape == (num_frames, 3, height, width)
        assert measure_clip(frames) == (clip.color, clip.direction)


def test_the_shape_travels_20_pixels_and_stays_inside():
    for index, clip in enumerate(all_shape_clips()):
        frames = render_clip(clip, seed=1000 + index).float()
        shape_THW = frames.amax(1) - frames.amin(1) > 100
        border = torch.cat([shape_THW[:, [0, -1], :].flatten(), shape_THW[:, :, [0, -1]].flatten()])
        assert border.float().mean() < 0.05
        axis = 2 if DIRECTIONS[clip.direction][0] else 1
        positions = torch.arange(64.0)
        mass = shape_THW.sum(3 - axis).float()
        centers = (mass * positions).sum(1) / mass.sum(1)
        assert abs(centers[-1] - centers[0]) >= 19.5


def test_played_backwards_a_clip_moves_the_other_way():
    opposite = {"left": "right", "right": "left", "up": "down", "down": "up"}
    for index, clip in enumerate(all_shape_clips()[::7]):
        assert measure_clip(render_clip(clip, seed=index).flip(0)) == (clip.color, opposite[clip.direction])


def test_colors_survive_noise_blur_and_dimming():
    generator = torch.Generator().manual_seed(0)
    for index, clip in enumerate(all_shape_clips()[::7]):
        frames = torch.nn.functional.avg_pool2d(render_clip(clip, seed=index).float(), 3, 1, 1) * 0.7
        noisy = frames + 8 * torch.randn(frames.shape, generator=generator)
        assert measure_clip(noisy.clamp(0, 255).to(torch.uint8)) == (clip.color, clip.direction)


@pytest.mark.parametrize("color", COLORS)
def test_swapped_channels_are_told_apart(color):
    frames = render_clip(ShapeClip(color, "circle", "left"), seed=0)
    rolled = frames.roll(1, dims=1)
    cycle = {"red": "green", "green": "blue", "blue": "red", "yellow": "cyan", "cyan": "magenta", "magenta": "yellow"}
    assert measure_clip(rolled) == (cycle[color], "left")


def test_wrong_clips_are_not_given_the_benefit_of_the_doubt():
    frames = render_clip(ShapeClip("red", "square", "up"), seed=0)
    assert measure_clip(frames[:1].repeat(17, 1, 1, 1)) == ("red", None)
    assert measure_clip(torch.full((17, 3, 64, 64), 128, dtype=torch.uint8)) == (None, None)
    noise = torch.randint(0, 60, (17, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert measure_clip(noise) == (None, None)


def test_a_diagonal_movement_has_no_direction():
    frames = torch.zeros(17, 3, 64, 64, dtype=torch.uint8)
    for number, frame in enumerate(frames):
        frame[1, 4 + 2 * number : 16 + 2 * number, 40 - 2 * number : 52 - 2 * number] = 255
    assert measure_clip(frames) == ("green", None)


def test_strong_noise_of_all_colors_has_no_direction():
    noise = torch.randint(0, 256, (17, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert measure_clip(noise)[1] is None


@pytest.mark.parametrize("words", [("white", "circle", "left"), ("red", "star", "left"), ("red", "circle", "inwards")])
def test_an_unknown_word_is_refused_with_the_known_ones(words):
    with pytest.raises(ValueError, match="must be one of"):
        ShapeClip(*words)


def test_frames_of_another_layout_are_refused():
    with pytest.raises(ValueError, match=r"\(T, 3, H, W\)"):
        measure_clip(torch.zeros(17, 64, 64, 3, dtype=torch.uint8))
