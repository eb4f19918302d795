"""Pulling chunks through a recorded model: each node runs only when the frames that it makes are asked for.

The programs of the nodes are generators. One that lacks frames yields the stage which makes them; one that has made
frames yields those. A loop with a stack of its own runs them, since a decoder is deeper than Python's recursion.
No program keeps a chunk in a variable while it waits: a chunk lives until its last reader has used it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from torch import Tensor

from .graph import Node, join, late_reads, longest_part, narrow, nodes_of, num_frames_in
from .spill import Parked, Spill


@dataclass(frozen=True)
class Run:
    """What the programs of one run share: the clip, frames a step as a share of all frames, the weights to use."""

    clip: Tensor
    share: Fraction
    constant: Callable[[Tensor], Tensor]

    def apply(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """function(*arguments): all that makes new frames goes through here."""
        return function(*arguments)

    def step(self, num_frames: int, multiple: int = 1) -> int:
        """How many of a stream's frames go through a node at once, in multiples of `multiple`."""
        wanted = -(-num_frames * self.share.numerator // self.share.denominator)
        return max(1, -(-wanted // multiple)) * multiple


@dataclass(frozen=True)
class Ending:
    """The last chunk that a program makes, and the state behind it."""

    chunk: Tensor
    state: Tensor


class Stage:
    """A node at work."""

    def __init__(self, node: Node, readers: list[Reader], run: Run) -> None:
        self.node = node
        self.inputs = readers
        self.readers: list[Reader] = []  # of its result
        self.is_done = False
        self.num_made = 0
        self.program = node.program(readers, run)

    def put(self, chunk: Any, spill: Spill) -> None:
        readers = [reader for reader in self.readers if not reader.is_closed]
        if isinstance(chunk, Ending):
            self._hand_on(chunk.state, [reader for reader in readers if reader.takes_state], spill)
            chunk = chunk.chunk
        num_frames = num_frames_in(chunk, self.node.axis)
        readers = [reader for reader in readers if not reader.takes_state and not reader.passes(num_frames)]
        parked = None
        some_are_early = any(not reader.is_late for reader in readers)
        for reader in readers:
            if reader.is_late and some_are_early and isinstance(chunk, Tensor):
                parked = spill.put(chunk) if parked is None else parked
                reader.receive(parked, num_frames)
            else:
                reader.receive(chunk, num_frames)
        self.num_made += num_frames
        if self.num_made >= self.node.num_frames:
            self.finish()

    def _hand_on(self, state: Tensor, readers: list[Reader], spill: Spill) -> None:
        for reader in readers:
            reader.receive(spill.put(state) if reader.is_late else state, 1)

    def finish(self) -> None:
        """Nothing more will be read or made."""
        self.is_done = True
        self.program.close()
        for reader in self.inputs:
            reader.close()


class Reader:
    """The frames of one stream that one reader has still to read."""

    def __init__(self, stage: Stage, is_late: bool, skips: int = 0, takes_state: bool = False) -> None:
        self.stage, self.axis, self.num_frames = stage, stage.node.axis, stage.node.num_frames
        if takes_state:
            self.axis, self.num_frames = None, 1
        self.is_late, self.is_closed, self.takes_state = is_late, False, takes_state
        self.position = self.available = 0
        self._skips = skips
        self._queue: deque[tuple[Any, int, int]] = deque()  # chunk, first frame of it to read, number of frames
        stage.readers.append(self)

    @property
    def is_at_end(self) -> bool:
        return self.position == self.num_frames

    @property
    def num_left(self) -> int:
        return self.num_frames - self.position

    def passes(self, num_frames: int) -> bool:
        """Whether the next frames to arrive will never be read; they need not wait here for the reader to say so."""
        if self.position + num_frames > self._skips:
            return False
        self.position += num_frames
        return True

    def receive(self, chunk: Any, num_frames: int) -> None:
        unread = max(0, self._skips - self.position) if not self.available else 0
        self._queue.append((chunk, unread, num_frames - unread))
        self.position += unread
        self.available += num_frames - unread

    def close(self) -> None:
        """Read no more."""
        self.is_closed, self.available = True, 0
        self._queue.clear()

    def wait(self, at_least: int) -> Generator[Stage, None, int]:
        """Number of frames to be had, `at_least` as many as asked for unless the stream ends before."""
        while self.available < at_least and not self.stage.is_done:
            yield self.stage
        return self.available

    def take(self, num_frames: int) -> Generator[Stage, None, Any]:
        """The next frames."""
        yield from self.wait(num_frames)
        if self.axis is None:
            self.position, self.available = 1, 0
            chunk = self._queue.popleft()[0]
            return chunk.load() if isinstance(chunk, Parked) else chunk
        found: list[Tensor] = []
        missing = num_frames
        while missing:
            chunk, start, length = self._queue.popleft()
            whole = start == 0 and length <= missing
            if isinstance(chunk, Parked):
                chunk = chunk.load()
            used = min(length, missing)
            found.append(chunk if whole else narrow(chunk, self.axis, start, used))
            if used < length:
                self._queue.appendleft((chunk, start + used, length - used))
            missing -= used
            del chunk
        self.position += num_frames
        self.available -= num_frames
        return join(found, self.axis)

    def take_all(self) -> Generator[Stage, None, Any]:
        """What is left of the stream; a piece stays at hand for the next time."""
        if self.axis is not None:
            return (yield from self.take(self.num_left))
        yield from self.wait(1)
        if isinstance(self._queue[0][0], Parked):
            self.receive(self._queue.popleft()[0].load(), 0)
        return self._queue[0][0]


def pull_chunks(output: Node, run: Run, spill: Spill) -> Iterator[Any]:
    """The chunks of `output`, in order."""
    nodes = nodes_of(output)
    late = late_reads(nodes)
    run = replace(run, share=min(Fraction(1), run.share / longest_part(output)))
    stages: dict[Node, Stage] = {}
    for node in nodes:
        readers = [
            Reader(stages[read], (node, index) in late, node.skips, node.is_state)
            for index, read in enumerate(node.inputs)
        ]
        stages[node] = Stage(node, readers, run)
    last = stages[output]
    result = Reader(last, is_late=False)
    del stages
    while True:
        while not result.available and not last.is_done:
            _advance(last, spill)
        if not result.available:
            return
        yield _at_hand(result)


def _at_hand(reader: Reader) -> Any:
    """All that a reader has received."""
    taking = reader.take(reader.available)
    try:
        next(taking)
    except StopIteration as taken:
        return taken.value
    raise AssertionError("frames at hand need no waiting")


def _advance(stage: Stage, spill: Spill) -> None:
    """Run until `stage` has made a chunk or is done."""
    stack = [stage]
    while stack:
        top = stack[-1]
        asked = next(top.program, None)
        if isinstance(asked, Stage):
            stack.append(asked)
            continue
        stack.pop()
        if asked is None:
            top.finish()
        else:
            top.put(asked, spill)
        del asked  # it would live on while the reader works
