"""One case on one device: its inputs, what is right for them, and the time of whoever gets it right."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch._functorch import config as functorch_config
from torch.utils import _pytree as pytree

import opensora_kernels
from bench import measure
from bench.measure import Ceilings, as_graphs, peak_bytes, tensors, time_calls, why_wrong
from opensora_kernels import backends, use
from opensora_kernels.cases import Case, Maker, bytes_moved

Direction = Literal["forward", "backward"]
Arguments = dict[str, Any]

MOST_COPIES = 8
# Below this a GPU waits for the host, which needs 5 to 10 us for a launch: such calls are replayed as a CUDA graph.
LAUNCH_BOUND_SECONDS = 20e-6
# A peer may err so many times as much as the accuracy rule allows; it is timed, and marked.
LENIENCY = 4.0
# Inputs that the gradients do not depend on, which a backward pass need not read.
_UNREAD_BACKWARD = {"gate_residual": {"x"}, "guided_euler_step": {"z"}, "pack_shards": {"tensors"}}
_UNREAD_BACKWARD |= {"causal_conv3d": {"bias", "residual"}, "upsample_conv3d": {"bias"}}
_UNREAD_BACKWARD |= {"unpack_shards": {"packed"}, "blend_tiles": {"tiles"}}


@dataclass(frozen=True)
class Contender:
    """Someone to be timed. `bind` makes the call for given arguments, outside the timing; `backends` is what `use` is
    told meanwhile. `is_partial`: it may return the first of the reference's results alone."""

    name: str
    bind: Callable[[Mapping[str, Any]], Callable[[], Any]]
    kind: Literal["backend", "compile", "peer"] = "backend"
    backends: Mapping[str, str] = field(default_factory=dict)
    is_reference: bool = False
    is_partial: bool = False
    leniency: float = 1.0


def of_backend(op: str, backend: str) -> Contender:
    """The public function, with `backend` ordered; for the reference all operators inside it are references too."""
    is_reference = backend == "reference"
    ordered = dict.fromkeys(backends.ops(), "reference") if is_reference else {op: backend}
    function = getattr(opensora_kernels, op)
    return Contender(
        backend, lambda arguments: partial(function, **arguments), backends=ordered, is_reference=is_reference
    )


def compiled_reference(op: str) -> Contender:
    torch._dynamo.reset()
    function = torch.compile(getattr(opensora_kernels, op), dynamic=False)
    ordered = dict.fromkeys(backends.ops(), "reference")
    return Contender("torch.compile", lambda arguments: partial(function, **arguments), "compile", ordered)


