"""What property tests share: drawn heads and clips as models lay them in memory, and Triton against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree as pytree

from opensora_kernels import _triton, use
from tests.ops.accuracy import assert_accurate
from tests.ops.contract import public

interpreted = pytest.mark.skipif(
    not _triton.is_interpreted() or _triton.why_not_installed() is not None,
    reason="interprets Triton kernels, with TRITON_INTERPRET=1",
)

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
LEADING = st.sampled_from([(), (1,), (3,), (2, 3), (2, 1, 2), (0,)])
MEMORY = st.sampled_from(["packed", "temporal", "separate", "heads_first", "gaps", "reversed"])

CLIP_MEMORY = st.sampled_from(["contiguous", "channels_last", "later_frames", "later_frames_channels_last", "swapped"])


class Numbers:
    """Seeded normal numbers of one dtype that bf16 holds exactly."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self.dtype, self._generator = dtype, torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, mean: float = 0.0, dtype: torch.dtype | None = None) -> Tensor:
        drawn = torch.randn(shape, generator=self._generator) + mean
        return drawn.to(torch.bfloat16).to(dtype or self.dtype)

    def integers(self, end: int, *shape: int) -> Tensor:
        """Whole numbers from 0 to end - 1."""
        return torch.randint(end, shape, generator=self._generator, dtype=torch.int32)


def heads(numbers: Numbers, memory: str, num_tensors: int, leading: tuple[int, ...], *sizes: int) -> list[Tensor]:
    """Tensors (*leading, L, N, D), `sizes` being L, N and D, that lie in memory as `memory` says."""
    num_tokens, num_heads, head_size = sizes
    if memory == "packed":
        return list(numbers(*leading, num_tokens, num_tensors, num_heads, head_size).unbind(-3))
    if memory == "temporal" and leading:
        packed = numbers(*leading[:-1], num_tokens, leading[-1], num_tensors, num_heads, head_size)
        return [x.transpose(-4, -3) for x in packed.unbind(-3)]
    if memory == "heads_first":
        return [numbers(*leading, num_heads, num_tokens, head_size).transpose(-3, -2) for _ in range(num_tensors)]
    if memory == "gaps":
        return [numbers(*leading, num_tokens, num_heads, 2 * head_size)[..., ::2] for _ in range(num_tensors)]
    if memory == "reversed":
        return [
            numbers(*sizes[::-1], *leading[::-1]).permute(*range(2 + len(leading), -1, -1)) for _ in range(num_tensors)
        ]
    return [numbers(*leading, *sizes) for _ in range(num_tensors)]


def clips(numbers: Numbers, memory: str, shape: tuple[int, ...], mean: float = 0.0) -> tuple[Tensor, Tensor]:
    """x (B, C, T, H, W) that lies in memory as `memory` says, and the clip of which it may be only the later frames."""
    batch, channels, frames, height, width = shape
    clip = numbers(batch, channels, frames + 2 * memory.startswith("later"), height, width, mean=mean)
    if memory.endswith("channels_last"):
        clip = clip.contiguous(memory_format=torch.channels_last_3d)
    if memory == "swapped":
        clip = clip.transpose(3, 4).contiguous().transpose(3, 4)
    return clip[:, :, -frames:], clip


def assert_triton_is_accurate(op: str, arguments: dict[str, Any], wanted: list[str]) -> None:
    """Results, and gradients of a fixed projection of them with respect to the arguments named in `wanted`."""
    truth = _results_and_gradients(op, "reference", arguments, wanted, torch.float64)
    at_same_dtype = _results_and_gradients(op, "reference", arguments, wanted)
    actual = _results_and_gradients(op, "triton", arguments, wanted)
    dtypes = [x.dtype for x in arguments.values() if isinstance(x, Tensor) and x.is_floating_point()]
    coarsest = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
    assert_accurate(actual, at_same_dtype, truth, op, coarsest=coarsest)


def _results_and_gradients(
    op: str, backend: str, arguments: dict[str, Any], wanted: list[str], dtype: torch.dtype | None = None
) -> list[Tensor]:
    given = dict(arguments)
    for name, value in given.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            given[name] = value.detach().to(dtype or value.dtype).requires_grad_(name in wanted)
    with use(**{op: backend}):
        outputs = pytree.tree_leaves(public(op)(**given))
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(out.shape, generator=generator).bfloat16().to(out.dtype) for out in outputs]
    leaves = [given[name] for name in wanted]
    if not leaves:
        return outputs
    # an argument may be all that an output does not depend on
    pairs = [(out, grad) for out, grad in zip(outputs, cotangents, strict=True) if out.requires_grad]
    grads = torch.autograd.grad([out for out, _ in pairs], leaves, [grad for _, grad in pairs], allow_unused=True)
    return [*outputs, *(torch.zeros_like(x) if grad is None else grad for x, grad in zip(leaves, grads, strict=True))]
