"""`decode` and `encode`: a model over a clip of any length inside a memory budget, chunk after chunk.

Axes: B batch, C channels, T frames, H height, W width.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress

import torch
from torch import Tensor

from opensora_kernels.checks import check_float, check_shape

from .autoencoders import as_function
from .loops import Loop, foresee, loop_of
from .plan import TilePlan, plan_tiles
from .recording import first_step_of, recorded_for
from .strategies import Model, Streaming, Whole

Progress = Callable[[int, int], None]


def decode(
    decoder: Model,
    z: Tensor,
    *,
    memory_budget: int | str | None = None,
    plan: TilePlan | None = None,
    progress: Progress | None = None,
) -> Iterator[Tensor]:
    """The frames of decoder(z), in chunks in order, with the memory that `plan` or `memory_budget` allows.

    Shapes: z (B, C, T, H, W) -> chunks (B, 3, t, H', W') whose t add up to T'; each is the caller's to keep or drop.
    decoder: a module or function of one tensor, in evaluation mode. It is called once, for its graph, unless the plan
    is "whole": what it draws at random or reads from elsewhere is then drawn and read once. An autoencoder of
    diffusers, or its bound method `decode`, is taken as `decoder_of(vae)`: one that steps through frames by itself is
    streamed by its own steps and caches, with its tiling switched off.
    memory_budget: bytes on z's device, or text such as "10GiB", beyond those of z and of the weights; `plan_tiles`
    chooses, and a warning says so if nothing exact fits. plan: what `plan_tiles` returned, or a TilePlan of one's own.
    Neither: all frames at once.
    progress: called with the number of frames made so far and of all frames, after each chunk.
    Temporary files of the plan are gone when the iterator is exhausted, closed, or dropped, and after an error.
    Numbers: streaming gives the frames of one run over the clip; where GroupNorm looks at all frames its statistics are
    merged from those of single frames, which rounds differently from PyTorch's, within the same error.
    Errors: before any frame: ValueError for a z that is not 5-D, empty, not finite, or that the decoder does not take
    (with the frame and channel counts that it does), and for a budget that is too small (with the smallest that would
    do); TypeError for a z that is not floating-point, or a decoder that cannot be recorded.
    """
    return _run("decode", "z", as_function(decoder), z, memory_budget, plan, progress)


def encode(
    encoder: Model,
    x: Tensor,
    *,
    memory_budget: int | str | None = None,
    plan: TilePlan | None = None,
    progress: Progress | None = None,
) -> Iterator[Tensor]:
    """The latents encoder(x), in chunks in order: as `decode`, with x (B, 3, T, H, W) in and (B, C, t, h, w) out.

    Of an autoencoder of diffusers it is the mode of the latents' distribution (see `encoder_of`).
    """
    return _run("encode", "x", as_function(encoder, encodes=True), x, memory_budget, plan, progress)


def gather(chunks: Iterable[Tensor], out: Tensor | None = None) -> Tensor:
    """All chunks in one tensor along axis 2, in `out` where given: on any device, of the size of all frames.

    Errors: ValueError if the chunks do not fill `out`, or if there are none.
    """
    parts, start = [], 0
    for chunk in chunks:
        stop = start + chunk.shape[2]
        if out is None:
            parts.append(chunk)
        elif stop > out.shape[2] or (*out.shape[:2], *out.shape[3:]) != (*chunk.shape[:2], *chunk.shape[3:]):
            raise ValueError(
                f"gather: out must hold frames {start} to {stop} of chunks {tuple(chunk.shape)}, got {tuple(out.shape)}"
            )
        else:
            out[:, :, start:stop].copy_(chunk)
        start = stop
        del chunk  # not to be held while the next one is made
    if out is not None and start < out.shape[2]:
        raise ValueError(f"gather: out must have as many frames as the chunks, {start}, got {out.shape[2]}")
    if out is None and not parts:
        raise ValueError("gather: chunks must hold at least one chunk, got none")
    return torch.cat(parts, 2) if out is None else out


def _run(
    caller: str,
    name: str,
    model: Model,
    x: Tensor,
    memory_budget: int | str | None,
    plan: TilePlan | None,
    progress: Progress | None,
) -> Iterator[Tensor]:
    check_float(caller, name, x)
    check_shape(caller, name, x, (None,) * 5, "(B, C, T, H, W)")
    if not x.numel():
        raise ValueError(f"{caller}: {name} must have no empty axis, got {tuple(x.shape)}")
    if memory_budget is not None and plan is not None:
        raise ValueError(f"{caller}: memory_budget must be None where a plan is given, got {memory_budget!r}")
    if x.device.type != "meta" and not all_finite(x):
        raise ValueError(f"{caller}: {name} must be finite, got NaN or infinity")
    if torch.is_autocast_enabled(x.device.type):
        raise ValueError(f"{caller}: autocast must be off, since frames are made when they are asked for, got it on")
    if memory_budget is not None:
        plan = plan_tiles(model, tuple(x.shape), memory_budget, x.dtype, x.device)
        if not plan.strategy.is_exact:
            warnings.warn(f"{caller}: in {memory_budget} nothing exact fits, seams may show: {plan}", stacklevel=3)
    strategy = Whole() if plan is None else plan.strategy
    loop = loop_of(model, x.shape[2]) if isinstance(strategy, Streaming) else None
    if loop is not None:
        num_frames = _checked_loop(caller, name, loop, x, needs_length=progress is not None)
        chunks = loop.chunks(x)
    elif isinstance(strategy, Streaming):
        recorded = recorded_for(caller, name, model, tuple(x.shape), x.dtype, x.device)
        num_frames = recorded.shape[2]
        chunks = strategy.run_recorded(recorded, x)
    else:
        num_frames = None
        chunks = strategy.run(model, x)
    return chunks if progress is None else _counted(chunks, num_frames, progress)


def _checked_loop(caller: str, name: str, loop: Loop, x: Tensor, needs_length: bool) -> int | None:
    """The number of frames that the loop makes; raises what its first step raises, before any frame."""
    num_frames = None
    # a step that cannot be recorded can be run; and it draws its random numbers when it is
    with suppress(TypeError), torch.random.fork_rng([x.device] if x.device.type == "cuda" else []):
        first_step_of(caller, name, loop, tuple(x.shape), x.dtype, x.device)
        if needs_length:
            num_frames = foresee(loop, tuple(x.shape), x.dtype, x.device).num_frames
    return num_frames


def all_finite(x: Tensor) -> bool:
    """Whether x holds neither NaN nor infinity, read frame by frame so that no mask of the clip is made."""
    return all(bool(frame.isfinite().all()) for frame in x.unbind(2))


def _counted(chunks: Iterator[Tensor], num_frames: int | None, progress: Progress) -> Iterator[Tensor]:
    done = 0
    try:
        while True:
            chunk = [next(chunks, None)]
            if chunk[0] is None:
                return
            done += chunk[0].shape[2]
            progress(done, num_frames or done)
            yield chunk.pop()
    finally:
        chunks.close()