class Workload:
    """A case drawn at least twice: calls take the copies in turn, and results are checked on values never seen in the
    memory that they then lie in."""

    def __init__(
        self,
        op: str,
        case: Case,
        dtype: torch.dtype,
        device: str,
        direction: Direction = "forward",
        *,
        most_copies: int = MOST_COPIES,
    ) -> None:
        self.op, self.case, self.dtype, self.device, self.direction = op, case, dtype, device, direction
        self.copies = [self._drawn(0), self._drawn(1)]
        while len(self.copies) < min(most_copies, -(-measure.FLUSHED_BYTES[device] // max(1, self._input_bytes()))):
            self.copies.append(self._drawn(len(self.copies)))
        self._values = [[leaf.detach().clone() for leaf in tensors(copy)] for copy in self.copies]
        self.truth_by = "reference"
        exact = torch.float64 if dtype == torch.float32 or not case.is_large else torch.float32
        self._plain = [self._expected(copy, dtype) for copy in self.copies[:2]]
        self._truth = [self._expected(copy, exact) for copy in self.copies[:2]]

    def is_empty(self) -> bool:
        return bytes_moved({}, self._plain[0]) == 0

    def why_not(self, backend: str) -> str | None:
        return backends.why_not(self.op, backend, *backends.flat_arguments(self.op, **self.copies[0]))

    def chosen(self) -> str:
        """The backend that runs here for who asks for none."""
        return backends.choose(self.op, *backends.flat_arguments(self.op, **self.copies[0]))

    def floor(self, ceilings: Ceilings) -> dict[str, float]:
        """Bytes and operations that nobody can avoid, and the seconds that they take at best."""
        moved, flops = self._least
        return {"bytes": moved, "flops": flops, "floor": max(moved / ceilings.bandwidth, flops / ceilings.rate)}

    @cached_property
    def _least(self) -> tuple[int, int]:
        """Forward: inputs read, results written. Backward: cotangents and what gradients depend on read, gradients that
        are no cotangent themselves written, with twice the operations of the forward pass."""
        arguments = self.copies[0]
        if self.direction == "forward":
            return bytes_moved(arguments, self._plain[0]), self.case.flops(arguments)
        reference, gradients = of_backend(self.op, "reference"), tensors(self._plain[0])
        with use(**reference.backends):
            cotangents = self._cotangents(self._outputs(reference, arguments))
        same = [[one.shape == other.shape and torch.equal(one, other) for other in cotangents] for one in gradients]
        written = [gradient for gradient, passes in zip(gradients, same, strict=True) if not any(passes)]
        unread = _UNREAD_BACKWARD.get(self.op, set())
        read = {name: value for name, value in arguments.items() if name not in unread}
        return bytes_moved(read, [cotangents, written]), 2 * self.case.flops(arguments)

    def measure(self, contender: Contender, ceilings: Ceilings, *, seconds: float | None = None) -> dict[str, Any]:
        """`wrong` with the reason; or times, bytes and floor. Accuracy is checked before the timing; of the last result
        that was timed; and then of every copy, with other values in the same memory, where a result kept from an
        earlier call is wrong. Peers somewhat less accurate are timed all the same, and `less_accurate` says so."""
        has_gradient = self.direction == "backward"
        # a backward pass that is timed keeps its graph, whose buffers torch.compile would otherwise reuse
        keeping = functorch_config.patch(donated_buffer=False)
        with use(**contender.backends), torch.set_grad_enabled(has_gradient), keeping:
            # deterministic algorithms would have torch.compile compile again, for them
            with _poisoned(contender.kind != "compile"):
                first = self.call(contender, self.copies[0])()
            strictly = contender
            wrong = less_accurate = self._why_wrong(contender, first, 0)
            if wrong is not None and contender.kind != "backend":
                contender = replace(contender, leniency=LENIENCY)
                wrong = self._why_wrong(contender, first, 0)
            del first
            if wrong is not None:
                return {"wrong": wrong}
            floor = self.floor(ceilings)
            calls = [self.call(contender, copy) for copy in self.copies]
            replays = None
            if self.device == "cuda" and not has_gradient and floor["floor"] < LAUNCH_BOUND_SECONDS:
                replays = as_graphs(calls)
            last: list[Any] = []
            timing = time_calls(replays or calls, self.device, seconds=seconds, last=last)
            wrong = self._why_wrong(contender, last.pop(), 0)
            wrong = wrong and f"right at first, but not when timed: {wrong}"
            peak = peak_bytes(calls[0], self.device)
            wrong = wrong or self._why_wrong_on_other_values(contender, replays)
        if wrong is not None:
            return {"wrong": wrong}
        found = {"less_accurate": less_accurate} if contender is not strictly else {}
        return asdict(timing) | floor | {"peak_bytes": peak, "is_replayed": replays is not None} | found

    def _drawn(self, seed: int) -> Arguments:
        arguments = self.case.make(Maker(self.dtype, self.device, seed))
        if self.direction == "backward":
            # a gradient through state and statistics as well would be another operator's work too
            arguments = {name: value for name, value in arguments.items() if not name.startswith("return_")}
            for leaf in tensors(arguments):
                leaf.requires_grad_(leaf.is_floating_point())
        return arguments

    def _input_bytes(self) -> int:
        return bytes_moved(self.copies[0], ())

    def _expected(self, arguments: Arguments, dtype: torch.dtype) -> Any:
        """The reference's result at `dtype`; where memory does not hold it, the library's, and `truth_by` says so."""
        if dtype != self.dtype:
            arguments = pytree.tree_map(partial(_at, dtype), arguments)
        contender = of_backend(self.op, "reference")
        tf32_off = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=False, allow_tf32=False)
        with tf32_off, torch.set_grad_enabled(self.direction == "backward"):
            if self.truth_by == "reference":
                try:
                    with use(**contender.backends):
                        return self.call(contender, arguments)()
                except torch.OutOfMemoryError:
                    if "library" not in backends.backends_of(self.op):
                        raise
                    self.truth_by = "library"
            with use(**{self.op: "library"}):
                return self.call(of_backend(self.op, "library"), arguments)()

    def _outputs(self, contender: Contender, arguments: Arguments) -> list[Tensor]:
        with torch.enable_grad():
            outputs = tensors(contender.bind(arguments)())
        return [out for out in outputs if out.requires_grad]

    def call(self, contender: Contender, arguments: Arguments) -> Callable[[], Any]:
        if self.direction == "forward":
            return contender.bind(arguments)
        outputs = self._outputs(contender, arguments)
        leaves = [leaf for leaf in tensors(arguments) if leaf.requires_grad]
        cotangents = self._cotangents(outputs)
        return lambda: torch.autograd.grad(outputs, leaves, cotangents, retain_graph=True, allow_unused=True)

    def _cotangents(self, outputs: list[Tensor]) -> list[Tensor]:
        draw = Maker(self.dtype, self.device, seed=99)
        return [draw.normal(*out.shape, dtype=out.dtype) for out in outputs]

    def why_wrong(self, contender: Contender) -> str | None:
        """Of a call on the first copy, with a result in memory full of NaN."""
        with _poisoned(contender.kind != "compile"):
            return self._why_wrong(contender, self.call(contender, self.copies[0])(), 0)

    def _why_wrong(self, contender: Contender, actual: Any, seed: int) -> str | None:
        plain, truth = self._plain[seed], self._truth[seed]
        if contender.is_partial and self.direction == "forward":
            actual, plain, truth = (tensors(tree) for tree in (actual, plain, truth))
            plain, truth = plain[: len(actual)], truth[: len(actual)]
        is_reference = contender.is_reference and self.direction == "forward"
        lenient = {"is_reference": is_reference, "leniency": contender.leniency}
        return why_wrong(actual, plain, truth, self.dtype, **lenient)

    def _why_wrong_on_other_values(
        self, contender: Contender, replays: Sequence[Callable[[], Any]] | None
    ) -> str | None:
        """Whether inputs were changed, or a copy in which other values now lie is taken for what it was."""
        for copy, values in zip(self.copies, self._values, strict=True):
            if not all(map(torch.equal, tensors(copy), values)):
                self._write_all()
                return "it changed its inputs"
        try:
            for index, copy in enumerate(self.copies):
                seed = 0 if index == 1 else 1
                self._write(index, seed)
                run = replays[index] if replays else self.call(contender, copy)
                wrong = self._why_wrong(contender, run(), seed)
                if wrong is not None:
                    return f"right at first, but not for other values: {wrong}"
        finally:
            self._write_all()
        return None

    def _write_all(self) -> None:
        for index in range(len(self.copies)):
            self._write(index, index)

    def _write(self, index: int, seed: int) -> None:
        """Values of copy `seed` into copy `index`, behind the back of who watches versions."""
        for leaf, value in zip(tensors(self.copies[index]), self._values[seed], strict=True):
            with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(leaf):
                leaf.copy_(value)


@contextmanager
def _poisoned(is_wanted: bool) -> Iterator[None]:
    """torch.empty gives NaN, so that what a kernel leaves out can't be right by chance."""
    was_on, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(was_on or is_wanted, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_on, warn_only=warns)


def _at(dtype: torch.dtype, leaf: Any) -> Any:
    if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
        return leaf
    return leaf.detach().to(dtype).requires_grad_(leaf.requires_grad)
