"""`decode` and `encode`: a model over a clip of any length inside a memory budget, chunk after chunk.

Axes: B batch, C channels, T frames, H height, W width.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from opensora_kernels.checks import check_callable, check_float, check_shape

from .autoencoders import as_function
from .inference import own_random_numbers
from .loops import loop_of
from .plan import TilePlan, plan_tiles
from .recording import check_whole, foreseen_for, look, recorded_for
from .strategies import Model, Strategy, Streaming, Whole
from .tiled_strategy import Tiled

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
    chooses, and a warning says so if nothing exact fits. plan: what `plan_tiles` returned for the shape of z (or for
    more samples), or a TilePlan of one's own. Neither: all frames at once.
    progress: called with the number of frames made so far and of all frames, after each chunk.
    Gradients: none; the chunks are made under no_grad, and with autocast off, whatever is on where they are asked for.
    Temporary files of the plan are gone when the iterator is exhausted, closed, or dropped, and after an error.
    Numbers: streaming gives the frames of one run over the clip; where GroupNorm looks at all frames its statistics are
    merged from those of single frames, which rounds differently from PyTorch's, within the same error.
    Errors: before any frame: ValueError for a z that is not 5-D, empty, not finite, on the meta device, or that the
    decoder does not take (with the dtype, frame or channel counts that it does), for autocast that is on, for a plan
    of another shape, and for a budget that is too small (with the smallest that would do); TypeError for a z that is
    not floating-point, a plan that is none, a decoder or progress that cannot be called, or a decoder that cannot be
    recorded, unless it is to run whole.
    """
    check_callable("decode", "decoder", decoder)
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
    check_callable("encode", "encoder", encoder)
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
    _check_clip(caller, name, x)
    if progress is not None:
        check_callable(caller, "progress", progress)
    if plan is not None:
        _check_plan(caller, name, x, plan)
    if memory_budget is not None and plan is not None:
        raise ValueError(f"{caller}: memory_budget must be None where a plan is given, got {memory_budget!r}")
    if memory_budget is not None:
        plan = plan_tiles(model, tuple(x.shape), memory_budget, x.dtype, x.device)
        if not plan.strategy.is_exact:
            warnings.warn(f"{caller}: in {memory_budget} nothing exact fits, seams may show: {plan}", stacklevel=3)
    strategy = Whole() if plan is None else plan.strategy
    if isinstance(strategy, Streaming) and strategy.loop_in(model, x.shape[2]) is None:
        if strategy.by_layer and not plan.was_made_for(x):
            _check_model(caller, name, model, Streaming(), x, needs_length=False)
        recorded = recorded_for(caller, name, model, tuple(x.shape), x.dtype, x.device)
        num_frames = recorded.shape[2]
        chunks = strategy.run_recorded(recorded, x)
    else:
        num_frames = None
        if progress is not None or plan is None or not plan.was_made_for(x):
            num_frames = _check_model(caller, name, model, strategy, x, needs_length=progress is not None)
        chunks = strategy.run(model, x)
    return chunks if progress is None else _counted(chunks, num_frames, progress)


def _check_clip(caller: str, name: str, x: Tensor) -> None:
    check_float(caller, name, x)
    check_shape(caller, name, x, (None,) * 5, "(B, C, T, H, W)")
    if not x.numel():
        raise ValueError(f"{caller}: {name} must have no empty axis, got {tuple(x.shape)}")
    if x.is_meta:
        raise ValueError(f"{caller}: {name} must have data, got a tensor on the meta device: plan_tiles needs none")
    if not all_finite(x):
        raise ValueError(f"{caller}: {name} must be finite, got NaN or infinity")
    if torch.is_autocast_enabled(x.device.type):
        raise ValueError(f"{caller}: autocast must be off, since models run in the dtype of their weights, got it on")


def _check_plan(caller: str, name: str, x: Tensor, plan: Any) -> None:
    if not isinstance(plan, TilePlan) or not hasattr(plan.strategy, "run"):
        raise TypeError(f"{caller}: plan must be a TilePlan, such as TilePlan(Streaming(1)), got {plan!r}")
    # the last batch of many may be smaller
    if plan.shape and (x.shape[0] > plan.shape[0] or plan.shape[1:] != tuple(x.shape[1:])):
        raise ValueError(
            f"{caller}: {name} must have the shape {tuple(plan.shape)} that the plan was made for, or fewer samples, "
            f"got {tuple(x.shape)}"
        )


def _check_model(caller: str, name: str, model: Model, strategy: Strategy, x: Tensor, needs_length: bool) -> int | None:
    """The number of frames that a loop makes; raises what the model would raise half-way, before any frame."""
    clip = (tuple(x.shape), x.dtype, x.device)
    try:
        loop = loop_of(model, x.shape[2])
    except ValueError:
        if isinstance(strategy, Whole):
            return None  # the model's own tiling is on, and cuts the clip as it likes
        raise
    with own_random_numbers(x.device):
        if isinstance(strategy, Tiled):
            look(caller, name, model, lambda *clip: strategy.predict(model, *clip, x.device), *clip[:2])
        elif loop is not None:
            with suppress(TypeError):  # steps that cannot be recorded can be run
                # the first step of a length has no state yet, all others are alike
                return foreseen_for(caller, name, loop, *clip, *(() if needs_length else (2,))).num_frames
        elif isinstance(strategy, Whole):
            check_whole(caller, name, model, *clip)
    return None


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
