"""The programs of nodes: how each kind of step takes frames from its readers and yields frames of its result."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from opensora_kernels.norms import frame_statistics

from .graph import Call, TimeAxis, join, narrow, num_frames_in
from .streams import Ending, Reader, Run, Stage

Program = Callable[[list[Reader], Run], Iterator[Any]]


def source(axis: TimeAxis | None) -> Program:
    """The clip itself."""

    def program(readers: list[Reader], run: Run) -> Iterator[Any]:
        if axis is None:
            yield run.clip
            return
        step = run.step(axis.frames)
        for start in range(0, axis.frames, step):
            yield narrow(run.clip, axis, start, min(step, axis.frames - start))

    return program


def constant(tensor: Tensor) -> Program:
    """A tensor of the model, all at once."""

    def program(readers: list[Reader], run: Run) -> Iterator[Any]:
        yield run.constant(tensor)

    return program


def made(function: Callable[..., Tensor], arguments: tuple[Any, ...], options: dict[str, Any]) -> Program:
    """function(clip, *arguments, **options), which reads nothing of the clip but where it is."""

    def program(readers: list[Reader], run: Run) -> Iterator[Any]:
        yield function(run.clip, *arguments, **options)

    return program


def piece(call: Call) -> Program:
    """The whole of every input through a function, once."""

    def program(readers: list[Reader], run: Run) -> Iterator[Any]:
        yield run.apply(call, (yield from _all_of_each(readers)), run.constant)

    return program


def pass_on() -> Program:
    """A piece or a stream under another name, or with another axis for time."""

    def program(readers: list[Reader], run: Run) -> Iterator[Any]:
        yield (yield from readers[0].take_all())

    return program


def each_chunk(call: Call, multiple: int = 1) -> Program:
    """A function of frames, `multiple` at least at a time; every chunk sees the pieces among the inputs."""

    def program(readers: list[Reader], run: Run) -> Iterator[Any]:
        lead = next(reader for reader in readers if reader.axis is not None)
        step = run.step(lead.num_frames, multiple)
        while not lead.is_at_end:
            available = yield from lead.wait(multiple)
            length = min(available // multiple * multiple, step)
            yield run.apply(call, (yield from _frames_of_each(readers, length)), run.constant)

    return program


def sliced(stop: int) -> Program:
    """Frames up to `stop`, without those that the node skips."""

    def program(readers: list[Reader], run: Run) -> Iterator[Any]:
        (reader,) = readers
        while reader.position < stop:
            available = yield from reader.wait(1)
            length = min(available, stop - reader.position)
            if reader.position + length == stop:
                yield (yield from _last(reader, length))
            else:
                yield (yield from reader.take(length))

    return program


def joined() -> Program:
    """One input after the other."""

    def program(readers: list[Reader], run: Run) -> Iterator[Any]:
        for reader in readers:
            if reader.axis is None:
                yield (yield from reader.take(1))
            else:
                while not reader.is_at_end:
                    length = yield from reader.wait(1)
                    yield (yield from reader.take(length))

    return program


def padded(pad: Callable[[Tensor, int, int], Tensor], front: int, back: int) -> Program:
    """pad(chunk, frames in front, frames behind), with frames in front of the first chunk and behind the last alone."""

    def program(readers: list[Reader], run: Run) -> Iterator[Any]:
        (reader,) = readers
        step = run.step(reader.num_frames)
        while not reader.is_at_end:
            length = min((yield from reader.wait(1)), step)
            is_first, is_last = reader.position == 0, length == reader.num_left
            yield run.apply(pad, (yield from reader.take(length)), front if is_first else 0, back if is_last else 0)

    return program


def reflected(pad: Callable[[Tensor, int], Tensor], axis: TimeAxis, back: int) -> Program:
    """pad(chunk, frames behind), the last chunk with the frames before it that are reflected behind the clip."""

    def program(readers: list[Reader], run: Run) -> Iterator[Any]:
        (reader,) = readers
        step = run.step(reader.num_frames)
        kept: list[Tensor] = []
        while not reader.is_at_end:
            length = min((yield from reader.wait(1)), step)
            num_known = num_frames_in(kept[0], axis) if kept else 0
            kept.append((yield from reader.take(length)))
            chunk = [join(kept, axis)]
            num_kept = min(num_known + length, back + 1)
            kept = [narrow(chunk[0], axis, num_known + length - num_kept, num_kept).clone()]
            num_behind = back if reader.is_at_end else 0
            made = [run.apply(pad, chunk.pop(), num_behind)]
            yield narrow(made.pop(), axis, num_known, length + num_behind)

    return program


def statistics() -> Program:
    """Mean and squared deviations of all frames, in one piece (B, C, T, 2)."""

    def program(readers: list[Reader], run: Run) -> Iterator[Any]:
        (reader,) = readers
        step = run.step(reader.num_frames)
        found = []
        while not reader.is_at_end:
            length = min((yield from reader.wait(1)), step)
            found.append(run.apply(frame_statistics, (yield from reader.take(length))))
        yield torch.cat(found, 2)

    return program


def windows(
    call: Callable[..., Tensor], weights: list[Tensor | None], span: int, stride: int, before: int, after: int
) -> Program:
    """A function of windows of `span` frames every `stride` <= span frames, of a clip padded before and after it.

    call(chunk, *weights, number of frames to pad in front, behind) computes all windows of what it gets. Frames that
    later windows read again are kept.
    """

    def program(readers: list[Reader], run: Run) -> Iterator[Any]:
        (reader,) = readers
        step = run.step(reader.num_frames, stride)
        given = [None if weight is None else run.constant(weight) for weight in weights]
        kept: list[Tensor] = []  # the last frames read, if the next window begins with them
        num_kept, num_front = 0, before
        while not reader.is_at_end:
            length = min((yield from reader.wait(1)), step)
            num_behind = after if length == reader.num_left else 0
            num_windows = (num_front + num_kept + length + num_behind - span) // stride + 1
            kept.append((yield from reader.take(length)))
            if num_windows <= 0:
                num_kept += length
                continue
            chunk = [torch.cat(kept, 2) if len(kept) > 1 else kept[0]]
            used = num_windows * stride
            kept = [chunk[0][:, :, max(0, used - num_front) :].clone()]
            num_kept, num_padded, num_front = kept[0].shape[2], num_front, max(0, num_front - used)
            yield run.apply(call, chunk.pop(), *given, num_padded, num_behind)

    return program


def twice_the_frames(first_alone: bool) -> Program:
    """Twice the frames, interpolated linearly; the first alone, apart from the others, as `upsample_conv3d` has it."""

    def program(readers: list[Reader], run: Run) -> Iterator[Any]:
        (reader,) = readers
        if first_alone:
            yield (yield from reader.take(1))
        step = run.step(reader.num_frames)
        kept: list[Tensor] = []  # the frame that is to be doubled next, behind its predecessor if it has one
        while not reader.is_at_end:
            length = min((yield from reader.wait(1)), step)
            num_known = max(0, sum(frames.shape[2] for frames in kept) - 1)
            is_last = length == reader.num_left
            kept.append((yield from reader.take(length)))
            chunk = [torch.cat(kept, 2) if len(kept) > 1 else kept[0]]
            kept = [chunk[0][:, :, -2:].clone()]
            doubled = chunk[0].shape[2] - num_known - (not is_last)
            if doubled:
                yield run.apply(_doubled, chunk.pop(), num_known, doubled)

    return program


def _doubled(frames: Tensor, start: int, num_frames: int) -> Tensor:
    twice = F.interpolate(frames, scale_factor=(2, 1, 1), mode="trilinear")
    return twice[:, :, 2 * start : 2 * (start + num_frames)]


def convolved(call: Call, span: int, stride: int, num_front: int, is_given_state: bool = False) -> Program:
    """call([state, frames...]) -> [result, state for the next frames], as `causal_conv3d` with `return_state`.

    The first reader's frames are convolved; the others are pieces, or streams with a frame for each of the result. The
    last may be the state to begin with. The state behind the last frame comes out with the last chunk.
    """

    def program(readers: list[Reader], run: Run) -> Iterator[Any]:
        x, *others = readers
        step = run.step(x.num_frames, stride)
        state: Tensor | None = None
        if is_given_state:
            given = others.pop()
            state = yield from given.take(given.num_frames)
        while not x.is_at_end:
            have = num_front if state is None else state.shape[2]
            missing = max(1, span - have)
            length = min((yield from x.wait(missing)), max(step, missing))
            if have + length < span:
                return  # the last frames fill no window
            values = [state, (yield from x.take(length))]
            values += yield from _frames_of_each(others, (have + length - span) // stride + 1)
            results = _emptied(call, values, run)
            state = results.pop()
            yield Ending(results.pop(), state) if x.is_at_end else results.pop()

    return program


def attended(attend: Callable[..., Tensor], seen: list[int], mask: Tensor | None) -> Program:
    """attend(queries, keys, values, mask, number of queries before) of the frames of three streams, along axis -2.

    Query t needs the first seen[t] keys. All of them are kept, in one piece of memory each for keys and values. `mask`
    may be the fourth reader's.
    """

    def program(readers: list[Reader], run: Run) -> Iterator[Any]:
        q, *others = readers
        step = run.step(q.num_frames)
        given = run.constant(mask) if mask is not None else None
        if len(others) > 2:
            given = yield from others.pop().take_all()
        kept: list[Tensor] = []
        while not q.is_at_end:
            start = q.position
            length = min((yield from q.wait(1)), step)
            num_seen = seen[start + length - 1]
            for index, reader in enumerate(others):
                if (missing := num_seen - reader.position) <= 0:
                    continue
                frames = [(yield from reader.take(missing))]
                if len(kept) == index:
                    shape = frames[0].shape
                    kept.append(frames[0].new_empty(*shape[:-2], reader.num_frames, shape[-1]))
                kept[index].narrow(-2, num_seen - missing, missing).copy_(frames.pop())
            queries = [(yield from q.take(length))]
            yield run.apply(attend, queries.pop(), *(each.narrow(-2, 0, num_seen) for each in kept), given, start)

    return program


def _emptied(call: Call, values: list[Any], run: Run) -> list[Tensor]:
    """call(values), the list given back empty so that nobody holds the frames while the program waits."""
    results = run.apply(call, values, run.constant)
    values.clear()
    return list(results)


def _last(reader: Reader, length: int) -> Generator[Stage, None, Any]:
    chunk = [(yield from reader.take(length))]
    reader.close()
    return chunk.pop()


def _all_of_each(readers: list[Reader]) -> Generator[Stage, None, list[Any]]:
    values = []
    for reader in readers:
        values.append((yield from reader.take_all()))
    return values


def _frames_of_each(readers: list[Reader], length: int) -> Generator[Stage, None, list[Any]]:
    """The pieces, and the next `length` frames of the streams."""
    values = []
    for reader in readers:
        values.append((yield from (reader.take_all() if reader.axis is None else reader.take(length))))
    return values
