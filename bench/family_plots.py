"""Pictures of decoders beside their rivals: time and memory of ours, family by family, where the rival's are 1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from matplotlib import pyplot as plt

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]

_BARS = {  # (whether streamed, mode): label, color
    (False, "whole"): ("on our operators, without tiling", "#5b8def"),
    (False, "tiled"): ("on our operators, the rival's own tiling in both", "#b4c9f5"),
    (True, "whole"): ("streamed by us inside a budget, against the rival without tiling", "#0b6e4f"),
}
_FAR = 2.6  # bars end there, and their figure says how long they are


def family_bars(rows: Sequence[Row], title: str) -> Figure:
    """Median time and peak memory over the rival's, shorter is better."""
    ours = [row for row in rows if row["kind"] == "backend" and row["truth_by"] in row["times_as_fast_as"]]
    families = list(dict.fromkeys(row["family"] for row in ours))
    figure, (times, memories) = plt.subplots(
        1, 2, figsize=(11, 1.9 + 0.86 * len(families)), sharey=True, layout="constrained"
    )
    ticks, position = [], 0.0
    for family in families:
        of_family = [row for row in ours if row["family"] == family]
        ticks.append((position + 0.5 * (len(of_family) - 1), _name_of(of_family)))
        for row in of_family:
            color = _BARS[_kind(row)][1]
            rival = row["median"] * row["times_as_fast_as"][row["truth_by"]]
            whisker = [min(row[key] / rival, _FAR) for key in ("p20", "p80")]
            _bar(times, position, row["median"] / rival, color, whisker)
            if "times_the_memory" in row:
                _bar(memories, position, row["times_the_memory"], color)
            position += 1
        position += 0.8
    for axes, what in ((times, "median time"), (memories, "peak memory")):
        axes.axvline(1, color="black", lw=1.2)
        longest = max((bar.get_width() for bar in axes.patches), default=1)
        axes.set(xlim=(0, max(1.15, longest * 1.14)), xlabel=f"{what}, rival = 1, shorter is better")
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)
    times.set_yticks([at for at, _ in ticks], [name for _, name in ticks], fontsize=8)
    times.set_ylim(max(position - 1.3, 0.6), -0.9)
    shown = [bar for kind, bar in _BARS.items() if any(_kind(row) == kind for row in ours)]
    handles = [plt.Rectangle((0, 0), 1, 1, color=color) for _, color in shown]
    figure.legend(handles, [label for label, _ in shown], loc="outside lower left", fontsize=8, frameon=False, ncols=3)
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    return figure


def _kind(row: Row) -> tuple[bool, str]:
    return row["backend"] == "streamed", row["mode"]


def _name_of(rows: Sequence[Row]) -> str:
    """Family, clip and rival, one below the other."""
    return f"{rows[0]['family']}\n{rows[0]['case'].split()[1]}\nagainst {rows[0]['truth_by']}"


def _bar(axes: Axes, position: float, length: float, color: str, whisker: Sequence[float] = ()) -> None:
    axes.barh(position, min(length, _FAR), color=color, height=0.86)
    if whisker:
        axes.plot(whisker, [position, position], color="black", lw=0.8)
    end = max(min(length, _FAR), *whisker) if whisker else min(length, _FAR)
    behind = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.6}  # where the line of the rival is
    axes.annotate(
        f"{length:.2f}", (end, position), (4, 0), textcoords="offset points", va="center", fontsize=8, bbox=behind
    )
