"""Streaming gives the frames of one run over the clip, with no more memory for a longer one, and leaves no files."""

from __future__ import annotations

import gc
from fractions import Fraction
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from opensora_kernels import causal_conv3d
from opensora_kernels.vae import Streaming, TilePlan, decode, encode, gather, plan_tiles
from tests.ops.accuracy import assert_accurate
from tests.vae.live_bytes import LiveBytes
from tests.vae.models import DECODERS, ENCODERS, PER_POSITION, build

MODELS = {**DECODERS, **{f"{name}_encoder": kind for name, kind in ENCODERS.items()}}


def clip(name: str, num_frames: int, dtype: torch.dtype = torch.float32, batch: int = 1, height: int = 4) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(batch, 3 if name.endswith("encoder") else 4, num_frames, height, 6).to(dtype)


def stream(model: nn.Module, x: Tensor, *arguments: object) -> list[Tensor]:
    return list(decode(model, x, plan=TilePlan(Streaming(*arguments))))


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=8)
@given(
    num_frames=st.integers(1, 7),
    chunk_frames=st.sampled_from([Fraction(1, 2), 1, 2, 3, 9]),
    spill=st.sampled_from(["device", "host", "file"]),
    batch=st.integers(1, 2),
)
def test_streaming_equals_whole_for_any_chunking(name: str, num_frames: int, chunk_frames, spill: str, batch: int):
    model, x = build(MODELS[name]), clip(name, num_frames, batch=batch)
    with torch.no_grad():
        whole = model(x)
    streamed = gather(stream(model, x, chunk_frames, spill))
    assert_accurate(streamed, whole, build(MODELS[name], torch.float64)(x.double()), name)
    # With one sample PyTorch chooses between two kernels by the size of a chunk, which sum in different orders; and
    # statistics of a clip are merged from those of its frames.
    if batch > 1 and name.removesuffix("_encoder") in PER_POSITION:
        assert torch.equal(streamed, whole)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_streaming_keeps_the_accuracy_rule_at_half_precision(name: str, dtype: torch.dtype):
    model, x = build(MODELS[name], dtype), clip(name, 5, dtype)
    with torch.no_grad():
        whole = model(x)
    # the same rounded weights, in fp64
    truth = build(MODELS[name], torch.float64)
    truth.load_state_dict(model.state_dict())
    assert_accurate(gather(stream(model, x, 1)), whole, truth(x.double()), name)


@pytest.mark.parametrize("name", MODELS)
def test_the_size_of_chunks_changes_no_bit(name: str):
    model, x = build(MODELS[name]), clip(name, 7, batch=2)
    in_ones, in_threes = (gather(stream(model, x, chunk_frames)) for chunk_frames in (1, 3))
    assert torch.equal(in_ones, in_threes)


