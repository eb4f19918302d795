"""`python -m bench model`: whole decodes, encodes, denoising and training steps of Open-Sora 1.2, with random weights;
denoising of Open-Sora 1.0, 1.1 and Open-Sora-Plan; decodes of the latter and of diffusers' video VAEs, beside what they
are without us.

Automatic: every operator on the backend it chooses here. Triton: on that where possible. Reference: PyTorch's own
operators one by one, the form in which the original is written. torch.compile is of the latter. As for operators, no
time is shown for a wrong result, and Ctrl-C keeps what is finished.

  python -m bench model --what denoise,vae_decode --quick
  python -m bench model --scale open-sora-v1.2 --what vae_decode --json decode.json --plot plots
  python -m bench model --what vae_decode --models wan_2.1,mochi --dtype bf16
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import side_by_side
from bench.about import about_this_run, check_device, json_file, output_folder
from bench.cases import DTYPES
from bench.decoders import DECODERS, QUICK
from bench.measure import Ceilings, measure_ceilings, peak_bytes, time_calls, why_wrong
from bench.models import RELEASED_OTHERS, SCALES, WHAT, Size, Step
from bench.record import Record, failure
from bench.table import compare, header, line
from opensora_kernels import backends, use
from opensora_kernels.cases import bytes_moved

QUICK_SECONDS = 0.5
NUM_STEPS = 2  # of denoising: the first is like all others
OPEN_SORA = "open_sora_1.2"  # of all steps; other models are decoded alone


LEGEND = """\
x: how many times as fast as the reference and torch.compile of it. rate: GB/s where memory limits, else TFLOP/s. %
floor: the least time that the measured copy and matrix product allow, over the median. MB: peak memory beyond weights
and inputs. B: forward and backward pass. Before each run 128 MB (CPU) or 256 MB (GPU) of other memory are written."""


def main(arguments: Sequence[str]) -> int:
    """The exit status of `Record.collect`."""
    options = read_options(arguments)
    torch.backends.cudnn.benchmark = options.device == "cuda"
    ceilings = measure_ceilings(options.device, DTYPES[options.dtype])
    about = about_this_run(options.device) | {"dtype": options.dtype, "scale": options.scale}
    about |= {"GB/s": round(ceilings.bandwidth / 1e9, 1), "TFLOP/s": round(ceilings.rate / 1e12, 3)}
    print("\n".join([", ".join(f"{name} {value}" for name, value in about.items()), LEGEND]))
    record = Record(about, options.json, options.plot)
    return record.collect(lambda: run(options, ceilings, record))


def run(options: argparse.Namespace, ceilings: Ceilings, record: Record) -> None:
    """Other models' decoders; then step by step, the smallest clips first."""
    end = time.monotonic() + options.seconds_in_all
    if "vae_decode" in options.what and (others := [name for name in options.models if name in DECODERS]):
        side_by_side.run(others, options, ceilings, record, end)
    for what in options.what if OPEN_SORA in options.models else []:
        print(f"\n{what}\n{header(has_base=False)}", flush=True)
        for size in sizes_of(what, options):
            if time.monotonic() > end:
                print("\nthe time is up: what is finished follows", flush=True)
                return
            rows: list[dict[str, Any]] = []
            try:
                for row in measure(what, size, ceilings, options):
                    rows.append(row)
                    compare(rows)
                    print(line(row, has_base=False), flush=True)
            except Exception as error:  # such as too little memory to find out what is right
                case = {"op": what, "case": "x".join(map(str, size)), "direction": "forward", "kind": "backend"}
                rows.append(case | {"backend": "reference"} | failure(error, options.device))
                print(line(rows[-1], has_base=False), flush=True)
            finally:
                record.add(rows)


@dataclass(frozen=True)
class Build:
    """A way to run a model: the name, what `use` is told meanwhile, and why it makes no sense here."""

    name: str
    ordered: Callable[[], AbstractContextManager[Any]]
    is_compiled: bool = False
    why_not: str | None = None


def builds(options: argparse.Namespace, *, is_largest: bool) -> list[Build]:
    reference = partial(use, **dict.fromkeys(backends.ops(), "reference"))
    no_gpu = None if options.device == "cuda" else "Triton needs a GPU"
    compiled = "--no-compile" if options.no_compile else None
    if options.quick and options.device == "cpu" and not is_largest:
        compiled = compiled or "with --quick on a CPU, of the largest size alone"
    return [
        Build("reference", reference),
        Build("automatic", use),
        Build("triton", partial(use, "triton"), why_not=no_gpu),
        Build("torch.compile", reference, is_compiled=True, why_not=compiled),
    ]


