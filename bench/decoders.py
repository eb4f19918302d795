"""Decoders in two forms with the same weights: as their authors wrote them, and on our operators.

Open-Sora-Plan 1.1 is written out in PyTorch's own calls; VAEs of diffusers are diffusers' own code, and the other
form is a copy of the model after `apply_opensora_kernels`. Axes: B batch, C channels, T frames, H height, W width.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bench import plain_causal_vae
from opensora.presets import open_sora_plan_v1_1
from opensora.vae import CausalVideoVAE
from opensora_kernels import apply_opensora_kernels
from opensora_kernels.cases import Maker
from opensora_kernels.vae import decoder_of

Mode = Literal["whole", "tiled"]
LatentSize = tuple[int, int, int]  # frames, height, width


@dataclass(frozen=True)
class Decoder:
    """A released decoder and the latents that it is run on.

    model: its class in diffusers, or None for Open-Sora-Plan's. arguments: where the release differs from the class'
    defaults. tiny: with about a quarter of the released widths; released: with all of them; on_gpu: what people decode.
    Where there are tiles, all are larger than one of the default size. lacks: modes that diffusers does not have.
    """

    model: str | None
    tiny: LatentSize
    on_gpu: LatentSize
    released: LatentSize | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    lacks: dict[Mode, str] = field(default_factory=dict)
    narrowing: int = 4  # tiny: what the widths are divided by, so that weights stay small beside the activations
    budget: float = 0.7  # of the rival's peak, for the streamed form

    @property
    def rival(self) -> str:
        return "diffusers" if self.model else "plain"

    @property
    def ours(self) -> str:
        return "patched" if self.model else "automatic"

    @property
    def modes(self) -> tuple[Mode, ...]:
        return ("whole", "tiled") if self.model else ("whole",)

    def latent_size(self, device: str, *, is_tiny: bool) -> LatentSize:
        return self.tiny if is_tiny else self.on_gpu if device == "cuda" else self.released or self.tiny

    def why_not(self) -> str | None:
        return "diffusers is not installed" if self.model and find_spec("diffusers") is None else None


_WAN_2_2 = {"base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "is_residual": True, "patch_size": 2}
_WAN_2_2 |= {"in_channels": 12, "out_channels": 12, "scale_factor_spatial": 16}
_WAN_2_2 |= {"latents_mean": [0.0] * 48, "latents_std": [1.0] * 48}  # the pipeline's, not the decoder's
_ONLY_TILES = {"whole": "diffusers decodes it in tiles alone"}
_NO_TILES = {"tiled": "diffusers does not tile its decode"}

DECODERS: dict[str, Decoder] = {
    "open_sora_plan_1.1": Decoder(None, (5, 12, 12), (17, 64, 64), released=(5, 32, 32), budget=0.5),
    "wan_2.1": Decoder("AutoencoderKLWan", (3, 4, 36), (21, 60, 104)),
    "wan_2.2": Decoder("AutoencoderKLWan", (3, 4, 18), (21, 44, 80), arguments=_WAN_2_2, narrowing=8),
    "qwen_image": Decoder("AutoencoderKLQwenImage", (1, 16, 40), (1, 128, 128)),
    "cogvideox": Decoder("AutoencoderKLCogVideoX", (3, 2, 48), (13, 60, 90)),
    "hunyuan_video": Decoder("AutoencoderKLHunyuanVideo", (3, 2, 34), (16, 68, 120)),
    "hunyuan_video_1.5": Decoder("AutoencoderKLHunyuanVideo15", (3, 4, 18), (16, 30, 53), narrowing=8),
    "mochi": Decoder("AutoencoderKLMochi", (2, 2, 34), (14, 60, 106)),
    "ltx": Decoder("AutoencoderKLLTXVideo", (2, 4, 18), (21, 16, 24)),
    "cosmos": Decoder("AutoencoderKLCosmos", (5, 24, 32), (8, 88, 160), lacks=_NO_TILES),
    "allegro": Decoder("AutoencoderKLAllegro", (6, 40, 70), (22, 90, 160), lacks=_ONLY_TILES, narrowing=16),
    "easyanimate": Decoder("AutoencoderKLMagvit", (2, 2, 66), (13, 48, 84)),
}
# In ten minutes on two cores; one for each way of keeping frames.
QUICK = ("open_sora_plan_1.1", "wan_2.1", "cogvideox", "hunyuan_video", "mochi", "ltx", "easyanimate")
_WIDTHS = ("base_dim", "decoder_base_dim", "block_out_channels", "decoder_block_out_channels")
_WIDTHS += ("decode_block_out_channels", "norm_num_groups")  # the encoder's own are left: it is not run


@dataclass(frozen=True)
class Pair:
    """Both forms of a decoder and latents z (1, C, T, H, W) in place; `weights` are those of the decoder."""

    z: Tensor
    weights: list[Tensor]
    theirs: Callable[[Tensor], Tensor]
    ours: Callable[[Tensor], Tensor]
    make_exact: Callable[[torch.dtype], Callable[[Tensor], Tensor]]  # theirs in a wider dtype
    set_mode: Callable[[Mode], None]

    def truth(self, mode: Mode, dtype: torch.dtype) -> Tensor:
        self.set_mode(mode)
        return self.make_exact(dtype)(self.z.to(dtype))


def build(decoder: Decoder, dtype: torch.dtype, device: str, *, is_tiny: bool) -> Pair:
    """With random weights, drawn on the CPU without touching the generators of others."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        make = of_diffusers if decoder.model else of_open_sora_plan
        vae = make(decoder, is_tiny).eval().requires_grad_(False)
        for name, parameter in vae.named_parameters():
            if parameter.dim() == 1 or "norm" in name or "scale" in name:  # ones and zeros would hide what is left out
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    vae = nn.Module.to(vae, device, dtype)  # diffusers' own warns of modules that some models keep in fp32
    z = Maker(dtype, device, seed=1).normal(1, latent_channels(vae), *decoder.latent_size(device, is_tiny=is_tiny))
    return (_pair_of_diffusers if decoder.model else _pair_of_open_sora_plan)(vae, z)


