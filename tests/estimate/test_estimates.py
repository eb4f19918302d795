"""`opensora estimate`: requests in words, tables and numbers, and the answer to a minute at 1080p."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from opensora import presets
from opensora.cli import main
from opensora.config import DataConfig
from opensora.estimate.placement import Hardware, largest
from opensora.estimate.requests import Asked, frames_of, pixels_of, read_request
from opensora.estimate.sampling import SamplingOnPaper
from opensora.estimate.training import BucketClip, TrainingOnPaper, buckets_of


@pytest.mark.parametrize(
    ("text", "asked"),
    [
        ("1 minute at 1080p on 8 x 80 GB", Asked(1440, (1080, 1920), 8, 80 * 10**9)),
        ("4s at 720p", Asked(96, (720, 1280))),
        ("51 frames of 240x426 on 2 x 24GiB", Asked(51, (240, 426), 2, 24 * 2**30)),
        ("1080p", Asked(pixels=(1080, 1920))),
        ("8 x 141 GB GPUs", Asked(num_gpus=8, memory=141 * 10**9)),
    ],
)
def test_requests_are_read_in_words(text: str, asked: Asked):
    assert read_request(text) == asked


@pytest.mark.parametrize("text", ["", "a long film", "1 minute at 1081p", "1 minute twice at 720p"])
def test_a_request_that_says_nothing_known_is_refused(text: str):
    with pytest.raises(ValueError, match="request: must be like"):
        read_request(text)


def test_durations_and_sizes():
    assert [frames_of(text, fps=24) for text in ("51", "51 frames", "2s", "0.5 min")] == [51, 51, 48, 720]
    assert pixels_of("720x1280", 9 / 16) == pixels_of("720p", 9 / 16) == (720, 1280)
    for text in ("0", "soon", "1 hour", "1.2.3"):
        with pytest.raises(ValueError, match="num_frames: must be"):
            frames_of(text, fps=24)


def test_the_largest_number_that_fits():
    assert [largest(lambda n, most=most: n <= most, 100) for most in (0, 1, 2, 3, 63, 64, 99, 100, 500)] == [
        0, 1, 2, 3, 63, 64, 99, 100, 100,
    ]  # fmt: skip


def test_buckets_that_train_on_nothing_are_left_out():
    config = replace(
        presets.get("tiny").training["motion"],
        data=DataConfig(buckets={"240p": {1: (1.0, 8), 51: (0.5, 2), 102: (0.0, 0)}, "144p": {51: (1.0, 4)}}),
    )
    assert [(clip.name, clip.size, clip.batch) for clip in buckets_of(config)] == [
        ("144p, 51 frames", (51, 144, 256), 4),
        ("240p, image", (1, 240, 426), 8),
        ("240p, 51 frames", (51, 240, 426), 2),
    ]


def test_the_largest_batch_is_the_last_that_fits():
    preset = presets.get("tiny")
    paper = TrainingOnPaper(preset, preset.training["motion"], Hardware(2, memory=4 * 10**9))
    clip = BucketClip("clip", (17, 64, 64), 4)
    (row,) = paper.estimate([clip], checkpointing="full").buckets
    assert row.fits
    for batch, fits in ((row.largest_batch, True), (row.largest_batch + 1, False)):
        (found,) = paper.estimate([replace(clip, batch=batch)], checkpointing="full").buckets
        assert found.fits is fits
        assert found.num_tokens == batch * row.num_tokens // 4


def test_ranks_of_a_sequence_and_recomputation_save_memory():
    preset = presets.get("tiny")
    paper = TrainingOnPaper(preset, preset.training["motion"], Hardware(4), has_encoders=False)
    clip = BucketClip("clip", (17, 256, 256), 8)

    def kept(checkpointing: Any, ranks: int) -> int:
        return paper.estimate([clip], checkpointing=checkpointing, sequence_ranks=ranks).buckets[0].kept

    assert kept("none", 1) > kept("selective", 1) > kept("full", 1)
    assert kept("none", 4) == pytest.approx(kept("none", 1) / 4, rel=0.1)
    with pytest.raises(ValueError, match="sequence ranks must divide the 4 GPUs, got 3"):
        kept("none", 3)


def test_a_minute_at_1080p_fits_eight_gpus_of_80_gb():
    estimate = SamplingOnPaper(presets.get("open-sora-v1.2"), Hardware(8)).estimate((1440, 1080, 1920))
    text, denoise, decode = estimate.stages
    assert estimate.fits
    assert not estimate.offloads
    assert str(estimate.degree) == "8 x 1"
    assert 1440 < estimate.largest_frames < 10_000
    assert 40e9 < denoise.peak < 80e9
    assert text.weights == denoise.weights == decode.weights
    # 30 steps with guidance: linear layers alone are 2 x 1.1 billion x 3.5 million tokens x 2 x 30.
    assert denoise.flops > 2 * 1.1e9 * 3.46e6 * 60
    assert "16 seconds" in estimate.notes[0]


def test_work_is_that_of_the_originals():
    """Counted by hand for upstream's model, with guidance and 30 steps: 16.7 PFLOP for 4 s of 720p, decoding 1.14."""
    paper = SamplingOnPaper(presets.get("open-sora-v1.2"), Hardware(1))
    _, denoise, decode = paper.estimate((102, 720, 1280)).stages
    assert denoise.flops == pytest.approx(16.7e15, rel=0.03)
    assert decode.flops == pytest.approx(1.14e15, rel=0.03)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["estimate", "--preset", "tiny", *arguments]) == 0
    return capsys.readouterr().out


