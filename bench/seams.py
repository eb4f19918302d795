"""The picture of `python -m bench exactness`: seams of tiles and windows, and none of streaming, by the trained model.

Axes: B batch, C channels, T frames, H height, W width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bench import vaes
from bench.plots import plt
from opensora_kernels.vae import Streaming, TilePlan, decode, gather, run_tiled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NUM_LATENTS, WINDOW = 13, 5  # 49 frames; 17 of them in a window, as many as the model was trained on
LEVELS = 127.5  # of 8 bits, in a unit of [-1, 1]
GAIN = 8  # of the differences shown


def plot(about: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    """Decode in each way, which takes half a minute, write the picture into `folder`, and say where it is."""
    film, decoded = _decode()
    whole = decoded["whole"]
    figure = plt.figure(figsize=(11, 9.6), layout="constrained")
    grid = figure.add_gridspec(3, 3, height_ratios=[1, 1, 0.72])
    shown = _worst_frame(decoded["tiled"] - whole)
    for column, (name, title) in enumerate(_titles(film, decoded).items()):
        above, below = (figure.add_subplot(grid[row, column]) for row in range(2))
        above.imshow(_pixels((decoded[name][0, :, shown] + 1) / 2), interpolation="nearest")
        above.set_title(title, fontsize=10)
        difference = (decoded[name] - whole)[0, :, shown].abs().amax(0)
        # half of the range, as that of the pixels is 2
        below.imshow((difference * GAIN / 2).clamp(0, 1), cmap="magma", vmin=0, vmax=1, interpolation="nearest")
        most = LEVELS * difference.max().item()
        below.set_title(f"|difference| x {GAIN}, at most {_levels(most)}", fontsize=10)
        for axes in (above, below):
            _mark_tiles(axes, is_cut=name == "tiled")
    _flicker(figure.add_subplot(grid[2, :]), decoded, shown)
    figure.suptitle(
        f"The embedded model on a clip that it was not trained on, {whole.shape[2]} frames of {whole.shape[3]} x "
        f"{whole.shape[4]}: frame {shown}\n"
        f"{about['device']} · fp32 · {about['date'][:10]} · {about['commit']}",
        fontsize=10,
    )
    path = folder / "seams.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return [path]


@torch.no_grad()
def _decode() -> tuple[Tensor, dict[str, Tensor]]:
    """The film, and its latents decoded in each way: (1, 3, T, H, W) in [-1, 1]."""
    vae, film = vaes.trained(), vaes.film(4 * NUM_LATENTS - 3)
    run, factor = partial(vaes.decode_frames, vae), vae.spatial_vae.factor
    z = vae.encode(film, sample_posterior=False)
    decoded = {
        "whole": run(z),
        "tiled": run_tiled(run, z, _tiling(factor), result_size=lambda size: _size(size, factor)),
        "streaming": gather(decode(run, z, plan=TilePlan(Streaming(1)))),
    }
    return film, decoded


def _tiling(factor: int) -> vaes.Tiling:
    return replace(vaes.tiling_of(factor, vaes.TRAINED_TILE, vaes.TRAINED_STRIDE), window=WINDOW)


def _size(size: tuple[int, int, int], factor: int) -> tuple[int, int, int]:
    return 4 * size[0] - 3, size[1] * factor, size[2] * factor


def _titles(film: Tensor, decoded: Mapping[str, Tensor]) -> dict[str, str]:
    side, window = 4 * vaes.TRAINED_TILE, 4 * WINDOW - 3
    ways = {
        "whole": "whole",
        "tiled": f"tiles of {side} x {side}, windows of {window} frames",
        "streaming": "streaming, 4 frames at a time",
    }
    return {name: f"{way}\nPSNR {_psnr(decoded[name], film):.2f} dB" for name, way in ways.items()}


def _psnr(frames: Tensor, film: Tensor) -> float:
    return -10 * math.log10(((frames.clamp(-1, 1) - film) / 2).square().mean().item())


def _worst_frame(difference: Tensor) -> int:
    return int(_by_frame(difference).argmax())


def _by_frame(difference: Tensor) -> Tensor:
    """RMS of each frame."""
    return difference.square().mean(dim=(0, 1, 3, 4)).sqrt()


def _pixels(frame_CHW: Tensor) -> Tensor:
    return frame_CHW.clamp(0, 1).permute(1, 2, 0)


def _mark_tiles(axes: Axes, *, is_cut: bool) -> None:
    """Ticks where a tile begins."""
    step = 4 * vaes.TRAINED_STRIDE
    height, width = vaes.FILM_SIZE
    axes.set_xticks(range(step, width, step) if is_cut else [])
    axes.set_yticks(range(step, height, step) if is_cut else [])
    axes.tick_params(labelsize=8)


def _flicker(axes: Axes, decoded: Mapping[str, Tensor], shown: int) -> None:
    """What changes from a frame to the next that does not change in the whole clip."""
    for name, color, marker in (("tiled", "#c8553d", "o"), ("streaming", "#0b6e4f", "s")):
        difference = decoded[name] - decoded["whole"]
        changes = LEVELS * _by_frame(difference[:, :, 1:] - difference[:, :, :-1])
        axes.plot(range(1, len(changes) + 1), changes, color=color, marker=marker, ms=3, lw=1.2, label=name)
    num_frames = decoded["whole"].shape[2]
    for border in range(4 * WINDOW - 3, num_frames, 4 * (WINDOW - 1)):
        axes.axvline(border, color="black", lw=0.8, ls=":", label="a window begins" if border < 4 * WINDOW else None)
    axes.set(yscale="log", xlim=(0.5, num_frames - 0.5), xlabel="frame", ylabel="RMS, in levels of 256")
    axes.set_title("flicker: change from the frame before that is not there in whole", fontsize=10, loc="left")
    axes.grid(alpha=0.3)
    axes.legend(loc="center right", fontsize=9)


def _levels(value: float) -> str:
    return "0" if value == 0 else f"{value:.0f} of 256 levels" if value >= 1 else f"{value:.4f} of 256 levels"
