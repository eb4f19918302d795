"""`python -m bench tune OP|all`: times the constants of Triton kernels on this GPU and writes the faster ones down.

Every question that a call and its backward pass ask of `opensora_kernels.tuning` is answered in turn with one constant
doubled or halved, as long as that is faster by more than noise and as accurate. For causal_conv3d the form is chosen
first: PyTorch's own chain, or either Triton form. The table is `opensora_kernels/tuned/<device>.json`, to be committed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import opensora_kernels
from bench.about import write_json
from bench.cases import DTYPES, chosen_cases
from bench.measure import tensors, time_calls, why_wrong
from opensora_kernels import backends, tuning, use
from opensora_kernels.cases import Case, Maker
from opensora_kernels.ops.causal_conv3d.triton_forms import CHAIN, GEMM, LIBRARY

# Medians of two runs of one kernel differ by up to 2 %.
GAIN = 1.03
MOST_STEPS = 8

Constants = dict[str, int]
Timer = Callable[[Callable[[], Any]], float]


class Call:
    """One case in one dtype, forward alone or forward and backward, and the reference's results to compare with."""

    def __init__(self, op: str, case: Case, dtype: torch.dtype, device: str, *, is_backward: bool) -> None:
        self.op, self.case, self.dtype, self.device, self.is_backward = op, case, dtype, device, is_backward
        self._arguments, self._leaves = self._draw(dtype)

    def run(self) -> Any:
        return self._run(self._arguments, self._leaves)

    @cached_property
    def plain_and_truth(self) -> tuple[Any, Any]:
        # as in the benches: fp32 is fine enough a truth for bf16 at the size of a release
        exact = torch.float64 if self.dtype is torch.float32 else torch.float32
        with use(**{self.op: "reference"}):
            return self.run(), self._run(*self._draw(exact))

    def questions(self) -> dict[str, Constants]:
        """The keys that it asks for, with the constants of today."""
        asked: dict[str, Constants] = {}

        def note(op: str, key: str, chosen: Constants) -> Mapping[str, int]:
            if op == self.op:
                asked[key] = chosen
            return {}

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


def tune(op: str, case: Case, dtype: torch.dtype, device: str, time: Timer) -> dict[str, Constants]:
    """For each key of a case the constants that are faster than today's; `time` gives the seconds of a call."""
    forward, both = (Call(op, case, dtype, device, is_backward=is_backward) for is_backward in (False, True))
    asked_forward = forward.questions()
    found: dict[str, Constants] = {}
    for key, today in {**asked_forward, **both.questions()}.items():
        call = forward if key in asked_forward else both
        best = fastest_form(both, key, time) if key.startswith("form ") else refined(call, key, today, time)
        if changed := {name: value for name, value in best.items() if today.get(name) != value}:
            found[key] = changed
    return found


def fastest_form(call: Call, key: str, time: Timer) -> Constants:
    forms = [{"FORM": form} for form in (CHAIN, LIBRARY, GEMM)]
    return min(forms, key=lambda form: seconds_with(call, key, form, time))


def refined(call: Call, key: str, today: Constants, time: Timer) -> Constants:
    """From today's constants on, whatever single change gains most, until none does."""
    best, seconds = today, seconds_with(call, key, today, time)
    for _ in range(MOST_STEPS):
        timed = [(seconds_with(call, key, constants, time), constants) for constants in neighbours(best)]
        fastest, constants = min(timed, key=lambda pair: pair[0], default=(seconds, best))
        if fastest * GAIN >= seconds:
            break
        best, seconds = constants, fastest
    return best


def neighbours(constants: Constants) -> Iterator[Constants]:
    for name, value in constants.items():
        steps = (value - 1, value + 1) if name == "num_stages" else (value // 2, value * 2)
        yield from ({**constants, name: step} for step in steps if step >= 1)


def seconds_with(call: Call, key: str, constants: Constants, time: Timer) -> float:
    """Infinite where a kernel does not compile with these constants, or gives a wrong result."""

    def answer(op: str, asked: str, _: Constants) -> Mapping[str, int]:
        return constants if (op, asked) == (call.op, key) else {}

    backend = "reference" if constants.get("FORM") == CHAIN else "triton"
    with use(**{call.op: backend}), tuning.answered(answer):
        try:
            wrong = why_wrong(call.run(), *call.plain_and_truth, call.dtype, is_reference=backend == "reference")
        except Exception as error:  # whatever a compiler or a launch raises: these are no candidate
            wrong = f"{type(error).__name__}: {error}".splitlines()[0]
        if wrong is not None:
            print(f"  {key} {constants}: {wrong}", file=sys.stderr)
            return float("inf")
        return time(call.run)


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
    parser = argparse.ArgumentParser(prog="python -m bench tune", description=__doc__.split(":", 1)[1].splitlines()[0])
    parser.add_argument("op", choices=[*backends.ops(), "all"])
    parser.add_argument("--cases", default="large", help="small, large or one's name")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--folder", type=Path, default=tuning.TABLES, help="of the tables; default: the package's own")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device to time kernels on")
    name = tuning.device_name(torch.device("cuda", torch.cuda.current_device()))
    for op in backends.ops() if options.op == "all" else [options.op]:
        for case in chosen_cases(op, options.cases):
            found = tune(op, case, DTYPES[options.dtype], "cuda", lambda run: time_calls(run, "cuda").median)
            print(f"{op} {case.name}: {found or 'nothing faster'}", flush=True)
            if found:
                write(name, op, found, options.folder)
                tuning._read.cache_clear()  # the next case starts from what this one found
    return 0
