"""Rows as they are measured: written after every case, so that nothing is lost with a device, and drawn at the end."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from bench.about import output_folder, write_json
from bench.table import compare, spread, tally

# Modules that draw what a command recorded, where that is not `bench.plots`; matplotlib is imported when one is needed.
PICTURES = {"exactness": "bench.seams", "frames": "bench.growth"}


class DeviceLost(RuntimeError):
    """The device is in error, as after an illegal access; whatever runs on it from now on fails too."""


@dataclass
class Record:
    """What a command found. `path`: where it is kept, or None; `folder`: where its pictures go, or None."""

    about: Mapping[str, Any]
    path: Path | None
    folder: Path | None
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        """The rows of one case."""
        rows = list(rows)
        compare(rows)
        self.rows += rows
        self.save()

    def collect(self, run: Callable[[], None]) -> int:
        """Let `run` add rows, and finish with those that it has when it ends, whatever ends it. Exit status 1 when a
        result of ours is wrong or the device is lost, 130 after Ctrl-C."""
        status = status_of(run, "what is finished follows")
        self.finish()
        ours = (row for row in self.rows if row["kind"] == "backend")
        return status or int(any("wrong" in row or "failed" in row for row in ours))

    def save(self) -> None:
        if self.path:
            write_json(self.path, {**self.about, "rows": self.rows})

    def finish(self) -> None:
        self.save()
        print(f"\n{spread(self.rows)}\n{tally(self.rows)}")
        if self.folder:
            draw(self.about, self.rows, self.folder)


def status_of(run: Callable[[], None], kept: str) -> int:
    """0; or 130 after Ctrl-C and 1 when the device is lost, with a line that says so."""
    try:
        run()
    except KeyboardInterrupt:
        print(f"\ninterrupted: {kept}", flush=True)
        return 130
    except DeviceLost as error:
        print(f"\n{error}", flush=True)
        return 1
    return 0


def failure(error: Exception, device: str) -> dict[str, str]:
    """What takes the place of a time; raises DeviceLost if nothing can be measured on the device any more."""
    said = f"{type(error).__name__}: {error}".splitlines()[0]
    if device == "cuda":
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            raise DeviceLost(f"the device is lost, and the rest is not measured: {said}") from error
    return {"failed": said}


def draw(about: Mapping[str, Any], rows: Sequence[dict[str, Any]], folder: Path) -> None:
    try:
        plot = import_module(PICTURES.get(about.get("command"), "bench.plots")).plot
    except ImportError as error:
        print(f"no pictures: {error}; python -m bench plot FILE DIR draws them where matplotlib is installed")
        return
    print(*(f"wrote {path}" for path in plot(about, rows, folder)), sep="\n")


def main(arguments: Sequence[str]) -> int:
    """`python -m bench plot`."""
    parser = argparse.ArgumentParser(prog="python -m bench plot", description="pictures of what another run measured")
    parser.add_argument("file", type=Path, help="that --json wrote")
    parser.add_argument("folder", type=output_folder, help="for the pictures")
    options = parser.parse_args(arguments)
    try:
        found = json.loads(options.file.read_text())
    except (OSError, ValueError) as error:
        parser.error(f"file must be what --json wrote, got {options.file}: {error}")
    draw(found, found.pop("rows"), options.folder)
    return 0
