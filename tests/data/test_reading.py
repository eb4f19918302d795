"""Reading video and image files, and lists of them."""

import csv
import json
import pickle

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from opensora.data.manifest import read_manifest
from opensora.data.reading import SEEK_FROM_FRAME, VideoError, probe, read_frames
from opensora.video import write_mp4, write_png

NUM_FRAMES = 2 * SEEK_FROM_FRAME + 6


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    """A clip whose frame t has the grey level 3 t: any wrong frame shows."""
    frames = (3 * torch.arange(NUM_FRAMES)).to(torch.uint8).reshape(-1, 1, 1, 1).expand(-1, 3, 32, 48)
    return write_mp4(tmp_path_factory.mktemp("numbered") / "clip.mp4", frames, fps=12.5)


def levels(frames):
    return (frames.float().mean((1, 2, 3)) / 3).round().int().tolist()


def test_probe_reads_counts_rate_and_size(numbered):
    info = probe(numbered)
    assert (info.num_frames, info.fps, info.height, info.width) == (NUM_FRAMES, 12.5, 32, 48)


@pytest.mark.parametrize(
    "indices", [[0], [3, 4, 5], [5, 3, 3], [SEEK_FROM_FRAME + 1, NUM_FRAMES - 1], [NUM_FRAMES - 1, 0]]
)
def test_the_frames_asked_for_come_in_the_order_asked_for(numbered, indices):
    assert levels(read_frames(numbered, indices)) == indices


def test_all_frames_are_uint8_tchw(numbered):
    frames = read_frames(numbered)
    assert frames.shape == (NUM_FRAMES, 3, 32, 48)
    assert frames.dtype == torch.uint8
    assert frames.is_contiguous()
    assert levels(frames) == list(range(NUM_FRAMES))


def test_no_frame_after_the_last_one_is_decoded(numbered, monkeypatch):
    import opensora.data.reading as reading

    numbers = []
    original = reading._numbered_frames

    def spy(*arguments):
        for number, frame in original(*arguments):
            numbers.append(number)
            yield number, frame

    monkeypatch.setattr(reading, "_numbered_frames", spy)
    read_frames(numbered, [1, 4])
    assert numbers == [0, 1, 2, 3, 4]


def test_reading_starts_at_the_key_frame_before_the_first_index(tmp_path, monkeypatch):
    import opensora.data.reading as reading

    # x264 puts a key frame every 250 frames.
    frames = (torch.arange(300) % 85 * 3).to(torch.uint8).reshape(-1, 1, 1, 1).expand(-1, 3, 16, 16)
    path = write_mp4(tmp_path / "long.mp4", frames, fps=25)
    numbers = []
    original = reading._numbered_frames

    def spy(*arguments):
        for number, frame in original(*arguments):
            numbers.append(number)
            yield number, frame

    monkeypatch.setattr(reading, "_numbered_frames", spy)
    assert levels(read_frames(path, [260])) == [260 % 85]
    assert numbers[0] > 0
    assert numbers[-1] == 260


def test_a_frame_beyond_the_end_names_the_file_and_the_frame(numbered):
    with pytest.raises(VideoError, match=rf"clip\.mp4: truncated: frame {NUM_FRAMES} could not be decoded") as caught:
        read_frames(numbered, [0, NUM_FRAMES])
    assert caught.value.path == str(numbered)


@pytest.mark.parametrize("indices", [[], [-1, 2]])
def test_impossible_indices_are_refused(numbered, indices):
    with pytest.raises(ValueError, match="read_frames: indices must be"):
        read_frames(numbered, indices)


@pytest.mark.parametrize("function", [probe, read_frames])
@pytest.mark.parametrize("content", [None, b"", b"this is no video", b"\0\0\0\x20ftypisom" + b"\0" * 64])
def test_a_file_that_is_no_video_is_an_error_with_its_name(tmp_path, function, content):
    path = tmp_path / "broken.mp4"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(VideoError, match=r"broken\.mp4: \w+") as caught:
        function(path)
    assert caught.value.reason


