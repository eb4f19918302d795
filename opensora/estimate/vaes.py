"""VAEs on paper: memory and operations of encoding and decoding clips of any size.

Runs are of a few frames, or of small pictures where all layers are convolutions: on paper every operator takes as long
for a small clip as for a large one, but a long clip has more of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import nn

from opensora.config import CausalVideoVAEConfig, Preset, SpatialVAEConfig, VAEKind, VideoVAEConfig
from opensora.config_files import config_from_dict
from opensora.estimate.paper import Affine, on_paper, peak_bytes
from opensora.presets import open_sora_plan_v1_0, open_sora_plan_v1_1
from opensora.training.flops import count_flops
from opensora.vae import CausalVideoVAE, FrameVAE, VideoVAE
from opensora.vae.spatial import SpatialVAE
from opensora.vae.temporal import TemporalVAE
from opensora_kernels.vae import TilePlan, plan_tiles

Direction = Literal["encode", "decode"]
Size = tuple[int, int, int]
"""Frames, height and width of a clip in pixels."""

PLANNED_FRAMES = 34
"""Frames of the clip that a long one's plan is made for: what streaming holds does not grow with the clip."""
_SMALL = 32  # rows and columns of small pictures, in latents


class VAEOnPaper(Protocol):
    """`peak`: bytes beyond weights that a batch of clips takes, with the pixels. `flops`: operations of one clip."""

    vae: Any

    def peak(self, direction: Direction, size: Size, batch: int = 1) -> int: ...
    def flops(self, direction: Direction, size: Size) -> int: ...


def vae_on_paper(preset: Preset, dtype: torch.dtype = torch.bfloat16) -> VAEOnPaper:
    """The VAE of a preset: of the config.json in its folder, else of its release. It remembers what was measured."""
    return _vae_on_paper(preset.vae, preset.vae_kind, preset.name, dtype)


@cache
def _vae_on_paper(source: str, kind: VAEKind, name: str, dtype: torch.dtype) -> VAEOnPaper:
    with torch.device("meta"):
        if kind == "frames":
            with torch.device("cpu"):  # its modules keep tensors
                from diffusers import AutoencoderKL
            return FramesOnPaper(FrameVAE(AutoencoderKL(**asdict(SpatialVAEConfig()))), dtype)
        if kind == "causal":
            release = open_sora_plan_v1_0 if "v1.0" in name else open_sora_plan_v1_1
            config = _config_beside(source, CausalVideoVAEConfig) or release.vae()
            return CausalOnPaper(CausalVideoVAE(config), dtype)
        return StackedOnPaper(VideoVAE(_config_beside(source, VideoVAEConfig) or VideoVAEConfig()), dtype)


def decoding_plan(vae: Any, size: Size, budget: int) -> TilePlan:
    """How `plan_tiles` decodes the first frames of a clip inside `budget` bytes.

    Errors: ValueError for a budget below every plan's peak.
    """
    short = min(size[0], vae.padded_frames(min(size[0], PLANNED_FRAMES)))
    latents = (1, vae.latent_channels, *vae.latent_size((short, *size[1:])))
    return plan_tiles(partial(vae.decode, num_frames=short), latents, budget, next(vae.parameters()).dtype, "cuda")


class FramesOnPaper:
    """An image VAE that takes a few frames of a clip at a time."""

    def __init__(self, vae: FrameVAE, dtype: torch.dtype) -> None:
        self.vae = vae.to(dtype).eval()
        self._frames = _Pictures(vae.spatial_vae, dtype)

    def peak(self, direction: Direction, size: Size, batch: int = 1) -> int:
        return _pixels(size, self._frames.dtype, batch, direction) + self._frames.peak(direction, size, batch)

    def flops(self, direction: Direction, size: Size) -> int:
        return self._frames.flops(direction, size)


