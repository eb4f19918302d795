import pytest

from opensora.conditioning.masks import MaskGenerator
from opensora.data.buckets import BucketKey, Buckets
from opensora.data.recipes import BUCKETS, MASK_RATIOS


def test_a_clip_goes_to_the_largest_and_longest_bucket_it_fills():
    buckets = Buckets({"144p": {1: (1.0, 8), 17: (1.0, 4), 51: (1.0, 2)}, "480p": {1: (1.0, 3), 51: (1.0, 1)}})
    assert buckets.assign(60, 480, 854) == BucketKey("480p", 51, "0.56")
    assert buckets.assign(20, 480, 854) == BucketKey("144p", 17, "0.56")
    assert buckets.assign(60, 144, 256) == BucketKey("144p", 51, "0.56")
    assert buckets.assign(1, 854, 480) == BucketKey("480p", 1, "1.78")
    assert buckets.assign(60, 100, 100) is None
    key = BucketKey("480p", 51, "0.56")
    assert buckets.size(key) == (51, 480, 854)
    assert buckets.batch_size(key) == 1
    assert len(buckets) == 5 * 17


def test_a_clip_must_be_longer_than_its_bucket():
    buckets = Buckets({"144p": {17: (1.0, 1)}})
    assert buckets.assign(17, 144, 256) is None
    assert buckets.assign(18, 144, 256) is not None
    assert buckets.assign(51, 144, 256, frame_interval=3) is None
    assert buckets.assign(52, 144, 256, frame_interval=3) is not None


def test_refused_clips_go_to_smaller_resolutions_not_to_fewer_frames():
    buckets = Buckets({"480p": {17: (1.0, 1), 51: (0.0, None)}, "144p": {17: (1.0, 1)}})
    assert buckets.assign(60, 480, 854) == BucketKey("144p", 17, "0.56")


def test_frame_probability_sends_clips_to_fewer_frames():
    buckets = Buckets({"144p": {17: (1.0, 1), 51: ((1.0, 0.25), 1)}})
    keys = [buckets.assign(60, 144, 256, seed=seed * len(buckets)) for seed in range(2000)]
    share = sum(key.num_frames == 51 for key in keys) / len(keys)
    assert abs(share - 0.25) < 4 * (0.25 * 0.75 / 2000) ** 0.5  # 4 standard errors of a binomial


def test_tables_from_json_are_read():
    assert Buckets({"144p": {"17": [[1.0, 1.0], 2]}}).assign(20, 144, 256) == BucketKey("144p", 17, "0.56")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({}, "at least one resolution"),
        ({"150p": {1: (1.0, 1)}}, "resolution: must be one of 144p"),
        ({"144p": {1: (1.5, 1)}}, r"144p, 1 frames: probabilities must lie in \[0, 1\], got 1.5"),
        ({"144p": {17: (1.0, 0)}}, "144p, 17 frames: batch_size must be positive"),
        ({"144p": {17: (1.0,)}}, r"must be \(keep_probability, batch_size\)"),
        ({"144p": {17: 1.0}}, r"must be \(keep_probability, batch_size\)"),
    ],
)
def test_bad_tables_are_refused(table: dict, message: str):
    with pytest.raises(ValueError, match=message):
        Buckets(table)


def test_published_mixtures_are_usable():
    for name, table in BUCKETS.items():
        assert Buckets(table).assign(500, 1080, 1920, seed=3) is not None, name
        MaskGenerator(MASK_RATIOS[name])
