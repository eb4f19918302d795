"""What decode, encode and plan_tiles refuse, and what they say."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from opensora_kernels.vae import Streaming, Tiled, TilePlan, Tiling, Whole, decode, encode, plan_tiles
from tests.vae.models import DECODERS, build

STREAMING = TilePlan(Streaming(1))
TILED = TilePlan(Tiled(Tiling((4, 4), (4, 4), (0, 0), (100, 100), window=None)))


def only_odd_frames(z: Tensor) -> Tensor:
    if z.shape[2] % 2 == 0:
        raise ValueError(f"a clip has 2n + 1 frames, got {z.shape[2]}")
    return z * 2


@pytest.mark.parametrize("plan", [None, STREAMING], ids=["whole", "streaming"])
def test_nan_and_other_bad_clips_are_refused_before_any_frame(plan: TilePlan | None):
    model = build(DECODERS["wan"])
    z = torch.randn(1, 4, 3, 4, 4)
    z[0, 1, 2, 3, 0] = float("nan")
    with pytest.raises(ValueError, match="decode: z must be finite, got NaN"):
        decode(model, z, plan=plan)
    with pytest.raises(ValueError, match=r"encode: x must have shape \(B, C, T, H, W\)"):
        encode(model, torch.zeros(4, 3, 4, 4), plan=plan)
    with pytest.raises(TypeError, match="decode: z must have a floating-point dtype"):
        decode(model, torch.zeros(1, 4, 3, 4, 4, dtype=torch.int64), plan=plan)
    with pytest.raises(ValueError, match="decode: z must have no empty axis"):
        decode(model, torch.zeros(1, 4, 0, 4, 4), plan=plan)


def test_a_wrong_number_of_channels_names_the_right_one():
    with pytest.raises(ValueError, match=r"decode: z must have a shape that the model takes \(channels: 4\)"):
        decode(build(DECODERS["open_sora"]), torch.zeros(1, 5, 3, 4, 4), plan=STREAMING)
    with pytest.raises(ValueError, match=r"plan_tiles: shape must .* \(channels: 4\)"):
        plan_tiles(build(DECODERS["wan"]), (1, 3, 3, 4, 4), "1GiB", torch.float32)


def test_a_number_of_frames_that_the_model_refuses_names_valid_ones():
    with pytest.raises(ValueError, match=r"\(frames near 4: 1, 3, 5, 7, 9, 11, 13\), got .*2n \+ 1 frames, got 4"):
        decode(only_odd_frames, torch.zeros(1, 4, 4, 4, 4), plan=STREAMING)


def test_a_budget_that_is_too_small_names_the_smallest_that_would_do():
    model, shape = build(DECODERS["wan"]), (1, 4, 2, 4, 4)
    with pytest.raises(ValueError, match=r"plan_tiles: budget must be at least \d+ bytes") as refused:
        plan_tiles(model, shape, 1000, torch.float32)
    smallest = int(str(refused.value).split(" bytes")[0].rsplit(" ", 1)[1])
    assert plan_tiles(model, shape, smallest, torch.float32).peak_bytes == smallest
    for too_small in (1000, smallest - 1):
        with pytest.raises(ValueError, match="budget must be at least"):
            decode(model, torch.zeros(shape), memory_budget=too_small)


@pytest.mark.parametrize("plan", [None, STREAMING, TILED], ids=["whole", "streaming", "tiled"])
def test_clips_that_the_model_does_not_take_are_refused_before_any_frame_however_it_runs(plan: TilePlan | None):
    model = build(DECODERS["wan"])
    with pytest.raises(ValueError, match=r"z must have a shape .* \(channels: 4\), got \(1, 5, 3, 4, 4\)"):
        decode(model, torch.zeros(1, 5, 3, 4, 4), plan=plan)
    with pytest.raises(ValueError, match=r"\(frames near 4: 1, 3, 5, .*\), got \(1, 4, 4, 4, 4\)"):
        decode(only_odd_frames, torch.zeros(1, 4, 4, 4, 4), plan=plan)
    with pytest.raises(
        ValueError, match=r"z must have dtype torch.float32, that of the model's weights, got torch.float64"
    ):
        decode(model, torch.zeros(1, 4, 3, 4, 4, dtype=torch.float64), plan=plan)
    with pytest.raises(
        ValueError, match=r"dtype must be torch.float32, that of the model's weights, got torch.bfloat16"
    ):
        plan_tiles(torch.nn.Conv3d(4, 4, 1), (1, 4, 3, 4, 4), "1GiB", torch.bfloat16)


@pytest.mark.parametrize("result", [lambda z: z.transpose(1, 2), lambda z: z[:, :, :, :, 0], lambda z: z.flatten(1, 2)])
def test_frames_along_another_axis_are_refused(result: object):
    with pytest.raises(TypeError, match=r"must return frames along axis 2 of \(B, C, T, H, W\), got shape \(1, "):
        decode(lambda z: result(z * 2), torch.zeros(1, 4, 3, 4, 4), plan=STREAMING)


def test_a_model_that_drops_values_at_random_is_to_be_in_evaluation_mode():
    model = torch.nn.Sequential(torch.nn.Conv3d(4, 4, 1), torch.nn.Dropout(0.5))
    for run in (
        lambda: decode(model, torch.zeros(1, 4, 3, 4, 4), plan=STREAMING),
        lambda: plan_tiles(lambda z: model(z), (1, 4, 3, 4, 4), "1GiB", torch.float32),
    ):
        with pytest.raises(ValueError, match=r"model must be in evaluation mode, .*: call eval\(\)"):
            run()


@pytest.mark.parametrize("budget", ["10 parsecs", "", 0, -5, "GiB"])
def test_a_budget_that_is_no_number_of_bytes_is_refused(budget: object):
    with pytest.raises(ValueError, match="memory budget must be"):
        plan_tiles(only_odd_frames, (1, 4, 3, 4, 4), budget, torch.float32)


def test_options_of_a_plan_are_checked():
    z = torch.zeros(1, 4, 3, 4, 4)
    for plan in ("whole", Streaming(1), TilePlan("whole")):
        with pytest.raises(TypeError, match="plan must be a TilePlan, such as"):
            decode(only_odd_frames, z, plan=plan)
    with pytest.raises(ValueError, match="z must have data, got a tensor on the meta device"):
        decode(only_odd_frames, z.to("meta"))
    for number in (float("nan"), float("inf"), -1):
        with pytest.raises(ValueError, match="chunk_frames must be above 0 and finite, got"):
            Streaming(number)
    with pytest.raises(TypeError, match="chunk_frames must be a number, got '2'"):
        Streaming("2")
    with pytest.raises(ValueError, match="strategies must hold at least one"):
        plan_tiles(only_odd_frames, (1, 4, 3, 4, 4), "1GiB", torch.float32, strategies=[])
    with pytest.raises(ValueError, match=r"shape must be \(B, C, T, H, W\) of no empty axis, got \(1, 4, 3\)"):
        plan_tiles(only_odd_frames, (1, 4, 3), "1GiB", torch.float32)
    with pytest.raises(ValueError, match="chunk_frames must be above 0 and finite, got 0"):
        Streaming(0)
    with pytest.raises(ValueError, match="spill must be one of device, host, file, got 'tape'"):
        Streaming(1, "tape")
    with pytest.raises(ValueError, match="memory_budget must be None where a plan is given"):
        decode(only_odd_frames, torch.zeros(1, 4, 3, 4, 4), memory_budget="1GiB", plan=STREAMING)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="autocast must be off"):
        decode(only_odd_frames, torch.zeros(1, 4, 3, 4, 4), plan=STREAMING)


def test_what_cannot_be_called_and_what_is_no_size_or_dtype_is_refused_before_anything_runs():
    z, shape, seen = torch.zeros(1, 4, 3, 4, 4), (1, 4, 3, 4, 4), []
    with pytest.raises(TypeError, match="decode: decoder must be callable, got 3"):
        decode(3, z)
    with pytest.raises(TypeError, match="encode: encoder must be callable, got 'wan'"):
        encode("wan", z)
    with pytest.raises(TypeError, match="plan_tiles: decoder must be callable, got None"):
        plan_tiles(None, shape, "1GiB", torch.float32)
    for run in (decode, encode):
        with pytest.raises(TypeError, match=r"code: progress must be callable, got 3"):
            run(lambda z: seen.append(z) or z, z, progress=3)
    assert not seen
    for bad in ((1, 4, 3.0, 4, 4), (1, 4, 3, "4", 4), "1x4x3", None):
        with pytest.raises(TypeError, match=r"plan_tiles: shape must be \(B, C, T, H, W\) in whole numbers, got "):
            plan_tiles(only_odd_frames, bad, "1GiB", torch.float32)
    for bad in ("fp32", torch.int64, None):
        with pytest.raises(TypeError, match=r"plan_tiles: dtype must be a floating-point torch.dtype, got "):
            plan_tiles(only_odd_frames, shape, "1GiB", bad)
    with pytest.raises(TypeError, match="chunk_frames must be a number, got True"):
        Streaming(True)


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (lambda z: [z], "must return one tensor made from its argument, got list"),
        (lambda z: torch.zeros(1), "must return one tensor made from its argument, got Tensor"),
        (lambda z: z * z.max().item(), "cannot be recorded"),
        (lambda z: z.clone().index_fill_(2, torch.tensor([0]), 0.0)[:, :, 1:].mul_(2), "writes into part of a clip"),
        (lambda z: z[z > 0], "cannot be recorded"),
    ],
    ids=["list", "constant", "value", "view", "mask"],
)
def test_a_model_that_cannot_be_recorded_says_what_stands_in_the_way(model: object, says: str):
    with pytest.raises(TypeError, match=says):
        decode(model, torch.ones(1, 4, 3, 4, 4), plan=STREAMING)


def test_a_view_of_what_was_changed_in_place_is_not_read_silently():
    def model(z: Tensor) -> Tensor:
        x = z * 2
        view = x.transpose(3, 4)
        x += 1
        return view * 3

    with pytest.raises(TypeError, match="reads a view of a clip that was changed in place"):
        decode(model, torch.ones(1, 4, 3, 4, 4), plan=STREAMING)


def test_whole_runs_models_that_cannot_be_recorded():
    (result,) = decode(lambda z: z * z.max().item(), torch.ones(1, 4, 3, 4, 4), plan=TilePlan(Whole()))
    assert torch.equal(result, torch.ones(1, 4, 3, 4, 4))
