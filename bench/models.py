"""Steps of whole models that `python -m bench model` times: decodes, encodes, denoising, gradients of training.

Axes: B batch, C channels, T frames, H height, W width, L text tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from opensora.config import STDiT3Config, VAELossConfig, VideoVAEConfig
from opensora.models import LatteT2V, STDiT, STDiT2
from opensora.models.stdit3 import STDiT3
from opensora.presets import open_sora_plan_v1_1, open_sora_v1_0, open_sora_v1_1, tiny
from opensora.schedulers.rectified_flow import RectifiedFlow
from opensora.vae import VAELoss, VideoVAE
from opensora_kernels.cases import Maker

Size = tuple[int, int, int]  # frames, height, width in pixels


@dataclass(frozen=True)
class Other:
    """A transformer of another system and clips of its releases, smallest first; frames of a latent after the first."""

    kind: type[nn.Module]
    config: Any
    clips: tuple[Size, ...]
    time_factor: int = 1


@dataclass(frozen=True)
class Scale:
    """Models of one size and the clips that they are run on, smallest first. others: by the name of their step."""

    vae: VideoVAEConfig
    transformer: STDiT3Config
    clips: tuple[Size, ...]
    clips_trained: tuple[Size, ...]
    others: dict[str, Other] = field(default_factory=dict)

    def clips_of(self, what: str) -> tuple[Size, ...]:
        if what in self.others:
            return self.others[what].clips
        return self.clips_trained if what.startswith("train") else self.clips


_NARROW = {"hidden_size": 144, "depth": 2, "num_heads": 6, "caption_channels": 64, "model_max_length": 24}
_NARROW_LATTE = {"num_attention_heads": 6, "attention_head_dim": 24, "cross_attention_dim": 144, "num_layers": 2}
_PLAN = open_sora_plan_v1_1.transformer
RELEASED_OTHERS = {
    "denoise_1.0": Other(STDiT, open_sora_v1_0.transformer("16x512x512"), ((16, 256, 256), (16, 512, 512))),
    "denoise_1.1": Other(STDiT2, open_sora_v1_1.transformer(), ((16, 240, 426), (48, 480, 854))),
    "denoise_plan": Other(LatteT2V, _PLAN("65x512x512"), ((65, 512, 512),), time_factor=4),
}
TINY_OTHERS = {
    "denoise_1.0": Other(STDiT, replace(open_sora_v1_0.transformer(), **_NARROW), ((4, 64, 64),)),
    "denoise_1.1": Other(STDiT2, replace(open_sora_v1_1.transformer(), **_NARROW), ((4, 64, 64),)),
    "denoise_plan": Other(
        LatteT2V,
        replace(_PLAN(), **_NARROW_LATTE, sample_size=(8, 8), video_length=5, caption_channels=64, model_max_length=24),
        ((17, 64, 64),),
        time_factor=4,
    ),
}


SCALES = {
    "tiny": Scale(
        tiny.vae(), tiny.transformer(), ((17, 64, 64), (34, 64, 64), (68, 64, 64)), ((17, 64, 64),), TINY_OTHERS
    ),
    "open-sora-v1.2": Scale(
        VideoVAEConfig(),
        STDiT3Config(),
        ((51, 240, 426), (102, 240, 426), (51, 480, 854), (51, 720, 1280)),
        ((51, 240, 426),),
        RELEASED_OTHERS,
    ),
}


@dataclass(frozen=True)
class Step:
    """One step with its model and inputs in place. `run` gives tensors; `read` is all that it must read."""

    run: Callable[[], Any]
    read: list[Tensor]


Draw = Callable[..., Tensor]
# (scale, size of the clip, dtype that everything is drawn in, dtype that it is computed in, device, denoising steps)
MakeStep = Callable[[Scale, Size, torch.dtype, torch.dtype, str, int], Step]


def _denoise(scale: Scale, size: Size, drawn: torch.dtype, dtype: torch.dtype, device: str, num_steps: int) -> Step:
    model, draw = _built(STDiT3, scale.transformer, drawn, dtype, device), _drawing(drawn, dtype, device)
    z, y, mask, arguments = _conditions(scale, size, draw, device)
    null_y, flow = draw(*y.shape), RectifiedFlow()
    run = partial(
        flow.sample, model, z, y, null_y, mask, arguments=arguments, num_sampling_steps=num_steps, cfg_scale=7.0
    )
    return Step(run, [*model.parameters(), z, y, null_y])


def _denoise_other(
    what: str, scale: Scale, size: Size, drawn: torch.dtype, dtype: torch.dtype, device: str, num_steps: int
) -> Step:
    """Both halves of a guided batch, with what a prompt needs once inside, as a sampler asks for them."""
    other = scale.others[what]
    model, draw = _built(other.kind, other.config, drawn, dtype, device), _drawing(drawn, dtype, device)
    num_frames, height, width = size
    length, channels = other.config.model_max_length, other.config.caption_channels
    x = draw(1, other.config.in_channels, 1 + (num_frames - 1) // other.time_factor, height // 8, width // 8)
    y, mask = draw(2, 1, length, channels), torch.arange(length, device=device)[None] < max(1, 2 * length // 3)
    told = {"num_frames": num_frames, "height": height, "width": width, "ar": height / width, "fps": 24}
    told = {name: torch.full((1,), float(value), device=device) for name, value in told.items()}
    times = [torch.full((1,), 1000.0 * (i + 1) / (num_steps + 1), device=device) for i in range(num_steps)]

    def run() -> list[Tensor]:
        denoise = model.denoiser(y, mask, **told)
        return [denoise(x, t) for t in times]

    return Step(run, [*model.parameters(), x, y])


def _vae_decode(scale: Scale, size: Size, drawn: torch.dtype, dtype: torch.dtype, device: str, num_steps: int) -> Step:
    model = _built(VideoVAE, scale.vae, drawn, dtype, device)
    z = _drawing(drawn, dtype, device)(1, model.latent_channels, *model.latent_size(size))
    return Step(lambda: model.decode(z, size[0]), [*model.parameters(), z])


def _vae_encode(scale: Scale, size: Size, drawn: torch.dtype, dtype: torch.dtype, device: str, num_steps: int) -> Step:
    model = _built(VideoVAE, scale.vae, drawn, dtype, device)
    x = _drawing(drawn, dtype, device)(1, 3, *size).clamp(-1, 1)
    return Step(lambda: model.encode(x, sample_posterior=False), [*model.parameters(), x])


def _train(scale: Scale, size: Size, drawn: torch.dtype, dtype: torch.dtype, device: str, num_steps: int) -> Step:
    model, draw = _built(STDiT3, scale.transformer, drawn, dtype, device), _drawing(drawn, dtype, device)
    x0, y, mask, arguments = _conditions(scale, size, draw, device)
    noise, t = draw(*x0.shape), torch.full((1,), 500.0, device=device)

    def loss() -> Tensor:
        told = arguments | {"y": y, "mask": mask}
        return RectifiedFlow().training_losses(model, x0, told, noise=noise, t=t).mean()

    return Step(_gradients(model, loss), [*model.parameters(), x0, y, noise])


def _train_vae(scale: Scale, size: Size, drawn: torch.dtype, dtype: torch.dtype, device: str, num_steps: int) -> Step:
    model, draw = _built(VideoVAE, scale.vae, drawn, dtype, device), _drawing(drawn, dtype, device)
    x, loss = draw(1, 3, *size).clamp(-1, 1), VAELoss(VAELossConfig())

    def compute() -> Tensor:
        return loss(x, model(x, draw_noise=torch.zeros_like)).total

    return Step(_gradients(model, compute), [*model.parameters(), x])


WHAT: dict[str, MakeStep] = {
    "denoise": _denoise,
    "vae_decode": _vae_decode,
    "vae_encode": _vae_encode,
    "train": _train,
    "train_vae": _train_vae,
} | {name: partial(_denoise_other, name) for name in RELEASED_OTHERS}


def _conditions(scale: Scale, size: Size, draw: Draw, device: str) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Latents, text, its mask of two thirds of all tokens, and the numbers that the model is told."""
    with torch.device("meta"):
        latent_size = VideoVAE(scale.vae).latent_size(size)
    length = scale.transformer.model_max_length
    latents = draw(1, scale.transformer.in_channels, *latent_size)
    y_B1LC = draw(1, 1, length, scale.transformer.caption_channels)
    mask_BL = torch.arange(length, device=device)[None] < max(1, 2 * length // 3)
    names = ("num_frames", "height", "width", "fps")
    told = {name: torch.full((1,), float(value), device=device) for name, value in zip(names, (*size, 24), strict=True)}
    return latents, y_B1LC, mask_BL, told


def _gradients(model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], list[Tensor]]:
    """The loss and its gradients; the optimizer is PyTorch's own, and no part of it."""

    def run() -> list[Tensor]:
        model.zero_grad(set_to_none=True)
        value = loss()
        value.backward()
        return [value.detach(), *(weight.grad for weight in model.parameters() if weight.grad is not None)]

    return run


def _drawing(drawn: torch.dtype, dtype: torch.dtype, device: str) -> Draw:
    draw = Maker(drawn, device, seed=1)
    return lambda *shape: draw.normal(*shape).to(dtype)


def _built(kind: type[nn.Module], config: Any, drawn: torch.dtype, dtype: torch.dtype, device: str) -> Any:
    """A model with random weights, no layer of which is without effect: matrices keep the scale of what they multiply,
    norms differ from one. They are drawn on the device: a billion normal numbers take a CPU half a minute."""
    with torch.device("meta"):
        model = kind(config)
    model = model.to_empty(device=device).to(dtype).eval()
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            values = torch.randn(weight.shape, generator=generator, device=device)
            if weight.ndim > 1:
                values *= weight[0].numel() ** -0.5
            else:
                values = values * 0.1 + ("norm" in name and name.endswith("weight"))
            weight.copy_(values.to(drawn))
        for name, buffer in model.named_buffers():
            if name in ("scale", "shift"):  # of the latents
                buffer.fill_(float(name == "scale"))
            else:
                buffer.copy_(torch.randn(buffer.shape, generator=generator, device=device).to(drawn))
    return model
