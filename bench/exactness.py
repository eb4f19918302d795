"""`python -m bench exactness`: how far each way to decode is from the model's own decode of the whole clip, in fp32.

One row for each VAE: Open-Sora's, Open-Sora-Plan's, and every causal video VAE of diffusers that is recognised, small
and with random weights, but for the trained one. Theirs: the model's own tiles, before it is patched. Ours: `run_tiled`
with the same numbers (Allegro and MiniMax-H3 lay out theirs in another way); the streaming decoder, a frame of latents
at a time; the patched model on the whole clip.
Rounding is what fp32 costs the model's own decode against fp64: nothing below it is anybody's error. Exit status 1 if
streaming or the patched model is further away than that allows.

  python -m bench exactness --quick --json exactness.json --plot pictures
  python -m bench exactness --models wan mochi
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bench import vaes
from bench.about import about_this_run, check_device, json_file, output_folder
from bench.record import Record, draw, status_of
from bench.vaes import Decode, Subject
from opensora_kernels.vae import Streaming, TilePlan, decode, run_tiled
from tests.ops.accuracy import NUM_ULP

EPS = torch.finfo(torch.float32).eps
NUM_LATENTS, QUICK_NUM_LATENTS = 13, 5
# The rule allows each of two results twice the error of the plain one and some ULP; the plain one is off itself.
ALLOWED_ROUNDINGS = 3
IN_ULP = 1e-4  # of the scale: a difference below is told in ULP, one above in percent
COLUMNS = {
    "rounding": "rounding",
    "theirs": "tiled, theirs",
    "tiled": "tiled, ours",
    "streaming": "streaming",
    "patched": "whole, patched",
}
LEGEND = """\
The largest difference, relative to the largest value of the whole clip: in percent, or in ULP of fp32 at that value
(1.2e-7 of it); rms: of all differences, relative to the same value. One chunk: streaming gives all frames at once, for
something looks at all of them or the clip is one step of the model's own. -: see below."""

Cell = dict[str, Any]
Row = dict[str, Any]


def main(arguments: Sequence[str]) -> int:
    options = read_options(arguments)
    torch.backends.cudnn.allow_tf32 = False  # fp32 is meant
    tile = f"{vaes.TILE} of {vaes.HEIGHT} x {vaes.WIDTH} latents, every {vaes.STRIDE}"
    about = about_this_run(options.device) | {"dtype": "fp32", "command": "exactness", "tiles": tile}
    record = Record(about, options.json, options.plot)
    print(f"{', '.join(f'{name} {value}' for name, value in about.items())}\n{LEGEND}\n\n{header()}", flush=True)
    status = status_of(lambda: run(options, record), "what is finished stays")
    for line in remarks(record.rows):
        print(line)
    if options.plot and not status:
        draw(about, record.rows, options.plot)
    return status or int(any("wrong" in row for row in record.rows))


def run(options: argparse.Namespace, record: Record) -> None:
    num_latents = QUICK_NUM_LATENTS if options.quick else NUM_LATENTS
    for name, subject in vaes.subjects(options.models, num_latents, options.device):
        row = {"model": name, "skipped": subject} if isinstance(subject, str) else measure(subject)
        print(line(row), flush=True)
        record.rows.append(row)
        record.save()


