"""Open-Sora-Plan's data: lists of clips, images beside clips, and clips of several sizes in one batch."""

import csv
import json

import pytest
import torch

from opensora.config import DataConfig
from opensora.data.joint import image_groups
from opensora.data.loader import make_loader
from opensora.data.manifest import read_manifest
from opensora.data.reading import read_frames
from opensora.data.shapes import generate
from opensora.data.transforms import transform_frames
from opensora.video import write_mp4, write_png

NUM_FRAMES = 9


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three clips, the last of which is smaller, and five stills, in lists of Open-Sora-Plan's kinds."""
    folder = tmp_path_factory.mktemp("plan")
    (folder / "stills").mkdir()
    clips, stills = [], []
    for index, (height, width) in enumerate([(48, 64), (64, 48), (32, 40)]):
        write_mp4(folder / f"{index}.mp4", generate(index, num_frames=12, height=height, width=width)[1], fps=24)
        clips.append({"path": f"{index}.mp4", "cap": [f"clip {index}", "unused"], "frame_idx": f"{index}:99"})
    for index in range(5):
        write_png(folder / "stills" / f"{index}.png", generate(9 + index, num_frames=1, height=40, width=36)[1][0])
        stills.append({"path": f"{index}.png", "cap": f"still {index}"})
    (folder / "clips.json").write_text(json.dumps(clips))
    (folder / "stills.json").write_text(json.dumps(stills))
    (folder / "stills.txt").write_text("stills, stills.json\n\n")
    return folder


def config(folder, **changes):
    options = {"manifest": str(folder / "clips.json"), "num_frames": NUM_FRAMES, "image_size": (32, 32)}
    return DataConfig(**(options | {"batch_size": 2, "fit": "square", "use_image_num": 2} | changes))


def test_plan_lists_are_read_as_manifests(folder):
    clips = read_manifest(folder / "clips.json").clips
    assert [(clip.text, clip.first_frame) for clip in clips] == [("clip 0", 0), ("clip 1", 1), ("clip 2", 2)]
    assert [(clip.num_frames, clip.height, clip.width) for clip in clips][1] == (12, 64, 48)
    stills = read_manifest(folder / "stills.txt").clips
    assert [clip.text for clip in stills] == [f"still {index}" for index in range(5)]
    assert stills[3].path == str(folder / "stills" / "3.png")


def test_a_smaller_copy_of_a_video_is_read_in_its_place(folder, tmp_path):
    (tmp_path / "list.json").write_text(json.dumps([{"path": "0.mp4", "cap": "a"}]))
    (tmp_path / "0_resize_1080p.mp4").write_bytes((folder / "0.mp4").read_bytes())
    assert read_manifest(tmp_path / "list.json").clips[0].path.endswith("0_resize_1080p.mp4")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "clips.json\n", "line 1: must be 'folder,annotations.json'"),
        ("a.json", "{}", "must hold a list of annotations, got dict"),
        ("a.json", "[", "must be a JSON file"),
        ("a.json", '[{"cap": "no path"}]', "must be an annotation with a path"),
        ("a.json", '[{"path": "a.mp4", "cap": "a", "frame_idx": "x:9"}]', "frame_idx must be 'start:end'"),
    ],
)
def test_lists_that_are_none_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_manifest(tmp_path / name)


def test_a_clip_begins_where_its_annotation_says(folder):
    dataset = make_loader(config(folder, use_image_num=0)).dataset
    for index in range(3):
        frames = read_frames(folder / f"{index}.mp4", range(index, index + NUM_FRAMES))
        assert torch.equal(dataset[5, index]["video"], transform_frames(frames, (32, 32), fit="square"))
        assert dataset[index]["frames"] == (index, index + NUM_FRAMES - 1)