def measure(what: str, size: Size, ceilings: Ceilings, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each build, the reference first and, for the spread, once more at the end."""
    make, dtype = WHAT[what], DTYPES[options.dtype]
    is_trained = what.startswith("train")
    place = {"scale": SCALES[options.scale], "size": size, "drawn": dtype, "device": options.device}
    place["num_steps"] = options.steps
    with torch.set_grad_enabled(is_trained):
        first, *others = builds(options, is_largest=size == sizes_of(what, options)[-1])
        about = {"op": what, "case": "x".join(map(str, size)), "direction": "backward" if is_trained else "forward"}
        about |= {"kind": "backend", "axis": "pixels", "size": size[0] * size[1] * size[2]}
        about |= {"truth_by": "reference", "bandwidth": ceilings.bandwidth, "flops_ceiling": ceilings.rate}
        with first.ordered():
            step = make(dtype=dtype, **place)
            with FlopCounterMode(display=False) as counter:
                plain = step.run()
            exact = torch.float64 if dtype == torch.float32 else torch.float32
            truth = make(dtype=exact, **place).run()
        moved, flops = bytes_moved({"read": step.read}, plain), counter.get_total_flops()
        about |= {"bytes": moved, "flops": flops, "floor": max(moved / ceilings.bandwidth, flops / ceilings.rate)}
        checked = Checked(step, plain, truth, dtype, options)
        reference = about | {"backend": first.name} | checked.measure(first)
        yield reference
        for build in others:
            row = about | {"backend": build.name} | ({"kind": "compile"} if build.is_compiled else {})
            yield row | ({"skipped": build.why_not} if build.why_not else checked.measure(build))
        reference["again"] = checked.measure(first).get("median", reference["median"])


@dataclass(frozen=True)
class Checked:
    """A step and what is right for it."""

    step: Step
    plain: Any
    truth: Any
    dtype: torch.dtype
    options: argparse.Namespace

    def measure(self, build: Build) -> dict[str, Any]:
        """Times and peak memory beyond weights and inputs, or `wrong`, `failed` or `skipped` with the reason."""
        run, device = self.step.run, self.options.device
        if build.is_compiled:
            torch._dynamo.reset()
            # not a warning for each piece that stays outside its graphs: it runs all the same
            logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
            run = torch.compile(run, dynamic=False)
        try:
            with build.ordered():
                wrong = why_wrong(run(), self.plain, self.truth, self.dtype, is_chain=True)
                if wrong is not None:
                    return {"wrong": wrong}
                timing = time_calls(run, device, seconds=QUICK_SECONDS if self.options.quick else None)
                return asdict(timing) | {"peak_bytes": peak_bytes(run, device), "is_replayed": False}
        except torch.OutOfMemoryError:
            return {"skipped": "out of memory"}
        except Exception as error:  # whatever a compiler raises: the other rows stand
            return failure(error, device)


def sizes_of(what: str, options: argparse.Namespace) -> tuple[Size, ...]:
    return SCALES[options.scale].clips_of(what)


def read_options(arguments: Sequence[str]) -> argparse.Namespace:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(
        prog="python -m bench model", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--what", nargs="+", default=["denoise", "vae_decode", "vae_encode", *RELEASED_OTHERS], metavar="STEP",
        help=f"of {', '.join(WHAT)}, with spaces or commas between; default: %(default)s")  # fmt: skip
    add(
        "--models",
        nargs="+",
        metavar="MODEL",
        help=f"whose decoders, of {', '.join([OPEN_SORA, *DECODERS])}; {OPEN_SORA}'s other steps too; default: all, "
        f"with --quick {', '.join([OPEN_SORA, *QUICK])}",
    )
    add("--scale", choices=SCALES, help="of the models; default: open-sora-v1.2 on a GPU without --quick, else tiny")
    add("--steps", type=int, default=NUM_STEPS, help="of denoising; default: %(default)s")
    add("--quick", action="store_true", help="few runs; on a CPU the largest clip alone is compiled")
    add("--no-compile", action="store_true", help="leave out torch.compile of the reference")
    add("--dtype", choices=DTYPES, default="bf16" if device == "cuda" else "fp32", help="default here: %(default)s")
    add("--device", choices=["cpu", "cuda"], default=device, help="default here: %(default)s")
    add("--seconds-in-all", type=float, default=float("inf"), metavar="N", help="begin no clip after so many")
    add("--json", type=json_file, metavar="FILE", help="write every row there, with device, versions and commit")
    add("--plot", type=output_folder, metavar="DIR", help="write pictures there: bars, time and memory against size")
    options = parser.parse_args(arguments)
    check_device(parser, options.device)
    options.models = options.models or [OPEN_SORA, *(QUICK if options.quick else DECODERS)]
    for name, known in (("what", [*WHAT]), ("models", [OPEN_SORA, *DECODERS])):
        chosen = [word for words in getattr(options, name) for word in words.split(",") if word]
        setattr(options, name, chosen)
        for word in chosen:
            if word not in known:
                parser.error(f"--{name} must be of {', '.join(known)}, got {word!r}")
    if options.steps < 1:
        parser.error(f"--steps must be at least 1, got {options.steps}")
    is_small = options.quick or options.device == "cpu"
    options.scale = options.scale or ("tiny" if is_small else "open-sora-v1.2")
    return options
