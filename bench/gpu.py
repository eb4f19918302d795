"""`python -m bench gpu`: everything that a machine with one NVIDIA GPU can tell, in nine minutes and one folder.

Needs a python3 with PyTorch and Triton, no network and no installation. Parts run in the order of what would be missed
most; each has a time limit and a log of its own, and none stops the others. Wheels of pure-Python packages that the
machine lacks (pytest, hypothesis, peers) may lie in a folder.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from bench.about import about_this_run, write_json

ROOT = Path(__file__).parents[1]
TAIL = 12  # lines of a part's log that are shown


@dataclass(frozen=True)
class Part:
    name: str
    command: list[str]
    most_seconds: float


@dataclass(frozen=True)
class Outcome:
    name: str
    status: str  # "done", "failed: exit N", "stopped after N s", "not begun: ..."
    seconds: float


def parts(output: Path) -> list[Part]:
    """What is run, the most wanted first. `output` gets tables, JSON and pictures."""
    python = [sys.executable, "-m"]
    checked = ["compute-sanitizer", "--error-exitcode", "9"] if shutil.which("compute-sanitizer") else []
    return [
        Part("build", [sys.executable, "setup.py", "build_ext", "--inplace"], 90),
        Part("convolution", [*python, "bench", "convolution", "--json", str(output / "convolution.json")], 60),
        Part("tests", [*python, "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests"], 210),
        Part("bench", [*python, "bench", "all", *written(output, "bench")], 180),
        Part(
            "model", [*python, "bench", "model", "--quick", "--scale", "open-sora-v1.2", *written(output, "model")], 90
        ),
        Part("tune", [*python, "bench", "tune", "all", "--folder", str(output)], 90),
        *([Part("sanitizer", [*checked, *python, "pytest", "-q", "-m", "gpu", *_SMALL], 90)] if checked else []),
    ]


def written(output: Path, name: str) -> list[str]:
    return ["--json", str(output / f"{name}.json"), "--plot", str(output)]


_SMALL = ["-p", "no:cacheprovider", "-k", "accurate_as_pytorch and small and cuda and float32", "tests/ops"]


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench gpu", description=__doc__.split(":", 1)[1].split(".")[0])
    parser.add_argument("--output", type=Path, required=True, help="a folder for tables, JSON, pictures and logs")
    parser.add_argument("--wheels", type=Path, help="a folder with wheels of packages that are missing here")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all parts together")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("bench gpu: there is no CUDA device here; python -m bench all measures the CPU", file=sys.stderr)
        return 2
    options.output.mkdir(parents=True, exist_ok=True)
    environment = dict(os.environ) | {"PYTHONPATH": str(ROOT), "OPENSORA_BUILD_CUDA": "auto"}
    if options.wheels:
        site = unpack(options.wheels, options.output / "site")
        environment["PYTHONPATH"] += os.pathsep + str(site)
    outcomes = run_all(parts(options.output), options.output, 60 * options.minutes, environment)
    shutil.rmtree(options.output / "site", ignore_errors=True)
    record = {**about_this_run("cuda"), "parts": [asdict(outcome) for outcome in outcomes]}
    write_json(options.output / "run.json", record)
    print("\n".join(f"{outcome.name:<14}{outcome.seconds:7.1f} s  {outcome.status}" for outcome in outcomes))
    return int(any(outcome.status != "done" for outcome in outcomes))


def unpack(wheels: Path, site: Path) -> Path:
    """Wheels of pure Python are archives of what they install."""
    for wheel in sorted(wheels.glob("*.whl")):
        shutil.unpack_archive(wheel, site, format="zip")
    return site


def run_all(wanted: list[Part], folder: Path, seconds: float, environment: dict[str, str]) -> list[Outcome]:
    """Each part in turn, within `seconds` for all; logs go to `folder`, and the end of each to the screen."""
    deadline = time.monotonic() + seconds
    outcomes = []
    for part in wanted:
        left = deadline - time.monotonic()
        if left < 5:
            outcomes.append(Outcome(part.name, "not begun: no time left", 0.0))
            continue
        outcome = _run(part, folder / f"{part.name}.log", min(left, part.most_seconds), environment)
        outcomes.append(outcome)
        lines = (folder / f"{part.name}.log").read_text(errors="replace").splitlines()
        print("\n".join([f"== {part.name}: {outcome.status}", *lines[-TAIL:]]), flush=True)
    return outcomes


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
            # first as Ctrl-C, on which the benches write what they have
            os.killpg(process.pid, signal.SIGINT)
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            status = f"stopped after {seconds:.0f} s"
    return Outcome(part.name, status, round(time.monotonic() - start, 1))