def latent_channels(vae: Any) -> int:
    """Under the name that its class has for them."""
    config = asdict(vae.config) if is_dataclass(vae.config) else vae.config
    return next(config[name] for name in ("latent_channels", "z_dim", "embed_dim") if name in config)


def of_open_sora_plan(decoder: Decoder, is_tiny: bool) -> nn.Module:
    config = open_sora_plan_v1_1.vae()
    return CausalVideoVAE(replace(config, hidden_size=config.hidden_size // decoder.narrowing) if is_tiny else config)


def of_diffusers(decoder: Decoder, is_tiny: bool) -> nn.Module:
    import diffusers

    kind = getattr(diffusers, decoder.model)
    parameters = inspect.signature(kind.__init__).parameters.values()
    arguments = {each.name: each.default for each in parameters if each.name in _WIDTHS} | decoder.arguments
    if is_tiny:
        widths = {name: arguments[name] for name in _WIDTHS if arguments.get(name) is not None}
        arguments |= {name: _divided(width, decoder.narrowing) for name, width in widths.items()}
    vae = kind(**arguments)
    vae.encoder = nn.Identity()  # half of the memory, and no part of a decode
    return vae


def _divided(width: Any, by: int) -> Any:
    return width // by if isinstance(width, int) else tuple(_divided(each, by) for each in width)


def _pair_of_open_sora_plan(vae: Any, z: Tensor) -> Pair:
    def make_exact(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        wide = nn.Module.to(copy.deepcopy(vae), dtype)
        return lambda z: plain_causal_vae.decode(wide, z)

    weights = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
    theirs = lambda z: plain_causal_vae.decode(vae, z)  # noqa: E731
    return Pair(z, weights, theirs, vae.decode_unscaled, make_exact, lambda mode: None)


def _pair_of_diffusers(vae: Any, z: Tensor) -> Pair:
    patched = copy.deepcopy(vae)
    apply_opensora_kernels(patched)

    def make_exact(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        return _decoding(nn.Module.to(copy.deepcopy(vae), dtype))

    def set_mode(mode: Mode) -> None:
        for each in (vae, patched):
            each.enable_tiling() if mode == "tiled" else each.disable_tiling()

    return Pair(z, [*vae.decoder.parameters()], _decoding(vae), decoder_of(patched), make_exact, set_mode)


def _decoding(vae: Any) -> Callable[[Tensor], Tensor]:
    return lambda z: vae.decode(z).sample
