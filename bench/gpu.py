"""`python -m bench gpu`: everything that a machine with one NVIDIA GPU can tell, in nine minutes and one folder.

Needs a python3 with PyTorch and Triton, no network and no installation; with nvcc it compiles the CUDA library first.
Parts run in the order of what would be missed most; each has a time limit and a log of its own, and none stops the
others. Ctrl-C ends the part that runs and keeps what is finished. Wheels of packages that the machine lacks (pytest,
hypothesis, pytest-xdist, matplotlib, peers) may lie in a folder.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from bench.about import about_this_run, output_folder, write_json

ROOT = Path(__file__).parents[1]
TAIL = 12  # lines of a part's log that are shown
PATIENCE = 5  # seconds in which a part that is told to stop may write what it has
NUM_WORKERS = 8  # of pytest-xdist: compilers run on the CPU, and contexts take half a gigabyte of the GPU each
_OF_KERNELS = ("tests/csrc", "tests/ops")
# Of each compiled operator calls that its kernels take: the contract's small cases of attention have no heads of 64.
SMALL = (
    "(accurate_as_pytorch and bfloat16 and (-cuda-small or -cuda-eights))"
    " or (compiled_kernels and (plain or strided or many_channels)) or tokens_over_time or packed_keys"
)


@dataclass(frozen=True)
class Part:
    name: str
    command: list[str]
    most_seconds: float


@dataclass(frozen=True)
class Outcome:
    name: str
    status: str  # "done", "failed: exit N", "stopped after N s", "interrupted", "not begun: ..."
    seconds: float


def parts(output: Path, *, num_workers: int = 0) -> list[Part]:
    """What is run, the most wanted first: 520 s in all. `output` gets tables, JSON and logs."""
    bench = [sys.executable, "-m", "bench"]
    alone = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider"]
    # A test file that can't be imported, for want of a package, must not keep the others from running.
    pytest = [*alone, "--continue-on-collection-errors"]
    side_by_side = ["-n", str(num_workers)] if num_workers else []

    def to(name: str) -> list[str]:
        return ["--json", str(output / f"{name}.json")]

    # Seconds that a part may take are fewer than its limit, by what the imports and its last case need.
    forward = ["all", "--quick", "--cases", "large", "sizes", "--seconds-in-all", "100"]
    backward = ["all", "--quick", "--cases", "large", "--direction", "backward", "--seconds-in-all", "30"]
    # compiling whole models would take the minutes that all other figures need
    model = ["model", "--models", "open_sora_1.2", "--quick", "--no-compile", "--scale", "open-sora-v1.2"]
    model += ["--seconds-in-all", "30"]
    tune = ["tune", "all", "--folder", str(output), "--seconds-each", "15", "--seconds-in-all", "20"]
    wanted = [
        Part("build", [sys.executable, "setup.py", "build_ext", "--inplace"], 60),
        Part("doctor", [sys.executable, "-m", "opensora_kernels"], 15),
        Part("convolution", [*bench, "convolution", *to("convolution")], 40),
        Part("bench", [*bench, *forward, *to("bench")], 115),
        Part("operators", [*pytest, *side_by_side, *_OF_KERNELS], 100),
        Part("backward", [*bench, *backward, *to("backward")], 45),
        Part("tests", [*pytest, "tests", *(f"--ignore={folder}" for folder in _OF_KERNELS)], 20),
        Part("model", [*bench, *model, *to("model")], 45),
        Part("tune", [*bench, *tune], 30),
    ]
    if (sanitizer := find_sanitizer()) is not None:
        # torch's own allocator would hide what lies beside a tensor
        checked = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", sanitizer, "--error-exitcode", "9"]
        small = [*alone, "-k", SMALL, *_OF_KERNELS]
        for tool, seconds in (("memcheck", 30), ("racecheck", 20)):
            wanted.append(Part(tool, [*checked, "--tool", tool, *small], seconds))
    return wanted


def find_sanitizer() -> str | None:
    """In PATH, or beside an nvcc that is not."""
    folder = Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda") / "bin"
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=str(folder))


def pictures(output: Path) -> list[Part]:
    """Of the figures that the parts have left; without matplotlib each says that there is none."""
    drawn = [path for path in (output / f"{name}.json" for name in ("bench", "backward", "model")) if path.exists()]
    plot = [sys.executable, "-m", "bench", "plot"]
    return [Part(f"pictures-{path.stem}", [*plot, str(path), str(output)], 20) for path in drawn]


def main(arguments: Sequence[str]) -> int:
    """Exit status 1 when a part is not done, 2 without a GPU, 130 after Ctrl-C."""
    options = read_options(arguments)
    if not torch.cuda.is_available():
        print("bench gpu: there is no CUDA device here; python -m bench all measures the CPU", file=sys.stderr)
        return 2
    output = output_folder(str(options.output))
    for number in (signal.SIGINT, signal.SIGTERM):  # also where a shell without terminal ignores the first for us
        signal.signal(number, signal.default_int_handler)
    environment = dict(os.environ) | {"PYTHONPATH": str(ROOT), "OPENSORA_BUILD_CUDA": "auto"}
    site = output / "site"
    if options.wheels:
        environment["PYTHONPATH"] += os.pathsep + str(unpack(options.wheels, site))
    has_workers = (site / "xdist").exists() or find_spec("xdist") is not None
    outcomes: list[Outcome] = []

    def keep(outcome: Outcome) -> None:
        outcomes.append(outcome)
        write_json(output / "run.json", {**about, "parts": [asdict(one) for one in outcomes]})

    about = about_this_run("cuda")
    deadline = time.monotonic() + 60 * options.minutes
    status = 0
    try:
        run_all(parts(output, num_workers=NUM_WORKERS if has_workers else 0), output, deadline, environment, keep)
        run_all(pictures(output), output, deadline, environment, keep)
    except KeyboardInterrupt:
        status = 130
    finally:
        shutil.rmtree(site, ignore_errors=True)
    print("\n".join(f"{outcome.name:<18}{outcome.seconds:7.1f} s  {outcome.status}" for outcome in outcomes))
    return status or int(any(outcome.status != "done" for outcome in outcomes))


def read_options(arguments: Sequence[str]) -> argparse.Namespace:
    """Folders become absolute: the parts run in the repository's."""
    parser = argparse.ArgumentParser(prog="python -m bench gpu", description=__doc__.split(":", 1)[1].split(".")[0])
    parser.add_argument("--output", type=Path, required=True, help="a folder for tables, JSON, pictures and logs")
    parser.add_argument("--wheels", type=Path, help="a folder with wheels of packages that are missing here")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all parts together; default: %(default)s")
    options = parser.parse_args(arguments)
    options.output = options.output.resolve()
    if options.wheels is not None:
        if not options.wheels.is_dir():
            parser.error(f"--wheels must be a folder, got {options.wheels}")
        options.wheels = options.wheels.resolve()
    return options


