"""`python -m bench page`: the results in bench/results/<device>/ as tables, there and in README.md.

A folder holds what `python -m bench all --json .../bench.json` and `python -m bench model --json .../model.json` wrote,
decodes of other dtypes or scales as decoders*.json, what `exactness`, `frames` and `memory` wrote so named, and maybe
pictures. `--take outputs/gpu` first copies what `make gpu` left there. Figures of a CPU are shown as ratios only: its
seconds tell nobody anything. `--check` writes nothing and exits with 1 if a page says something else than its JSON, as
a test does too.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from bench import exactness, frames, on_paper
from bench.table import Row, rate, relative_spread, spread, tally

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
BEGIN, END = "<!-- results: begin -->\n", "<!-- results: end -->\n"
# Shown beside their tables; all other pictures stand at the top of a page.
OF_SECTIONS = {"exactness": "seams.png", "frames": "frames_memory.png"}
AWAITED = "H200"  # Claims are about this machine; where it has no folder, the page says so.
Record = dict[str, Any]


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench page", description=__doc__.split(":", 1)[1].strip())
    parser.add_argument("--take", type=Path, metavar="DIR", help="copy JSON and pictures from there first")
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if a page is out of date")
    options = parser.parse_args(arguments)
    if options.take:
        try:
            print(f"took {options.take} as {take(options.take).relative_to(ROOT)}")
        except (OSError, ValueError, KeyError) as error:
            parser.error(f"--take must be a folder with what bench all --json bench.json wrote: {error}")
    stale = {path: text for path, text in pages().items() if not path.exists() or path.read_text() != text}
    for path, text in stale.items():
        if options.check:
            print(f"bench page: {path.relative_to(ROOT)} does not agree with its JSON", file=sys.stderr)
        else:
            path.write_text(text)
            print(f"wrote {path.relative_to(ROOT)}")
    return int(options.check and bool(stale))


def take(source: Path, results: Path = RESULTS) -> Path:
    """Copy JSON and pictures into the folder named after the device."""
    device = read(source / "bench.json")["device"]
    folder = results / "-".join(re.findall(r"[a-z0-9]+", device.lower()))
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted([*source.glob("*.json"), *source.glob("*.png")]):
        shutil.copyfile(path, folder / path.name)
    return folder


def pages(results: Path = RESULTS, readme: Path = ROOT / "README.md") -> dict[Path, str]:
    """Every page and what it should say."""
    folders = sorted(path.parent for path in results.glob("*/bench.json"))
    before, _, rest = readme.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    return {folder / "README.md": device_page(folder) for folder in folders} | {
        readme: before + BEGIN + summary(folders) + END + after
    }


def summary(folders: Iterable[Path]) -> str:
    """The largest case of every operator on each device."""
    folders = list(folders)
    parts = []
    for folder in folders:
        record = read(folder / "bench.json")
        of_largest = [row for op in ops(record) for row in largest(record, op)]
        parts.append(f"{about(record)} [All cases]({folder.relative_to(ROOT)}/README.md).\n")
        parts.append(operator_table(record, of_largest))
    if not any(AWAITED in read(folder / "bench.json")["device"] for folder in folders):
        parts.append(f"NVIDIA {AWAITED}: not measured.\n")
    return "\n".join(parts)


def device_page(folder: Path) -> str:
    record = read(folder / "bench.json")
    parts = [f"# {record['device']}\n", about(record) + "\n", *pictures(folder), operator_table(record, record["rows"])]
    parts.append(f"{tally(record['rows'])}. {spread(record['rows']).capitalize()}.\n")
    parts += faults(record)
    if (folder / "convolution.json").exists():
        found = convolution_table(read(folder / "convolution.json"))
        parts += ["## The library's own convolution, channels last\n", found]
    if (folder / "model.json").exists():
        model = read(folder / "model.json")
        parts += [f"## Whole models, {model['scale']}\n", about(model) + "\n", model_table(model)]
        parts += [f"{spread(model['rows']).capitalize()}.\n", *decoder_table(model), *faults(model)]
    for path in sorted(folder.glob("decoders*.json")):  # of other dtypes or scales, or a machine of nearly that name
        parts += [*decoder_table(read(path)), *faults(read(path))]
    for name, section in (("exactness", exactness_section), ("frames", frames_section)):
        if (folder / f"{name}.json").exists():
            parts += section(read(folder / f"{name}.json"))
            parts += [_picture(path) for path in [folder / OF_SECTIONS[name]] if path.exists()]
    for path in sorted(folder.glob("plain_causal_vae*.json")):
        parts += plain_section(read(path))
    if (folder / "plain_open_sora_vae.json").exists():
        parts += decode_section(read(folder / "plain_open_sora_vae.json"))
    if (folder / "norm_and_pad.json").exists():
        parts += norm_and_pad_section(read(folder / "norm_and_pad.json"))
    if (folder / "memory.json").exists():
        parts += memory_section(read(folder / "memory.json"))
    return "\n".join(parts)


def about(record: Record) -> str:
    said = _made(record)
    share = 100 * relative_spread(record["rows"])
    ratios = "" if is_gpu(record) else " Ratios only."
    legend = f"Bold: slower by more than the {share:.0f} % by which two runs of the same code differ."
    return f"{said}.{ratios} {legend} ~: less accurate than our rule allows, by less than four times."


def _made(record: Record) -> str:
    versions = [f"torch {record['torch']}", *([f"triton {record['triton']}"] if record.get("cuda") else [])]
    return f"{record['device']}, {record['dtype']}, {', '.join(versions)}, {record['date'][:10]}, `{record['commit']}`"


def faults(record: Record) -> list[str]:
    """A list of what got no time, or none."""
    lines = []
    for row in record["rows"]:
        if said := row.get("wrong") or row.get("failed"):
            lines.append(f"- `{row['op']}`, {row['case']}, {row['backend']}: {said}")
    return ["Not timed, because the result was wrong or there was none:\n", "\n".join(lines) + "\n"] if lines else []


def operator_table(record: Record, rows: Sequence[Row]) -> str:
    """How many times as fast as others is the backend that runs by default, and every other one that is not plain
    PyTorch's."""
    lines, bold = [], 1 - relative_spread(record["rows"])
    for op in ops({"rows": rows}):
        for case, direction in dict.fromkeys((row["case"], row["direction"]) for row in rows if row["op"] == op):
            of_case = [row for row in rows if (row["op"], row["case"], row["direction"]) == (op, case, direction)]
            name = f"{case}, backward" if direction == "backward" else case
            measured = [row for row in of_case if row["kind"] == "backend" and "median" in row]
            ours = [row for row in measured if row.get("is_chosen") or row["backend"] != "reference"]
            if not any(row.get("is_chosen") for row in measured):
                lines.append([f"`{op}`", name, "not measured", *[""] * (len(_heads(record)) - 3)])
            for row in sorted(ours, key=lambda row: not row.get("is_chosen")):
                runs = row["backend"] if row.get("is_chosen") else f"({row['backend']}, if asked)"
                cells = [f"`{op}`", name, runs, *_speeds(record, row), _ratio(row, "reference", bold)]
                lines.append([*cells, _ratio(row, "torch.compile", bold), _best_peer(of_case, row, bold)])
    return _markdown(_heads(record), lines)


