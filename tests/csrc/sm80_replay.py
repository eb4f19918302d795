"""csrc/tests/causal_conv3d_sm80_replay.cpp from Python: what the operators of the CUDA library take, on the CPU."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.csrc import host


class Replay:
    """Compiled into `folder`. tile_out, num_splits: how the kernels share the work; 0 for their own choice."""

    def __init__(self, folder: Path) -> None:
        if (reason := host.why_not()) is not None:
            pytest.skip(reason)
        self._library = ctypes.CDLL(str(host.library("causal_conv3d_sm80_replay.cpp", folder, level="-O1")))
        self._library.replay_forward.restype = self._library.replay_weight_gradient.restype = ctypes.c_bool

    def forward(
        self, x: Tensor, state: Tensor | None, weight: Tensor, bias: Tensor | None, residual: Tensor | None,
        kernel: list[int], step: list[int], dilation: list[int], start: list[int], replicates_front: bool,
        space_padding: int, out: Tensor, statistics: Tensor | None, *, tile_out: int = 0,
    ) -> None:  # fmt: skip
        """As torch.ops.opensora_kernels.causal_conv3d_cuda_forward."""
        numbers = _numbers(x, state, out, kernel, step, dilation, start, replicates_front, space_padding)
        tensors = (x, state, weight, bias, residual, out, statistics)
        self._run(self._library.replay_forward, numbers, (tile_out,), tensors)

    def weight_gradient(
        self, x: Tensor, state: Tensor | None, grad: Tensor, kernel: list[int], step: list[int], dilation: list[int],
        start: list[int], replicates_front: bool, space_padding: int, grad_weight: Tensor, grad_bias: Tensor | None,
        *, is_wide: bool = False, tile_out: int = 0, num_splits: int = 0,
    ) -> None:  # fmt: skip
        """As torch.ops.opensora_kernels.causal_conv3d_cuda_weight_gradient; `is_wide`: by wgmma, as on sm_90a."""
        numbers = _numbers(x, state, grad, kernel, step, dilation, start, replicates_front, space_padding)
        tensors = (x, state, grad, grad_weight, grad_bias)
        options = (ctypes.c_bool(is_wide), tile_out, num_splits)
        self._run(self._library.replay_weight_gradient, numbers, options, tensors)

    def _run(
        self, function: Any, numbers: ctypes.Array, options: tuple[Any, ...], tensors: tuple[Tensor | None, ...]
    ) -> None:
        """Once with copies that arrive as late as they may, once at once. The last two of `tensors` are results."""
        found = []
        for lands_at_once in (False, True):
            pointers = map(_pointer, tensors)
            is_right = function(numbers, ctypes.c_bool(lands_at_once), *options, *pointers)
            assert is_right, "a copy left its tensor or was not aligned"
            results = [tensor for tensor in tensors[-2:] if tensor is not None]
            found.append([result.clone() for result in results])
        for late, early in zip(*found, strict=True):
            assert torch.equal(late, early), "the result depends on when copies arrive"


def _numbers(
    x: Tensor, state: Tensor | None, out: Tensor, kernel: list[int], step: list[int], dilation: list[int],
    start: list[int], replicates_front: bool, space_padding: int,
) -> ctypes.Array:  # fmt: skip
    """In the order in which the replay reads them."""
    shape = [x.shape[0], x.shape[4], out.shape[4], *x.shape[2:4], *out.shape[1:4]]
    options = [replicates_front, space_padding, x.dtype is torch.bfloat16]
    places = [x.shape[1], *x.stride()[:2], *([0, 0, 0] if state is None else [state.shape[1], *state.stride()[:2]])]
    numbers = [*shape, *kernel, *step, *dilation, *start, *options, *places]
    return (ctypes.c_int64 * len(numbers))(*map(int, numbers))


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())
