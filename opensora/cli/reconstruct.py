"""`opensora reconstruct`: a video through a VAE and back, and how much of it is left."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opensora import presets
from opensora.cli import CommandError
from opensora.cli.options import OrNone, Parser
from opensora.config import Precision

if TYPE_CHECKING:
    import torch

    from opensora.reconstruction import AnyVAE


def run(arguments: Sequence[str]) -> int:
    options = _parser().parse(arguments)
    output = Path(options["output"])
    if output.suffix.lower() != ".mp4":
        raise CommandError(f"output: must end in .mp4, got {str(output)!r}")
    if output.exists() and output.samefile(options["input"]):
        raise CommandError(f"output: must be another file than the input, got {str(output)!r}")
    if options["fps"] is not None and not options["fps"] > 0:
        raise CommandError(f"fps: must be above 0, got {options['fps']}")

    from opensora.data.reading import probe, read_frames
    from opensora.data.transforms import transform_frames
    from opensora.metrics import lpips_alex, psnr, ssim
    from opensora.parallel import DTYPES, resolve_device
    from opensora.reconstruction import decode_clip, encode_clip, load_any_vae
    from opensora.sampling.stages import StageMeter
    from opensora.video import to_uint8, write_mp4

    info = probe(options["input"])
    device = resolve_device(options["device"])
    vae = load_any_vae(options["vae"], dtype=DTYPES[options["dtype"]], device=device)
    num_frames, size = _extent(vae, options, info.num_frames, (info.height, info.width))
    clip = transform_frames(read_frames(options["input"], range(num_frames)), size)
    original = to_uint8(clip)
    meter = StageMeter(device)
    scores: dict[str, list[torch.Tensor]] = {"PSNR": [], "SSIM": [], "LPIPS": []}
    lpips = lpips_alex()

    def measured(chunks: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
        start = 0
        while True:
            with meter.stage("decode"):
                frames = next(chunks, None)
            if frames is None:
                return
            for frame in frames.split(1):  # SSIM takes 150 bytes for one of these, a chunk may be the clip
                same = original[start : start + 1]
                scores["PSNR"].append(psnr(same, frame))
                scores["SSIM"].append(ssim(same, frame))
                if not isinstance(lpips, str):
                    scores["LPIPS"].append(lpips(*(side / 127.5 - 1 for side in (same, frame))))
                start += 1
            yield frames

    ways = (options["strategy"], options["memory"])
    with meter.stage("encode"):
        latents, plan = encode_clip(vae, clip[None].to(device, DTYPES[options["dtype"]]), *ways)
    del clip  # what counts from here on is what decoding takes
    print(f"encode: {plan}")
    chunks, plan = decode_clip(vae, latents, num_frames, *ways)
    print(f"decode: {plan}")
    write_mp4(output, measured(chunks), fps=options["fps"] or info.fps or 24)
    _print_results(options, num_frames, size, scores, lpips, meter)
    return 0


def _parser() -> Parser:
    parser = Parser("reconstruct", "Encode a video and decode it again; print PSNR, SSIM, LPIPS, seconds and memory.")
    add = parser.add_argument
    add("input", type=str, help="a video or an image")
    add("output", type=str, help="the mp4 to write")
    vae = presets.get(presets.names()[0]).vae
    add("--vae", type=str, default=vae, help="folder or hub id: Open-Sora's, Open-Sora-Plan's, or one of diffusers'")
    add("--strategy", type=OrNone(str), help="whole, tiled (the VAE's own or 256 pixels) or streaming; default: whole")
    add("--memory", type=OrNone(str), help='a budget such as "10GiB" beyond clip and weights, which chooses a strategy')
    add("--num-frames", type=OrNone(int), help="from the start; default: as many as the VAE takes")
    add("--image-size", type=int, nargs=2, metavar=("H", "W"), help="pixels; default: the video's, in whole latents")
    add("--fps", type=OrNone(float), help="of the mp4; default: the video's")
    add("--dtype", type=Precision, default="fp32")
    add("--device", type=str, default="auto", help="auto, cpu, cuda, npu, ...")
    return parser


def _extent(
    vae: AnyVAE, options: dict[str, Any], num_frames: int, size: tuple[int, int]
) -> tuple[int, tuple[int, int]]:
    """Frames and size of the clip, checked."""
    from opensora.metrics import WINDOW

    wanted = vae.valid_length(num_frames) if options["num_frames"] is None else options["num_frames"]
    if not 1 <= wanted <= num_frames or vae.valid_length(wanted) != wanted:
        lengths = _lengths(vae)
        raise CommandError(f"num_frames: must be from 1 to {num_frames}{lengths} for this video and VAE, got {wanted}")
    asked = tuple(options["image_size"]) if options["image_size"] else vae.size_below(*size)
    given = f"got {asked[0]} {asked[1]}"
    if vae.size_below(*asked) != asked:
        raise CommandError(f"image_size: must be {_sizes(vae)}, {given}")
    if min(asked) < WINDOW:
        raise CommandError(f"image_size: must be at least {WINDOW} x {WINDOW} pixels, as SSIM wants, {given}")
    return wanted, asked


def _lengths(vae: AnyVAE) -> str:
    if vae.tiles:
        return f" of {vae.tiles[1][0]} n + {vae.tiles[0][0]}"
    return f" of {vae.time_factor} n + 1" if vae.has_odd_clips else ""


def _sizes(vae: AnyVAE) -> str:
    if not vae.tiles:
        return f"multiples of {vae.space_factor}, from {vae.space_factor} on"
    (_, *tile), (_, *stride) = vae.tiles
    rule = " and ".join(f"{each} n + {least}" for least, each in zip(tile, stride, strict=True))
    return f"of {rule} pixels, which is whole tiles of this VAE"


def _print_results(
    options: dict[str, Any],
    num_frames: int,
    size: tuple[int, int],
    scores: dict[str, list[torch.Tensor]],
    lpips: Any,
    meter: Any,
) -> None:
    import torch

    print(f"{options['output']}: {num_frames} frames of {size[0]} x {size[1]}")
    for name, unit in (("PSNR", " dB"), ("SSIM", ""), ("LPIPS", "")):
        if scores[name]:
            print(f"{name:<7}{torch.cat(scores[name]).mean():.4g}{unit}")
        else:
            print(f"{name:<7}not measured: {lpips}")
    place = "of the process" if meter.device.type == "cpu" else "allocated"
    for name, cost in meter.costs.items():
        print(f"{name:<7}{cost.seconds:.2f} s, peak memory {cost.peak_bytes / 2**20:.0f} MiB {place}")