class StackedOnPaper:
    """Open-Sora 1.2's: an image VAE for every frame, then one over time, a chunk of frames at a time."""

    def __init__(self, vae: VideoVAE, dtype: torch.dtype) -> None:
        self.vae = vae.to(dtype).eval()
        self._frames, self._chunks = _Pictures(vae.spatial_vae, dtype), _Chunks(vae.temporal_vae, dtype)

    def peak(self, direction: Direction, size: Size, batch: int = 1) -> int:
        num_frames, *pixels = size
        config, area = self.vae.config, _area(self.vae.spatial_vae.latent_size(*pixels))
        chunk = min(num_frames, config.micro_frame_size or num_frames)
        dtype = self._frames.dtype
        # Latents of the image VAE are there during both halves.
        latents = batch * num_frames * config.spatial.latent_channels * area * dtype.itemsize
        over_time = latents + batch * area * self._chunks.peak(direction, chunk)
        frames = latents + self._frames.peak(direction, size, batch)
        return _pixels(size, dtype, batch, direction) + max(frames, over_time)

    def flops(self, direction: Direction, size: Size) -> int:
        num_frames, *pixels = size
        area = _area(self.vae.spatial_vae.latent_size(*pixels))
        chunk = min(num_frames, self.vae.config.micro_frame_size or num_frames)
        whole, rest = divmod(num_frames, chunk)
        over_time = whole * self._chunks.flops(direction, chunk) + (self._chunks.flops(direction, rest) if rest else 0)
        return self._frames.flops(direction, size) + int(area * over_time)


class CausalOnPaper:
    """Open-Sora-Plan's, which takes whole clips."""

    _LENGTHS = (9, 17)

    def __init__(self, vae: CausalVideoVAE, dtype: torch.dtype) -> None:
        self.vae, self.dtype = vae.to(dtype).eval(), dtype
        self._known: dict[Any, _Cost] = {}

    def peak(self, direction: Direction, size: Size, batch: int = 1) -> int:
        """In proportion to the area: the scores of attention are never held."""
        num_frames, area = self._padded(size)
        at_lengths = (self._measure(direction, n, _SMALL).peak / _SMALL**2 for n in self._LENGTHS)
        of_latent = Affine.through(*self._LENGTHS, *at_lengths)
        return _pixels(size, self.dtype, batch, direction) + int(
            batch * area * (of_latent.start + of_latent.slope * num_frames)
        )

    def flops(self, direction: Direction, size: Size) -> int:
        """Convolutions grow with the area, attention with its square."""
        num_frames, area = self._padded(size)
        short, long = (self._measure(direction, n, _SMALL).flops for n in self._LENGTHS)
        larger = self._measure(direction, self._LENGTHS[0], 2 * _SMALL).flops
        by_length = Affine.through(*self._LENGTHS, short, long)(num_frames) / short
        return int(by_length * _with_square(short, larger, area))

    def _padded(self, size: Size) -> tuple[int, int]:
        num_frames = self.vae.padded_frames(size[0])
        return num_frames, _area(self.vae.latent_size((num_frames, *size[1:]))[1:])

    def _measure(self, direction: Direction, num_frames: int, side: int) -> _Cost:
        key = (direction, num_frames, side)
        if key not in self._known:
            factor = self.vae.space_factor
            if direction == "encode":
                shape: Sequence[int] = (1, 3, num_frames, side * factor, side * factor)
            else:
                shape = (
                    1,
                    self.vae.latent_channels,
                    *self.vae.latent_size((num_frames, factor, factor))[:1],
                    side,
                    side,
                )
            self._known[key] = _run(getattr(self.vae, direction), shape, self.dtype)
        return self._known[key]


