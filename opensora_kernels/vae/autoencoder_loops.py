"""The loops over frames inside diffusers' video autoencoders, one for each way of keeping earlier frames.

A loop is recognised by what the encoder or decoder takes and where it keeps frames, not by the name of a class.

Axes: B batch, C channels, T frames, H height, W width.
Source: diffusers 0.42.1, models/autoencoders/autoencoder_*.py, `_encode` and `_decode` of each class.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .loops import Span, Spans, Step


class Steps(NamedTuple):
    """A `Loop` without its model."""

    spans: Spans
    step: Step
    num_frames: Callable[[int], int] | None = None


def decoding(vae: Any, options: dict[str, Any]) -> Steps | None:
    taken = inspect.signature(type(vae.decoder).forward).parameters
    if "feat_cache" in taken:
        return _decoding_with_list(vae, "first_chunk" in taken)
    if "conv_cache" in taken and hasattr(vae, "num_latent_frames_batch_size"):
        return _decoding_with_returned_cache(vae)
    if hasattr(vae, "_clear_conv_cache"):
        return _with_features_in_modules(vae, vae.decoder, vae.num_latent_frames_batch_size, vae.post_quant_conv, None)
    if hasattr(vae, "_make_decoder_cache"):
        return _decoding_segments(vae, vae._make_decoder_cache, _segments_of_kvae(vae, vae._decode, is_latent=True))
    if hasattr(vae.decoder, "make_cache"):
        return _decoding_segments(vae, vae.decoder.make_cache, _latent_segments_of_kandinsky(vae))
    if hasattr(vae, "_temporal_tiled_decode"):
        return _decoding_windows(vae, options)
    return None


def encoding(vae: Any) -> Steps | None:
    taken = inspect.signature(type(vae.encoder).forward).parameters
    if "feat_cache" in taken:
        return _encoding_with_list(vae)
    if "conv_cache" in taken and hasattr(vae, "num_sample_frames_batch_size") and hasattr(vae, "quant_conv"):
        return _encoding_with_returned_cache(vae)
    if hasattr(vae, "_clear_conv_cache"):
        return _with_features_in_modules(vae, vae.encoder, vae.num_sample_frames_batch_size, None, vae.quant_conv)
    if hasattr(vae, "_make_encoder_cache"):
        return _encoding_segments(vae, vae._make_encoder_cache, _segments_of_kvae(vae, vae._encode, is_latent=False))
    if hasattr(vae.encoder, "make_cache"):
        return _encoding_segments(vae, vae.encoder.make_cache, _segments_of_kandinsky(vae))
    if hasattr(vae, "_temporal_tiled_encode"):
        return _encoding_windows(vae)
    return None


def _mode(moments: Tensor) -> Tensor:
    return moments.chunk(2, 1)[0]


def _untiled(vae: Any, spans: Spans) -> Spans:
    """`spans`, refused while the model runs tile after tile, each over all frames."""

    def checked(num_frames: int) -> Sequence[Span] | None:
        if getattr(vae, "use_tiling", False):
            raise ValueError(
                f"streaming: the tiling of {type(vae).__name__} must be off, since it runs each tile over all frames: "
                "call disable_tiling(), got use_tiling=True"
            )
        return spans(num_frames)

    return checked


def _function_of(vae: nn.Module, name: str) -> Callable[..., Tensor]:
    """A function of the file in which the model's class is."""
    files = (vars(sys.modules[kind.__module__]) for kind in type(vae).__mro__)
    return next(file[key] for file in files for key in (name, f"_{name}") if key in file)


def _in_lengths(lengths: Sequence[int]) -> list[Span]:
    stops = [sum(lengths[: index + 1]) for index in range(len(lengths))]
    return list(zip([0, *stops[:-1]], stops, strict=True))


# Wan, Qwen-Image: one frame at a time, four after the first one to encode; a list holds each convolution's last frames.
def _decoding_with_list(vae: Any, takes_first_chunk: bool) -> Steps:
    patch_size = getattr(vae.config, "patch_size", None)
    num_places = sum(1 for _ in vae.decoder.modules())

    def step(frames: Tensor, state: Any) -> tuple[Tensor, Any]:
        cache = [None] * num_places if state is None else state
        options = {"first_chunk": True} if state is None and takes_first_chunk else {}
        out = vae.decoder(vae.post_quant_conv(frames), feat_cache=cache, feat_idx=[0], **options)
        if patch_size is not None:
            out = _function_of(vae, "unpatchify")(out, patch_size=patch_size)
        return torch.clamp(out, min=-1.0, max=1.0), cache

    return Steps(_untiled(vae, lambda num_frames: [(i, i + 1) for i in range(num_frames)]), step)


