"""`python -m bench tune OP|all`: times the constants of Triton kernels on this GPU and writes the faster ones down.

Every question that a call and its backward pass ask of `opensora_kernels.tuning` is answered in turn with one constant
doubled or halved, as long as that is faster by more than noise and as accurate. For causal_conv3d the form is chosen
first: PyTorch's own chain, or either Triton form. The table is `opensora_kernels/tuned/<device>.json`, to be committed.
It is written after every answer; Ctrl-C and the end of the time that is given keep it.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import opensora_kernels
from bench.about import output_folder, write_json
from bench.cases import DTYPES, chosen_cases
from bench.measure import tensors, time_calls, why_wrong
from bench.record import DeviceLost, failure, status_of
from opensora_kernels import backends, tuning, use
from opensora_kernels.cases import Case, Maker
from opensora_kernels.ops.causal_conv3d.triton_forms import CHAIN, GEMM, LIBRARY

# Medians of two runs of one kernel differ by up to 2 %.
GAIN = 1.03
MOST_STEPS = 8
# Of one candidate: 200 runs of a kernel that takes 250 us, the median of which is as steady as that of more.
SECONDS = 0.05
# Whose constants matter most, in this order: the convolution's forms, then what has a goal on a GPU.
FIRST = ("causal_conv3d", "rms_norm", "rms_norm_silu", "group_norm_silu", "qk_norm_rope", "modulate", "gate_residual",
         "guided_euler_step", "qk_norm_attention")  # fmt: skip

Constants = dict[str, int]
Timer = Callable[[Callable[[], Any]], float]


@dataclass
class Clock:
    """Times calls until it is over: once `ends` of `time.monotonic()` has passed, no further candidate is tried."""

    seconds_of: Timer
    ends: float = math.inf

    def is_over(self) -> bool:
        return time.monotonic() >= self.ends


class Call:
    """One case in one dtype, forward alone or forward and backward, and the reference's results to compare with. All
    questions but the one that is tried are answered by what `known` says, which earlier cases found."""

    def __init__(
        self,
        op: str,
        case: Case,
        dtype: torch.dtype,
        device: str,
        *,
        is_backward: bool,
        known: Mapping[str, Constants] | None = None,
    ) -> None:
        self.op, self.case, self.dtype, self.device, self.is_backward = op, case, dtype, device, is_backward
        self.known = {} if known is None else known
        self._arguments, self._leaves = self._draw(dtype)

    def why_not(self) -> str | None:
        """The reason why Triton can't serve this case, or None."""
        return backends.why_not(self.op, "triton", *backends.flat_arguments(self.op, **self._arguments))

    def run(self) -> Any:
        return self._run(self._arguments, self._leaves)

    @cached_property
    def plain_and_truth(self) -> tuple[Any, Any]:
        # as in the benches: fp32 is fine enough a truth for bf16 at the size of a release
        exact = torch.float64 if self.dtype is torch.float32 else torch.float32
        exactly = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=False, allow_tf32=False)
        with use(**{self.op: "reference"}), exactly:
            return self.run(), self._run(*self._draw(exact))

    def questions(self) -> dict[str, Constants]:
        """The keys that it asks for, with the constants of today."""
        asked: dict[str, Constants] = {}

        def note(op: str, key: str, chosen: Constants) -> Mapping[str, int]:
            if op != self.op:
                return {}
            known = self.known.get(key, {})
            asked[key] = {**chosen, **known}
            return known

        with use(**{self.op: "triton"}), tuning.answered(note):
            self.run()
        return asked

    def _draw(self, dtype: torch.dtype) -> tuple[dict[str, Any], list[Tensor]]:
        arguments = self.case.make(Maker(dtype, self.device))
        floating = [leaf for leaf in tensors(arguments) if leaf.is_floating_point() and leaf.is_leaf]
        return arguments, [leaf.requires_grad_() for leaf in floating]

    def _run(self, arguments: dict[str, Any], leaves: list[Tensor]) -> Any:
        function = getattr(opensora_kernels, self.op)
        if not self.is_backward:
            with torch.no_grad():
                return function(**arguments)
        outputs = [out for out in tensors(function(**arguments)) if out.requires_grad]
        return list(torch.autograd.grad(outputs, leaves, [out.detach() for out in outputs], allow_unused=True))


