"""Frames to files: what comes back, that bytes repeat, and that a failure leaves the old file alone."""

import os
import subprocess
import sys

import av
import pytest
import torch
from PIL import Image

from opensora.data.reading import probe, read_frames
from opensora.data.shapes import generate
from opensora.video import to_uint8, write_contact_sheet, write_gif, write_mp4, write_png, write_video


@pytest.fixture(scope="module")
def frames():
    return generate(0)[1]


def test_to_uint8_maps_minus_one_to_black_and_one_to_white():
    video = torch.tensor([-2.0, -1.0, 0.0, 1.0, 3.0]).reshape(1, 5, 1, 1).expand(3, 5, 4, 6)
    for dtype in (torch.float32, torch.bfloat16):
        result = to_uint8(video.to(dtype))
        assert result.shape == (5, 3, 4, 6)
        assert result[:, 0, 0, 0].tolist() == [0, 0, 128, 255, 255]


def test_to_uint8_refuses_nan_and_other_layouts():
    with pytest.raises(ValueError, match="must be finite, got 3 NaN"):
        to_uint8(torch.full((3, 1, 1, 1), float("nan")))
    with pytest.raises(ValueError, match=r"must have shape \(3, T, H, W\), got \(5, 3, 4, 4\)"):
        to_uint8(torch.zeros(5, 3, 4, 4))


def test_an_mp4_comes_back_as_it_went_in_up_to_compression(tmp_path, frames):
    path = write_mp4(tmp_path / "clip.mp4", frames, fps=8, crf=12)
    info = probe(path)
    assert (info.num_frames, info.fps, info.height, info.width) == (17, 8.0, 64, 64)
    mse = (read_frames(path).float() - frames.float()).square().mean()
    # 4:2:0 halves the resolution of saturated edges, which costs most of what is missing.
    assert 10 * torch.log10(255**2 / mse) > 30


def test_flat_colors_keep_their_value(tmp_path):
    colors = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [0, 0, 0], [128, 64, 200]])
    flat = colors.to(torch.uint8)[:, :, None, None].expand(-1, -1, 32, 32)
    back = read_frames(write_mp4(tmp_path / "flat.mp4", flat, fps=1, crf=1))
    # Limited-range YUV has 219 levels for 256, and three matrix roundings.
    assert (back.int() - flat.int()).abs().max() <= 4