def convolution_table(record: Record) -> str:
    """Of each width: the share of the measured matrix product."""
    lines = []
    for row in record["rows"]:
        shares = [work / row[name] / record["rate"] for name, work in
                  (("forward", row["flops"]), ("backward", 2 * row["flops"]))]  # fmt: skip
        cells = [str(row["channels"]), "x".join(map(str, row["clip"])), *(f"{100 * share:.0f} %" for share in shares)]
        lines.append(cells)
    return _markdown(["channels", "clip", "forward, of the matrix product", "backward"], lines)


def model_table(record: Record) -> str:
    bold = 1 - relative_spread(record["rows"])
    lines = []
    for row in record["rows"]:
        if row["backend"] in ("automatic", "triton") and "median" in row and "family" not in row:
            cells = [row["op"], row["case"], row["backend"], *_speeds(record, row), _ratio(row, "reference", bold)]
            lines.append([*cells, _ratio(row, "torch.compile", bold), f"{row['peak_bytes'] / 1e6:.0f} MB"])
    return _markdown([*_heads(record, "step", "frames x pixels")[:-1], "peak memory"], lines)


def decoder_table(record: Record) -> list[str]:
    """Ours against the rival: times as fast, peak memory, and that in units of the rival's. None without decoders."""
    rows = [row for row in record["rows"] if "family" in row]
    bold, lines, num_speeds = 1 - relative_spread(rows), [], int(is_gpu(record))
    for row in rows:
        case = [row["family"], row["case"].removeprefix(row["family"]).strip()]
        if "skipped" in row:
            lines.append([*case, f"{row['backend']}: not measured: {row['skipped']}", *[""] * (3 + num_speeds)])
        elif "median" in row and row["kind"] == "backend":
            memory = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f} MB"
            times = f"{row['times_the_memory']:.2f}" if "times_the_memory" in row else "-"
            plan = f" ({row['plan'].removeprefix('streaming: ')})" if "plan" in row else ""
            cells = [*case, f"{row['backend']} against {row['truth_by']}{plan}"]
            cells += [f"{row['median'] * 1e3:.4g}"] * num_speeds
            lines.append([*cells, _ratio(row, row["truth_by"], bold), memory, times])
    heads = ["decoder", "frames x pixels", "runs", *["ms"] * num_speeds, "x rival", "peak memory", "x rival's memory"]
    about = (
        f"{record['device']}, {record['dtype']}, {record['date'][:10]}, `{record['commit']}`; the same random weights. "
    )
    text = f"{about}{spread(rows).capitalize()}.\n"
    title = f"## Decoders beside their rivals, {record['scale']}, {record['dtype']}\n"
    return [title, text, _markdown(heads, lines)] if rows else []


