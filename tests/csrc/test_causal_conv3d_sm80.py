"""The mma.sync kernels of causal_conv3d, replayed on the host block by block; and their index maps, exhaustively."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from opensora_kernels.ops.causal_conv3d import reference
from opensora_kernels.ops.causal_conv3d.triton_call import Call
from tests.csrc import host
from tests.csrc.sm80_replay import Replay
from tests.ops.accuracy import assert_accurate

SPACE_PADDINGS = ("zeros", "replicate", "reflect")
GUARD = 64  # elements around what a kernel writes, which must stay as they are


@pytest.mark.skipif(host.why_not() is not None, reason=str(host.why_not()))
def test_index_maps_are_exhaustively_right(tmp_path: Path):
    found = subprocess.run([host.program("causal_conv3d_sm80_maps.cpp", tmp_path)], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


@dataclass(frozen=True)
class Layer:
    """One convolution at a size that a host replays in a moment. Sizes are (T, H, W); space_pad (left, right, top,
    bottom)."""

    channels: tuple[int, int] = (16, 24)
    size: tuple[int, int, int] = (3, 5, 7)
    num_samples: int = 1
    kernel: tuple[int, int, int] = (3, 3, 3)
    stride: tuple[int, int, int] = (1, 1, 1)
    dilation: tuple[int, int, int] = (1, 1, 1)
    time_padding: str = "zeros"
    space_padding: str = "zeros"
    time_pad: int = 2
    space_pad: tuple[int, int, int, int] = (1, 1, 1, 1)
    num_state: int = 0
    has_bias: bool = True
    has_residual: bool = False
    has_statistics: bool = False
    dtype: torch.dtype = torch.bfloat16
    tile_out: int = 0
    num_splits: int = 1  # so that even a small clip fills the ring of slots

    def call(self, seed: int = 0) -> Call:
        torch.manual_seed(seed)
        num_channels, num_out = self.channels
        x = self._drawn(self.num_samples, num_channels, *self.size)
        weight = (
            self._drawn(num_out, num_channels, *self.kernel) / (num_channels * torch.Size(self.kernel).numel()) ** 0.5
        )
        bias = self._drawn(num_out) if self.has_bias else None
        state = None
        if self.num_state:
            state = self._drawn(self.num_samples, num_channels, self.num_state, *self.size[1:])
        call = Call(
            x, weight, bias, list(self.stride), list(self.dilation), 1, self.time_padding, self.space_padding,
            0 if self.time_padding == "none" else self.time_pad, list(self.space_pad), state, "", None, None, 1, 0.0,
            False, None, "", None, False, self.has_statistics,
        )  # fmt: skip
        return call._replace(residual=self._drawn(*call.out_shape)) if self.has_residual else call

    def _drawn(self, *shape: int) -> Tensor:
        return torch.randn(shape).to(self.dtype)


LAYERS = {
    "plain": Layer(),
    "odd": Layer((40, 8), (2, 9, 17), kernel=(2, 3, 5), space_pad=(2, 2, 1, 1), time_pad=1, has_bias=False),
    "wide": Layer((72, 136), (2, 5, 6), has_residual=True, has_statistics=True, num_splits=0),
    "many_tiles": Layer((8, 16), (2, 13, 23), 2, has_residual=True, has_statistics=True),
    "tile_96": Layer((96, 96), (2, 4, 5), tile_out=96, has_statistics=True, dtype=torch.float16),
    "tile_64": Layer((24, 64), (3, 6, 6), tile_out=64, has_residual=True, dtype=torch.float16, num_splits=3),
    "repeated": Layer(time_padding="replicate", has_residual=True),
    "bordered": Layer(time_padding="replicate", space_padding="replicate"),
    "mirrored": Layer(space_padding="reflect", space_pad=(2, 1, 1, 2)),
    "continued": Layer(num_state=2, num_samples=2),
    "continued_far": Layer((8, 8), num_state=5, time_padding="replicate"),
    "unpadded": Layer(time_padding="none"),
    "halved": Layer(size=(3, 6, 8), kernel=(1, 3, 3), stride=(1, 2, 2), time_pad=0, space_pad=(0, 1, 0, 1)),
    "halved_in_time": Layer(size=(6, 5, 5), stride=(2, 1, 1), time_padding="replicate", time_pad=2),
    "halved_both": Layer(size=(6, 8, 9), stride=(2, 2, 2), time_pad=1, num_state=2, num_samples=2),
    "dilated": Layer(size=(6, 8, 9), dilation=(2, 1, 2), time_pad=4, space_pad=(2, 2, 1, 1)),
    "pointwise": Layer((16, 200), kernel=(1, 1, 1), time_pad=0, space_pad=(0, 0, 0, 0), num_splits=2),
    "one_position": Layer((8, 8), (1, 1, 1), num_splits=4),
}


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
def test_replay_of_the_forward_kernel_keeps_the_accuracy_rule(sm80_replay: Replay, layer: Layer):
    call = layer.call()
    have = _replayed_forward(sm80_replay, call, layer.tile_out)
    plain, truth = reference.causal_conv3d(*call), reference.causal_conv3d(*_doubled(call))
    assert_accurate(have, plain, truth, "forward", coarsest=layer.dtype)


@pytest.mark.parametrize("is_wide", [False, True], ids=["mma", "wgmma"])
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
def test_replay_of_the_weight_gradient_keeps_the_accuracy_rule(sm80_replay: Replay, layer: Layer, is_wide: bool):
    call = layer.call()._replace(residual=None, return_statistics=False)
    grad = layer._drawn(*call.out_shape)
    options = {"is_wide": is_wide, "tile_out": layer.tile_out, "num_splits": layer.num_splits}
    have = _replayed_weight_gradient(sm80_replay, call, grad, **options)
    plain, truth = (_weight_gradient(*pair) for pair in ((call, grad), (_doubled(call), grad.double())))
    assert_accurate([value.to(layer.dtype) for value in have], plain, truth, "weight gradient")


@pytest.mark.parametrize("name", ["plain", "repeated", "continued", "odd", "dilated"])
def test_the_same_kernel_gives_the_gradient_of_the_padded_input(sm80_replay: Replay, name: str):
    """As the gradients of frames in front: a convolution of the result's gradient with flipped, transposed taps."""
    layer = LAYERS[name]
    call = layer.call()
    grad = layer._drawn(*call.out_shape)
    sizes = [layer.num_samples, layer.channels[0], *call.padded_size]
    flipped = call.weight.flip(2, 3, 4).transpose(0, 1)
    start = [-d * (k - 1) for k, d in zip(layer.kernel, layer.dilation, strict=True)]
    backward = call._replace(x=grad, weight=flipped, bias=None, state=None, residual=None, time_padding="zeros")
    have = _replayed_convolution(sm80_replay, backward, sizes, start)[0]
    found = []
    for dtype in (layer.dtype, torch.float64):
        padded = torch.zeros(sizes, dtype=dtype, requires_grad=True)
        out = torch.nn.functional.conv3d(padded, call.weight.to(dtype), dilation=layer.dilation)
        found.append(torch.autograd.grad(out, padded, grad.to(dtype))[0])
    assert_accurate(have, *found, "gradient of the input")


