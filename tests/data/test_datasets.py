"""Clips and batches: shapes, sizes, unreadable files, and orders that a resumed run continues exactly."""

import csv
import logging
from dataclasses import replace
from itertools import islice

import pytest
import torch

from opensora.config import DataConfig
from opensora.data.datasets import MAX_REPLACEMENTS, ClipDataset
from opensora.data.loader import collate, make_loader
from opensora.data.manifest import read_manifest
from opensora.data.prefetch import Prefetcher
from opensora.data.reading import VideoError, read_frames
from opensora.data.samplers import ClipRequest
from opensora.data.shapes import generate
from opensora.video import write_mp4, write_png

COLUMNS = ("path", "text", "num_frames", "height", "width", "fps")
NUM_CLIPS, NUM_FRAMES = 11, 12


def write_manifest(folder, rows):
    path = folder / f"list{len(list(folder.glob('*.csv')))}.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows(rows)
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    for index in range(NUM_CLIPS):
        _, frames = generate(7 * index, num_frames=NUM_FRAMES, height=16, width=24)
        write_mp4(folder / f"{index}.mp4", frames, fps=25)
    write_png(folder / "still.png", generate(0, num_frames=1, height=40, width=30)[1][0])
    return folder


def rows_of(indices):
    return [(f"{index}.mp4", f"clip {index}", NUM_FRAMES, 16, 24, 25) for index in indices]


@pytest.fixture
def manifest(folder):
    return write_manifest(folder, rows_of(range(NUM_CLIPS)))


@pytest.fixture
def manifest_with_bad_files(folder):
    """Every fourth file is broken, each in its own way; the list does not say so."""
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "cut.mp4").write_bytes((folder / "1.mp4").read_bytes()[:-300])
    rows = rows_of(range(NUM_CLIPS))
    for row, name in ((0, "empty.mp4"), (4, "cut.mp4"), (8, "absent.mp4")):
        rows[row] = (name, *rows[row][1:])
    return write_manifest(folder, rows)


def batches_of(config, count=None, **options):
    loader = make_loader(config, **options)
    return loader, list(islice(loader.forever(), count or len(loader)))


def same(first, second):
    return first["path"] == second["path"] and torch.equal(first["video"], second["video"])


def test_a_clip_comes_with_what_the_model_is_told(manifest, folder):
    sample = ClipDataset(read_manifest(manifest), num_frames=5, image_size=(8, 8), frame_interval=2)[3]
    assert (sample["video"].shape, sample["video"].dtype) == ((3, 5, 8, 8), torch.float32)
    assert -1 <= sample["video"].min() < -0.5 < 0.3 < sample["video"].max() <= 1
    assert (sample["text"], sample["path"]) == ("clip 3", str(folder / "3.mp4"))
    assert (sample["num_frames"], sample["height"], sample["width"], sample["ar"]) == (5, 8, 8, 1.0)
    assert sample["fps"] == 12.0
    assert sample["skipped"] == []


