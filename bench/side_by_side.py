"""Decoders of `bench.decoders` timed beside their rivals in one run, and streamed inside a budget of memory."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bench.cases import DTYPES
from bench.decoders import DECODERS, Decoder, Mode, Pair, build
from bench.measure import Ceilings, Timing, mapping_every_tensor, peak_bytes, time_in_turn, why_wrong, with_a_heap
from bench.record import Record, failure
from bench.table import compare, milliseconds
from opensora_kernels.cases import bytes_moved
from opensora_kernels.vae import TilePlan, decode, gather, plan_tiles

Row = dict[str, Any]

LEGEND = """\
Decoders beside their rivals: Open-Sora-Plan 1.1 written in PyTorch's own calls, and diffusers' own VAEs; with random
weights. whole, tiled: without tiling, with that of diffusers at its default size. automatic, patched: on our operators.
streamed: without tiling, chunk after chunk, with a budget of memory (0.5 and 0.7 of the rival's peak), planned before
the timing. x time: how many times as fast as the rival; x MB: memory in units of the rival's. MB: peak beyond weights
and latents, the whole video within it. The versions run in turn."""


def run(names: Sequence[str], options: argparse.Namespace, ceilings: Ceilings, record: Record, end: float) -> None:
    """Rows of each decoder in `names`, none begun after `end` on the monotonic clock."""
    print(f"\n{LEGEND}\n\n{header()}", flush=True)
    with mapping_every_tensor():
        for name in names:
            if time.monotonic() > end:
                print("\nthe time is up: what is finished follows", flush=True)
                return
            for rows in measure(name, DECODERS[name], ceilings, options):
                record.add(rows)
                print("\n".join(map(line, rows)), flush=True)


@torch.no_grad()
def measure(name: str, decoder: Decoder, ceilings: Ceilings, options: argparse.Namespace) -> Iterator[list[Row]]:
    """The rows of one mode after the other, the rival's first."""
    device, is_tiny = options.device, options.scale == "tiny"
    about = {"op": "vae_decode", "family": name, "direction": "forward", "truth_by": decoder.rival}
    about |= {"bandwidth": ceilings.bandwidth, "flops_ceiling": ceilings.rate}
    rival = about | {"case": name, "mode": "whole", "kind": "rival", "backend": decoder.rival}
    if decoder.why_not():
        yield [rival | {"skipped": decoder.why_not()}]
        return
    try:
        pair = build(decoder, DTYPES[options.dtype], device, is_tiny=is_tiny)
    except Exception as error:  # such as a newer diffusers that wants other arguments
        yield [rival | failure(error, device)]
        return
    for mode in decoder.modes:
        if mode in decoder.lacks:
            yield [rival | {"case": f"{name} {mode}", "mode": mode, "skipped": decoder.lacks[mode]}]
            continue
        try:
            yield Comparison(decoder, pair, mode, about, options).rows()
        except torch.OutOfMemoryError:  # to find out what is right
            yield [rival | {"case": f"{name} {mode}", "mode": mode, "skipped": "out of memory"}]
        except Exception as error:
            yield [rival | {"case": f"{name} {mode}", "mode": mode} | failure(error, device)]


@dataclass
class Comparison:
    """All versions of a decoder in one mode."""

    decoder: Decoder
    pair: Pair
    mode: Mode
    about: Mapping[str, Any]
    options: argparse.Namespace
    _calls: list[tuple[Row, Callable[[], Tensor]]] = field(default_factory=list)

    def rows(self) -> list[Row]:
        decoder, pair, dtype = self.decoder, self.pair, DTYPES[self.options.dtype]
        self.pair.set_mode(self.mode)
        with FlopCounterMode(display=False) as counter:
            self._plain = pair.theirs(pair.z)
        self._truth = pair.truth(self.mode, torch.float64 if dtype == torch.float32 else torch.float32)
        moved, flops = bytes_moved({"read": [*pair.weights, pair.z]}, self._plain), counter.get_total_flops()
        floor = max(moved / self.about["bandwidth"], flops / self.about["flops_ceiling"])
        height, width = self._plain.shape[-2:]
        num_frames = self._plain.numel() // (3 * height * width)  # Allegro's come before the channels
        case = f"{self.about['family']} {num_frames}x{height}x{width} {self.mode}"
        self._shared = {**self.about, "case": case, "mode": self.mode, "bytes": moved, "flops": flops, "floor": floor}
        rival = self._checked(decoder.rival, lambda: pair.theirs(pair.z), kind="rival")
        rows = [rival, self._checked(decoder.ours, lambda: pair.ours(pair.z))]
        if self.mode == "whole":
            rows.append(self._streamed(rival.get("peak_bytes")))
        self._time(rival)
        for row in rows:
            if row.get("peak_bytes") and rival.get("peak_bytes"):
                row["times_the_memory"] = row["peak_bytes"] / rival["peak_bytes"]
        compare(rows)
        return rows

    def _checked(self, name: str, call: Callable[[], Tensor], *, kind: str = "backend", **more: Any) -> Row:
        """With the peak memory if the result is right, and then kept to be timed."""
        row, device = self._shared | {"backend": name, "kind": kind} | more, self.options.device
        try:
            wrong = why_wrong(call(), self._plain, self._truth, DTYPES[self.options.dtype], is_chain=True)
            if wrong is not None:
                return row | {"wrong": wrong}
            row |= {"peak_bytes": peak_bytes(call, device, is_warm=True), "is_replayed": False}
        except torch.OutOfMemoryError:
            return row | {"skipped": "out of memory"}
        except Exception as error:  # the other rows stand
            return row | failure(error, device)
        self._calls.append((row, call))
        return row

    def _streamed(self, peak_of_rival: int | None) -> Row:
        row, z, ours = self._shared | {"backend": "streamed", "kind": "backend"}, self.pair.z, self.pair.ours
        if peak_of_rival is None:
            return row | {"skipped": "peak memory can't be measured here, to be a budget"}
        start = time.perf_counter()
        try:
            plan = plan_tiles(ours, tuple(z.shape), int(peak_of_rival * self.decoder.budget), z.dtype, z.device)
        except (ValueError, TypeError) as error:  # it can't be recorded, or not inside this budget
            return row | {"skipped": str(error).splitlines()[0]}
        told = {"plan": str(plan.strategy), "budget": plan.budget, "predicted_bytes": plan.peak_bytes}
        told["planning_seconds"] = time.perf_counter() - start
        if not plan.strategy.is_exact:
            return row | told | {"skipped": f"no exact plan fits, only '{plan.strategy}'"}
        return self._checked("streamed", lambda: self._gathered(plan), **told)

    def _gathered(self, plan: TilePlan) -> Tensor:
        """The whole video, as the rival returns it."""
        return gather(decode(self.pair.ours, self.pair.z, plan=plan), out=torch.empty_like(self._plain))

    def _time(self, rival: Row) -> None:
        """All that are right in turn, and the rival once more, for the spread."""
        again: Row = {}
        calls = [*self._calls, *((again, call) for row, call in self._calls if row is rival)]
        how = {"seconds": 0.5, "least": 3} if self.options.quick else {"seconds": 2.0}

        @torch.no_grad()  # a thread starts with gradients
        def timed() -> list[Timing]:
            return time_in_turn([call for _, call in calls], self.options.device, **how)

        timings = with_a_heap(timed) if self.options.device == "cpu" else timed()
        for (row, _), timing in zip(calls, timings, strict=True):
            row |= asdict(timing)
        if again:
            rival["again"] = again["median"]


def header() -> str:
    return f"{'decoder':<36}{'version':<12}{'median ms':>10}{'p20':>10}{'p80':>10}{'x time':>8}{'MB':>9}{'x MB':>7}"


def line(row: Row) -> str:
    head = f"{row['case']:<36}{row['backend']:<12}"
    if "median" not in row:
        return head + "  " + " ".join(f"{key}: {row[key]}" for key in ("skipped", "wrong", "failed") if key in row)
    median, p20, p80 = (milliseconds(row[key]) for key in ("median", "p20", "p80"))
    ratio = row["times_as_fast_as"].get(row["truth_by"])
    cells = ["-" if ratio is None else f"{ratio:.2f}"]
    cells.append(f"{row['peak_bytes'] / 1e6:.1f}" if row["peak_bytes"] is not None else "-")
    cells.append(f"{row['times_the_memory']:.2f}" if "times_the_memory" in row else "-")
    plan = f"  {row['plan']}" if "plan" in row else ""
    return f"{head}{median:>10}{p20:>10}{p80:>10}{cells[0]:>8}{cells[1]:>9}{cells[2]:>7}{plan}"
