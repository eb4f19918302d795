"""CausalVideoVAE without our operators: every step a PyTorch call of its own, as the original runs it.

Takes the weights from a `CausalVideoVAE`. What is fused is compared with it, in numbers by tests, in seconds and bytes
by `python -m bench.plain_causal_vae`: of the full size, each way in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.about import about_this_run, json_file, write_json
from opensora.presets import open_sora_plan_v1_0, open_sora_plan_v1_1
from opensora.vae import CausalVideoVAE
from opensora.vae.causal_video import layers, resampling
from opensora_kernels.vae import decode as decode_in_parts
from opensora_kernels.vae import plan_tiles

# Fused: our operators, whole; streamed: within half of the memory that this takes, the video included.
WAYS = ("plain", "fused", "channels_last", "streamed")


def encode(vae: CausalVideoVAE, x: Tensor) -> Tensor:
    """Moments of unscaled latents; as upstream, every level's result is kept until the end."""
    kept = [convolve(vae.encoder.conv_in, x)]
    for level in vae.encoder.down:
        for block in level.block:
            kept.append(residual(block, kept[-1]))
        if level.downsample is not None:
            kept.append(downsample(level.downsample, kept[-1]))
        if level.time_downsample is not None:
            kept.append(time_downsample(level.time_downsample, kept[-1]))
    hidden = normalise(vae.encoder.norm_out, middle(vae.encoder.mid, kept[-1]))
    return convolve(vae.quant_conv, convolve(vae.encoder.conv_out, hidden * torch.sigmoid(hidden)))


def decode(vae: CausalVideoVAE, z: Tensor) -> Tensor:
    """Pixels of unscaled latents."""
    hidden = middle(vae.decoder.mid, convolve(vae.decoder.conv_in, convolve(vae.post_quant_conv, z)))
    for level in reversed(vae.decoder.up):
        for block in level.block:
            hidden = residual(block, hidden)
        if level.upsample is not None:
            hidden = convolve(level.upsample.conv, F.interpolate(hidden, scale_factor=(1, 2, 2), mode="nearest"))
        if level.time_upsample is not None:
            hidden = time_upsample(level.time_upsample, hidden)
    hidden = normalise(vae.decoder.norm_out, hidden)
    return convolve(vae.decoder.conv_out, hidden * torch.sigmoid(hidden))


def convolve(layer: nn.Module, x: Tensor) -> Tensor:
    if isinstance(layer, layers.Conv2d):
        return framewise(lambda frames: F.conv2d(frames, layer.weight, layer.bias, layer.stride, layer.padding), x)
    conv = layer.conv
    padded = torch.cat((x[:, :, :1].repeat(1, 1, conv.kernel_size[0] - 1, 1, 1), x), dim=2)
    return F.conv3d(padded, conv.weight, conv.bias, conv.stride, conv.padding)