class _Pictures:
    """The image VAE, some frames at a time: the same for every few but for what is there before and kept after."""

    def __init__(self, vae: SpatialVAE, dtype: torch.dtype) -> None:
        self.vae, self.dtype = vae, dtype
        self._known: dict[Any, Any] = {}

    def peak(self, direction: Direction, size: Size, batch: int) -> int:
        """In proportion to the area: the scores of attention are never held."""
        num_frames, few = batch * size[0], self.vae.micro_batch_size
        # From two micro batches on, results have a place of their own.
        lengths = (num_frames, num_frames + 1) if few is None or num_frames <= 2 * few else (2 * few, 3 * few)
        key = (direction, lengths)
        if key not in self._known:
            self._known[key] = Affine.through(
                *lengths, *(self._measure(direction, n, _SMALL).peak / _SMALL**2 for n in lengths)
            )
        of_latent, area = self._known[key], _area(self.vae.latent_size(*size[1:]))
        return int(area * (of_latent.start + of_latent.slope * num_frames))

    def flops(self, direction: Direction, size: Size) -> int:
        """Convolutions grow with the area, attention with its square."""
        small, larger = (self._measure(direction, 1, side).flops for side in (_SMALL, 2 * _SMALL))
        return int(size[0] * _with_square(small, larger, _area(self.vae.latent_size(*size[1:]))))

    def _measure(self, direction: Direction, num_frames: int, side: int) -> _Cost:
        key = (direction, num_frames, side)
        if key not in self._known:
            if direction == "encode":
                pixels = side * self.vae.factor
                call: Callable[..., Any] = partial(self.vae.encode, draw_noise=None)
                shape = (1, self.vae.module.config.in_channels, num_frames, pixels, pixels)
            else:
                call = self.vae.decode
                shape = (1, self.vae.module.config.latent_channels, num_frames, side, side)
            self._known[key] = _run(call, shape, self.dtype)
        return self._known[key]


class _Chunks:
    """The VAE over time, for each row and column of latents: it is made of convolutions alone."""

    def __init__(self, vae: TemporalVAE, dtype: torch.dtype) -> None:
        self.vae, self.dtype = vae, dtype
        self._known: dict[Any, _Cost] = {}

    def peak(self, direction: Direction, num_frames: int) -> float:
        return self._measure(direction, num_frames).peak / _SMALL**2

    def flops(self, direction: Direction, num_frames: int) -> float:
        return self._measure(direction, num_frames).flops / _SMALL**2

    def _measure(self, direction: Direction, num_frames: int) -> _Cost:
        key = (direction, num_frames)
        if key not in self._known:
            if direction == "encode":
                call: Callable[..., Any] = self.vae.encode
                shape = (1, self._channels, num_frames, _SMALL, _SMALL)
            else:
                call = partial(self.vae.decode, num_frames=num_frames)
                shape = (1, self.vae.embed_dim, self.vae.latent_frames(num_frames), _SMALL, _SMALL)
            self._known[key] = _run(call, shape, self.dtype)
        return self._known[key]

    @cached_property
    def _channels(self) -> int:
        return next(self.vae.encoder.parameters()).shape[1]


@dataclass(frozen=True)
class _Cost:
    """Of a run: most bytes alive beyond weights and input, and operations."""

    peak: int
    flops: int


def _run(call: Callable[..., Any], shape: Sequence[int], dtype: torch.dtype) -> _Cost:
    flops = 0

    def counted() -> None:
        nonlocal flops
        flops = count_flops(lambda: call(x))

    with torch.no_grad(), on_paper():
        x = torch.empty(*shape, dtype=dtype)
        peak = peak_bytes(counted)
    return _Cost(peak, flops)


def _with_square(small: int, larger: int, area: int) -> float:
    """For an area in latents, from _SMALL x _SMALL of them and from four times as many."""
    square = (larger - 4 * small) / 12  # small = linear + square, larger = 4 linear + 16 square
    ratio = area / _SMALL**2
    return (small - square) * ratio + square * ratio**2


def _pixels(size: Size, dtype: torch.dtype, batch: int, direction: Direction) -> int:
    """Of what is encoded; what is decoded is counted as it is made."""
    return 3 * batch * size[0] * size[1] * size[2] * dtype.itemsize if direction == "encode" else 0


def _area(size: Sequence[int]) -> int:
    return size[0] * size[1]


def _config_beside(folder: str, config_type: type) -> Any:
    path = Path(folder) / "config.json"
    return config_from_dict(config_type, json.loads(path.read_text())) if path.is_file() else None


def weights_of(vae: nn.Module) -> int:
    """Bytes."""
    return sum(parameter.nbytes for parameter in vae.parameters())
