"""LPIPS on VGG16: how different two frames look (Zhang et al. 2018).

Axes: N frames, C channels, H height, W width.
Source: Open-Sora-Plan v1.1.0, opensora/models/ae/videobase/losses/perceptual_loss.py and lpips.py (behaviour and
parameter names), after CompVis/taming-transformers and richzhang/PerceptualSimilarity v0.1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn

# Of VGG16's features: for each slice, the widths of its convolutions and the number of its first layer.
_SLICES = (
    ((3, 64, 64), 0),
    ((64, 128, 128), 5),
    ((128, 256, 256, 256), 10),
    ((256, 512, 512, 512), 17),
    ((512, 512, 512, 512), 24),
)
_EPS = 1e-10
# Before the names in checkpoints that hold more: a training checkpoint, a wrapped module.
_PREFIX = re.compile(r"^(?:.*\.)?(?=(?:net\.slice\d|lin\d\.|scaling_layer\.|features\.\d|classifier\.))")


class LPIPS(nn.Module):
    """The distance of frames: their VGG16 features at five depths, each of length 1, squared differences weighted by
    channel, averaged over the frame and summed.

    Shapes: two batches (N, 3, H, W) in [-1, 1], at least 16 x 16 pixels -> (N, 1, 1, 1), computed in fp32.
    Gradients reach the frames alone: its weights are fixed, and it stays in evaluation mode (upstream's dropout acts
    where a whole loss happens to be set to training; a measure should not be random).
    """

    def __init__(self) -> None:
        super().__init__()
        self.scaling_layer = _Scaling()
        self.net = nn.Module()
        for index, (widths, first) in enumerate(_SLICES):
            self.net.add_module(f"slice{index + 1}", _slice(widths, first))
        for index, (widths, _) in enumerate(_SLICES):
            self.add_module(f"lin{index}", _Weights(widths[-1]))
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> LPIPS:
        return super().train(False)

    def forward(self, frames_NCHW: Tensor, other_NCHW: Tensor) -> Tensor:
        x, y = (self.scaling_layer(side.float()) for side in (frames_NCHW, other_NCHW))
        distance = x.new_zeros(())
        for index in range(len(_SLICES)):
            layers, weights = self.net.get_submodule(f"slice{index + 1}"), self.get_submodule(f"lin{index}")
            x, y = layers(x), layers(y)
            difference = (_unit_length(x) - _unit_length(y)).square()
            distance = distance + weights.model(difference).mean((2, 3), keepdim=True)
        return distance

    @classmethod
    def from_weights(cls, weights: Mapping[str, Tensor], *, source: str) -> LPIPS:
        """From tensors by name, whichever of the layouts in use: this module's own names, those of a training
        checkpoint ("loss.perceptual_loss." before them), torchvision's VGG16 ("features.0.weight") beside the weights
        of LPIPS ("lin0.model.1.weight").

        Errors: ValueError that names `source` and what is missing or of another shape.
        """
        found = {_own_name(name): tensor for name, tensor in weights.items()}
        with torch.device("meta"):
            wanted = {name: tuple(tensor.shape) for name, tensor in cls().state_dict().items()}
        faults = []
        for name, shape in wanted.items():
            if name not in found and not name.startswith("scaling_layer."):
                faults.append(f"no {name}")
            elif name in found and tuple(found[name].shape) != shape:
                faults.append(f"{name} of shape {tuple(found[name].shape)} instead of {shape}")
        if faults:
            shown = "; ".join(faults[:4]) + (f"; and {len(faults) - 4} more" if len(faults) > 4 else "")
            raise ValueError(
                f"LPIPS: {source} must hold VGG16's features (net.slice1.0.weight or features.0.weight, ...) and "
                f"lin0.model.1.weight to lin4, but has {shown}"
            )
        distance = cls()
        distance.load_state_dict({name: found[name] for name in wanted if name in found}, strict=False)
        return distance


class _Scaling(nn.Module):
    """From [-1, 1] to what VGG16 was trained on."""

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


def _slice(widths: tuple[int, ...], first: int) -> nn.Sequential:
    """Convolutions with ReLU, numbered as in VGG16's features; all but the first slice begin with a pooling layer."""
    layers = nn.Sequential()
    if first:
        layers.add_module(str(first - 1), nn.MaxPool2d(2))
    for index, (before, after) in enumerate(pairwise(widths)):
        layers.add_module(str(first + 2 * index), nn.Conv2d(before, after, 3, padding=1))
        layers.add_module(str(first + 2 * index + 1), nn.ReLU())
    return layers


def _unit_length(x_NCHW: Tensor) -> Tensor:
    # vector_norm: its gradient is 0, not NaN, where no feature responds
    return x_NCHW / (torch.linalg.vector_norm(x_NCHW, dim=1, keepdim=True) + _EPS)


def _own_name(name: str) -> str:
    """This module's name of a tensor: "features.10.weight" is net.slice3.10.weight."""
    name = _PREFIX.sub("", name)
    number = re.fullmatch(r"features\.(\d+)\.(weight|bias)", name)
    if number is None:
        return name
    depth = sum(int(number[1]) >= first for _, first in _SLICES)
    return f"net.slice{depth}.{number[1]}.{number[2]}"