class Stepping(nn.Module):
    """Steps through frames by itself, with the states of two convolutions; the second strides."""

    def __init__(self, lengths: list[int], stride: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lengths, self.stride = lengths, stride
        self.weights = [torch.randn(4, 4, 3, 3, 3) / 10 for _ in range(2)]

    def forward(self, z: Tensor) -> Tensor:
        results, states = [], (None, None)
        for frames in z.split(self.lengths, 2):
            hidden, first = causal_conv3d(
                frames, self.weights[0], time_padding="replicate", state=states[0], return_state=True
            )
            result, second = causal_conv3d(
                hidden, self.weights[1], stride=(self.stride, 1, 1), state=states[1], return_state=True,
                activation="silu",
            )  # fmt: skip
            results.append(result)
            states = (first, second)
        return torch.cat(results, 2)


@pytest.mark.parametrize("spill", ["device", "file"])
@pytest.mark.parametrize(("lengths", "stride"), [([3, 2, 2], 1), ([1, 1, 1, 1], 1), ([5, 4], 2), ([3, 3], 2)], ids=str)
def test_steps_of_a_models_own_stream_with_the_states_between_them(lengths: list[int], stride: int, spill: str):
    model, z = Stepping(lengths, stride), clip("wan", sum(lengths), batch=2)
    for chunk_frames in (Fraction(1, 2), 1, 2, 9):
        assert torch.equal(gather(stream(model, z, chunk_frames, spill)), model(z))


@pytest.mark.parametrize("name", ["wan", "open_sora"])
def test_channels_last_clips_stream_too(name: str):
    model, x = build(MODELS[name]), clip(name, 5, batch=2)
    streamed = gather(stream(model, x.to(memory_format=torch.channels_last_3d), 2, "file"))
    assert_accurate(streamed, model(x), build(MODELS[name], torch.float64)(x.double()), name)


def peak_of(model: nn.Module, x: Tensor, *arguments: object) -> int:
    gc.collect()
    chunks = decode(model, x, plan=TilePlan(Streaming(*arguments)))
    with LiveBytes() as counted:
        for chunk in chunks:
            del chunk
    return counted.peak


@pytest.mark.parametrize("name", ["wan", "by_frame", "strides_encoder"])
def test_memory_does_not_grow_with_length_where_norms_are_per_position(name: str):
    model = build(MODELS[name])
    short, long = (peak_of(model, clip(name, num_frames), 2) for num_frames in (9, 33))
    assert long <= short


def test_memory_without_what_the_spill_holds_hardly_grows_where_norms_look_at_the_clip():
    model = build(MODELS["open_sora"])
    short, long = (peak_of(model, clip("open_sora", frames, height=32), 1, "file") for frames in (5, 17))
    in_memory = peak_of(model, clip("open_sora", 17, height=32), 1, "device")
    assert long <= 1.1 * short  # statistics, 8 bytes for each frame and channel, stay
    assert in_memory > 2 * long


def test_no_frame_waits_for_a_later_one_where_norms_are_per_position():
    seen = []
    model = build(MODELS["wan"])
    chunks = decode(model, clip("wan", 9), plan=TilePlan(Streaming(1)), progress=lambda *done: seen.append(done))
    assert next(chunks).shape[2] == 1
    assert seen == [(1, 33)]
    assert sum(chunk.shape[2] for chunk in chunks) == 32
    assert seen[-1] == (33, 33)


def files_below(folder: Path) -> list[Path]:
    return list(folder.rglob("*"))


def test_spill_files_are_gone_at_the_end_and_when_the_consumer_stops_half_way(tmp_path: Path):
    model, x = build(MODELS["open_sora"]), clip("open_sora", 5)
    chunks = decode(model, x, plan=TilePlan(Streaming(1, "file", tmp_path)))
    next(chunks)
    assert files_below(tmp_path)
    chunks.close()
    assert not files_below(tmp_path)

    for chunk in decode(model, x, plan=TilePlan(Streaming(1, "file", tmp_path)), progress=lambda *done: None):
        assert files_below(tmp_path)
        del chunk
    assert not files_below(tmp_path)


def test_spill_files_are_gone_after_an_error_in_the_model(tmp_path: Path):
    model, x = build(MODELS["open_sora"]), clip("open_sora", 5)
    chunks = decode(model, x, plan=TilePlan(Streaming(1, "file", tmp_path)))
    model.vae.decoder.conv_out.conv.weight.data = torch.zeros(1)  # as a device error would, in the middle
    with pytest.raises((RuntimeError, ValueError, IndexError)):
        next(chunks)
    assert not files_below(tmp_path)


def test_a_clip_is_freed_chunk_by_chunk_as_its_last_reader_passes(tmp_path: Path):
    model, x = build(MODELS["open_sora"]), clip("open_sora", 17)
    chunks = decode(model, x, plan=TilePlan(Streaming(1, "file", tmp_path)))
    next(chunks)
    at_first = sum(path.stat().st_size for path in files_below(tmp_path) if path.is_file())
    for _ in range(13):
        next(chunks)
    assert sum(path.stat().st_size for path in files_below(tmp_path) if path.is_file()) < 0.5 * at_first


@torch.no_grad()
def test_gather_fills_a_tensor_of_the_caller():
    model, x = build(MODELS["wan"]), clip("wan", 5, batch=2)
    out = torch.empty(2, 3, 17, 16, 24)
    assert gather(decode(model, x, plan=TilePlan(Streaming(2))), out) is out
    assert torch.equal(out, model(x))
    with pytest.raises(ValueError, match="out must have as many frames as the chunks, 17, got 18"):
        gather(decode(model, x), torch.empty(2, 3, 18, 16, 24))
    with pytest.raises(ValueError, match="out must hold frames"):
        gather(decode(model, x), torch.empty(2, 3, 16, 16, 24))


def test_tensors_made_beside_the_clip_stay_what_they_are():
    def model(x: Tensor) -> Tensor:
        first = x.new_zeros(x.shape[0], x.shape[1], 1, *x.shape[3:])
        return torch.cat([first, x + torch.ones_like(x)], 2) * x.new_full((1, 1, x.shape[2] + 1, 1, 1), 3.0)

    x = clip("wan", 5)
    streamed = stream(model, x, 2)
    assert len(streamed) > 1
    assert torch.equal(gather(streamed), model(x))


@pytest.mark.parametrize("num_frames", [1, 3])
def test_a_clip_that_lies_apart_in_memory_can_be_flattened(num_frames: int):
    x = clip("wan", num_frames).transpose(3, 4)
    assert torch.equal(
        gather(stream(lambda z: z.flatten(3).unflatten(3, (-1, 2)), x)), x.flatten(3).unflatten(3, (-1, 2))
    )


@pytest.mark.parametrize("plan", [None, TilePlan(Streaming(1))], ids=["whole", "streaming"])
def test_autocast_where_chunks_are_asked_for_changes_nothing(plan: TilePlan | None):
    model, x = build(nn.Sequential).append(nn.Conv3d(4, 3, 1).requires_grad_(False)), clip("wan", 3)
    chunks = decode(model, x, plan=plan)
    with torch.autocast("cpu", torch.bfloat16):
        frames = gather(chunks)
    assert frames.dtype is torch.float32
    assert torch.equal(frames, model(x))


@torch.no_grad()
def test_encoding_streams_like_decoding():
    encoder, x = build(MODELS["strides_encoder"]), clip("strides_encoder", 9, batch=2)
    assert torch.equal(gather(encode(encoder, x, plan=TilePlan(Streaming(4)))), encoder(x))


def test_what_looks_across_frames_runs_on_the_whole_clip_and_is_named():
    def model(x: Tensor) -> Tensor:
        b, c, t, h, w = x.shape
        tokens = x.permute(0, 3, 4, 2, 1).reshape(b * h * w, 1, t, c)
        mixed = F.scaled_dot_product_attention(tokens, tokens, tokens)
        return x + mixed.reshape(b, h, w, t, c).permute(0, 4, 3, 1, 2).cumsum(2).flip(3)

    x = clip("wan", 6)
    streamed = stream(model, x, 2)
    assert [chunk.shape[2] for chunk in streamed] == [2, 2, 2]
    assert_accurate(gather(streamed), model(x), model(x.double()), "attention")
    plan = plan_tiles(model, tuple(x.shape), "1GiB", torch.float32, strategies=[Streaming(2)])
    assert "attention (24, 1, 6, 4) looks across frames" in str(plan)
    assert "cumsum" in str(plan)


@pytest.mark.parametrize("mask", ["argument", "tensor", "made_from_clip", "blocks"])
def test_attention_to_earlier_frames_streams_with_their_keys_kept(mask: str):
    def model(x: Tensor) -> Tensor:
        b, c, t, h, w = x.shape
        per_frame = h * w if mask == "blocks" else 1  # tokens of a frame see each other
        order = (0, 2, 3, 4, 1) if mask == "blocks" else (0, 3, 4, 2, 1)
        tokens = x.permute(order).reshape(-1, 1, t * per_frame, c)
        options = {"is_causal": True}
        if mask == "tensor":
            options = {"attn_mask": torch.ones(t, t, dtype=torch.bool).tril()}
        elif mask == "made_from_clip":
            options = {"attn_mask": torch.tril(x.new_ones(t, t)).bool()}
        elif mask == "blocks":
            frame = torch.arange(t).repeat_interleave(per_frame)
            hidden = torch.where(frame[:, None] >= frame, 0, -torch.inf).to(x.dtype)
            options = {"attn_mask": hidden.expand(b, 1, -1, -1)}
        mixed = F.scaled_dot_product_attention(tokens, tokens, tokens * 2, **options)
        back = (0, 4, 1, 2, 3) if mask == "blocks" else (0, 4, 3, 1, 2)
        return x + mixed.reshape(b, *(x.shape[axis] for axis in order[1:4]), c).permute(back)

    x, seen = clip("wan", 6, batch=2 if mask != "blocks" else 1), []
    for chunk in decode(model, x, plan=TilePlan(Streaming(2)), progress=lambda *counts: seen.append(counts)):
        seen.append(chunk)
    assert seen[0] == (2, 6)  # before the later frames were read
    assert_accurate(gather(seen[1::2]), model(x), model(x.double()), mask)
    plan = plan_tiles(model, tuple(x.shape), "1GiB", torch.float32, strategies=[Streaming(2)])
    assert "keys and values of all earlier frames are kept" in str(plan)


class Resampling(nn.Module):
    """What diffusers' VAEs do to frames besides causal convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose3d(4, 4, (2, 1, 1), (2, 1, 1))
        self.conv = causal_conv(4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(self.up(x), scale_factor=(2, 1, 1), mode="trilinear")
        x = F.pad(x, (0, 1, 0, 1, 0, 2), mode="reflect")
        x, self.state = causal_conv3d(x, self.conv, return_state=True)  # kept for a next call
        return torch.cat([x, x[:, :, -1:]], 2)


def causal_conv(channels: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(channels, channels, 3, 3, 3) * 0.1)


@pytest.mark.parametrize("num_frames", [1, 2, 5])
def test_frames_are_doubled_reflected_and_repeated_chunk_by_chunk(num_frames: int):
    model, x = build(Resampling), clip("wan", num_frames)
    streamed = stream(model, x, 1)
    assert_accurate(gather(streamed), model(x), build(Resampling, torch.float64)(x.double()), "resampling")
    if num_frames == 5:
        assert len(streamed) > 5
        short, long = (peak_of(model, clip("wan", frames), 1) for frames in (9, 33))
        assert long <= short


def test_a_model_that_steps_through_frames_by_itself_gives_the_same_frames():
    conv = build(lambda: nn.Conv3d(4, 3, (2, 3, 3), padding=(0, 1, 1)))

    def model(x: Tensor) -> Tensor:
        frames, last = [], x[:, :, :1]
        for frame in x.split(1, dim=2):
            frames.append(conv(torch.cat([last, frame], 2)))
            last = frame
        return torch.cat(frames, 2)

    x = clip("wan", 6)
    assert torch.equal(gather(stream(model, x, 1)), model(x))
