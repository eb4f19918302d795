"""Models of random weights and a list of clips, for all tests of encoding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from opensora.checkpoints import load_model
from opensora.config import (
    VideoVAEConfig,
)
from opensora.data.shapes import generate
from opensora.text.tiny import build_tiny_text_encoder
from opensora.vae import VideoVAE
from opensora.video import write_mp4
from tests.encoding.clips import LENGTH, NUM_CLIPS, NUM_FRAMES, rows_of, write_list
from tests.tiny_models import CAPTIONS, save_tiny_models


@pytest.fixture(scope="package")
def folder(tmp_path_factory) -> Path:
    torch.set_num_threads(1)
    folder = save_tiny_models(tmp_path_factory.mktemp("models"))
    for index in range(NUM_CLIPS):
        write_mp4(folder / f"{index}.mp4", generate(7 * index, num_frames=NUM_FRAMES, height=16, width=24)[1], fps=24)
    write_list(folder / "clips.csv", rows_of(range(NUM_CLIPS)))
    return folder


@pytest.fixture(scope="package")
def vae(folder) -> VideoVAE:
    return load_model(folder / "vae", VideoVAE, VideoVAEConfig)


@pytest.fixture(scope="package")
def text():
    return build_tiny_text_encoder(CAPTIONS, model_max_length=LENGTH)
