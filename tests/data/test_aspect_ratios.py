import pytest

from opensora.data.aspect_ratios import (
    ASPECT_RATIOS,
    RESOLUTIONS,
    closest_aspect_key,
    get_image_size,
    get_num_frames,
)


def test_names_give_height_and_width():
    assert get_image_size("240p", "9:16") == (240, 426)
    assert get_image_size("720p", "16:9") == (1280, 720)
    assert get_image_size("1024", "1.0") == (1024, 1024)


@pytest.mark.parametrize("resolution", RESOLUTIONS)
def test_tables_hold_what_they_name(resolution: str):
    table = RESOLUTIONS[resolution]
    for key, (height, width) in table.sizes.items():
        # Keys have two digits and sizes are rounded to multiples of up to 64: "4.0" of 2880 is 5760 x 1408.
        assert abs(height / width / float(key) - 1) < 0.03
        assert 0.85 < height * width / table.num_pixels < 1.15
        assert closest_aspect_key(float(key), 1.0, resolution) == key


def test_every_name_fits_every_lettered_resolution():
    for resolution in ("144p", "240p", "360p", "480p", "720p", "1080p", "2k", "4k"):
        assert {get_image_size(resolution, name) for name in ASPECT_RATIOS} == set(
            RESOLUTIONS[resolution].sizes.values()
        )


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ValueError, match=r"resolution: must be one of 144p, .*4k, 32, 48, 64, got '99p'"):
        get_image_size("99p", "9:16")
    with pytest.raises(ValueError, match=r"aspect_ratio: 480p must be given one of 3:8, .*0.56.*, got '4:5'"):
        get_image_size("480p", "4:5")
    with pytest.raises(
        ValueError, match=r"aspect_ratio: 1024 must be given one of 12:25, 0\.25, .*1\.0, .*, got '1:1'"
    ):
        get_image_size("1024", "1:1")


def test_durations_are_counts_of_frames():
    assert [get_num_frames(name) for name in ("2s", "4s", "8x", "17", 51)] == [51, 102, 408, 17, 51]
    for wrong in ("3s", "0", -1, "1.5"):
        with pytest.raises(ValueError, match="num_frames: must be a positive number or one of 1x, 2x"):
            get_num_frames(wrong)
