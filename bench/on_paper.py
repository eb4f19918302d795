"""`python -m bench memory`: peak memory of decoders at their released widths and at sizes that people use, on paper.

Every version runs on tensors without data, and what would be alive is counted, with the workspaces of a CPU's library:
what `plan_tiles` predicts, held to measured peaks by the tests. Rivals, clips and modes are those of `python -m bench
model --what vae_decode`; streamed: its own steps, or a frame of latents at a time, for frames that are let go.

  python -m bench memory --models wan_2.1,cogvideox --dtype fp32 bf16 --json memory.json
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bench import plain_causal_vae
from bench.about import about_this_run, json_file
from bench.cases import DTYPES
from bench.decoders import DECODERS, Decoder, latent_channels, of_diffusers, of_open_sora_plan
from bench.record import Record, failure, status_of
from opensora_kernels import apply_opensora_kernels
from opensora_kernels.vae import Streaming, decoder_of, plan_tiles
from opensora_kernels.vae.attention_rules import scaled_dot_product_attention
from opensora_kernels.vae.memory import Ledger

Row = dict[str, Any]
# Frames of latents: caches are full, every kind of step has come, and Allegro, which decodes six at a time, has some.
NUM_LATENTS = 6


def main(arguments: Sequence[str]) -> int:
    """The exit status of `Record.collect`."""
    options = read_options(arguments)
    about = about_this_run("cpu") | {"command": "memory"}
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    record = Record(about, options.json, None)
    status = status_of(lambda: run(options, record), "what is finished stays")
    return status or int(any("failed" in row for row in record.rows))


def run(options: argparse.Namespace, record: Record) -> None:
    print(f"\nMiB, and in units of the rival's\n\n{header()}", flush=True)
    for name in options.models:
        for dtype in options.dtype:
            try:
                for row in measure(name, DECODERS[name], DTYPES[dtype]):
                    record.rows.append(row | {"dtype": dtype})
                    print(line(record.rows[-1]), flush=True)
            except Exception as error:  # the other rows stand
                record.rows.append({"family": name, "dtype": dtype} | failure(error, "cpu"))
                print(f"{name}, {dtype}: {type(error).__name__}: {error}", flush=True)
            record.save()


@torch.no_grad()
def measure(name: str, decoder: Decoder, dtype: torch.dtype) -> Iterator[Row]:
    """A row for each mode: bytes of the rival, of ours, and streamed (None where it cannot be)."""
    make = of_diffusers if decoder.model else of_open_sora_plan
    vae = nn.Module.to(make(decoder, is_tiny=False), dtype).eval().requires_grad_(False)
    ours = copy.deepcopy(vae)
    if decoder.model:
        apply_opensora_kernels(ours)  # with weights: modules are compared before they are replaced
    vae, ours = (nn.Module.to(each, "meta") for each in (vae, ours))
    num_frames, height, width = decoder.on_gpu
    z = torch.empty(1, latent_channels(vae), min(NUM_LATENTS, num_frames), height, width, dtype=dtype, device="meta")
    for mode in decoder.modes:
        if mode in decoder.lacks:
            continue
        if decoder.model:
            for each in (vae, ours):
                each.enable_tiling() if mode == "tiled" else each.disable_tiling()
            versions = (lambda: vae.decode(z), lambda: ours.decode(z))
            stepping = decoder_of(ours)
        else:
            versions = (lambda: plain_causal_vae.decode(vae, z), lambda: ours.decode_unscaled(z))
            stepping = ours.decode_unscaled
        row = {"family": name, "mode": mode, "latents": tuple(z.shape[2:])}
        row |= dict(zip(("rival", "ours"), map(peak_of, versions), strict=True))
        yield row | ({"streamed": _streamed(stepping, z)} if mode == "whole" else {})


def peak_of(call: Callable[[], Any]) -> int:
    with Ledger(torch.device("cpu")) as ledger, _AttentionOnPaper():
        call()
    return ledger.peak


class _AttentionOnPaper(TorchFunctionMode):
    """On a CPU no version holds the scores of its attention; on tensors without data PyTorch would."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        is_attention = func is F.scaled_dot_product_attention
        return (scaled_dot_product_attention if is_attention else func)(*args, **(kwargs or {}))


def _streamed(model: Callable[[Tensor], Tensor], z: Tensor) -> int | None:
    try:
        plan = plan_tiles(model, tuple(z.shape), "1024TiB", z.dtype, "cpu", strategies=[Streaming(1)])
    except (TypeError, ValueError):
        return None
    return plan.peak_bytes


def header() -> str:
    return f"{'decoder':<20}{'dtype':<7}{'latents':<14}{'mode':<8}{'rival':>9}{'ours':>9}{'':>7}{'streamed':>10}{'':>7}"


def line(row: Row) -> str:
    def cells(key: str, width: int) -> str:
        if row.get(key) is None:
            return f"{'-':>{width}}{'':>7}"
        return f"{row[key] / 2**20:>{width}.0f}{row[key] / row['rival']:>7.2f}"

    size = "x".join(map(str, row["latents"]))
    start = f"{row['family']:<20}{row['dtype']:<7}{size:<14}{row['mode']:<8}{row['rival'] / 2**20:>9.0f}"
    return start + cells("ours", 9) + cells("streamed", 10)


def table(rows: Sequence[Row]) -> list[list[str]]:
    """For a page: the heads, and a line for each row."""
    lines = [["decoder", "latents", "mode", "dtype", "rival, MiB", "ours", "x rival", "streamed", "x rival"]]
    for row in rows:
        if "failed" in row:
            lines.append([row["family"], "", "", row["dtype"], f"failed: {row['failed']}", *[""] * 4])
            continue
        cells = [row["family"], " x ".join(map(str, row["latents"])), row["mode"], row["dtype"], _mib(row["rival"])]
        for key in ("ours", "streamed"):
            known = row.get(key) is not None
            cells += [_mib(row[key]), f"{row[key] / row['rival']:.2f}"] if known else ["-", "-"]
        lines.append(cells)
    return lines


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.0f}"


def read_options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--models", nargs="+", default=[*DECODERS], metavar="NAME", help=f"of {', '.join(DECODERS)}; default: all")
    add("--dtype", nargs="+", choices=DTYPES, default=["fp32", "bf16"], help="default: %(default)s")
    add("--json", type=json_file, metavar="FILE", help="write every row there, with versions and commit")
    options = parser.parse_args(arguments)
    options.models = [name for words in options.models for name in words.split(",") if name]
    for name in options.models:
        if name not in DECODERS:
            parser.error(f"--models must be of {', '.join(DECODERS)}, got {name!r}")
    return options
