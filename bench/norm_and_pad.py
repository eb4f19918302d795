"""What a CPU does before a causal convolution: GroupNorm, SiLU and padding, by PyTorch, compiled, and by our library.

Seconds of the processor in one thread, which other processes disturb least; all ways in turn.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.about import about_this_run, json_file, write_json
from opensora_kernels import cpu_norms
from opensora_kernels._extension import why_not_loaded

# channels, frames, rows and columns of Open-Sora 1.2's decoders
SHAPES = ((128, 4, 128), (256, 4, 64), (512, 5, 32))
LAYOUTS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last_3d}


def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.pad(F.silu(F.group_norm(x, 32, weight, bias, 1e-6)), (1, 1, 1, 1, 2, 0))


def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    moments = cpu_norms.group_moments(x, 32, 1e-6, False, None)
    num_samples, num_channels, num_frames, height, width = x.shape
    size = (num_samples, num_channels, num_frames + 2, height + 2, width + 2)
    layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last_3d
    out = torch.empty(size, dtype=x.dtype, memory_format=layout)
    out[:, :, :2].zero_()
    cpu_norms.apply_group_norm(x, moments, weight, bias, True, out[:, :, 2:], (1, 1, 1, 1))
    return out


def medians(calls: list[Callable[[], Tensor]], num_runs: int) -> list[float]:
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(2):
        for call in calls:
            call()
    for _ in range(num_runs):
        for call, found in zip(calls, times, strict=True):
            start = time.thread_time()
            call()
            found.append(time.thread_time() - start)
    return [statistics.median(found) for found in times]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.norm_and_pad", description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=21, help="of each way, the median of which counts")
    parser.add_argument("--json", type=json_file, metavar="FILE", help="write what was found there")
    options = parser.parse_args()
    if (reason := why_not_loaded("cpu")) is not None:
        raise SystemExit(reason)
    torch.set_num_threads(1)
    compiled = torch.compile(plain)
    record = {**about_this_run("cpu"), "rows": []}
    for dtype in (torch.bfloat16, torch.float32):
        for num_channels, num_frames, side in SHAPES:
            for name, layout in LAYOUTS.items():
                x = torch.randn(1, num_channels, num_frames, side, side).to(dtype).contiguous(memory_format=layout)
                given = (x, torch.rand(num_channels).to(dtype), torch.randn(num_channels).to(dtype))
                calls = [lambda run=run, given=given: run(*given) for run in (plain, compiled, ours)]
                times = medians(calls, options.runs)
                print(
                    f"{str(dtype)[6:]} {num_channels} x {num_frames} x {side}^2 {name}: "
                    f"PyTorch {times[0] * 1e3:.2f} ms, compiled {times[1] * 1e3:.2f}, "
                    f"ours {times[2] * 1e3:.2f}: {times[0] / times[2]:.2f} x, "
                    f"{times[1] / times[2]:.2f} x",
                    flush=True,
                )
                seconds = dict(zip(("plain", "compiled", "ours"), times, strict=True))
                shape = (num_channels, num_frames, side, side)
                record["rows"].append({"dtype": str(dtype)[6:], "shape": shape, "layout": name, **seconds})
    if options.json:
        write_json(options.json, record)


if __name__ == "__main__":
    main()