def _encoding_with_list(vae: Any) -> Steps:
    patch_size = getattr(vae.config, "patch_size", None)
    num_places = sum(1 for _ in vae.encoder.modules())

    def spans(num_frames: int) -> list[Span]:
        return [(0, 1), *((1 + 4 * i, 5 + 4 * i) for i in range((num_frames - 1) // 4))]

    def step(frames: Tensor, state: Any) -> tuple[Tensor, Any]:
        cache = [None] * num_places if state is None else state
        if patch_size is not None:
            frames = _function_of(vae, "patchify")(frames, patch_size=patch_size)
        out = vae.encoder(frames, feat_cache=cache, feat_idx=[0])
        return _mode(vae.quant_conv(out)), cache

    return Steps(_untiled(vae, spans), step)


# CogVideoX: batches of frames, the odd ones in the first; Mochi: the odd ones in the last. Caches go in and come out.
def _decoding_with_returned_cache(vae: Any) -> Steps:
    is_mochi = hasattr(vae, "drop_last_temporal_frames")
    conv = getattr(vae, "post_quant_conv", None)

    def spans(num_frames: int) -> Sequence[Span] | None:
        size = vae.num_latent_frames_batch_size
        if not is_mochi:
            return _batches(num_frames, size)
        if not vae.use_framewise_decoding:
            return None
        return [(start, min(start + size, num_frames)) for start in range(0, num_frames, size)]

    def step(frames: Tensor, state: Any) -> tuple[Tensor, Any]:
        out, cache = vae.decoder(frames if conv is None else conv(frames), conv_cache=state)
        num_dropped = vae.temporal_compression_ratio - 1 if is_mochi and vae.drop_last_temporal_frames else 0
        return out[:, :, num_dropped:] if state is None else out, cache

    return Steps(_untiled(vae, spans), step)


def _encoding_with_returned_cache(vae: Any) -> Steps:
    def step(frames: Tensor, state: Any) -> tuple[Tensor, Any]:
        out, cache = vae.encoder(frames, conv_cache=state)
        return _mode(out if vae.quant_conv is None else vae.quant_conv(out)), cache

    spans = _untiled(vae, lambda num_frames: _batches(num_frames, vae.num_sample_frames_batch_size))
    return Steps(spans, step)


def _batches(num_frames: int, size: int) -> list[Span]:
    num_batches, num_odd = max(num_frames // size, 1), num_frames % size
    stops = [size * (index + 1) + num_odd for index in range(num_batches)]
    return [(0 if index == 0 else stop - size, min(stop, num_frames)) for index, stop in enumerate(stops)]


# EasyAnimate (Magvit): the first frame alone; convolutions and upsamplers hold the last frames that they read.
def _with_features_in_modules(vae: Any, part: nn.Module, size: int, before: Any, after: Any) -> Steps:
    owners = [module for module in part.modules() if hasattr(module, "prev_features")]

    def spans(num_frames: int) -> list[Span]:
        rest = range(1, num_frames, size)
        return [(0, 1), *((start, min(start + size, num_frames)) for start in rest)]

    def step(frames: Tensor, state: Any) -> tuple[Tensor, Any]:
        with _lent(owners, state) as features:
            out = part(frames if before is None else before(frames))
            features[:] = [owner.prev_features for owner in owners]
        return out if after is None else _mode(after(out)), features

    return Steps(_untiled(vae, spans), step)


@contextmanager
def _lent(owners: Sequence[Any], features: list[Any] | None) -> Iterator[list[Any]]:
    """The owners hold `features`, and afterwards what they held before."""
    own = [owner.prev_features for owner in owners]
    features = [None] * len(owners) if features is None else features
    try:
        for owner, feature in zip(owners, features, strict=True):
            owner.prev_features = feature
        yield features
    finally:
        for owner, feature in zip(owners, own, strict=True):
            owner.prev_features = feature


# KVAE, Kandinsky 6: segments of frames, and a dictionary of caches that each step changes.
def _decoding_segments(vae: Any, make_cache: Callable[[], Any], lengths: Callable[[int], list[int]]) -> Steps:
    def step(frames: Tensor, state: Any) -> tuple[Tensor, Any]:
        cache = make_cache() if state is None else state
        return vae.decoder(frames, cache), cache

    return Steps(_untiled(vae, lambda num_frames: _in_lengths(lengths(num_frames))), step)


def _encoding_segments(vae: Any, make_cache: Callable[[], Any], lengths: Callable[[int], list[int]]) -> Steps:
    def step(frames: Tensor, state: Any) -> tuple[Tensor, Any]:
        cache = make_cache() if state is None else state
        return _mode(vae.encoder(frames, cache)), cache

    return Steps(_untiled(vae, lambda num_frames: _in_lengths(lengths(num_frames))), step)


def _segments_of_kvae(vae: Any, method: Callable[..., Any], is_latent: bool) -> Callable[[int], list[int]]:
    size = inspect.signature(method).parameters["seg_len"].default

    def lengths(num_frames: int) -> list[int]:
        ratio = vae.config.temporal_compress_times if is_latent else 1
        found = _first_longer(ratio * (num_frames - 1) + 1, size)
        return [math.ceil(length / ratio) for length in found]

    return lengths


def _segments_of_kandinsky(vae: Any) -> Callable[[int], list[int]]:
    return lambda num_frames: _first_longer(num_frames, _function_of(vae, "SEGMENT_FRAMES"))


def _latent_segments_of_kandinsky(vae: Any) -> Callable[[int], list[int]]:
    size = _function_of(vae, "SEGMENT_FRAMES") // vae.temporal_compression_ratio
    return lambda num_frames: _first_longer(num_frames, size)


def _first_longer(num_frames: int, size: int) -> list[int]:
    """Segments of `size`, of which the first has one frame more, and the last what is left."""
    lengths = [min(size + 1, num_frames)]
    while (left := num_frames - sum(lengths)) > 0:
        lengths.append(min(size, left))
    return lengths


# HunyuanVideo, LTX, LTX-2 with framewise decoding: windows that share frames, faded one into the next.
def _decoding_windows(vae: Any, options: dict[str, Any]) -> Steps:
    conv = getattr(vae, "post_quant_conv", None)
    taken = inspect.signature(vae.decode).parameters
    embedding = [options.get("temb")] if "temb" in taken else []
    others = {"causal": options.get("causal")} if "causal" in taken else {}

    def spans(num_frames: int) -> list[Span] | None:
        ratio = vae.temporal_compression_ratio
        window, stride = vae.tile_sample_min_num_frames // ratio, vae.tile_sample_stride_num_frames // ratio
        return _windows(num_frames, window, stride) if vae.use_framewise_decoding else None

    def step(frames: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        if _is_tiled(vae, frames, vae.spatial_compression_ratio):
            out = vae.tiled_decode(frames, *embedding, **others).sample
        else:
            out = vae.decoder(frames if conv is None else conv(frames), *embedding, **others)
        if state is not None:
            out = out[:, :, :-1] if conv is None else out[:, :, 1:]
        stride = vae.tile_sample_stride_num_frames
        return _faded(state, out, vae.tile_sample_min_num_frames - stride, stride)

    return Steps(spans, step, lambda num_frames: (num_frames - 1) * vae.temporal_compression_ratio + 1)


def _encoding_windows(vae: Any) -> Steps:
    conv = getattr(vae, "quant_conv", None)

    def spans(num_frames: int) -> list[Span] | None:
        # LTX asks for framewise decoding here too
        is_framewise = vae.use_framewise_decoding if conv is None else vae.use_framewise_encoding
        window, stride = vae.tile_sample_min_num_frames, vae.tile_sample_stride_num_frames
        return _windows(num_frames, window, stride) if is_framewise else None

    def step(frames: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        if _is_tiled(vae, frames, 1):
            out = vae.tiled_encode(frames)
        else:
            out = vae.encoder(frames)
            out = out if conv is None else conv(out)
        ratio = vae.temporal_compression_ratio
        window, stride = vae.tile_sample_min_num_frames // ratio, vae.tile_sample_stride_num_frames // ratio
        moments, following = _faded(state, out if state is None else out[:, :, 1:], window - stride, stride)
        return _mode(moments), following

    return Steps(spans, step, lambda num_frames: (num_frames - 1) // vae.temporal_compression_ratio + 1)


def _windows(num_frames: int, window: int, stride: int) -> list[Span] | None:
    if num_frames <= window:
        return None
    return [(start, min(start + window + 1, num_frames)) for start in range(0, num_frames, stride)]


def _is_tiled(vae: Any, frames: Tensor, ratio: int) -> bool:
    """Whether the model cuts a window into tiles; `ratio`: pixels for a row of it."""
    height, width = vae.tile_sample_min_height // ratio, vae.tile_sample_min_width // ratio
    return vae.use_tiling and (frames.shape[3] > height or frames.shape[4] > width)


def _faded(previous: Tensor | None, x: Tensor, overlap: int, stride: int) -> tuple[Tensor, Tensor]:
    """The frames that a window gives, one more for the first, and its last ones, into which the next is faded.

    Frame by frame and with numbers for weights, as in the models: a tensor of weights would round in bf16.
    """
    if previous is None:
        stride += 1
    elif num_faded := min(previous.shape[2], x.shape[2], overlap):
        before = previous[:, :, -num_faded:]
        faded = [before[:, :, t] * (1 - t / num_faded) + x[:, :, t] * (t / num_faded) for t in range(num_faded)]
        x = torch.cat([torch.stack(faded, 2), x[:, :, num_faded:]], 2)
    return x[:, :, :stride], x[:, :, max(0, x.shape[2] - overlap) :].clone()