def unpack(wheels: Path, site: Path) -> Path:
    """Wheels are archives of what they install."""
    for wheel in sorted(wheels.glob("*.whl")):
        shutil.unpack_archive(wheel, site, format="zip")
    return site


def run_all(
    wanted: list[Part],
    folder: Path,
    deadline: float,
    environment: dict[str, str],
    keep: Callable[[Outcome], object],
) -> None:
    """Each part in turn, until `deadline` of `time.monotonic()`; `keep` gets the outcome of each. Logs go to `folder`,
    and the end of each to the screen."""
    for part in wanted:
        left = deadline - time.monotonic()
        if left < 5:
            keep(Outcome(part.name, "not begun: no time left", 0.0))
            continue
        log = folder / f"{part.name}.log"
        outcome = _run(part, log, min(left, part.most_seconds), environment)
        keep(outcome)
        lines = log.read_text(errors="replace").splitlines()
        print("\n".join([f"== {part.name}: {outcome.status}", *lines[-TAIL:]]), flush=True)
        if outcome.status == "interrupted":
            raise KeyboardInterrupt


def _run(part: Part, log: Path, seconds: float, environment: dict[str, str]) -> Outcome:
    start = time.monotonic()
    with log.open("w") as output:
        try:
            process = subprocess.Popen(
                part.command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        except OSError as error:
            output.write(f"{error}\n")
            return Outcome(part.name, f"failed: {error}", 0.0)
        try:
            code = process.wait(seconds)
            status = "done" if code == 0 else f"failed: exit {code}"
        except subprocess.TimeoutExpired:
            status = f"stopped after {seconds:.0f} s"
        except KeyboardInterrupt:
            status = "interrupted"
        _end(process)
    return Outcome(part.name, status, round(time.monotonic() - start, 1))


def _end(process: subprocess.Popen[bytes]) -> None:
    """Of a part and all that it started, which form a group of their own: first as Ctrl-C, on which the benches write
    what they have, then for good. A second Ctrl-C ends the wait."""
    try:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
            process.wait(PATIENCE)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        pass
    finally:
        with suppress(ProcessLookupError):  # there is none left
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