@pytest.mark.parametrize("kept", [0.3, 0.6, 0.9])
def test_a_truncated_video_is_an_error_that_says_so(tmp_path, kept):
    frames = torch.randint(0, 256, (20, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    whole = write_mp4(tmp_path / "whole.mp4", frames, fps=8).read_bytes()
    path = tmp_path / "cut.mp4"
    path.write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(VideoError, match=r"cut\.mp4"):
        read_frames(path)
    with pytest.raises(VideoError, match=r"cut\.mp4"):
        read_frames(path, [0, 19])


def test_sound_without_picture_is_an_error(tmp_path):
    import av

    path = tmp_path / "sound.wav"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("pcm_s16le", rate=8000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
        sound.rate = 8000
        file.mux(stream.encode(sound))
        file.mux(stream.encode())
    with pytest.raises(VideoError, match="has no video stream"):
        probe(path)


def test_an_image_is_a_video_of_one_frame(tmp_path):
    picture = torch.randint(0, 256, (3, 5, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    path = write_png(tmp_path / "picture.png", picture)
    info = probe(path)
    assert (info.num_frames, info.fps, info.height, info.width) == (1, 0.0, 5, 7)
    assert torch.equal(read_frames(path), picture[None])
    assert torch.equal(read_frames(path, [0, 0]), picture[None].repeat(2, 1, 1, 1))
    with pytest.raises(VideoError, match="still image"):
        read_frames(path, [1])


def test_a_photo_lying_on_its_side_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (8, 4)).save(tmp_path / "photo.jpg", exif=exif)
    info = probe(tmp_path / "photo.jpg")
    assert (info.height, info.width) == (8, 4)
    assert read_frames(tmp_path / "photo.jpg").shape == (1, 3, 8, 4)


def test_a_truncated_image_is_an_error(tmp_path):
    noise = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    whole = write_png(tmp_path / "whole.png", noise).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(VideoError, match=r"cut\.png"):
        read_frames(tmp_path / "cut.png")


def test_a_video_error_survives_the_way_back_from_a_worker():
    error = pickle.loads(pickle.dumps(VideoError("a.mp4", "truncated")))
    assert (error.path, error.reason, str(error)) == ("a.mp4", "truncated", "a.mp4: truncated")


ROWS = [
    {
        "path": "clips/a.mp4",
        "text": 'a dog, "Rex"',
        "num_frames": 17,
        "height": 64,
        "width": 48,
        "fps": 8.0,
        "aes": 5.0,
    },
    {
        "path": "clips/b.mp4",
        "text": "a cat\nasleep",
        "num_frames": 20,
        "height": 32,
        "width": 32,
        "fps": 29.97,
        "aes": 4.0,
    },
]


def write_rows(path, rows):
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_the_three_formats_hold_the_same_clips(tmp_path, suffix):
    manifest = read_manifest(write_rows(tmp_path / f"list{suffix}", ROWS))
    assert [clip.text for clip in manifest.clips] == ['a dog, "Rex"', "a cat\nasleep"]
    assert manifest.clips[0].path == str(tmp_path / "clips/a.mp4")
    assert (manifest.clips[1].num_frames, manifest.clips[1].fps, manifest.clips[0].height) == (20, 29.97, 64)
    assert all(isinstance(clip.num_frames, int) and isinstance(clip.height, int) for clip in manifest.clips)
    assert manifest.bad_rows == ()


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_missing_numbers_are_read_from_the_file(tmp_path, numbered, suffix):
    rows = [{"path": str(numbered), "text": None, "num_frames": None, "height": 999, "width": None}]
    (clip,) = read_manifest(write_rows(tmp_path / f"list{suffix}", rows)).clips
    assert (clip.text, clip.num_frames, clip.height, clip.width, clip.fps) == ("", NUM_FRAMES, 999, 48, 12.5)


def test_bad_rows_are_left_out_counted_and_named(tmp_path, numbered):
    path = tmp_path / "list.jsonl"
    lines = [
        json.dumps({"path": str(numbered), "text": "fine"}),
        '{"path": "half a li',
        json.dumps({"text": "no path"}),
        json.dumps({"path": "absent.mp4"}),
        json.dumps(ROWS[0] | {"num_frames": "many"}),
        json.dumps(ROWS[0] | {"height": 0}),
        json.dumps(["a", "list"]),
    ]
    path.write_text("\n".join(lines))
    manifest = read_manifest(path)
    assert [clip.text for clip in manifest.clips] == ["fine"]
    assert [bad.number for bad in manifest.bad_rows] == [2, 3, 4, 5, 6, 7]
    reasons = [bad.reason for bad in manifest.bad_rows]
    for reason, expected in zip(
        reasons, ["not JSON", "no path", "No such file", "num_frames", "height", "JSON object"], strict=True
    ):
        assert expected in reason
    assert manifest.bad_rows[3].path == "clips/a.mp4"
    assert "1 clips, 6 rows left out" in manifest.describe(max_names=1)
    assert "and 5 more" in manifest.describe(max_names=1)


def test_a_list_without_any_usable_clip_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"at least one usable clip, got .*0 clips, 1 rows left out.*absent\.mp4"):
        read_manifest(write_rows(tmp_path / "list.jsonl", [{"path": "absent.mp4"}]))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("list.xlsx", "path\n", "must end in .csv, .jsonl, .parquet"),
        ("list.csv", "file,text\na,b\n", "with a column `path`"),
        ("list.csv", "", "with a column `path`"),
        ("list.parquet", "nothing", "readable Parquet file"),
    ],
)
def test_an_unusable_list_is_an_error_that_says_why(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_manifest(tmp_path / name)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_an_absent_list_is_file_not_found(tmp_path, suffix):
    with pytest.raises(FileNotFoundError):
        read_manifest(tmp_path / f"absent{suffix}")
