"""Pictures of what `python -m bench` measured: bars against the floor, the roofline, and cost against size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from bench.family_plots import family_bars

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]

_OURS = {
    "reference": "#9aa5b1",
    "library": "#5b8def",
    "triton": "#0b6e4f",
    "cuda": "#123a7a",
    "cpu": "#1f9e89",
    "automatic": "#5b8def",
}
_COMPILED = "#e0a030"
_PEERS = ("#c8553d", "#d98a7b", "#8e5ea2", "#b79acb", "#7a6a58", "#c2b280", "#4d4d4d", "#a8a8a8")
_MARKERS = "osD^vP*X<>"
_MOST_BARS = 40  # of one picture: more are not read at a glance


def plot(about: Mapping[str, Any], rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write the pictures of all measured rows into `folder`, and say where they are."""
    folder.mkdir(parents=True, exist_ok=True)
    measured = [row for row in rows if "median" in row and "family" not in row]
    written = []
    if of_families := [row for row in rows if "median" in row and "family" in row]:
        text = f"decoders on our operators against the same weights without them, {about['scale']}"
        written.append(
            _save(family_bars(of_families, _title(about, text)), folder / f"vae_decoders_{about['dtype']}.png")
        )
    for direction in dict.fromkeys(row["direction"] for row in measured):
        suffix, of_models = "" if direction == "forward" else "_backward", "models_" if "scale" in about else ""
        of_direction = [row for row in measured if row["direction"] == direction]
        for op in dict.fromkeys(row["op"] for row in of_direction):
            of_op = [row for row in of_direction if row["op"] == op]
            written.append(_save(_bars(about, of_op), folder / f"{op}{suffix}.png"))
            growing = [row for row in of_op if "size" in row]
            if len({row["size"] for row in growing}) > 1:
                axis = growing[0]["axis"].replace(" ", "_")
                written.append(_save(_curves(about, growing), folder / f"{op}{suffix}_by_{axis}.png"))
                if of_models:  # one operator needs little beyond its results
                    written.append(_save(_curves(about, growing, "memory"), folder / f"{op}{suffix}_memory.png"))
        written.append(_save(_roofline(about, of_direction), folder / f"{of_models}roofline{suffix}.png"))
    return written


def _title(about: Mapping[str, Any], text: str) -> str:
    return f"{text}\n{about['device']} · {about['dtype']} · {about['date'][:10]} · {about['commit']}"


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _colors(rows: Sequence[Row]) -> dict[str, str]:
    """Ours have fixed colors; peers take theirs in the order in which they come."""
    peers = dict.fromkeys(row["backend"] for row in rows if row["kind"] == "peer")
    of_peers = {name: _PEERS[index % len(_PEERS)] for index, name in enumerate(peers)}
    return _OURS | {"torch.compile": _COMPILED} | of_peers


def _bars(about: Mapping[str, Any], rows: Sequence[Row]) -> Figure:
    """The share of the possible speed that each contender reaches, case by case; its milliseconds in words."""
    kept: list[Row] = []
    cases = list(dict.fromkeys(row["case"] for row in rows))
    for case in reversed(cases):  # the largest come last, and say most
        of_case = [row for row in rows if row["case"] == case]
        if len(kept) + len(of_case) <= _MOST_BARS or not kept:
            kept = of_case + kept
    cases = list(dict.fromkeys(row["case"] for row in kept))
    figure, axes = plt.subplots(figsize=(10, 1.9 + 0.27 * len(kept) + 0.42 * len(cases)), layout="constrained")
    colors, position, ticks = _colors(kept), 0.0, []
    best = max(100 * row["floor"] / row["p20"] for row in kept)
    for case in cases:
        axes.text(0, position - 0.55, f" {case.replace('=', ' = ')}", fontsize=9, weight="bold", va="bottom")
        for row in (row for row in kept if row["case"] == case):
            slow, usual, fast = (100 * row["floor"] / row[key] for key in ("p80", "median", "p20"))
            axes.barh(position, usual, color=colors[row["backend"]], height=0.86)
            axes.plot([slow, fast], [position, position], color="black", lw=0.8)
            words = f"{_short(row['median'] * 1e3)} ms · {usual:.0f} %"
            axes.text(fast + best * 0.01, position, words, va="center", fontsize=8)
            ticks.append((position, row["backend"] + " *" * row.get("is_chosen", False)))
            position += 1
        position += 1.5
    axes.set(xlim=(0, best * 1.22), ylim=(position - 1.2, -1.7))
    axes.set_yticks([at for at, _ in ticks], [name for _, name in ticks], fontsize=8)
    axes.set_xlabel(
        "% of the speed that the measured copy and matrix product allow, longer is better (whiskers p20 to p80)"
    )
    direction = rows[0]["direction"]
    axes.set_title(_title(about, f"{rows[0]['op']}, {direction}   (*: what runs by default)"), fontsize=10, loc="left")
    axes.grid(axis="x", which="major", alpha=0.3)
    return figure