def test_the_command_shows_a_stage(capsys: pytest.CaptureFixture[str]):
    out = run(capsys, "--stage", "motion", "--gpus", "2", "--memory", "8GB")
    assert out.startswith("tiny, motion on 2 x 8 GB: for each GPU")
    assert "largest batch" in out
    assert "An estimate: seconds are work" in out
    found = json.loads(run(capsys, "--stage", "motion", "--gpus", "2", "--memory", "8GB", "--json"))
    assert found["buckets"][0]["clip"]["size"] == [17, 64, 64]
    assert found["buckets"][0]["peak"] < 8e9


def test_the_command_answers_what_a_clip_takes(capsys: pytest.CaptureFixture[str]):
    out = run(capsys, "1s at 256x256 on 2 x 80 GB")
    assert "24 frames of 256 x 256, on 2 x 80 GB" in out
    assert "Fits: --parallel.ulysses 1 --parallel.ring 1 --run.grad-checkpoint none" in out
    out = run(capsys, "1s at 512x512 on 1 x 3.15 GB", "--encoded")
    assert "Does not fit: 3.37 GB at least" in out
    assert "4 x 3.15 GB fit it: --parallel.ulysses 2 --parallel.ring 2 --run.grad-checkpoint full" in out
    assert "fit it" not in run(capsys, "1s at 256x256 on 2 x 3 GB")  # which are reserved
    out = run(capsys, "--task", "sample", "1s at 256x256 on 1 x 80 GB")
    assert "Fits.\n" in out
    assert "Longest that fits" in out
    found = json.loads(run(capsys, "--task", "sample", "--num-frames", "17", "--json"))
    assert [stage["name"] for stage in found["stages"]] == ["text", "denoise", "decode"]
    assert found["fits"] is True


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "tiny", "--stage", "last"], "stage: preset tiny has uniform, shifted, motion, got 'last'"),
        (["a long film"], "request: must be like"),
        (["--gpus", "0", "--mfu", "2"], "gpus, mfu and peak-tflops"),
        (["--preset", "tiny", "--memory", "much"], "memory budget must be bytes"),
        (["--preset", "tiny", "--resolution", "9p"], "resolution: must be one of"),
    ],
)
def test_what_cannot_be_estimated_is_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str):
    assert main(["estimate", *arguments]) == 2
    assert message in capsys.readouterr().err
