"""Small clips in lists, and how they are encoded and read."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

from opensora.config import (
    DataConfig,
    EncodeConfig,
)
from tests.tiny_models import CAPTIONS

NUM_CLIPS, NUM_FRAMES, LENGTH = 5, 12, 12
COLUMNS = ("path", "text", "num_frames", "height", "width", "fps", "aes", "cmotion")


def write_list(path: Path, rows: list[tuple]) -> str:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows(rows)
    return str(path)


def rows_of(indices: range) -> list[tuple]:
    return [(f"{i}.mp4", CAPTIONS[i % 3], NUM_FRAMES, 16, 24, 24, 5.0 + i, "pan left") for i in indices]


def config(folder: Path, output: Path, **changes) -> EncodeConfig:
    data = DataConfig(manifest=str(folder / "clips.csv"), num_frames=5, image_size=(16, 16), batch_size=2)
    options = {"data": data, "output": str(output), "storage": "fp32", "dtype": "fp32", "text_dtype": "fp32"}
    return EncodeConfig(**(options | changes))


def training_on(encoding: EncodeConfig, **changes) -> DataConfig:
    return replace(encoding.data, encoded=encoding.output, manifest="", **changes)