def _roofline(about: Mapping[str, Any], rows: Sequence[Row]) -> Figure:
    """Operations per second against operations per byte: each operator's best backend and best peer, largest case."""
    figure, axes = plt.subplots(figsize=(11, 6.6), layout="constrained")
    bandwidth, peak = rows[0]["bandwidth"], rows[0]["flops_ceiling"]
    ops = [op for op in dict.fromkeys(row["op"] for row in rows) if _largest(rows, op)[0]["flops"]]
    for index, op in enumerate(ops):
        of_case = _largest(rows, op)
        color = plt.get_cmap("tab20")(index % 20)
        ours = min((row for row in of_case if row["kind"] == "backend"), key=lambda row: row["median"], default=None)
        others = min((row for row in of_case if row["kind"] != "backend"), key=lambda row: row["median"], default=None)
        intensity = of_case[0]["flops"] / of_case[0]["bytes"]
        for row, face in ((ours, color), (others, "none")):
            if row is not None:
                height, marker = row["flops"] / row["median"], _MARKERS[index % len(_MARKERS)]
                axes.scatter(intensity, height, s=70, marker=marker, facecolor=face, edgecolor=color, lw=1.6, zorder=3)
        if ours is not None:
            axes.scatter([], [], s=50, marker=_MARKERS[index % len(_MARKERS)], color=color, label=_of_case(ours))
    spread = [row["flops"] / row["bytes"] for op in ops for row in _largest(rows, op)] or [1.0]
    knee = peak / bandwidth
    low, high = min(*spread, knee) / 3, max(*spread, knee) * 3
    ceilings = f"measured here: copy {_short(bandwidth / 1e9)} GB/s, matrix product {_rate(peak)}"
    (roof,) = axes.plot([low, knee, high], [low * bandwidth, peak, peak], color="black", lw=1.8)
    figure.legend([roof], [ceilings], loc="outside lower right", fontsize=9, frameon=False)
    slowest = min((row["flops"] / row["median"] for op in ops for row in _largest(rows, op)), default=peak)
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(min(slowest / 2, peak / 200), peak * 2))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _rate(value)))
    axes.set_xlabel("operations per byte that must be moved")
    axes.set_ylabel("operations per second that count")
    text = f"roofline, {rows[0]['direction']}, each operator's largest case; filled: our fastest, hollow: the best else"
    axes.set_title(_title(about, text), fontsize=10, loc="left")
    axes.grid(which="major", alpha=0.3)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8, frameon=False)
    return figure


def _largest(rows: Sequence[Row], op: str) -> list[Row]:
    of_op = [row for row in rows if row["op"] == op]
    case = max(of_op, key=lambda row: row["bytes"])["case"]
    return [row for row in of_op if row["case"] == case]


def _of_case(row: Row) -> str:
    return f"{row['op']}, {row['case']} ({row['backend']})"


def _curves(about: Mapping[str, Any], rows: Sequence[Row], of: Literal["time", "memory"] = "time") -> Figure:
    """Median time, with the floor below, or peak memory against size, both logarithmic."""
    figure, axes = plt.subplots(figsize=(9, 5.4), layout="constrained")
    colors = _colors(rows)
    for index, name in enumerate(dict.fromkeys(row["backend"] for row in rows)):
        of_backend = sorted((row for row in rows if row["backend"] == name), key=lambda row: row["size"])
        sizes, look = [row["size"] for row in of_backend], {"marker": _MARKERS[index % len(_MARKERS)], "label": name}
        if of == "memory":
            axes.plot(sizes, [row["peak_bytes"] / 1e6 for row in of_backend], color=colors[name], ms=5, **look)
            continue
        medians, low, high = ([row[key] * 1e3 for row in of_backend] for key in ("median", "p20", "p80"))
        reach = [[usual - least for usual, least in zip(medians, low, strict=True)],
                 [most - usual for usual, most in zip(medians, high, strict=True)]]  # fmt: skip
        axes.errorbar(sizes, medians, yerr=reach, color=colors[name], ms=5, elinewidth=0.8, capsize=2, **look)
    names = {row["size"]: f"{row['size']:,}" if "=" in row["case"] else row["case"] for row in rows}
    if of == "time":
        floors = sorted({row["size"]: row["floor"] * 1e3 for row in rows}.items())
        axes.plot(*zip(*floors, strict=True), color="black", lw=2, label="floor")
    label = "milliseconds" if of == "time" else "MB at most, beyond weights and inputs"
    axes.set(xscale="log", yscale="log", xlabel=rows[0]["axis"], ylabel=f"{label}, lower is better")
    axes.set_xticks(list(names), list(names.values()))
    axes.xaxis.set_minor_formatter(NullFormatter())
    _plain_numbers(axes, "y")
    direction = rows[0]["direction"]
    text = f"{rows[0]['op']}, {direction}: {of} against {rows[0]['axis']}"
    axes.set_title(_title(about, text), fontsize=10, loc="left")
    axes.grid(which="major", alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return figure


def _plain_numbers(axes: Axes, which: str) -> None:
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    axis.set_minor_formatter(NullFormatter())


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _rate(value: float) -> str:
    return f"{value / 1e12:,.4g} TFLOP/s" if value >= 1e12 else f"{value / 1e9:,.3g} GFLOP/s"
