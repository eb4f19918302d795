"""The picture of `python -m bench frames`: peak memory against the number of frames, a panel for each decoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from bench.peaks import DECODERS
from bench.plots import plt

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = Mapping[str, Any]
# Decoders without a spill need as much with any: the later ones lie on the earlier, which therefore are larger.
_LOOKS = {
    "whole": ("#9aa5b1", "o", 8),
    "tiled": ("#e0a030", "^", 8),
    "streaming, device": ("#5b8def", "s", 9),
    "streaming, host": ("#8e5ea2", "P", 8),
    "streaming, file": ("#0b6e4f", "D", 5),
    "planner": ("#c8553d", "*", 9),
}
_MIB = 2**20


def plot(about: Mapping[str, Any], rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write the picture into `folder`, and say where it is."""
    decoders = list(dict.fromkeys(row["decoder"] for row in rows if "predicted" in row))
    if not decoders:
        return []
    figure, panels = plt.subplots(1, len(decoders), figsize=(7 * len(decoders), 5.6), layout="constrained", sharey=True)
    panels = [panels] if len(decoders) == 1 else list(panels)
    for axes, decoder in zip(panels, decoders, strict=True):
        _panel(axes, [row for row in rows if row["decoder"] == decoder and "predicted" in row], about["budget"])
        axes.set_title(f"{DECODERS[decoder].title}, {about['clips'][decoder]}", fontsize=10, loc="left")
    panels[0].set_ylabel("MiB at most, beyond weights and clip, lower is better")
    # a strategy that one panel lacks is in the other
    entries = {label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels())}  # noqa: B905
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    text = f"{about['device']} · {about['dtype']} · {about['date'][:10]} · {about['commit']}"
    figure.suptitle(f"peak memory of a decode, each point a process of its own\n{text}", fontsize=10)
    path = folder / "frames_memory.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return [path]


def _panel(axes: Axes, rows: Sequence[Row], budget: int) -> None:
    axes.axhline(budget / _MIB, color="black", lw=1, ls=":", label="the planner's budget")
    for strategy in dict.fromkeys(row["strategy"] for row in rows):
        color, marker, size = _LOOKS[strategy]
        of_strategy = sorted((row for row in rows if row["strategy"] == strategy), key=lambda row: row["num_frames"])
        frames, predicted = zip(*((row["num_frames"], row["predicted"] / _MIB) for row in of_strategy), strict=True)
        axes.plot(frames, predicted, color=color, lw=1.3)
        points = [(row["num_frames"], row["measured"] / _MIB) for row in of_strategy if "measured" in row]
        axes.plot(*zip(*points, strict=True), color=color, marker=marker, ms=size, ls="", label=f"{strategy}, measured")
        alone = [(row["num_frames"], row["predicted"] / _MIB) for row in of_strategy if "measured" not in row]
        for point in alone:
            axes.plot(*point, color=color, marker=marker, ms=size, markerfacecolor="none")
    axes.plot([], [], color="black", lw=1.3, label="predicted")
    axes.plot([], [], color="black", marker="o", ls="", markerfacecolor="none", label="predicted only")
    lengths = sorted({row["num_frames"] for row in rows})
    axes.set(xscale="log", yscale="log", xlabel="frames of the video")
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(labelleft=True)
    axes.grid(which="major", alpha=0.3)
