import random
from itertools import pairwise

import pytest
import torch
from PIL import Image

from opensora.data.transforms import (
    fill_size,
    temporal_crop_indices,
    transform_frames,
    transform_image,
    transform_video,
)


def random_frames(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("source", [(40, 60), (37, 29), (16, 24), (1, 300), (500, 3)])
@pytest.mark.parametrize("target", [(16, 24), (24, 16), (1, 1), (31, 17)])
def test_clips_are_filled_and_cropped_to_size(source: tuple[int, int], target: tuple[int, int]):
    height, width = fill_size(source, target)
    assert height >= target[0]
    assert width >= target[1]
    assert height == target[0] or width == target[1]
    frames = random_frames(2, 3, *source)
    for clip in (transform_video(frames, target), transform_image(frames[0], target)[None]):
        assert clip.shape[1:] == (3, *target)
        assert clip.dtype == torch.float32
        assert clip.min() >= -1
        assert clip.max() <= 1


def test_a_clip_of_the_right_size_only_changes_its_range():
    frames = random_frames(3, 3, 16, 24)
    expected = frames.float() / 127.5 - 1
    # One rounding of fp32 near 1 per operation, four of them.
    torch.testing.assert_close(transform_video(frames, (16, 24)), expected, atol=2.4e-7, rtol=0)
    torch.testing.assert_close(transform_image(frames[0], (16, 24)), expected[0], atol=2.4e-7, rtol=0)


def test_pil_images_and_tensors_are_the_same():
    pixels = random_frames(3, 20, 30)
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    assert torch.equal(transform_image(image, (8, 8)), transform_image(pixels, (8, 8)))


def test_clips_for_a_model_have_channels_first_and_images_their_own_path():
    frames = random_frames(4, 3, 20, 30)
    assert transform_frames(frames, (8, 8)).shape == (3, 4, 8, 8)
    assert torch.equal(transform_frames(frames[:1], (8, 8))[:, 0], transform_image(frames[0], (8, 8)))


def test_center_crops_keep_the_middle():
    frames = torch.zeros(1, 3, 8, 24, dtype=torch.uint8)
    frames[..., 8:16] = 255
    assert transform_video(frames, (8, 8), fit="center").eq(1).all()
    assert transform_image(frames[0], (8, 8), fit="center").eq(1).all()
    with pytest.raises(ValueError, match="needs a square size"):
        transform_image(frames[0], (8, 4), fit="center")


def test_windows_stay_inside_and_are_evenly_spread():
    for seed in range(50):
        indices = temporal_crop_indices(17, 60, frame_interval=2, generator=random.Random(seed))
        assert len(indices) == 17
        assert indices[0] >= 0
        assert indices[-1] < 60
        assert all(2 <= later - earlier <= 3 for earlier, later in pairwise(indices))
    assert temporal_crop_indices(17, 17) == list(range(17))


def test_crops_are_not_resized():
    frames = random_frames(2, 3, 11, 20)
    assert torch.equal(transform_video(frames, (8, 4), fit="crop"), 2 * (frames[..., 2:10, 8:12] / 255.0) - 1)
    with pytest.raises(ValueError, match="at least 16 x 8 pixels, got 11 x 20"):
        transform_video(frames, (16, 8), fit="crop")


def test_clips_shorter_than_the_window_are_used_whole():
    assert temporal_crop_indices(4, 7, frame_interval=3) == [0, 2, 4, 6]
    with pytest.raises(ValueError, match="must have at least 4 frames, got 3"):
        temporal_crop_indices(4, 3)


def test_sizes_must_be_positive():
    with pytest.raises(ValueError, match="positive"):
        transform_video(random_frames(1, 3, 8, 8), (0, 8))