def tune(
    op: str, case: Case, dtype: torch.dtype, device: str, clock: Clock, known: Mapping[str, Constants] | None = None
) -> Iterator[tuple[str, Constants]]:
    """Each key of a case with the constants that are faster than today's, as soon as they are found.

    Raises Skipped where Triton does not serve the case, torch.OutOfMemoryError where memory does not hold it.
    """
    forward, both = (
        Call(op, case, dtype, device, is_backward=is_backward, known=known) for is_backward in (False, True)
    )
    if (reason := forward.why_not()) is not None:
        raise Skipped(reason)
    asked_forward = forward.questions()
    for key, today in {**asked_forward, **both.questions()}.items():
        if clock.is_over():
            return
        call = forward if key in asked_forward else both
        best = fastest_form(both, key, today, clock) if key.startswith("form ") else refined(call, key, today, clock)
        if changed := {name: value for name, value in best.items() if today.get(name) != value}:
            yield key, changed


class Skipped(Exception):
    """Says why a case is not tuned."""


def fastest_form(call: Call, key: str, today: Constants, clock: Clock) -> Constants:
    """Today's form, unless another is faster by more than noise; nothing where none could be timed."""
    forms = {form: seconds_with(call, key, {"FORM": form}, clock) for form in (CHAIN, LIBRARY, GEMM)}
    current = today.get("FORM", CHAIN)
    fastest = min(forms, key=lambda form: forms[form])
    if math.isinf(forms[fastest]):
        return {}
    return {"FORM": fastest if forms[fastest] * GAIN < forms[current] else current}


def refined(call: Call, key: str, today: Constants, clock: Clock) -> Constants:
    """From today's constants on, whatever single change gains most, until none does."""
    best, seconds = today, seconds_with(call, key, today, clock)
    for _ in range(MOST_STEPS):
        tried = (constants for constants in neighbours(best) if not clock.is_over())
        timed = [(seconds_with(call, key, constants, clock), constants) for constants in tried]
        fastest, constants = min(timed, key=lambda pair: pair[0], default=(seconds, best))
        if fastest * GAIN >= seconds:
            break
        best, seconds = constants, fastest
    return best