def framewise(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    batch, _, num_frames = x.shape[:3]
    frames = x.permute(0, 2, 1, 3, 4).reshape(batch * num_frames, x.shape[1], *x.shape[3:])
    y = function(frames)
    return y.view(batch, num_frames, *y.shape[1:]).permute(0, 2, 1, 3, 4).contiguous()


def normalise(norm: layers.GroupNorm, x: Tensor) -> Tensor:
    if norm.per_frame:
        return framewise(lambda frames: F.group_norm(frames, 32, norm.weight, norm.bias, norm.eps), x)
    return F.group_norm(x, 32, norm.weight, norm.bias, norm.eps)


def residual(block: nn.Module, x: Tensor) -> Tensor:
    hidden = x
    for norm, conv in ((block.norm1, block.conv1), (block.norm2, block.conv2)):
        hidden = normalise(norm, hidden)
        hidden = convolve(conv, hidden * torch.sigmoid(hidden))
    return (convolve(block.nin_shortcut, x) if hasattr(block, "nin_shortcut") else x) + hidden


def middle(mid: nn.Module, x: Tensor) -> Tensor:
    x = residual(mid.block_1, x)
    hidden = normalise(mid.attn_1.norm, x)
    q, k, v = (convolve(layer, hidden) for layer in (mid.attn_1.q, mid.attn_1.k, mid.attn_1.v))
    batch, channels, num_frames, height, width = q.shape
    is_mixed = isinstance(mid.attn_1, layers.AttnBlock3D)
    if not is_mixed:
        q, k, v = (value.permute(0, 2, 1, 3, 4).contiguous() for value in (q, k, v))
    q, k, v = (value.reshape(batch * num_frames, channels, height * width) for value in (q, k, v))
    weights = torch.softmax(q.transpose(1, 2) @ k * channels**-0.5, dim=2)
    hidden = v @ weights.transpose(1, 2)
    if is_mixed:
        hidden = hidden.reshape(batch, channels, num_frames, height, width)
    else:
        hidden = hidden.view(batch, num_frames, channels, height, width).permute(0, 2, 1, 3, 4).contiguous()
    return residual(mid.block_2, x + convolve(mid.attn_1.proj_out, hidden))


def downsample(block: nn.Module, x: Tensor) -> Tensor:
    return convolve(block.conv, F.pad(x, (0, 1, 0, 1)))


def time_downsample(block: nn.Module, x: Tensor) -> Tensor:
    padded = torch.cat((x[:, :, :1].repeat(1, 1, 2, 1, 1), x), dim=2)
    wide = padded.float() if padded.dtype is torch.bfloat16 and not padded.is_cuda else padded  # no such CPU kernel
    pooled = F.avg_pool3d(wide, (3, 1, 1), (2, 1, 1)).to(x.dtype)
    if isinstance(block, resampling.TimeDownsample2x):
        return pooled
    share = torch.sigmoid(block.mix_factor)
    return share * pooled + (1 - share) * F.conv3d(padded, block.conv.weight, block.conv.bias, (2, 1, 1), (0, 1, 1))


def time_upsample(block: nn.Module, x: Tensor) -> Tensor:
    if x.shape[2] > 1:
        x = torch.cat((x[:, :, :1], F.interpolate(x[:, :, 1:], scale_factor=(2, 1, 1), mode="trilinear")), dim=2)
    if isinstance(block, resampling.TimeUpsample2x):
        return x
    share = torch.sigmoid(block.mix_factor)
    return share * x + (1 - share) * convolve(block.conv, x)


@torch.no_grad()
def measure(options: argparse.Namespace) -> dict[str, float]:
    """Seconds of one run by the clock and of the processor, and the peak memory of this process.

    The model has its full size and random weights.
    """
    release = {"1.0": open_sora_plan_v1_0, "1.1": open_sora_plan_v1_1}[options.release]
    dtype = getattr(torch, options.dtype)
    torch.manual_seed(0)
    with torch.device("meta"):
        vae = CausalVideoVAE(release.vae())
    vae = vae.to(dtype).to_empty(device="cpu").eval()
    for parameter in vae.parameters():
        parameter.normal_(0, 0.02)
    num_frames, size = options.frames, options.size
    if options.half == "encode":
        x = torch.rand(1, 3, num_frames, size, size, dtype=dtype) * 2 - 1
        run = lambda: vae.posterior(x).moments if options.how != "plain" else encode(vae, x)  # noqa: E731
    else:
        x = torch.randn(1, 4, (num_frames + 3) // 4, size // 8, size // 8, dtype=dtype)
        run = lambda: vae.decode_unscaled(x) if options.how != "plain" else decode(vae, x)  # noqa: E731
    if options.how == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last_3d)
    if options.how == "streamed":
        whole = plan_tiles(vae.decode_unscaled, x.shape, "1TiB", dtype)
        plan = plan_tiles(vae.decode_unscaled, x.shape, whole.peak_bytes // 2, dtype)
        run = lambda: torch.cat(list(decode_in_parts(vae.decode_unscaled, x, plan=plan)), dim=2)  # noqa: E731
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start, start_cpu = time.perf_counter(), time.process_time()
    y = run()
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
    assert y.isfinite().all()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    mib = {"peak_mib": peak // 1024, "before_mib": before // 1024}
    return {"seconds": round(seconds, 2), "cpu_seconds": round(cpu_seconds, 2), **mib}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.plain_causal_vae", description=__doc__.splitlines()[0])
    parser.add_argument("--how", choices=WAYS, help="one run, here; without it, all")
    parser.add_argument("--half", choices=["encode", "decode"], default="decode")
    parser.add_argument("--release", choices=["1.0", "1.1"], default="1.1")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--json", type=json_file, metavar="FILE", help="write what was found there")
    options = parser.parse_args()
    if options.how:
        print(json.dumps(measure(options)))
        return
    clip = {name: getattr(options, name) for name in ("half", "release", "frames", "size")}
    record = {**about_this_run("cpu"), "dtype": options.dtype, **clip, "rows": []}
    for how in WAYS if options.half == "decode" else WAYS[:3]:
        command = [sys.executable, "-m", "bench.plain_causal_vae", *sys.argv[1:], "--how", how]
        ended = subprocess.run(command, capture_output=True, text=True)
        # a clip may be too small to be streamed within half of its memory
        found = json.loads(ended.stdout) if ended.returncode == 0 else {"skipped": ended.stderr.splitlines()[-1]}
        print(how, found, flush=True)
        record["rows"].append({"how": how, **found})
        if options.json:
            write_json(options.json, record)


if __name__ == "__main__":
    main()