WRITE_ONE = """
import sys
from opensora.data.shapes import generate
from opensora.video import write_mp4
write_mp4(sys.argv[1], generate(5, seed=0, num_frames=17, height=64, width=64)[1], fps=8)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="MALLOC_PERTURB_ is glibc's")
def test_an_mp4_does_not_depend_on_what_fresh_memory_holds(tmp_path):
    for fill in ("0", "17", "165"):
        command = [sys.executable, "-c", WRITE_ONE, str(tmp_path / f"{fill}.mp4")]
        subprocess.run(command, check=True, env={**os.environ, "MALLOC_PERTURB_": fill})
    assert len({(tmp_path / f"{fill}.mp4").read_bytes() for fill in ("0", "17", "165")}) == 1


def test_every_writer_repeats_its_bytes(tmp_path, frames):
    for suffix in (".mp4", ".gif"):
        first = write_video(tmp_path / f"a{suffix}", frames, fps=8).read_bytes()
        assert write_video(tmp_path / "folder" / f"b{suffix}", frames.clone(), fps=8).read_bytes() == first
    assert (
        write_png(tmp_path / "a.png", frames[0]).read_bytes() == write_png(tmp_path / "b.png", frames[0]).read_bytes()
    )


def test_an_mp4_says_how_its_colors_are_coded_and_nothing_about_when_it_was_made(tmp_path, frames):
    path = write_mp4(tmp_path / "clip.mp4", frames, fps=24000 / 1001)
    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        assert stream.codec_context.name == "h264"
        assert stream.codec_context.pix_fmt == "yuv420p"
        assert (stream.average_rate.numerator, stream.average_rate.denominator) == (24000, 1001)
        assert next(file.decode(stream)).colorspace == av.video.reformatter.Colorspace.SMPTE170M
        assert not {"creation_time", "encoder"} & (set(file.metadata) | set(stream.metadata))


def test_an_odd_size_is_made_even_by_repeating_the_edge(tmp_path):
    frames = torch.zeros(2, 3, 17, 33, dtype=torch.uint8)
    frames[:, :, -1], frames[:, :, :, -1] = 255, 255
    back = read_frames(write_mp4(tmp_path / "odd.mp4", frames, fps=8, crf=1))
    assert back.shape == (2, 3, 18, 34)
    assert back[:, :, 17].min() > 240
    assert back[:, :, :, 33].min() > 240


def test_a_gif_keeps_frames_and_speed(tmp_path, frames):
    with Image.open(write_gif(tmp_path / "clip.gif", frames, fps=8)) as gif:
        assert gif.n_frames == 17
        assert gif.info["duration"] == 120
        assert gif.info["loop"] == 0
    mse = (read_frames(tmp_path / "clip.gif").float() - frames.float()).square().mean()
    assert 10 * torch.log10(255**2 / mse) > 30


def test_one_frame_makes_a_png_and_several_do_not(tmp_path, frames):
    assert torch.equal(read_frames(write_video(tmp_path / "one.png", frames[:1], fps=8)), frames[:1])
    with pytest.raises(ValueError, match=r"a \.png holds one frame, got 17"):
        write_video(tmp_path / "many.png", frames, fps=8)


def test_a_contact_sheet_has_a_row_for_each_clip(tmp_path, frames):
    sheet = read_frames(write_contact_sheet(tmp_path / "sheet.png", [frames, frames.flip(0)], num_columns=3, gap=2))[0]
    assert sheet.shape == (3, 2 * 66 + 2, 3 * 66 + 2)
    assert torch.equal(sheet[:, 2:66, 2:66], frames[0])
    assert torch.equal(sheet[:, 2:66, 134:198], frames[16])
    assert torch.equal(sheet[:, 68:132, 68:132], frames[8])


def test_a_contact_sheet_of_several_sizes_is_refused(tmp_path, frames):
    with pytest.raises(ValueError, match="of the same size"):
        write_contact_sheet(tmp_path / "sheet.png", [frames, frames[:, :, :32]])
    with pytest.raises(ValueError, match="one or more"):
        write_contact_sheet(tmp_path / "sheet.png", [])


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".png"])
def test_a_full_disk_leaves_the_old_file_and_no_remains(tmp_path, frames, suffix, monkeypatch):
    path = tmp_path / f"old{suffix}"
    path.write_bytes(b"old")

    def full(source, target):
        assert os.path.getsize(source) > 0
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left") as failure:
        write_video(path, frames[:1], fps=8)
    assert failure.value.filename == str(path)
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full to play a full disk")
def test_a_write_that_fails_midway_is_an_os_error(tmp_path, frames, monkeypatch):
    from pathlib import Path

    monkeypatch.setattr(Path, "with_name", lambda self, name: Path("/dev/full"))
    monkeypatch.setattr(Path, "unlink", lambda self, missing_ok=False: None)
    path = tmp_path / "old.mp4"
    path.write_bytes(b"old")
    with pytest.raises(OSError, match="No space left"):
        write_mp4(path, frames.repeat(4, 1, 1, 1), fps=8, crf=0)
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda frames: frames.float(), TypeError, "frames must be uint8, got torch.float32"),
        (lambda frames: frames.permute(0, 2, 3, 1), ValueError, r"\(T, 3, H, W\)"),
        (lambda frames: frames[:0], ValueError, r"none of them 0"),
    ],
)
@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_frames_of_another_kind_are_refused(tmp_path, frames, change, error, message, suffix):
    with pytest.raises(error, match=message):
        write_video(tmp_path / f"clip{suffix}", change(frames), fps=8)


def test_an_unknown_suffix_and_an_impossible_speed_are_refused(tmp_path, frames):
    with pytest.raises(ValueError, match=r"must end in \.mp4, \.gif or \.png"):
        write_video(tmp_path / "clip.webm", frames, fps=8)
    for suffix in (".mp4", ".gif"):
        with pytest.raises(ValueError, match="fps must be positive, got 0"):
            write_video(tmp_path / f"clip{suffix}", frames, fps=0)


def test_an_mp4_is_the_same_whether_its_frames_come_at_once_or_in_chunks(tmp_path, frames):
    whole = write_mp4(tmp_path / "whole.mp4", frames, fps=8)
    chunks = write_mp4(tmp_path / "chunks.mp4", iter(frames.split(2)), fps=8)
    assert whole.read_bytes() == chunks.read_bytes()


def test_an_mp4_whose_frames_fail_midway_leaves_nothing_behind(tmp_path, frames):
    def failing():
        yield frames
        raise RuntimeError("no more")

    for chunks, error in ((failing(), RuntimeError), (iter(()), ValueError), ([frames, frames[..., 2:]], ValueError)):
        with pytest.raises(error):
            write_mp4(tmp_path / "clip.mp4", chunks, fps=8)
        assert not list(tmp_path.iterdir())