def test_without_a_size_a_clip_keeps_every_pixel(manifest, folder):
    sample = ClipDataset(read_manifest(manifest), num_frames=NUM_FRAMES)[2]
    frames = read_frames(folder / "2.mp4").float() / 127.5 - 1
    torch.testing.assert_close(sample["video"], frames.transpose(0, 1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("request_of", [str, lambda request: request])
def test_a_bucket_request_decides_the_size(manifest, request_of):
    dataset = ClipDataset(read_manifest(manifest), num_frames=3)
    sample = dataset[request_of(ClipRequest(6, 7, 12, 20))]
    assert sample["video"].shape == (3, 7, 12, 20)
    assert sample["text"] == "clip 6"
    assert torch.equal(sample["video"], dataset[0, request_of(ClipRequest(6, 7, 12, 20))]["video"])


def test_a_still_image_is_a_clip_of_one_frame(folder):
    manifest = read_manifest(write_manifest(folder, [("still.png", "a photo", "", "", "", "")]))
    sample = ClipDataset(manifest, num_frames=1, image_size=(20, 20))[0]
    assert sample["video"].shape == (3, 1, 20, 20)
    assert sample["fps"] == 120.0


@pytest.mark.parametrize("item", [NUM_CLIPS, -1, "3-4", "3-0-8-8", "a-b-c-d", ""])
def test_a_malformed_item_is_refused(manifest, item):
    with pytest.raises(ValueError, match="item must be a row below 11"):
        ClipDataset(read_manifest(manifest))[item]


def test_the_window_depends_on_seed_and_epoch_only(manifest):
    def videos(seed, epoch):
        dataset = ClipDataset(read_manifest(manifest), num_frames=3, seed=seed)
        return torch.stack([dataset[epoch, row]["video"] for row in range(6)])

    assert torch.equal(videos(0, 1), videos(0, 1))
    assert not torch.equal(videos(0, 1), videos(0, 2))
    assert not torch.equal(videos(0, 1), videos(1, 1))


def test_clips_from_memory_are_the_clips_from_disk(manifest, monkeypatch):
    config = {"num_frames": 4, "image_size": (8, 12), "frame_interval": 2}
    disk = ClipDataset(read_manifest(manifest), **config)
    memory = ClipDataset(read_manifest(manifest), cache_in_memory=True, **config)
    for row in range(NUM_CLIPS):
        assert torch.equal(disk[0, row]["video"], memory[0, row]["video"])
    expected = [disk[1, row]["video"] for row in range(NUM_CLIPS)]
    # From the second epoch on, no file is opened.
    monkeypatch.delattr("opensora.data.datasets.read_frames")
    assert all(torch.equal(expected[row], memory[1, row]["video"]) for row in range(NUM_CLIPS))
    with pytest.raises(NameError):
        disk[0]


def test_scores_of_the_manifest_come_with_the_clip(folder, tmp_path):
    path = tmp_path / "scores.csv"
    names = [folder / f"{index}.mp4" for index in range(3)]
    path.write_text(
        f"path,text,aes,flow,cmotion\n{names[0]},a,5.5,-0.25,pan left\n{names[1]},b,,,\n{names[2]},c,high,,\n"
    )
    manifest = read_manifest(path)
    assert [(bad.number, bad.reason) for bad in manifest.bad_rows] == [(3, "aes must be a number, got 'high'")]
    (batch,) = make_loader(DataConfig(manifest=str(path), num_frames=3, batch_size=2))
    scores = dict(
        zip(batch["text"], zip(batch["aes"], batch["flow"], batch["camera_motion"], strict=True), strict=True)
    )
    assert scores == {"a": (5.5, -0.25, "pan left"), "b": (None, None, None)}


def test_clips_may_be_mirrored_and_keep_the_rate_of_their_file(manifest):
    options = {"num_frames": 3, "frame_interval": 2}
    plain = ClipDataset(read_manifest(manifest), **options)
    mirrored = ClipDataset(read_manifest(manifest), flip=True, file_fps=True, **options)
    assert plain[0]["fps"] == 12.0
    assert mirrored[0]["fps"] == 25.0
    flipped = [
        torch.equal(mirrored[epoch, row]["video"], plain[epoch, row]["video"].flip(-1))
        for epoch in range(2)
        for row in range(NUM_CLIPS)
    ]
    same = [torch.equal(mirrored[0, row]["video"], plain[0, row]["video"]) for row in range(NUM_CLIPS)]
    assert 4 < sum(flipped) < 18
    assert all(a != b for a, b in zip(same, flipped, strict=False))


def test_clips_without_a_caption_are_skipped_counted_and_named_unless_kept(folder, caplog):
    rows = rows_of(range(4))
    for number, text in ((1, ""), (3, "   ")):
        rows[number] = (rows[number][0], text, *rows[number][2:])
    config = DataConfig(manifest=write_manifest(folder, rows), num_frames=3)
    loader = make_loader(config)
    assert [clip.text for clip in loader.dataset.manifest.clips] == ["clip 0", "clip 2"]
    assert "2 clips, 2 rows left out (row 2 1.mp4: has no text; row 4 3.mp4: has no text)" in caplog.text
    assert len(make_loader(replace(config, empty_captions="keep"))) == 4
    assert len(make_loader(config, needs_captions=False)) == 4
    with pytest.raises(
        ValueError, match=r"at least one usable clip, got .* 0 clips, 1 rows left out \(row 1 1\.mp4: has no"
    ):
        make_loader(replace(config, manifest=write_manifest(folder, rows[1:2])))


def test_an_unreadable_clip_is_replaced_and_named(manifest_with_bad_files):
    dataset = ClipDataset(read_manifest(manifest_with_bad_files), num_frames=NUM_FRAMES)
    for row, name in ((0, "empty.mp4"), (4, "cut.mp4"), (8, "absent.mp4")):
        sample = dataset[row]
        assert sample["skipped"][0][0].endswith(name)
        assert sample["skipped"][0][1]
        assert sample["path"].rsplit("/")[-1] not in {"empty.mp4", "cut.mp4", "absent.mp4"}
        assert sample["text"] != f"clip {row}"
        # The same whatever was read before, in another process too.
        again = ClipDataset(read_manifest(manifest_with_bad_files), num_frames=NUM_FRAMES)[row]
        assert same(sample, again)
    assert len({dataset[epoch, 0]["path"] for epoch in range(8)}) > 1


def test_a_data_set_of_unreadable_clips_gives_up_with_the_first_name(folder):
    rows = [(f"absent{index}.mp4", "", NUM_FRAMES, 16, 24, 25) for index in range(MAX_REPLACEMENTS + 5)]
    with pytest.raises(
        VideoError, match=rf"absent3\.mp4: No such file.*the {MAX_REPLACEMENTS} clips tried in its place"
    ):
        ClipDataset(read_manifest(write_manifest(folder, rows)), num_frames=3)[3]


def test_a_batch_holds_tensors_and_lists(manifest):
    loader, batches = batches_of(DataConfig(manifest=manifest, num_frames=5, image_size=(8, 8), batch_size=3))
    assert len(loader) == len(batches) == 3
    batch = batches[0]
    assert batch["video"].shape == (3, 3, 5, 8, 8)
    for key, value in (("num_frames", 5), ("height", 8), ("width", 8), ("fps", 25), ("ar", 1)):
        assert torch.equal(batch[key], torch.full((3,), float(value)))
    assert len(batch["text"]) == len(batch["path"]) == 3
    assert len({path for batch in batches for path in batch["path"]}) == 9


@pytest.mark.parametrize(("stop", "num_workers"), [(1, 0), (3, 0), (4, 0), (8, 0), (4, 2)])
def test_a_resumed_loader_gives_the_batches_of_an_unbroken_one(manifest_with_bad_files, stop, num_workers):
    config = DataConfig(manifest=manifest_with_bad_files, num_frames=4, image_size=(8, 8), batch_size=3)
    _, unbroken = batches_of(config, 10)
    first, _ = batches_of(config, stop)
    state = first.state_dict()
    second = make_loader(DataConfig(**{**vars(config), "num_workers": num_workers}))
    second.load_state_dict(state)
    assert second.state_dict() == state
    for expected, actual in zip(unbroken[stop:], second.forever(), strict=False):
        assert same(expected, actual)


def test_reading_ahead_changes_neither_batches_nor_position(manifest):
    config = DataConfig(manifest=manifest, num_frames=4, image_size=(8, 8), batch_size=3, num_workers=1)
    _, unbroken = batches_of(replace(config, num_workers=0), 10)
    first = Prefetcher(make_loader(config))
    assert all(same(a, b) for a, b in zip(unbroken[:4], first, strict=False))
    assert first.state_dict() == {"seed": 42, "epoch": 1, "last_micro_batch_access_index": 1}
    second = Prefetcher(make_loader(config))
    second.load_state_dict(first.state_dict())
    assert all(same(a, b) for a, b in zip(unbroken[4:], second, strict=False))


def test_a_loop_left_early_goes_on_where_it_was_left(manifest):
    config = DataConfig(manifest=manifest, num_frames=4, image_size=(8, 8), batch_size=2)
    _, unbroken = batches_of(config)
    loader = make_loader(config)
    assert all(same(a, b) for a, b in zip(unbroken[:2], islice(loader, 2), strict=True))
    assert all(same(a, b) for a, b in zip(unbroken[2:], loader, strict=True))
    assert loader.state_dict()["epoch"] == 1


def test_two_ranks_share_an_epoch_and_resume_as_one(manifest):
    config = DataConfig(manifest=manifest, num_frames=4, image_size=(8, 8), batch_size=2)
    _, alone = batches_of(config)
    ranks = [batches_of(config, rank=rank, num_replicas=2)[1] for rank in range(2)]
    assert all(same(a, b) for a, b in zip(alone, [ranks[0][0], ranks[1][0], ranks[0][1], ranks[1][1]], strict=False))
    half, _ = batches_of(config, 1, rank=0, num_replicas=2)
    resumed = make_loader(config)
    resumed.load_state_dict(half.state_dict())
    assert same(next(iter(resumed)), alone[2])


def test_loading_leaves_the_global_generators_alone(manifest):
    import random

    before = torch.get_rng_state(), random.getstate()
    for num_workers in (0, 1):
        batches_of(
            DataConfig(manifest=manifest, num_frames=4, image_size=(8, 8), batch_size=5, num_workers=num_workers), 2
        )
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def test_skipped_files_are_counted_named_and_logged_once(manifest_with_bad_files, caplog):
    config = DataConfig(manifest=manifest_with_bad_files, num_frames=NUM_FRAMES, image_size=(8, 8), batch_size=11)
    with caplog.at_level(logging.WARNING):
        loader, batches = batches_of(config, 2)
    assert [len(batch["path"]) for batch in batches] == [11, 11]
    assert {path.rsplit("/")[-1] for path in loader.skipped} == {"empty.mp4", "cut.mp4", "absent.mp4"}
    assert loader.num_replaced == 6
    assert sum("skipped" in record.message for record in caplog.records) == 3


def test_frames_too_small_for_a_crop_are_skipped(folder):
    rows = []
    for index, side in enumerate((8, 16)):
        write_mp4(folder / f"side{side}.mp4", torch.full((4, 3, side, side), 200, dtype=torch.uint8), fps=24)
        rows.append((f"side{side}.mp4", f"clip {index}", 4, side, side, 24))
    config = DataConfig(manifest=write_manifest(folder, rows), image_size=(12, 12), num_frames=4, fit="crop")
    loader, batches = batches_of(config, 2)
    assert [batch["video"].shape[3:] for batch in batches] == [(12, 12)] * 2
    ((path, reason),) = loader.skipped.items()
    assert path.endswith("side8.mp4")
    assert reason == "center_crop: frames must have at least 12 x 12 pixels, got 8 x 8"


def test_a_training_without_a_list_of_clips_is_refused():
    with pytest.raises(ValueError, match=r"data\.manifest must name a list of clips .*, got ''"):
        make_loader(DataConfig())


def test_clips_that_no_bucket_takes_are_an_error(manifest):
    config = DataConfig(manifest=manifest, buckets={"144p": {5: (1.0, 2)}})
    with pytest.raises(ValueError, match="check the buckets against the clips' sizes"):
        make_loader(config)


def test_bucketed_batches_mix_lengths_but_not_within_a_batch(folder):
    rows = []
    for index, num_frames in enumerate((4, 4, 4, 4, 9, 9)):
        frames = torch.full((num_frames, 3, 144, 256), 40 * index, dtype=torch.uint8)
        write_mp4(folder / f"wide{index}.mp4", frames, fps=24)
        rows.append((f"wide{index}.mp4", f"clip {index}", num_frames, 144, 256, 24))
    config = DataConfig(manifest=write_manifest(folder, rows), buckets={"144p": {3: (1.0, 2), 8: (1.0, 1)}})
    loader, batches = batches_of(config)
    shapes = sorted(tuple(batch["video"].shape) for batch in batches)
    assert [(shape[0], shape[2]) for shape in shapes] == [(1, 8), (1, 8), (2, 3), (2, 3)]
    assert len({shape[3:] for shape in shapes}) == 1
    resumed = make_loader(config)
    list(islice(loader, 1))
    resumed.load_state_dict(loader.state_dict())
    assert all(same(a, b) for a, b in zip(islice(loader, 3), islice(resumed, 3), strict=True))


def test_clips_that_are_too_short_are_left_out_or_refused(folder, caplog):
    rows = [*rows_of(range(3)), ("3.mp4", "short", 5, 16, 24, 25)]
    config = DataConfig(manifest=write_manifest(folder, rows), num_frames=6, frame_interval=2, batch_size=1)
    _, batches = batches_of(config)
    assert {text for batch in batches for text in batch["text"]} == {"clip 0", "clip 1", "clip 2"}
    assert "1 clips left out, shorter than 11 frames" in caplog.text
    with pytest.raises(ValueError, match=r"need clips of 39 frames, but the longest .* has 12"):
        make_loader(DataConfig(manifest=config.manifest, num_frames=20, frame_interval=2))


def test_clips_of_several_sizes_need_a_size(folder):
    rows = [*rows_of(range(2)), ("still.png", "a photo", 12, 40, 30, 0)]
    with pytest.raises(ValueError, match="image_size or buckets must be set for 2 sizes"):
        make_loader(DataConfig(manifest=write_manifest(folder, rows), num_frames=3))
    with pytest.raises(ValueError, match="video of a batch must have one shape"):
        collate([{"video": torch.zeros(3, 1, 4, 4)}, {"video": torch.zeros(3, 2, 4, 4)}])
