"""How fast a training runs: rates, use of the device and waiting, from what its steps report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

WORK = ("num_samples", "num_tokens", "flops")
"""What a loss may say of its batch among its scalars: clips, tokens and operations of the model for a training step."""
COUNTED = ("seconds", "data_seconds", *WORK)
"""Values of a step that are summed here and shown as rates, not by themselves."""


@dataclass
class Throughput:
    """Sums of steps since the last `rates`.

    ceiling_flops: asked once, for operations per second that all devices together do at best; None leaves model FLOP
    utilisation out.
    """

    ceiling_flops: Callable[[], float] | None = None
    _sums: dict[str, float] = field(default_factory=dict)
    _ceiling: float | None = None

    def add(self, values: Mapping[str, float]) -> None:
        """The values of one step: `seconds`, of which `data_seconds` waited for data, and what all ranks together
        trained on: `num_samples`, `num_tokens` and `flops` (of the model, recomputation left out). Any may be absent.
        """
        for name in COUNTED:
            if name in values:
                self._sums[name] = self._sums.get(name, 0.0) + values[name]

    def rates(self) -> dict[str, float]:
        """Per second: samples, tokens, operations; and as shares: `mfu` of the ceiling, `data_wait` of the time.

        The sums begin anew. Steps of unlike clips weigh as long as they took.
        """
        sums, self._sums = self._sums, {}
        seconds = sums.get("seconds", 0.0)
        if seconds <= 0:
            return {}
        found = {
            name: sums[source] / seconds
            for name, source in (
                ("samples_per_second", "num_samples"),
                ("tokens_per_second", "num_tokens"),
                ("flops_per_second", "flops"),
                ("data_wait", "data_seconds"),
            )
            if source in sums
        }
        if self.ceiling_flops is not None and "flops" in sums:
            self._ceiling = self._ceiling or self.ceiling_flops()
            found["mfu"] = found["flops_per_second"] / self._ceiling
        return found


def show_rates(rates: Mapping[str, float]) -> str:
    """The rates for people: "3.2 samples/s, 12,300 tokens/s, 41 TFLOP/s, MFU 42.0 %, 3 % waiting for data"."""
    shows: dict[str, Callable[[float], str]] = {
        "samples_per_second": lambda rate: f"{rate:.3g} samples/s",
        "tokens_per_second": lambda rate: f"{rate:,.0f} tokens/s",
        "flops_per_second": lambda rate: f"{show_flops(rate)}/s",
        "mfu": lambda share: f"MFU {100 * share:.1f} %",
        "data_wait": lambda share: f"{100 * share:.0f} % waiting for data",
    }
    return ", ".join(show(rates[name]) for name, show in shows.items() if name in rates)


def show_flops(number: float) -> str:
    """1.5e12 as "1.5 TFLOP"."""
    for unit, size in (("EFLOP", 1e18), ("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number / 1e6:.3g} MFLOP"