def test_results_do_not_depend_on_the_tile_of_output_channels(sm80_replay: Replay):
    call = Layer((16, 96), (2, 5, 7), has_residual=True).call()
    results = [_replayed_forward(sm80_replay, call, tile_out) for tile_out in (64, 96, 128)]
    assert all(torch.equal(result[0], results[0][0]) for result in results)


def _replayed_forward(sm80_replay: Replay, call: Call, tile_out: int) -> list[Tensor]:
    start = [axis.start for axis in call.taps]
    return _replayed_convolution(sm80_replay, call, call.out_shape, start, tile_out, call.return_statistics)


def _replayed_convolution(
    sm80_replay: Replay, call: Call, sizes: list[int], start: list[int], tile_out: int = 0, has_statistics: bool = False
) -> list[Tensor]:
    weight = call.weight.flatten(2).permute(2, 0, 1).contiguous()
    guarded = torch.full([GUARD + torch.Size(sizes).numel() + GUARD], float("nan"), dtype=call.x.dtype)
    out = guarded[GUARD:-GUARD].view(sizes[0], *sizes[2:], sizes[1])
    statistics = torch.full([*sizes[:3], 2], float("nan")) if has_statistics else None
    sm80_replay.forward(
        _moved(call.x), _moved(call.state), weight, call.bias, _moved(call.residual), *_window(call, start), out,
        statistics, tile_out=tile_out,
    )  # fmt: skip
    assert torch.cat([guarded[:GUARD], guarded[-GUARD:]]).isnan().all(), "a store left the result"
    return [out.permute(0, 4, 1, 2, 3), *([] if statistics is None else [statistics])]


def _replayed_weight_gradient(sm80_replay: Replay, call: Call, grad: Tensor, **options: int) -> list[Tensor]:
    num_out, num_channels, *kernel = call.weight.shape
    grad_weight, grad_bias = torch.empty(torch.Size(kernel).numel(), num_out, num_channels), torch.empty(num_out)
    sm80_replay.weight_gradient(
        _moved(call.x), _moved(call.state), _moved(grad), *_window(call, [axis.start for axis in call.taps]),
        grad_weight, grad_bias, **options,
    )  # fmt: skip
    return [grad_weight.permute(1, 2, 0).unflatten(2, kernel), grad_bias]


def _window(call: Call, start: list[int]) -> tuple[list[int], list[int], list[int], list[int], bool, int]:
    replicates_front = call.time_padding == "replicate" and call.state is None
    padding = SPACE_PADDINGS.index(call.space_padding)
    return list(call.weight.shape[2:]), call.stride, call.dilation, start, replicates_front, padding


def _moved(clip: Tensor | None) -> Tensor | None:
    return None if clip is None else clip.permute(0, 2, 3, 4, 1).contiguous()


def _doubled(call: Call) -> Call:
    return Call(*(value.double() if isinstance(value, Tensor) else value for value in call))


def _weight_gradient(call: Call, grad: Tensor) -> list[Tensor]:
    bias = torch.zeros(call.weight.shape[0], dtype=call.x.dtype).requires_grad_()
    call = call._replace(weight=call.weight.detach().requires_grad_(), bias=bias)
    return list(torch.autograd.grad(reference.causal_conv3d(*call)[0], (call.weight, bias), grad))
