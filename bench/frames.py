"""`python -m bench frames`: peak memory against the number of frames, for each way to decode, beside its prediction.

Two decoders: one whose norms look at one position, as Wan's, and one whose GroupNorms look at the whole clip, as those
of Open-Sora-Plan 1.1. Each point is a process of its own on one thread; --jobs of them run side by side. The planner
chooses for a budget that does not grow with the clip. What would need more than --most is predicted only. Exit status 1
if a run takes more than was predicted.

  python -m bench frames --quick --json frames.json --plot pictures
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from itertools import product
from typing import Any

from bench.about import about_this_run, check_device, json_file, output_folder
from bench.peaks import DECODERS, STRATEGIES, Case, measure_afresh
from bench.record import Record, draw, status_of
from opensora_kernels.vae.plan import parse_bytes, show_bytes

NUM_FRAMES = (17, 65, 257, 1025)
QUICK_NUM_FRAMES = (17, 65)
LEGEND = """\
MiB beyond weights and clip: measured, and what the prediction is above it. ~: predicted only. The frames that come out
are let go: what a caller keeps of them comes on top."""
Row = dict[str, Any]


def main(arguments: Sequence[str]) -> int:
    options = read_options(arguments)
    about = about_this_run(options.device) | {
        "dtype": "fp32",
        "command": "frames",
        "budget": parse_bytes(options.budget),
    }
    about |= {"clips": {name: size_of(name) for name in DECODERS}}
    record = Record(about, options.json, options.plot)
    print(f"{', '.join(f'{name} {value}' for name, value in about.items())}\n{LEGEND}\n", flush=True)
    status = status_of(lambda: run(options, record), "what is finished follows")
    print("\n".join(["", *tables(record.rows)]))
    if options.plot:
        draw(about, record.rows, options.plot)
    return status or int(any("failed" in row or is_above(row) for row in record.rows))


def run(options: argparse.Namespace, record: Record) -> None:
    """The shortest clips first, so that what is there when time is up can be compared."""
    cases = cases_of(options)
    pool = ThreadPoolExecutor(options.jobs)
    try:
        for case, found in zip(cases, pool.map(lambda case: measured(case, options.seconds), cases), strict=True):
            record.rows.append(asdict(case) | found)
            record.save()
            print(f"{case.decoder:<6}{case.num_frames:>5} frames  {case.strategy:<20}{say(found)}", flush=True)
    finally:
        pool.shutdown(cancel_futures=True)


def cases_of(options: argparse.Namespace) -> list[Case]:
    # on a CPU the host is the device
    strategies = [name for name in STRATEGIES if options.device != "cpu" or name != "streaming, host"]
    limits = {"budget": parse_bytes(options.budget), "most_bytes": parse_bytes(options.most), "device": options.device}
    points = product(options.frames, DECODERS, strategies)
    return [Case(decoder, num_frames, strategy, **limits) for num_frames, decoder, strategy in points]


def measured(case: Case, seconds: float) -> dict[str, Any]:
    """`predicted`, `plan`, `spill`, `measured` and `seconds` as far as they are known, or why not: `failed`."""
    try:
        return measure_afresh("bench.peaks", case, seconds=seconds)
    except RuntimeError as error:
        return {"failed": str(error).splitlines()[-1]}


def size_of(decoder: str) -> str:
    """Of its pictures, in pixels."""
    height, width = (size * DECODERS[decoder].factor for size in DECODERS[decoder].size)
    return f"{height} x {width}"


def is_above(row: Mapping[str, Any]) -> bool:
    return "measured" in row and row["measured"] > row["predicted"]


def say(row: Mapping[str, Any]) -> str:
    if "predicted" not in row:
        return "failed" if "failed" in row else "stopped"
    if "measured" not in row:
        return f"~{row['predicted'] / 2**20:.0f}"
    return f"{row['measured'] / 2**20:.0f} ({100 * (row['predicted'] / row['measured'] - 1):+.0f} %)"


def grid(rows: Sequence[Row], decoder: str) -> Iterator[list[str]]:
    """Heads, then a line for each strategy with a cell for each number of frames."""
    of_decoder = [row for row in rows if row["decoder"] == decoder]
    lengths = list(dict.fromkeys(row["num_frames"] for row in of_decoder))
    yield ["MiB at most", *(f"{length} frames" for length in lengths)]
    for strategy in dict.fromkeys(row["strategy"] for row in of_decoder):
        found = {row["num_frames"]: say(row) for row in of_decoder if row["strategy"] == strategy}
        yield [strategy, *(found.get(length, "") for length in lengths)]


def titles(rows: Sequence[Row]) -> dict[str, str]:
    """What each decoder is and how large its pictures are."""
    return {name: f"{DECODERS[name].title}, {size_of(name)}" for name in dict.fromkeys(row["decoder"] for row in rows)}


def told(record: Mapping[str, Any]) -> str:
    """The legend, with the budget."""
    return f"{LEGEND.replace(chr(10), ' ')} The planner's budget: {show_bytes(record['budget'])}."


def tables(rows: Sequence[Row]) -> Iterator[str]:
    for decoder, title in titles(rows).items():
        yield title
        for first, *cells in grid(rows, decoder):
            yield f"{first:<20}" + "".join(f"{cell:>16}" for cell in cells)
        yield ""
    yield from (f"{row['decoder']}, {row['strategy']}: {row['failed']}" for row in rows if "failed" in row)


def read_options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench frames", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--frames", nargs="+", type=int, metavar="N", help="4 n + 1; default: 17 to 1025, with --quick 17 and 65")
    add("--quick", action="store_true", help="short clips alone")
    add("--budget", default="200MiB", help="of the planner; default: %(default)s")
    add("--most", default="6GiB", help="predict what takes more; default: %(default)s")
    add("--seconds", type=float, default=300, metavar="N", help="stop a process after so many; default: %(default)s")
    add("--jobs", type=int, help="processes at a time; default: one for each core, at most 4, and 1 on a GPU")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="default: cpu")
    add("--json", type=json_file, metavar="FILE", help="write every row there, with device, versions and commit")
    add("--plot", type=output_folder, metavar="DIR", help="write a picture there, with a panel for each decoder")
    options = parser.parse_args(arguments)
    check_device(parser, options.device)
    options.frames = sorted(options.frames or (QUICK_NUM_FRAMES if options.quick else NUM_FRAMES))
    for length in options.frames:
        if length < 1 or length % 4 != 1:
            parser.error(f"--frames must be 4 n + 1, got {length}")
    for name in ("budget", "most"):
        try:
            parse_bytes(getattr(options, name))
        except ValueError as error:
            parser.error(f"--{name}: {error}")
    if options.jobs is None:
        options.jobs = 1 if options.device == "cuda" else min(4, os.cpu_count() or 1)
    if options.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {options.jobs}")
    return options
