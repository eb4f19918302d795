"""LPIPS: how different two frames look to a network trained on pictures (Zhang et al. 2018).

Axes: N frames, C channels, H height, W width.
Source: richzhang/PerceptualSimilarity v0.1, and its copy in Open-Sora-Plan v1.1.0,
opensora/models/ae/videobase/losses/lpips.py (behaviour and parameter names).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

Backbone = Literal["vgg", "alex"]

_EPS = 1e-10
# Before the names in checkpoints that hold more: a training checkpoint, a wrapped module.
_PREFIX = re.compile(r"^(?:.*\.)?(?=(?:net\.slice\d|lin\d\.|scaling_layer\.|features\.\d|classifier\.))")


class LPIPS(nn.Module):
    """The distance of frames: features at five depths of VGG16 or AlexNet, each of length 1, squared differences
    weighted by channel, averaged over the frame and summed.

    Shapes: two batches (N, 3, H, W) in [-1, 1], at least 16 x 16 pixels for "vgg" and 31 x 31 for "alex" ->
    (N, 1, 1, 1), computed in fp32. Gradients reach the frames alone: its weights are fixed, and it stays in evaluation
    mode (upstream's dropout acts where a whole loss happens to be set to training; a measure should not be random).
    """

    def __init__(self, backbone: Backbone = "vgg") -> None:
        super().__init__()
        layers, ends = _LAYERS[backbone]()
        self.scaling_layer = _Scaling()
        self.net = nn.Module()
        widths, start = [], 0
        for index, end in enumerate(ends):
            part = nn.Sequential()
            for number in range(start, end):  # as they are numbered in torchvision's `features`
                part.add_module(str(number), layers[number])
            self.net.add_module(f"slice{index + 1}", part)
            widths += [layer.out_channels for layer in part if isinstance(layer, nn.Conv2d)][-1:]
            start = end
        for index, width in enumerate(widths):
            self.add_module(f"lin{index}", _Weights(width))
        self.num_slices = len(ends)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> LPIPS:
        return super().train(False)

    def forward(self, frames_NCHW: Tensor, other_NCHW: Tensor) -> Tensor:
        x, y = (self.scaling_layer(side.float()) for side in (frames_NCHW, other_NCHW))
        distance = x.new_zeros(())
        for index in range(self.num_slices):
            layers, weights = self.net.get_submodule(f"slice{index + 1}"), self.get_submodule(f"lin{index}")
            x, y = layers(x), layers(y)
            difference = (_unit_length(x) - _unit_length(y)).square()
            distance = distance + weights.model(difference).mean((2, 3), keepdim=True)
        return distance

    @classmethod
    def from_weights(cls, weights: Mapping[str, Tensor], *, source: str, backbone: Backbone = "vgg") -> LPIPS:
        """From tensors by name, whichever of the layouts in use: this module's own names, those of a training
        checkpoint ("loss.perceptual_loss." before them), torchvision's network ("features.0.weight") beside the weights
        of LPIPS ("lin0.model.1.weight").

        Errors: ValueError that names `source` and what is missing or of another shape.
        """
        with torch.device("meta"):
            wanted = {name: tuple(tensor.shape) for name, tensor in cls(backbone).state_dict().items()}
        slices = {name.split(".", 2)[2]: name for name in wanted if name.startswith("net.")}
        found = {}
        for name, tensor in weights.items():
            own = _PREFIX.sub("", name)
            found[slices.get(own.removeprefix("features."), own) if own.startswith("features.") else own] = tensor
        faults = []
        for name, shape in wanted.items():
            if name not in found and not name.startswith("scaling_layer."):
                faults.append(f"no {name}")
            elif name in found and tuple(found[name].shape) != shape:
                faults.append(f"{name} of shape {tuple(found[name].shape)} instead of {shape}")
        if faults:
            shown = "; ".join(faults[:4]) + (f"; and {len(faults) - 4} more" if len(faults) > 4 else "")
            raise ValueError(
                f"LPIPS: {source} must hold the features of {_NAMES[backbone]} (net.slice1.0.weight or "
                f"features.0.weight, ...) and lin0.model.1.weight to lin4, but has {shown}"
            )
        distance = cls(backbone)
        distance.load_state_dict({name: found[name] for name in wanted if name in found}, strict=False)
        return distance


class _Scaling(nn.Module):
    """From [-1, 1] to what the networks were trained on."""

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return (x_NCHW - self.shift) / self.scale


class _Weights(nn.Module):
    """One weight for each channel; layer 0, upstream's dropout, is there for the names."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Identity(), nn.Conv2d(channels, 1, 1, bias=False))


def _vgg16() -> tuple[list[nn.Module], tuple[int, ...]]:
    """Its features, and where each of the five slices ends."""
    layers: list[nn.Module] = []
    ends, before = [], 3
    for width, num_convolutions in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        if layers:
            layers.append(nn.MaxPool2d(2))
        for _ in range(num_convolutions):
            layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()]
            before = width
        ends.append(len(layers))
    return layers, tuple(ends)


def _alexnet() -> tuple[list[nn.Module], tuple[int, ...]]:
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)]
    layers += [nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)]
    for before, width in ((192, 384), (384, 256), (256, 256)):
        layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()]
    return layers, (2, 5, 8, 10, 12)


_LAYERS = {"vgg": _vgg16, "alex": _alexnet}
_NAMES = {"vgg": "VGG16", "alex": "AlexNet"}


def _unit_length(x_NCHW: Tensor) -> Tensor:
    # vector_norm: its gradient is 0, not NaN, where no feature responds
    return x_NCHW / (torch.linalg.vector_norm(x_NCHW, dim=1, keepdim=True) + _EPS)