@torch.no_grad()
def measure(subject: Subject) -> Row:
    """A cell for each of COLUMNS: `relative`, `ulp` and `rms`, or what it `says` in their place."""
    whole = subject.whole(subject.z)
    scale = whole.abs().max().item()
    row: Row = {"model": subject.name, "latents": list(subject.z.shape), "frames": list(whole.shape), "scale": scale}

    def distance(run: Decode | str) -> Cell:
        if isinstance(run, str):
            return {"says": run}
        try:
            result = run(subject.z)
        except Exception as error:  # whatever a model of others raises
            return {"says": f"{type(error).__name__}: {error}".splitlines()[0]}
        if result.shape != whole.shape:
            return {"says": f"gives {tuple(result.shape)} instead of {tuple(whole.shape)}"}
        if run is subject.theirs and torch.equal(result, whole):
            return {"says": "cuts nothing"}  # the switch is there, but decode does not look at it
        error = (result.double() - whole.double()) / scale
        relative = error.abs().max().item()
        return {"relative": relative, "ulp": relative / EPS, "rms": error.square().mean().sqrt().item()}

    num_chunks: list[int] = []

    def streamed(z: Tensor) -> Tensor:
        chunks = list(decode(subject.streamed, z, plan=TilePlan(Streaming(1))))
        num_chunks.append(len(chunks))
        return torch.cat(chunks, 2)

    def tiled(z: Tensor) -> Tensor:
        factor = subject.factor
        return run_tiled(
            subject.patched, z, subject.tiling,
            result_size=lambda size: (whole.shape[2], size[1] * factor, size[2] * factor),
        )  # fmt: skip

    ways = {"rounding": subject.exact, "theirs": subject.theirs, "tiled": tiled, "streaming": streamed}
    for name, way in (ways | {"patched": subject.patched}).items():
        row[name] = distance(way)
    row["streaming"] |= {"chunks": num_chunks[0]} if num_chunks else {}
    allowed = ALLOWED_ROUNDINGS * row["rounding"]["ulp"] + NUM_ULP
    # a model that cannot be streamed says so; NaN is not below anything
    errors = {"streaming": row["streaming"].get("ulp", 0.0), "patched": row["patched"].get("ulp", float("inf"))}
    too_far = [name for name, error in errors.items() if not error <= allowed]
    return row | ({"wrong": f"{', '.join(too_far)}: above {allowed:.0f} ULP"} if too_far else {})


def header() -> str:
    return f"{'model':<24}" + "".join(f"{title:>20}" for title in COLUMNS.values())


def line(row: Mapping[str, Any]) -> str:
    cells = [""] * len(COLUMNS) if "skipped" in row else [say(row[name]) for name in COLUMNS]
    return f"{row['model']:<24}" + "".join(f"{cell:>20}" for cell in cells) + "  WRONG" * ("wrong" in row)


def say(cell: Mapping[str, Any]) -> str:
    if "says" in cell:
        return cell["says"] if len(cell["says"]) < 14 else "-"
    relative = cell["relative"]
    if relative > IN_ULP:
        return f"{_percent(relative)}, rms {_percent(cell['rms'])}"
    return (f"{cell['ulp']:.2g} ULP" if relative else "0") + ", one chunk" * (cell.get("chunks") == 1)


def _percent(share: float) -> str:
    return f"{100 * share:.{0 if share >= 0.1 else 1}f} %"


def table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Heads and lines."""
    lines = [[row["model"], *(say(row[name]) for name in COLUMNS)] for row in rows if "skipped" not in row]
    return ["model", *COLUMNS.values()], lines


def remarks(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What did not fit into a cell."""
    found = []
    for row in rows:
        found += [f"{row['model']}: {row[key]}" for key in ("skipped", "wrong") if key in row]
        for name, title in COLUMNS.items():
            if say(row.get(name, {"says": ""})) == "-":
                found.append(f"{row['model']}, {title}: {row[name]['says']}")
    return found


def read_options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench exactness", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--models", nargs="+", default=vaes.names(), metavar="NAME", help=f"of {', '.join(vaes.names())}; default: all")
    add("--quick", action="store_true", help=f"clips of {QUICK_NUM_LATENTS} frames of latents, not {NUM_LATENTS}")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="default: cpu")
    add("--json", type=json_file, metavar="FILE", help="write every row there, with device, versions and commit")
    add("--plot", type=output_folder, metavar="DIR", help="write a picture of seams there, from the trained model")
    options = parser.parse_args(arguments)
    options.models = [name for words in options.models for name in words.split(",") if name]
    check_device(parser, options.device)
    for name in options.models:
        if name not in vaes.names():
            parser.error(f"--models must be of {', '.join(vaes.names())}, got {name!r}")
    return options