def test_images_of_a_list_stand_beside_clips_in_groups(folder):
    loader = make_loader(config(folder, image_manifest=str(folder / "stills.txt")))
    (batch,) = loader
    assert batch["video"].shape == (2, 3, NUM_FRAMES, 32, 32)
    assert batch["images"].shape == (2, 2, 3, 32, 32)
    # Of five stills, groups of two are (0, 1) and (2, 3); the third is not full.
    for text, images, captions in zip(batch["text"], batch["images"], batch["image_text"], strict=True):
        first = 2 * (int(text.split()[1]) % 2)
        assert captions == [f"still {first}", f"still {first + 1}"]
        still = read_frames(folder / "stills" / f"{first}.png")
        assert torch.equal(images[0], transform_frames(still, (32, 32), fit="square")[:, 0])


def test_images_may_be_frames_of_the_clip(folder):
    (batch,) = make_loader(config(folder, use_image_num=3))
    assert torch.equal(batch["images"], batch["video"][:, :, [0, 4, 8]].transpose(1, 2))
    assert batch["image_text"] == [[text] * 3 for text in batch["text"]]


def test_an_unreadable_image_is_replaced_and_named(folder, tmp_path):
    entries = [{"path": str(folder / "stills" / f"{index}.png"), "cap": str(index)} for index in range(5)]
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    entries[0]["path"] = str(tmp_path / "broken.png")
    with (tmp_path / "list.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("path", "text", "num_frames", "height", "width", "fps"))
        rows.writerows((entry["path"], entry["cap"], 1, 40, 36, 0) for entry in entries)
    loader = make_loader(config(folder, batch_size=3, image_manifest=str(tmp_path / "list.csv")))
    (batch,) = loader
    assert all(path.endswith("broken.png") for path in loader.skipped)
    assert loader.num_replaced == 2  # the first and the third clip take the group
    assert not any("0" in captions for captions in batch["image_text"])


def test_clips_that_keep_their_shape_are_padded_and_masked(folder):
    options = {"fit": "long_side", "image_size": (64, 64), "batch_size": 3}
    (batch,) = make_loader(config(folder, image_manifest=str(folder / "stills.txt"), **options), seed=1)
    assert batch["video"].shape == (3, 3, NUM_FRAMES, 64, 64)
    assert batch["images"].shape == (3, 2, 3, 64, 64)
    assert batch["attention_mask"].shape == (3, 3 + 2, 8, 8)
    for index, text in enumerate(batch["text"]):
        height, width = {"clip 0": (48, 64), "clip 1": (64, 48), "clip 2": (32, 32)}[text]
        assert not batch["video"][index, :, :, height:].any()
        assert not batch["video"][index, :, :, :, width:].any()
        assert batch["attention_mask"][index, :3].sum() == 3 * height * width // 64
        assert batch["attention_mask"][index, :3, : height // 8, : width // 8].all()
    assert (batch["attention_mask"][:, 3:].sum((2, 3)) == 4 * 4).all()  # 40 x 36 is cut to 32 x 32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_image_num": -1}, "use_image_num must be at least 0, got -1"),
        ({"use_image_num": 0, "image_manifest": "stills.txt"}, "image_manifest needs use_image_num"),
        ({"image_size": None}, "use_image_num needs image_size and no buckets"),
        ({"use_image_num": 5, "image_manifest": "stills.txt"}, "5 images beside each clip need a list of more"),
        ({"encoded_images": "there"}, "encoded_images needs encoded"),
        ({"encoded": "there", "image_manifest": "stills.txt"}, "cannot stand beside encoded clips"),
    ],
)
def test_options_that_exclude_each_other_are_refused(folder, changes, message):
    if "image_manifest" in changes:
        changes["image_manifest"] = str(folder / changes["image_manifest"])
    with pytest.raises(ValueError, match=message):
        make_loader(config(folder, **changes))


def test_groups_of_images_leave_the_last_one_out():
    assert image_groups(5, 2) == [[0, 1], [2, 3]]
    assert image_groups(4, 2) == [[0, 1]]