def neighbours(constants: Constants) -> Iterator[Constants]:
    for name, value in constants.items():
        steps = (value - 1, value + 1) if name == "num_stages" else (value // 2, value * 2)
        yield from ({**constants, name: step} for step in steps if step >= 1)


def seconds_with(call: Call, key: str, constants: Constants, clock: Clock) -> float:
    """Infinite where a kernel does not compile with these constants, or gives a wrong result."""
    plain, truth = call.plain_and_truth

    def answer(op: str, asked: str, _: Constants) -> Mapping[str, int]:
        if op != call.op:
            return {}
        return constants if asked == key else call.known.get(asked, {})

    backend = "reference" if constants.get("FORM") == CHAIN else "triton"
    with use(**{call.op: backend}), tuning.answered(answer):
        try:
            # gradients of PyTorch's own chain are `plain` itself, within what the rule allows beside it
            is_reference = backend == "reference" and not call.is_backward
            wrong = why_wrong(call.run(), plain, truth, call.dtype, is_reference=is_reference)
        except torch.OutOfMemoryError:
            raise  # says nothing about constants: memory also holds the truth
        except Exception as error:  # whatever a compiler or a launch raises: these are no candidate
            wrong = failure(error, call.device)["failed"]
        if wrong is not None:
            print(f"  {key} {constants}: {wrong}", file=sys.stderr)
            return math.inf
        return clock.seconds_of(call.run)


@dataclass
class Tuning:
    """Cases one after the other: `save(op, found)` gets what is faster at once, the screen a line for each case."""

    dtype: torch.dtype
    device: str
    seconds_of: Timer
    save: Callable[[str, Mapping[str, Constants]], object]
    seconds_each: float = math.inf
    ends: float = math.inf
    known: dict[str, dict[str, Constants]] = field(default_factory=dict)

    def run(self, op: str, cases: Sequence[Case]) -> int:
        """How many cases were tuned, within `seconds_each`. Raises DeviceLost where no other can be."""
        clock = Clock(self.seconds_of, min(self.ends, time.monotonic() + self.seconds_each))
        num_tuned = 0
        for case in cases:
            if clock.is_over():
                print(f"{op} {case.name}: not begun, no time left", flush=True)
                continue
            try:
                found = self._tuned(op, case, clock) or "nothing faster"
                print(f"{op} {case.name}: {found}{', cut short' if clock.is_over() else ''}", flush=True)
                num_tuned += 1
            except Skipped as reason:
                print(f"{op} {case.name}: skipped, {reason}", flush=True)
            except torch.OutOfMemoryError:
                print(f"{op} {case.name}: skipped, out of memory", flush=True)
            except DeviceLost:
                raise
            except Exception as error:  # whatever a compiler raises: the other cases stand
                print(f"{op} {case.name}: failed, {failure(error, self.device)['failed']}", flush=True)
        return num_tuned

    def _tuned(self, op: str, case: Case, clock: Clock) -> dict[str, Constants]:
        known = self.known.setdefault(op, {})
        found = {}
        for key, constants in tune(op, case, self.dtype, self.device, clock, known):
            found[key] = constants
            known[key] = {**known.get(key, {}), **constants}  # the next case starts from there
            self.save(op, {key: constants})
        return found


def important_first(ops: Sequence[str]) -> list[str]:
    """Those with Triton kernels, FIRST in front."""
    with_kernels = [op for op in ops if "triton" in backends.backends_of(op)]
    return sorted(with_kernels, key=lambda op: FIRST.index(op) if op in FIRST else len(FIRST))


def write(device: str, op: str, found: Mapping[str, Constants], folder: Path) -> Path:
    """Add `found` to the table of `device`."""
    path = folder / f"{device}.json"
    table = json.loads(path.read_text()) if path.exists() else {}
    of_op = table.setdefault(op, {})
    for key, constants in found.items():
        of_op[key] = {**of_op.get(key, {}), **constants}
    folder.mkdir(exist_ok=True)
    write_json(path, table, sort_keys=True)
    return path


def main(arguments: Sequence[str]) -> int:
    """Exit status 1 when no case could be tuned or the device is lost, 130 after Ctrl-C."""
    options = read_options(arguments)
    torch.backends.cudnn.benchmark = True  # PyTorch's own chain gets its best shot
    name = tuning.device_name(torch.device("cuda", torch.cuda.current_device()))
    tuned = Tuning(
        DTYPES[options.dtype],
        "cuda",
        seconds_of=lambda run: time_calls(run, "cuda", seconds=SECONDS).median,
        save=lambda op, found: write(name, op, found, options.folder),
        seconds_each=options.seconds_each,
        ends=time.monotonic() + options.seconds_in_all,
    )
    num_tuned = 0

    def run() -> None:
        nonlocal num_tuned
        for op in important_first(backends.ops() if options.op == "all" else [options.op]):
            num_tuned += tuned.run(op, chosen_cases(op, options.cases))
            torch.cuda.empty_cache()

    return status_of(run, "what was found is in the table") or int(num_tuned == 0)


def read_options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench tune", description=__doc__.split(":", 1)[1])
    add = parser.add_argument
    add("op", choices=[*backends.ops(), "all"])
    add("--cases", default="large", help="small, large or one's name; default: %(default)s")
    add("--dtype", choices=DTYPES, default="bf16")
    add("--folder", type=output_folder, default=tuning.TABLES, help="of the tables; default: the package's own")
    add("--seconds-each", type=float, default=math.inf, metavar="N", help="at most for each operator")
    add("--seconds-in-all", type=float, default=math.inf, metavar="N", help="begin nothing later than that")
    options = parser.parse_args(arguments)
    for name in ("seconds_each", "seconds_in_all"):
        if not getattr(options, name) > 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0, got {getattr(options, name)}")
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device to time kernels on")
    return options
