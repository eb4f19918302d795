"""`python -m bench convolution`: the library's own conv3d, channels last, by width: what a kernel of ours must beat.

On a GPU cuDNN times its algorithms and takes the fastest. The JSON is written after every row; Ctrl-C keeps them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from bench.about import about_this_run, json_file, write_json
from bench.cases import DTYPES
from bench.measure import measure_ceilings, time_calls
from bench.record import failure, status_of
from opensora_kernels.cases import Maker

# 3 x 3 x 3 on clips of about equal work: the widths of Wan 2.1, HunyuanVideo and the Open-Sora VAEs.
LAYERS = {96: (9, 240, 416), 128: (9, 240, 320), 192: (9, 120, 208), 256: (9, 120, 160), 384: (9, 60, 104),
          512: (9, 60, 80)}  # fmt: skip
_SMALL_SHARE = 8  # of each axis of a picture, on a CPU


def main(arguments: Sequence[str]) -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(prog="python -m bench convolution", description=__doc__.split(":", 1)[1])
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--json", type=json_file, metavar="FILE", help="write everything there too")
    options = parser.parse_args(arguments)
    torch.backends.cudnn.benchmark = device == "cuda"  # the library gets its best shot
    ceilings = measure_ceilings(device, DTYPES[options.dtype])
    about = about_this_run(device)
    print(f"{about}\nmatrix products reach {ceilings.rate / 1e12:.1f} TFLOP/s")
    print(
        f"{'channels':>8}{'clip':>14}{'forward ms':>12}{'TFLOP/s':>9}{'%':>6}{'backward ms':>13}{'TFLOP/s':>9}{'%':>6}"
    )
    record: dict[str, Any] = {**about, "dtype": options.dtype, "rate": ceilings.rate, "rows": []}

    def run() -> None:
        for channels, clip in LAYERS.items():
            sizes = clip if device == "cuda" else (clip[0] // 3, clip[1] // _SMALL_SHARE, clip[2] // _SMALL_SHARE)
            row = attempt(channels, sizes, DTYPES[options.dtype], device)
            record["rows"].append(row)
            print(f"{channels:>8}{'x'.join(map(str, sizes)):>14} {_cells(row, ceilings.rate)}", flush=True)
            if options.json:
                write_json(options.json, record)

    return status_of(run, "finished rows are kept") or int(any("failed" in row for row in record["rows"]))


def _cells(row: dict[str, Any], ceiling: float) -> str:
    if "failed" in row:
        return row["failed"]
    rates = {"forward": row["flops"] / row["forward"], "backward": 2 * row["flops"] / row["backward"]}
    return " ".join(
        f"{row[direction] * 1e3:12.3f}{rate / 1e12:9.2f}{100 * rate / ceiling:6.1f}"
        for direction, rate in rates.items()
    )


def attempt(channels: int, sizes: tuple[int, ...], dtype: torch.dtype, device: str) -> dict[str, Any]:
    try:
        return measure(channels, sizes, dtype, device)
    except RuntimeError as error:  # cuDNN knows no algorithm, or memory is short: the other widths stand
        return {"channels": channels, "clip": list(sizes), **failure(error, device)}


def measure(channels: int, sizes: tuple[int, ...], dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Median seconds of a forward and of a backward pass, both gradients, and operations of the forward pass."""
    draw = Maker(dtype, device)
    x = draw.normal(1, channels, *sizes).contiguous(memory_format=torch.channels_last_3d).requires_grad_()
    weight = draw.normal(channels, channels, 3, 3, 3, std=(27 * channels) ** -0.5)
    weight = weight.contiguous(memory_format=torch.channels_last_3d).requires_grad_()
    with torch.no_grad():
        forward = time_calls(lambda: F.conv3d(x, weight, padding=1), device).median
    out = F.conv3d(x, weight, padding=1)
    grad = torch.randn_like(out)
    backward = time_calls(lambda: torch.autograd.grad(out, (x, weight), grad, retain_graph=True), device).median
    flops = 2 * 27 * channels * out.numel()
    return {"channels": channels, "clip": list(sizes), "forward": forward, "backward": backward, "flops": flops}