def exactness_section(record: Record) -> list[str]:
    said = f"{_made(record)}. Tiles: {record['tiles']}. {exactness.LEGEND.replace(chr(10), ' ')}\n"
    remarks = [f"- {remark}\n" for remark in exactness.remarks(record["rows"])]
    heading = "## How far decodes are from the model's own, whole, in fp32\n"
    return [heading, said, _markdown(*exactness.table(record["rows"])), "".join(remarks)]


def memory_section(record: Record) -> list[str]:
    heads, *lines = on_paper.table(record["rows"])
    said = (
        f"torch {record['torch']}, {record['date'][:10]}, `{record['commit']}`: what is alive at once, on tensors "
        "without data, with a CPU library's workspaces. Tiled: at diffusers' default tiles. Streamed: frames that "
        "come out are let go.\n"
    )
    return ["## Peak memory of decoders at their released widths, on paper\n", said, _markdown(heads, lines)]


def plain_section(record: Record) -> list[str]:
    """Open-Sora-Plan's VAE at its full size against the same without our operators."""
    plain, *others = record["rows"]
    lines = []
    for row in others:
        if "skipped" in row:
            lines.append([f"{row['how']}: not measured: {row['skipped']}", "", "", ""])
            continue
        time, memory = (f"{row[name] / plain[name]:.2f}" for name in ("cpu_seconds", "peak_mib"))
        beyond = (row["peak_mib"] - row["before_mib"]) / (plain["peak_mib"] - plain["before_mib"])
        lines.append([row["how"], time, memory, f"{beyond:.2f}"])
    size = f"{record['frames']} x {record['size']} x {record['size']}"
    clip = f"{record['half']} of {size} pixels, release {record['release']}"
    said = f"{_made(record)}; {clip}. In units of PyTorch's own calls, one run each in a process of its own.\n"
    heads = ["runs", "processor time", "peak memory of the process", "beyond weights and libraries"]
    return ["## Open-Sora-Plan's VAE at full size, beside PyTorch's own calls\n", said, _markdown(heads, lines)]


