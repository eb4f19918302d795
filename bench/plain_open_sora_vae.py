"""Open-Sora 1.2's VAE decodes a clip on a CPU: plain PyTorch beside our operators, each run in a process of its own.

Plain: diffusers' image VAE and the temporal VAE on the reference operators, every step a PyTorch call. Ours: the same
model after `apply_opensora_kernels`, on the backends that are chosen by themselves. Random weights, alternating runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext

import torch

from bench.about import about_this_run, json_file, write_json
from opensora.config import VideoVAEConfig
from opensora.device_memory import peak_memory, reset_peak_memory
from opensora.vae import VideoVAE
from opensora_kernels import apply_opensora_kernels, use

WAYS = ("plain", "ours")


@torch.no_grad()
def measure(options: argparse.Namespace) -> dict[str, float]:
    """Seconds of the last run by the clock and of the processor, and the peak memory of this process."""
    torch.manual_seed(0)
    vae = VideoVAE(VideoVAEConfig()).to(getattr(torch, options.dtype)).eval()
    del vae.spatial_vae.module.encoder, vae.temporal_vae.encoder
    latent_size = vae.latent_size((options.frames, options.size, options.size))
    z = torch.randn(1, vae.latent_channels, *latent_size).to(getattr(torch, options.dtype))
    if options.how == "ours":
        apply_opensora_kernels(vae)
    elif options.in_order:
        # as the model was before: pictures in PyTorch's default order of axes
        vae.spatial_vae.module.post_quant_conv.register_forward_pre_hook(lambda _, given: (given[0].contiguous(),))
    reset_peak_memory(torch.device("cpu"))
    before = peak_memory(torch.device("cpu"))
    with use("reference") if options.how == "plain" else nullcontext():
        for _ in range(options.runs):
            start, start_cpu = time.perf_counter(), time.process_time()
            frames = vae.decode(z, options.frames)
            seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
            assert frames.isfinite().all()
            del frames
    mib = {"peak_mib": peak_memory(torch.device("cpu")) >> 20, "before_mib": before >> 20}
    return {"seconds": round(seconds, 2), "cpu_seconds": round(cpu_seconds, 2), **mib}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.plain_open_sora_vae", description=__doc__.splitlines()[0])
    parser.add_argument("--how", choices=WAYS, help="one run, here; without it, both in turn")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3, help="runs of each, the median of which counts")
    parser.add_argument("--runs", type=int, default=2, help="in each process, the last of which is timed")
    parser.add_argument("--in-order", action="store_true", help="plain: without channels last in its pictures")
    parser.add_argument("--json", type=json_file, metavar="FILE", help="write what was found there")
    options = parser.parse_args()
    if options.how:
        print(json.dumps(measure(options)))
        return
    clip = {name: getattr(options, name) for name in ("dtype", "frames", "size")}
    record = {**about_this_run("cpu"), **clip, "rows": []}
    for _ in range(options.repeats):
        for how in WAYS:
            command = [sys.executable, "-m", "bench.plain_open_sora_vae", *sys.argv[1:], "--how", how]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            print(how, found, flush=True)
            record["rows"].append({"how": how, **found})
    plain, ours = ([row for row in record["rows"] if row["how"] == how] for how in WAYS)
    for name in ("seconds", "cpu_seconds", "peak_mib"):
        medians = [statistics.median(row[name] for row in rows) for rows in (plain, ours)]
        print(f"{name}: plain {medians[0]}, ours {medians[1]}, {medians[0] / medians[1]:.2f} x")
    if options.json:
        write_json(options.json, record)


if __name__ == "__main__":
    main()