def decode_section(record: Record) -> list[str]:
    """Open-Sora 1.2's VAE at its full size against the same in PyTorch's own calls: medians of the runs."""

    def median(how: str, of: Callable[[Row], float]) -> float:
        return statistics.median(of(row) for row in record["rows"] if row["how"] == how)

    def times(of: Callable[[Row], float]) -> str:
        return f"{median('plain', of) / median('ours', of):.2f}"

    beyond = f"{1 / float(times(lambda row: row['peak_mib'] - row['before_mib'])):.2f}"
    cells = [times(lambda row: row["seconds"]), times(lambda row: row["cpu_seconds"]), beyond]
    said = (
        f"{record['device']}, {record['dtype']}, torch {record['torch']}, {record['date'][:10]}, `{record['commit']}`; "
        f"{record['frames']} x {record['size']} x {record['size']} pixels, random weights, its image VAE patched. "
        f"Medians of {len(record['rows']) // 2} runs each, in turn, each in a process of its own.\n"
    )
    heads = ["x PyTorch's own calls", "x their processor time", "peak memory beyond weights, in units of theirs"]
    return ["## Open-Sora 1.2's VAE decodes at full size\n", said, _markdown(heads, [cells])]


def norm_and_pad_section(record: Record) -> list[str]:
    lines = []
    for row in record["rows"]:
        channels, *clip = row["shape"]
        speeds = [f"{row[other] / row['ours']:.2f}" for other in ("plain", "compiled")]
        lines.append([row["dtype"], f"{channels} x {' x '.join(map(str, clip))}", row["layout"], *speeds])
    said = f"{record['device']}, torch {record['torch']}, {record['date'][:10]}, `{record['commit']}`.\n"
    heads = ["dtype", "channels x clip", "order of axes", "x F.group_norm, F.silu, F.pad", "x torch.compile of them"]
    return ["## GroupNorm, SiLU and padding before a convolution, in one pass\n", said, _markdown(heads, lines)]


def frames_section(record: Record) -> list[str]:
    parts = ["## Peak memory against the number of frames\n", f"{_made(record)}. {frames.told(record)}\n"]
    for decoder, title in frames.titles(record["rows"]).items():
        heads, *lines = frames.grid(record["rows"], decoder)
        parts += [f"{title}:\n", _markdown(heads, lines)]
    return parts


def pictures(folder: Path) -> list[str]:
    return [_picture(path) for path in sorted(folder.glob("*.png")) if path.name not in OF_SECTIONS.values()]


def _picture(path: Path) -> str:
    return f"![{path.stem.replace('_', ' ')}]({path.name})\n"


def read(path: Path) -> Record:
    return json.loads(path.read_text())


def ops(record: Record) -> list[str]:
    return list(dict.fromkeys(row["op"] for row in record["rows"]))


def largest(record: Record, op: str) -> list[Row]:
    """All rows of the operator's measured case that moves most, forward."""
    of_op = [row for row in record["rows"] if row["op"] == op and row["direction"] == "forward"]
    cases = [row for row in of_op if "median" in row]
    return [row for row in of_op if cases and row["case"] == max(cases, key=lambda row: row["bytes"])["case"]]


def is_gpu(record: Record) -> bool:
    return record.get("cuda") is not None


def _heads(record: Record, what: str = "operator", size: str = "case") -> list[str]:
    speeds = ["ms", "rate", "% of floor"] if is_gpu(record) else ["% of floor"]
    return [what, size, "runs", *speeds, "x reference", "x torch.compile", "x best other"]


def _speeds(record: Record, row: Row) -> list[str]:
    share = f"{100 * row['floor'] / row['median']:.0f}"
    return [f"{row['median'] * 1e3:.4g}", rate(row), share] if is_gpu(record) else [share]


def _ratio(row: Row, other: str, bold_below: float) -> str:
    value = row["times_as_fast_as"].get(other)
    if value is None or other == row["backend"]:
        return "-"
    return f"**{value:.2f}**" if value < bold_below else f"{value:.2f}"


def _best_peer(of_case: Sequence[Row], ours: Row, bold_below: float) -> str:
    peers = [row for row in of_case if row["kind"] == "peer" and "median" in row]
    best = min(peers, key=lambda row: row["median"], default=None)
    mark = " ~" if best is not None and "less_accurate" in best else ""
    return "-" if best is None else f"{_ratio(ours, 'best peer', bold_below)} ({best['backend']}{mark})"


def _markdown(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    escape: Callable[[str], str] = lambda cell: cell.replace("|", "\\|")  # noqa: E731
    aligned = ["---" if index < 3 else "--:" for index in range(len(heads))]
    return "\n".join("| " + " | ".join(map(escape, cells)) + " |" for cells in [heads, aligned, *lines]) + "\n"
